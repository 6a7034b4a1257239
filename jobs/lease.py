"""One driver per output folder: a lease that its holder keeps alive, and that others take over when it no longer beats.

No clock is compared with another. The holder counts up a number inside its file; who wants the lease watches that
number for `ttl_s` seconds of its own monotonic clock. Lease files are made with O_EXCL and numbered: a takeover is the
next number, and a holder that sees a higher one, or finds its file gone or not its own, has lost.
"""

import json
import os
import re
import socket
import threading
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from cineray.jobs.output_folder import OutputError

TTL_S = 30.0  # three times the longest pause that was seen of a driver on an overloaded machine, about 10 s
BEAT_S = 1.0
_NAME = re.compile(r"lease\.(\d+)\.json")
_BEAT_BYTES = 16  # the counter stands at the end of the file, at a fixed width


class LeasedError(RuntimeError):
    """Another driver renders into the folder, or has taken it over."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Holder:
    """Who holds a lease, as its file says, and the beat that was read with it."""

    token: str
    host: str
    boot: str
    pid: int
    started: float
    beat: str

    @property
    def text(self) -> str:
        return f"process {self.pid} on {self.host}"

    def is_surely_dead(self) -> bool:
        """Whether the process ran under this very kernel and is no more; False where that cannot be known."""
        if (self.host, self.boot) != (socket.gethostname(), _boot_id()):
            return False
        try:
            process = psutil.Process(self.pid)
            return process.create_time() != self.started or process.status() == psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return True
        except psutil.Error:
            return False


class Lease:
    """Holds a folder while the block runs.

    Args:
        folder: where the lease files lie; made if it does not exist.
        ttl_s: a lease whose number stands still for so long is stale.
        beat_s: between two beats.

    Raises:
        LeasedError: on entering, if another driver holds the folder.
        OutputError: the lease cannot be written.
    """

    def __init__(self, folder: Path, ttl_s: float = TTL_S, beat_s: float = BEAT_S) -> None:
        self._folder = folder
        self._ttl_s = ttl_s
        self._beat_s = beat_s
        self._token = uuid.uuid4().hex
        self._number = 0
        self._lost: str | None = None
        self._gone: str | None = None
        self._last_beat_s = 0.0
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> "Lease":
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._acquire()
        except OSError as error:
            raise OutputError(
                f"output folder {self._folder.parent}: its lease cannot be written: {error.strerror}; "
                "change the folder's rights, or give another --out"
            ) from None
        self._last_beat_s = time.monotonic()
        self._thread = threading.Thread(target=self._beat, name="cineray-lease", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        if self._thread is not None:
            self._thread.join()
        holder = read_holder(self._path(self._number))
        if holder is not None and holder.token == self._token:
            with suppress(OSError):
                self._path(self._number).unlink()

    def is_ours(self) -> bool:
        """Looks at the folder now."""
        return self._lost is None and self._look()

    def check(self) -> None:
        """Nothing while the folder is ours.

        Raises:
            OutputError: it is there no more.
            LeasedError: it was taken over, or the lease could not be renewed for so long that it may have been.
        """
        if self._lost is None and time.monotonic() - self._last_beat_s > self._ttl_s:
            self._look()  # this process stood still: is the folder still ours?
        if self._gone is not None:
            raise OutputError(f"output folder {self._folder.parent} {self._gone}")
        if self._lost is not None:
            raise LeasedError(f"output folder {self._folder.parent}: {self._lost}")

    def _acquire(self) -> None:
        while True:
            number, holder = current_lease(self._folder)
            if number and not is_stale(self._path(number), holder, self._ttl_s):
                who = holder.text if holder else "a driver that has just begun"
                raise LeasedError(f"output folder {self._folder.parent} is being rendered into by {who}")
            try:
                self._write(number + 1)
            except FileExistsError:
                continue  # another one was faster: look at its lease
            except FileNotFoundError:
                self._folder.mkdir(exist_ok=True)  # a driver that has just ended tidied up; a lost parent raises
                continue
            self._number = number + 1
            if current_lease(self._folder)[0] == self._number:
                for old in range(1, self._number):
                    self._path(old).unlink(missing_ok=True)
                return
            self._path(self._number).unlink(missing_ok=True)

    def _path(self, number: int) -> Path:
        return self._folder / f"lease.{number}.json"

    def _write(self, number: int) -> None:
        process = psutil.Process()
        who = {
            "token": self._token,
            "host": socket.gethostname(),
            "boot": _boot_id(),
            "pid": process.pid,
            "started": process.create_time(),
        }
        content = json.dumps(who).encode() + b"\n" + b"0".rjust(_BEAT_BYTES)
        descriptor = os.open(self._path(number), os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        try:
            os.write(descriptor, content)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def _beat(self) -> None:
        beat = 0
        while not self._ended.wait(self._beat_s) and self._lost is None:
            beat += 1
            if self._look():
                try:
                    _write_beat(self._path(self._number), beat)
                    self._last_beat_s = time.monotonic()
                except OSError as error:
                    if time.monotonic() - self._last_beat_s > self._ttl_s:
                        self._lost = f"its lease cannot be renewed: {error.strerror}"

    def _look(self) -> bool:
        """Whether the lease is still ours; remembers if it is not."""
        holder = read_holder(self._path(self._number))
        number, new = current_lease(self._folder)
        if number == 0:
            self._gone = self._lost = "disappeared, or its lease was removed; is the disk still mounted?"
        elif holder is None or holder.token != self._token or number != self._number:
            self._lost = f"taken over by {new.text if new else 'another driver'}"
        return self._lost is None


def current_lease(folder: Path) -> tuple[int, Holder | None]:
    """(highest number, its holder); (0, None) without a lease, and no holder while its file is being written."""
    try:
        names = [match for path in folder.iterdir() if (match := _NAME.fullmatch(path.name))]
    except FileNotFoundError:
        return 0, None
    number = max((int(match[1]) for match in names), default=0)
    return number, read_holder(folder / f"lease.{number}.json") if number else None


def read_holder(path: Path) -> Holder | None:
    """What a lease file says; None if it is gone or not whole."""
    try:
        who, _, beat = path.read_bytes().partition(b"\n")
        return Holder(**json.loads(who), beat=beat.decode())
    except (OSError, ValueError, TypeError):
        return None


def is_stale(
    path: Path,
    holder: Holder | None,
    ttl_s: float,
    now: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> bool:
    """Watches a lease: False as soon as it beats, True if it does not for `ttl_s`, is gone, or its process is dead."""
    deadline = now() + ttl_s
    while True:
        if holder is not None and holder.is_surely_dead():
            return True
        if now() >= deadline:
            return True
        sleep(min(0.1, ttl_s / 10))
        seen = read_holder(path)
        if seen is None and not path.exists():
            return True
        if seen is not None and holder is not None and seen != holder:
            return False
        holder = holder or seen


def _write_beat(path: Path, beat: int) -> None:
    with path.open("r+b", buffering=0) as file:
        file.seek(-_BEAT_BYTES, os.SEEK_END)
        file.write(str(beat).encode().rjust(_BEAT_BYTES))
        os.fsync(file.fileno())


def _boot_id() -> str:
    """Tells one start of a machine from the next, and containers with the same host name apart."""
    try:
        pid_namespace = os.readlink("/proc/self/ns/pid")
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip() + pid_namespace
    except OSError:
        return str(uuid.getnode())
