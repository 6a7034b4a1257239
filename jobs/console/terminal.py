"""The one place where lines are printed: what came from elsewhere is escaped, and a closed pipe ends nothing."""

import errno
import io
import json
import logging
import os
import re
import sys
import warnings
from collections.abc import Iterable
from typing import Any, TextIO

from rich.console import Console, RenderableType

from cineray.text import printable

_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
_BAR_MOVES = re.compile(r"\n*(\x1b\[A)*")  # how tqdm goes to another bar's line and back
LOG_COLUMNS = 160  # a log has no width of its own


class UndeliveredError(Exception):
    """What was asked for on stdout could not be written there; the message says why."""


def tell(*lines: object) -> None:
    """Lines on stderr, each escaped and shortened by `printable`; silent once nobody reads them any more."""
    if sys.stderr is not None:  # as it is where it was closed before this process began
        print_lines(sys.stderr, *lines)


def print_lines(stream: TextIO, *lines: object) -> None:
    """The same on stdout or stderr.

    Raises:
        UndeliveredError: as `write`.
    """
    write(stream, "".join(f"{printable(line)}\n" for line in lines))


def print_json(content: Any) -> None:
    """One JSON object on stdout, in ASCII: the same under every locale.

    Raises:
        UndeliveredError: as `write`.
    """
    print_pieces(sys.stdout, [json.dumps(content), "\n"])


def print_pieces(stream: TextIO, pieces: Iterable[str]) -> None:
    """ASCII of our own, piece by piece.

    Raises:
        UndeliveredError: as `write`.
    """
    for piece in pieces:
        write(stream, piece, flush=False)
    write(stream, "")


def print_table(table: RenderableType) -> None:
    """A table on stdout; its foreign cells are `rich.text.Text` of what `printable` gives.

    Raises:
        UndeliveredError: as `write`.
    """
    console = new_console(sys.stdout, width=None if _is_terminal(sys.stdout) else LOG_COLUMNS)
    with console.capture() as captured:
        console.print(table)
    write(sys.stdout, captured.get())


def write(stream: TextIO | None, text: str, flush: bool = True) -> None:
    """Text of our own. A reader that has gone (`| head -1`) is no reason to stop: the work continues without it.

    Raises:
        UndeliveredError: stdout is closed or full, so that a result would be lost without a word.
    """
    raw = stream.raw if isinstance(stream, _EscapedStream) else stream
    if raw is None or raw.closed:
        if stream is sys.stdout:
            raise UndeliveredError("stdout is closed")
        return
    try:
        try:
            raw.write(text)
        except UnicodeEncodeError:
            encoding = raw.encoding or "ascii"
            raw.write(text.encode(encoding, "backslashreplace").decode(encoding))
        if flush:
            raw.flush()
    except OSError as error:  # EPIPE, a terminal that was closed, a full disk
        silence(raw)
        if stream is sys.stdout and error.errno not in (errno.EPIPE, errno.EIO):
            raise UndeliveredError(f"stdout cannot be written: {error.strerror}") from None


def silence(stream: TextIO) -> None:
    """What later lines, other libraries and the end of the process write to it goes nowhere."""
    try:
        descriptor = stream.fileno()
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), descriptor)
    except (OSError, ValueError):
        pass  # no file behind it


def new_console(stream: TextIO | None, width: int | None = None) -> Console:
    """A console for bars and tables: whatever ends the reading of `stream` ends nothing else."""
    return Console(file=_RawStream(stream), width=width)  # type: ignore[arg-type]  # all that rich calls is there


# torchao, where it is installed, tells at every start of kernels for other GPUs and of what torch will change for it
_CHATTY = ("torchao", "torch.utils._pytree")


def begin_printing() -> None:
    """Prepares this process, once, before anything is printed.

    A descriptor 0, 1 or 2 that is closed is taken, or the next file that is opened would become it and get what
    libraries print. What other libraries print on stderr (logs, warnings, tracebacks) may quote a prompt or a path:
    it passes through `printable`, too.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest free one
    if sys.stderr is not None and not isinstance(sys.stderr, _EscapedStream):
        sys.stderr = _EscapedStream(sys.stderr)
    warnings.showwarning = _tell_warning
    for library in _CHATTY:
        logging.getLogger(library).setLevel(logging.ERROR)


def _tell_warning(message: Warning | str, category: type[Warning], *_: object, **__: object) -> None:
    tell(f"{category.__name__}: {message}")


class _EscapedStream(io.TextIOBase):
    """A stream on which everything but line ends is escaped; colours are left out, tqdm's bars stay on a terminal."""

    def __init__(self, raw: TextIO) -> None:
        self.raw = raw

    def write(self, text: str) -> int:
        if _is_terminal(self.raw):
            moves = _BAR_MOVES.fullmatch(text)
            start = text if moves else "\r" if text.startswith("\r") else ""
        else:
            start = ""
        rest = _COLOUR.sub("", text[len(start) :] if start else text.removeprefix("\r"))
        write(self.raw, start + "\n".join(printable(line) if line else "" for line in rest.split("\n")), flush=False)
        return len(text)

    def flush(self) -> None:
        write(self.raw, "")

    def isatty(self) -> bool:
        return _is_terminal(self.raw)

    def fileno(self) -> int:
        return self.raw.fileno()

    def writable(self) -> bool:
        return True

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return self.raw.encoding


class _RawStream(io.TextIOBase):
    """What rich writes to: its own escape sequences pass."""

    def __init__(self, stream: TextIO | None) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        if self._stream is not None:
            write(self._stream, text, flush=False)
        return len(text)

    def flush(self) -> None:
        if self._stream is not None:
            write(self._stream, "")

    def isatty(self) -> bool:
        return self._stream is not None and _is_terminal(self._stream)

    def fileno(self) -> int:
        if self._stream is None:
            raise OSError("no stream")
        return self._stream.fileno()

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return getattr(self._stream, "encoding", None) or "ascii"


def _is_terminal(stream: TextIO) -> bool:
    try:
        return stream.isatty()
    except (OSError, ValueError, AttributeError):
        return False
