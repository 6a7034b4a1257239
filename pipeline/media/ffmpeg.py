"""Runs ffmpeg so that it neither takes the terminal nor hangs for ever, and its command line holds no text of a user's.

ffmpeg reads keys from a terminal on stdin, and a job in the background is stopped for it (SIGTTOU). So it never gets
ours, and runs in a session of its own, which also keeps Ctrl-C from ending a video in its middle.
"""

import os
import re
import selectors
import subprocess
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import imageio_ffmpeg
import psutil

# a disk of a network that answers again after a few minutes is no reason to lose a clip
STALL_S = 300
SLICE_S = 1.0
KILL_S = 10.0
MAX_LOG_BYTES = 64_000  # of what ffmpeg said; the end counts
PIPE_BYTES = 1 << 20
# names a second input in the arguments: `extra` comes through a pipe, so no process list shows it
EXTRA = "pipe:extra"


class VideoError(RuntimeError):
    """ffmpeg could not write or read a video."""


def file_url(path: Path | str) -> str:
    """A file as ffmpeg cannot take for anything else: no option, protocol or pattern, whatever its name."""
    return f"file:{os.path.abspath(path)}"


def run_ffmpeg(
    arguments: Iterable[str],
    take: Callable[[bytes], object] = lambda _: None,
    *,
    stdin: Iterable[bytes | memoryview] = (),
    extra: bytes = b"",
    stall_s: float = STALL_S,
) -> str:
    """Runs ffmpeg to its end.

    Args:
        take: called with each piece of what it writes to `pipe:1`; may raise.
        stdin: read by it from `pipe:0`.
        extra: read by it from `EXTRA`, wherever that stands in the arguments.
        stall_s: it is killed if it takes nothing, gives nothing and computes nothing for so long.

    Returns:
        What it said.

    Raises:
        VideoError: it could not be started, failed or hung; with the last lines that it said.
    """
    read_end, write_end = os.pipe()
    with os.fdopen(read_end, "rb") as extra_read, os.fdopen(write_end, "wb", buffering=0) as extra_write:
        words = [f"pipe:{read_end}" if word == EXTRA else word for word in arguments]
        with _started([_executable(), "-nostdin", "-hide_banner", "-y", "-v", "error", *words], read_end) as process:
            extra_read.close()
            assert process.stdin is not None
            assert process.stdout is not None
            assert process.stderr is not None
            log = bytearray()
            feeds = {process.stdin: iter(stdin), extra_write: iter([extra] if extra else [])}
            takers = {process.stdout: take, process.stderr: log.extend}
            _serve(process, feeds, takers, stall_s)
            code = process.wait()
    said = log[-MAX_LOG_BYTES:].decode("utf-8", "replace")
    if code != 0:
        ended = f"killed by signal {-code}" if code < 0 else f"exit {code}"
        raise VideoError(f"{last_lines(said) or 'ffmpeg said nothing'} ({ended})")
    return said


def last_lines(text: str, num_lines: int = 3) -> str:
    """The end of what ffmpeg said, as one line, without the addresses of its objects."""
    lines = (re.sub(r"\[[^\]]* @ 0x[0-9a-f]+\] ", "", line).strip() for line in text.split("\n"))
    return " | ".join([line for line in lines if line][-num_lines:])


def _executable() -> str:
    try:
        return imageio_ffmpeg.get_ffmpeg_exe()
    except RuntimeError as error:
        raise VideoError(f"no ffmpeg: {last_lines(str(error))}") from None


@contextmanager
def _started(command: list[str], extra_fd: int) -> Iterator[subprocess.Popen[bytes]]:
    """A process that has ended when the block has, however that ends."""
    try:
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            bufsize=0,
            pass_fds=(extra_fd,),
            start_new_session=True,
        )
    except (OSError, ValueError) as error:  # not there, no program, no memory; a path with a NUL
        raise VideoError(f"ffmpeg ({command[0]}) cannot be started: {error}") from None
    try:
        yield process
    finally:
        for pipe in (process.stdin, process.stdout, process.stderr):
            with suppress(OSError):
                pipe.close()  # type: ignore[union-attr]  # all three are pipes
        if process.poll() is None:
            process.kill()
            with suppress(subprocess.TimeoutExpired):  # it hangs in the kernel, on a disk that is gone
                process.wait(KILL_S)


def _serve(process: subprocess.Popen[bytes], feeds: dict, takers: dict, stall_s: float) -> None:
    """Feeds and empties the pipes until the process has closed its own."""
    watch = _Watch(process.pid, stall_s)
    unread = set(takers)
    rest: dict = dict.fromkeys(feeds, b"")  # what of a piece is still to be written; None after the last one
    with selectors.DefaultSelector() as selector:
        for pipe in (*feeds, *takers):
            os.set_blocking(pipe.fileno(), False)
            selector.register(pipe, selectors.EVENT_READ if pipe in takers else selectors.EVENT_WRITE)

        def done_with(pipe) -> None:
            selector.unregister(pipe)
            pipe.close()
            unread.discard(pipe)

        while unread:
            ready = selector.select(SLICE_S)
            watch.note(bool(ready))
            for key, _ in ready:
                pipe = key.fileobj
                if pipe in takers:
                    piece = os.read(key.fd, PIPE_BYTES)
                    takers[pipe](piece) if piece else done_with(pipe)
                    continue
                if not rest[pipe]:
                    rest[pipe] = next((memoryview(piece).cast("B") for piece in feeds[pipe]), None)
                try:
                    if rest[pipe] is None:
                        done_with(pipe)
                    else:
                        rest[pipe] = rest[pipe][os.write(key.fd, rest[pipe]) :]
                except BrokenPipeError:  # it has died, or wants no more: its exit code says which
                    done_with(pipe)


class _Watch:
    """Ends the wait for a process that does nothing any more.

    Counts short waits rather than seconds: those in which this process was itself stopped count as one.
    """

    def __init__(self, pid: int, stall_s: float) -> None:
        self._process = psutil.Process(pid)
        self._num_allowed = max(1, round(stall_s / SLICE_S))
        self._num_idle = 0
        self._cpu_s = 0.0

    def note(self, was_served: bool) -> None:
        """Notes progress; called after each wait.

        Raises:
            VideoError: it has done nothing for too long.
        """
        if was_served:
            self._num_idle = 0
            return
        cpu_s = self._used_s()
        self._num_idle = 0 if cpu_s > self._cpu_s else self._num_idle + 1
        self._cpu_s = cpu_s
        if self._num_idle >= self._num_allowed:
            raise VideoError(f"ffmpeg did nothing for {self._num_idle * SLICE_S:g} s and was killed")

    def _used_s(self) -> float:
        try:
            times = self._process.cpu_times()
        except psutil.Error:
            return self._cpu_s
        return times.user + times.system
