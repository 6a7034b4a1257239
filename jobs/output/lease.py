"""One driver per output folder: a lease that another driver takes over after its heartbeat stops.

No clock is compared with another. The holder counts up a number inside its file; who wants the lease watches that
file for `ttl_s` seconds of its own monotonic clock. Lease files are made with O_EXCL and numbered: a takeover is the
next number, and a holder that sees a higher one, or finds its file gone or not its own, has lost. What cannot be read
says nothing: it is tried again for `ttl_s` too.
"""

import errno
import json
import os
import re
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from cineray.files import parse_json, read_regular
from cineray.jobs.output.folder import OutputError
from cineray.jobs.output.own_files import NotOursError, new_file, open_file, opened_folder, require, write_all

TTL_S = 30.0  # three times the longest pause that was seen of a driver on an overloaded machine, about 10 s
HEARTBEAT_S = 1.0
MIN_TTL_S = 5 * HEARTBEAT_S  # a heartbeat must be seen also when a disk takes seconds to flush it
_MAX_NUMBER = 10**15 - 1  # no folder was ever taken over so often
_NAME = re.compile(r"lease\.([1-9][0-9]{0,14})\.json")
_HEARTBEAT_BYTES = 16  # the counter stands at the end of the file, at a fixed width
_MAX_BYTES = 65_536
_MAX_PID = 2**31 - 1
_ADVICE = "wait until it has ended, or give another --out"


