"""A folder for sockets and tokens of this process: short enough for a socket's path, and closed to other users."""

import fcntl
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from cineray.pipeline.request import InputError

# A socket's path has 107 bytes (103 on macOS). Ray adds 64 to its folder (/session_DATE_TIME_PID/sockets/plasma_store);
# ours adds 19 (/cineray-XXXXXXXX/r).
MAX_PLACE_BYTES = 20
_PLAIN = re.compile(r"/[A-Za-z0-9._/+-]*")  # torch reads a URL, Ray command lines
_PREFIX = "cineray-"
_LOCK = "lock"


@contextmanager
def private_folder() -> Iterator[Path]:
    """A new folder that only this user can enter; gone at the end, or when another process looks after this one died.

    Raises:
        InputError: no folder for temporary files can be used.
    """
    place = socket_place()
    _sweep(place)
    folder = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=place))  # mode 0700
    descriptor = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(descriptor)


def socket_place(environment: Mapping[str, str] = os.environ) -> str:
    """TMPDIR, if its path is short and plain enough for sockets; else another folder for temporary files.

    Raises:
        InputError: there is none that can be written.
    """
    wanted = [environment.get(name, "") for name in ("RAY_TMPDIR", "TMPDIR", "XDG_RUNTIME_DIR")]
    for place in [*wanted, "/tmp", "/var/tmp", "/dev/shm"]:
        fits = len(os.fsencode(place)) <= MAX_PLACE_BYTES and _PLAIN.fullmatch(place)
        if fits and os.path.isdir(place) and os.access(place, os.W_OK | os.X_OK):
            return place.rstrip("/") or "/"
    raise InputError(
        f"no folder for sockets: TMPDIR must name a folder that can be written, in at most {MAX_PLACE_BYTES} "
        "letters, digits and any of ._/+-; /tmp, /var/tmp and /dev/shm cannot be written either"
    )


def _sweep(place: str) -> None:
    """Removes folders whose processes were killed: nobody holds their lock any more."""
    try:
        folders = [entry for entry in os.scandir(place) if entry.name.startswith(_PREFIX)]
    except OSError:
        return
    for entry in folders:
        try:
            about = entry.stat(follow_symlinks=False)
            if not entry.is_dir(follow_symlinks=False) or about.st_uid != os.getuid() or about.st_mode & 0o77:
                continue
            descriptor = os.open(Path(entry.path) / _LOCK, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError:
            continue  # not ours, or not locked yet
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(entry.path, ignore_errors=True)
        except OSError:
            pass  # its process lives
        finally:
            os.close(descriptor)
