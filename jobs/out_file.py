"""A file that a command leaves: known to be writable before hours of measuring, and replaced in one step."""

import errno
import fcntl
import os
import signal
import stat
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

from cineray.pipeline.request import InputError

LOCK_S = 60.0  # it is held while a file of some kilobytes is read and written
_SIGTERM_CODE = 128 + signal.SIGTERM


def check_out(out: Path, command: str, option: str = "--out") -> None:
    """Nothing if a file can be written there, in the place of one that may be there.

    Args:
        option: that names it, for messages.

    Raises:
        InputError: a folder, a link, or what is no regular file; in a folder that is not there or not writable.
    """
    said = f"{command}: {option} {out}"
    if not out.name or out.name == "..":
        raise InputError(f"{said} names a folder; give a file, as {out / 'FILE.json'}")
    try:
        mode = out.lstat().st_mode
    except FileNotFoundError:
        mode = stat.S_IFREG
    except OSError as error:
        raise InputError(f"{said} cannot be written: {error.strerror}") from None
    if stat.S_ISDIR(mode):
        raise InputError(f"{said} is a folder; give a file, as {out / 'FILE.json'}")
    if not stat.S_ISREG(mode):
        kind = "a symbolic link" if stat.S_ISLNK(mode) else "no regular file"
        raise InputError(f"{said} is {kind}; give another path")
    probe = _beside(out)
    try:
        probe.touch(exist_ok=False)
    except OSError as error:
        raise InputError(f"{said} cannot be written: {error.strerror}") from None
    finally:
        with suppress(OSError):
            probe.unlink()


@contextmanager
def replacing(out: Path, command: str) -> Iterator[Path]:
    """A path beside the file to write to; on leaving, what stands there becomes the file in one step.

    Raises:
        InputError: it cannot be written.
    """
    temporary = _beside(out)
    try:
        yield temporary
        os.replace(temporary, out)
    except OSError as error:
        raise InputError(f"{command}: {out} cannot be written: {error.strerror}") from None
    finally:
        with suppress(OSError):
            temporary.unlink()


def replace_text(out: Path, text: str, command: str) -> None:
    """Writes the file in one step, in UTF-8.

    Raises:
        InputError: it cannot be written.
    """
    replace_bytes(out, text.encode(), command)


def replace_bytes(out: Path, content: bytes, command: str) -> None:
    """Writes a file that is no text in one step.

    Raises:
        InputError: it cannot be written.
    """
    with replacing(out, command) as temporary, temporary.open("xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def locked(out: Path, command: str) -> Iterator[None]:
    """One process at a time, of those that change this file; waits for the others.

    The lock is a file of its own beside it, which goes with its last holder: `os.replace` changes what the other name
    stands for.

    Raises:
        InputError: the lock cannot be made, or another process held it for `LOCK_S`.
    """
    lock, deadline = out.with_name(f".{out.name}.lock"), time.monotonic() + LOCK_S
    try:
        descriptor = _take(lock, deadline)
    except OSError as error:
        raise InputError(f"{command}: {out} cannot be locked: {error.strerror}") from None
    try:
        yield
    finally:
        with suppress(OSError):
            lock.unlink()
        os.close(descriptor)


def _take(lock: Path, deadline: float) -> int:
    while True:
        descriptor = os.open(lock, os.O_CREAT | os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(descriptor), lock.stat()):
                return descriptor  # else its last holder removed it meanwhile
        except (BlockingIOError, FileNotFoundError):
            pass
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)
        if time.monotonic() > deadline:
            raise OSError(errno.ETIMEDOUT, f"another process has held {lock} for {LOCK_S:g} s")
        time.sleep(0.02)


@contextmanager
def ended_by_sigterm() -> Iterator[None]:
    """Within it SIGTERM unwinds the stack, so that temporary files go; the exit code is 143, as of `render`."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def on_signal(_number: int, _frame: FrameType | None) -> None:
        raise SystemExit(_SIGTERM_CODE)

    before = signal.signal(signal.SIGTERM, on_signal)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _beside(out: Path) -> Path:
    return out.with_name(f".{out.name}.{uuid.uuid4().hex}")