class LeasedError(RuntimeError):
    """Another driver renders into the folder, or has taken it over."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Holder:
    """Who holds a lease, as its file says, and the heartbeat that was read with it.

    `ticks` is the start of the process in clock ticks since the machine's; None where that is not known, or the
    version that wrote the lease did not say.
    """

    token: str
    host: str
    boot: str
    pid: int
    ticks: int | None
    heartbeat: str

    @property
    def text(self) -> str:
        return f"process {self.pid} on {self.host}"

    def is_surely_dead(self) -> bool:
        """Whether the process ran under this very kernel and is no more; False where that cannot be known.

        Processes are told apart by their start in ticks, which no step of a clock changes.
        """
        if (self.host, self.boot) != (socket.gethostname(), _boot_id()):
            return False
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return True
        except OSError:
            pass  # another user's
        state, ticks = _process_state(self.pid)
        return state == "Z" or (None not in (ticks, self.ticks) and ticks != self.ticks)


class Lease:
    """Holds a folder while the block runs.

    Args:
        folder: where the lease files lie; made if it does not exist.
        ttl_s: a lease whose number stands still for so long is stale.
        heartbeat_s: between two heartbeats.

    Raises:
        LeasedError: on entering, if another driver holds the folder.
        OutputError: the lease cannot be written or read, or something else stands under its name.
    """

    def __init__(self, folder: Path, ttl_s: float = TTL_S, heartbeat_s: float = HEARTBEAT_S) -> None:
        self._folder = folder
        self._ttl_s = ttl_s
        self._heartbeat_s = heartbeat_s
        self._token = uuid.uuid4().hex
        self._number = 0
        self._lost: str | None = None
        self._gone: str | None = None
        self._last_heartbeat_s = 0.0
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> "Lease":
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._acquire()
        except NotOursError as error:
            raise OutputError(
                f"output folder {self._folder.parent}: {os.path.relpath(error.filename, self._folder.parent)} "
                f"{error.strerror}; remove it, or give another --out"
            ) from None
        except OSError as error:
            raise OutputError(
                f"output folder {self._folder.parent}: its lease cannot be written: {error.strerror}; "
                "change the folder's rights, or give another --out"
            ) from None
        self._last_heartbeat_s = time.monotonic()
        self._thread = threading.Thread(target=self._keep_heartbeat, name="cineray-lease", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        if self._thread is not None:
            self._thread.join()
        with suppress(OSError):
            holder = _read(self._path(self._number))[1]
            if holder is not None and holder.token == self._token:
                self._path(self._number).unlink()

    def is_ours(self) -> bool:
        """Looks at the folder now; False also where that cannot be seen."""
        return self._lost is None and self._is_still_owned()

    def check_now(self) -> None:
        """As `check`, after a look at the folder."""
        self.is_ours()
        self.check()

    def check(self) -> None:
        """Nothing while the folder is ours.

        Raises:
            OutputError: it is there no more.
            LeasedError: it was taken over, or the lease could not be renewed for so long that it may have been.
        """
        if self._lost is None and time.monotonic() - self._last_heartbeat_s > self._ttl_s:
            self._is_still_owned()  # this process stood still: is the folder still ours?
        if self._gone is not None:
            raise OutputError(f"output folder {self._folder.parent} {self._gone}")
        if self._lost is not None:
            raise LeasedError(f"output folder {self._folder.parent}: {self._lost}")

    def _acquire(self) -> None:
        while True:
            number = _numbers(self._folder)[-1:]
            if number and not self._is_free(number[0]):
                continue
            mine = number[0] + 1 if number else 1
            try:
                self._write(mine)
            except FileExistsError:
                continue  # another one was faster: look at its lease
            except FileNotFoundError:
                self._folder.mkdir(exist_ok=True)  # a driver that has just ended tidied up; a lost parent raises
                continue
            self._number = mine
            numbers = _numbers(self._folder)
            if numbers and numbers[-1] == mine:
                for old in numbers[:-1]:
                    with suppress(OSError):
                        self._path(old).unlink()
                return
            self._path(mine).unlink(missing_ok=True)

    def _is_free(self, number: int) -> bool:
        """Whether a lease is stale; False if it is gone.

        Raises:
            LeasedError: it is another driver's, which lives.
        """
        path = self._path(number)
        require("a file", path)
        if number == _MAX_NUMBER:
            raise NotOursError(errno.EEXIST, "has a number that no lease of cineray's has", str(path))
        if is_stale(path, read_holder(path), self._ttl_s):
            return True
        try:
            holder = _read(path)[1]
        except FileNotFoundError:
            return False
        except OSError as error:
            raise OutputError(
                f"output folder {self._folder.parent}: its lease {path.name} cannot be read: {error.strerror}; "
                "change its rights, or remove it if no driver renders there"
            ) from None
        who = holder.text if holder else "a driver that has just begun"
        raise LeasedError(f"output folder {self._folder.parent} is being rendered into by {who}; {_ADVICE}")

    def _path(self, number: int) -> Path:
        return self._folder / f"lease.{number}.json"

    def _write(self, number: int) -> None:
        pid = os.getpid()
        # these five alone, in a line: earlier versions take a file with others for no lease
        who = {
            "token": self._token,
            "host": socket.gethostname(),
            "boot": _boot_id(),
            "pid": pid,
            "started": psutil.Process().create_time(),  # which they read, and take with the clock's steps
        }
        more = {"ticks": _process_state(pid)[1]}
        content = f"{json.dumps(who)}\n{json.dumps(more)}\n".encode() + b"0".rjust(_HEARTBEAT_BYTES)
        with opened_folder(self._folder) as folder:
            name = self._path(number).name
            descriptor = new_file(name, folder)
            try:
                write_all(descriptor, content)
            except OSError:
                os.unlink(name, dir_fd=folder)
                raise

    def _keep_heartbeat(self) -> None:
        heartbeat = 0
        while not self._ended.wait(self._heartbeat_s) and self._lost is None:
            heartbeat += 1
            if self._is_still_owned():
                try:
                    _write_heartbeat(self._path(self._number), heartbeat)
                    self._last_heartbeat_s = time.monotonic()
                except OSError as error:
                    self._lose_if_silent(f"its lease cannot be renewed: {error.strerror}")

    def _is_still_owned(self) -> bool:
        """Whether the lease is seen to be ours; remembers if it is not."""
        try:
            numbers = _numbers(self._folder)
            holder = None
            if numbers and numbers[-1] == self._number:
                holder = _read(self._path(self._number))[1]
        except FileNotFoundError:
            numbers, holder = [n for n in _try_numbers(self._folder) if n != self._number], None
        except OSError as error:
            self._lose_if_silent(f"its lease cannot be read: {error.strerror}")
            return False
        if not numbers and not os.path.isdir(self._folder.parent):
            self._gone = self._lost = "disappeared; is the disk still mounted?"
        elif not numbers:
            self._lost = (
                "its lease is gone: another driver took it over and has ended, or somebody removed it; "
                "run the same command again"
            )
        elif numbers[-1] != self._number or (holder is not None and holder.token != self._token):
            new = holder or read_holder(self._path(numbers[-1]))
            self._lost = f"taken over by {new.text if new else 'another driver'}; {_ADVICE}"
        elif holder is None:
            self._lose_if_silent("its lease is damaged")
            return False
        return self._lost is None

    def _lose_if_silent(self, reason: str) -> None:
        """What fails once may work the next time; what fails for `ttl_s` may have cost the folder."""
        if time.monotonic() - self._last_heartbeat_s > self._ttl_s:
            self._lost = reason


def current_lease(folder: Path) -> tuple[int, Holder | None]:
    """(highest number, its holder); (0, None) without a lease, and no holder while its file cannot be understood."""
    numbers = _try_numbers(folder)
    return (numbers[-1], read_holder(folder / f"lease.{numbers[-1]}.json")) if numbers else (0, None)


def read_holder(path: Path) -> Holder | None:
    """What a lease file says; None if it is gone, cannot be read, or is not whole."""
    try:
        return _read(path)[1]
    except OSError:
        return None


def is_stale(
    path: Path,
    holder: Holder | None,
    ttl_s: float,
    now: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> bool:
    """Whether a lease is stale: no heartbeat for `ttl_s`, its file is gone, or its process is dead.

    Returns False at the first change. Any change of a file that is not understood is a heartbeat: a later version may
    have written it. One that cannot be read is watched twice as long, and is not stale unless it was read unchanged
    for `ttl_s`.
    """
    first: bytes | None = None
    began_s = since_s = now()
    while True:
        if holder is not None and holder.is_surely_dead():
            return True
        try:
            content, seen = _read(path)
        except FileNotFoundError:
            return True
        except OSError:
            if now() - began_s >= 2 * ttl_s:
                return False
        else:
            if first is None:
                first, since_s = content, now()
            is_other = seen is not None and holder is not None and seen != holder
            if content != first or is_other:
                return False
            if now() - since_s >= ttl_s:
                return True
            holder = holder or seen
        sleep(min(0.1, ttl_s / 10))


def _numbers(folder: Path) -> list[int]:
    """Numbers of the leases of a folder, in order; empty where there is no folder.

    Raises:
        NotOursError: the folder is none, or a link.
        OSError: it cannot be read.
    """
    try:
        with opened_folder(folder) as descriptor:
            names = os.listdir(descriptor)
    except FileNotFoundError:
        return []
    return sorted(int(match[1]) for name in names if (match := _NAME.fullmatch(name)))


def _try_numbers(folder: Path) -> list[int]:
    try:
        return _numbers(folder)
    except OSError:
        return []


def _read(path: Path) -> tuple[bytes, Holder | None]:
    """(what a lease file holds, who that is; None if it is not understood).

    Raises:
        OSError: it is gone, no regular file, or cannot be read.
    """
    content = read_regular(path, _MAX_BYTES, follow_links=False)
    try:
        first, _, rest = content.partition(b"\n")
        who = parse_json(first)
        more, _, heartbeat = rest.decode().rpartition("\n")
        ticks = parse_json(more).get("ticks") if more else None  # earlier versions wrote the heartbeat alone
        texts = [who[name] for name in ("token", "host", "boot")]
        pid = who["pid"]
        if not all(isinstance(text, str) for text in texts) or type(pid) is not int or not 0 < pid <= _MAX_PID:
            return content, None
        token, host, boot = texts
        ticks = ticks if type(ticks) is int else None
        return content, Holder(token=token, host=host, boot=boot, pid=pid, ticks=ticks, heartbeat=heartbeat)
    except (ValueError, TypeError, KeyError, AttributeError):
        return content, None


def _write_heartbeat(path: Path, heartbeat: int) -> None:
    with opened_folder(path.parent) as folder:
        descriptor = open_file(path.name, folder, os.O_RDWR)
        with os.fdopen(descriptor, "r+b", buffering=0) as file:
            file.seek(-_HEARTBEAT_BYTES, os.SEEK_END)
            file.write(str(heartbeat).encode().rjust(_HEARTBEAT_BYTES))
            os.fsync(file.fileno())


def _process_state(pid: int) -> tuple[str, int | None]:
    """(state as in /proc: "Z" is a zombie; start in clock ticks since the machine's), where the system tells."""
    try:
        # the name, in brackets, may hold blanks and brackets; the state is field 3, the start field 22
        fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
        return fields[0], int(fields[19])
    except (OSError, ValueError, IndexError):
        pass
    with suppress(psutil.Error):
        return "Z" if psutil.Process(pid).status() == psutil.STATUS_ZOMBIE else "", None
    return "", None


def _boot_id() -> str:
    """Tells one start of a machine from the next, and containers with the same host name apart."""
    try:
        pid_namespace = os.readlink("/proc/self/ns/pid")
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip() + pid_namespace
    except OSError:
        # on Linux another container may look alike: then nobody is known to be dead
        return uuid.uuid4().hex if sys.platform == "linux" else str(uuid.getnode())
