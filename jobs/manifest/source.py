"""Opens a manifest and decodes it: a file, a pipe or standard input, as text in pieces or lines, whatever its size.

What the text means is for `manifest_forms` to say.
"""

import codecs
import io
import json
import os
import re
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from cineray.pipeline.request import InputError

STDIN = Path("-")
CHUNK_BYTES = 2**16
MAX_LINE_CHARS = 1_000_000  # a prompt may have 20,000 characters of up to 12 each when escaped
MAX_SKIPPED_CHARS = 64_000_000  # of a line that is too long anyway: then it is no manifest, or has no end
_NO_TEXT = {
    b"PK\x03\x04": "is a zip archive or a spreadsheet; save the sheet as CSV",
    b"PAR1": "is a Parquet file; save the table as CSV or as JSON lines",
    b"\x1f\x8b": "is compressed; unpack it, or pipe it: zcat FILE | cineray render --manifest - ...",
    b"%PDF": "is a PDF; save its text as .txt, one prompt per line",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class ManifestSource:
    """A manifest that is open.

    Attributes:
        name: for messages.
        suffix: of the file's name in lower case, without the dot; empty for pipes and standard input.
        folder: where the paths of its images begin.
        chunks: its text in pieces, with `\\n` for every line end. Bytes that are not UTF-8 stand there as lone
            surrogates U+DC80 to U+DCFF, so that whoever counts lines can say where they are.
    """

    name: str
    suffix: str
    folder: Path
    chunks: Iterator[str]


@contextmanager
def opened(path: Path) -> Iterator[ManifestSource]:
    """Opens a manifest; `-` is standard input.

    A pipe that nobody writes to is waited for, and a signal ends the wait.

    Raises:
        InputError: it cannot be read, or is no text.
    """
    if path == STDIN:
        if sys.stdin is None or sys.stdin.closed:
            raise InputError("manifest -: standard input is closed")
        yield _source("standard input", "", Path(), sys.stdin.buffer)
        return
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise InputError(f"manifest {path} cannot be read: {_reason(error)}") from None
    _refuse_odd(path, mode)  # before it is opened, which a device might not like
    try:
        file = path.open("rb")
    except OSError as error:
        raise InputError(f"manifest {path} cannot be read: {_reason(error)}") from None
    with file:
        mode = os.fstat(file.fileno()).st_mode
        _refuse_odd(path, mode)
        is_file = stat.S_ISREG(mode)
        suffix, folder = (path.suffix.lower().removeprefix("."), path.parent) if is_file else ("", Path())
        yield _source(str(path), suffix, folder, file)


def _refuse_odd(path: Path, mode: int) -> None:
    if not (stat.S_ISREG(mode) or stat.S_ISFIFO(mode)):
        kind = "Is a directory" if stat.S_ISDIR(mode) else "Is neither a file nor a pipe"
        raise InputError(f"manifest {path} cannot be read: {kind}")


def _source(name: str, suffix: str, folder: Path, file: BinaryIO) -> ManifestSource:
    return ManifestSource(name=name, suffix=suffix, folder=folder, chunks=_decoded(name, suffix, file))


def _decoded(name: str, suffix: str, file: BinaryIO) -> Iterator[str]:
    start = _read(name, file, 4)
    for magic, what in _NO_TEXT.items():
        if start.startswith(magic):
            raise InputError(f"manifest {name} {what}")
    encoding = _encoding(start, suffix)
    # other encodings have no lone surrogates to stand for what is wrong
    errors = "surrogateescape" if encoding.startswith("utf-8") else "strict"
    decoder = io.IncrementalNewlineDecoder(codecs.getincrementaldecoder(encoding)(errors), translate=True)
    num_lines, chunk = 0, start
    while True:
        try:
            text = decoder.decode(chunk, final=not chunk)
        except UnicodeDecodeError as error:
            raise InputError(
                f"manifest {name}: not {encoding.upper()}, as its first bytes say, after line {num_lines}: "
                f"{error.reason}; save it as UTF-8"
            ) from None
        num_lines += text.count("\n")
        yield text
        if not chunk:
            return
        chunk = _read(name, file, CHUNK_BYTES)


def _encoding(start: bytes, suffix: str) -> str:
    """The text encoding, by its byte order mark, else by zeros beside the first character (ASCII in JSON and CSV)."""
    encoding = json.detect_encoding(start)
    marked = start.startswith((codecs.BOM_UTF8, codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE, codecs.BOM_UTF32_BE))
    return encoding if marked or suffix != "txt" else "utf-8"


def _read(name: str, file: BinaryIO, size: int) -> bytes:
    """At least one byte, unless the file has ended; all of four, which say the encoding."""
    try:
        return file.read(size) if size <= 4 or not isinstance(file, io.BufferedReader) else file.read1(size)
    except OSError as error:
        raise InputError(f"manifest {name} cannot be read: {_reason(error)}") from None


def _reason(error: OSError | ValueError) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error)


_NOT_UTF8 = re.compile("[\udc80-\udcff]")


def read_lines(
    source: ManifestSource, chunks: Iterator[str], keeps_blank: bool = False
) -> Iterator[tuple[int, str | list[str]]]:
    """(line number from 1, line without its end), less blank ones; a list of what is wrong where it is no text."""
    for number, line in enumerate(_split(source, chunks), 1):
        if line is None:
            yield number, [f"the line must have at most {MAX_LINE_CHARS} characters"]
        elif not line.isascii() and (found := _NOT_UTF8.search(line)):
            byte = ord(found[0]) - 0xDC00
            yield number, [f"not UTF-8: byte 0x{byte:02x} at column {found.start() + 1}; save the file as UTF-8"]
        elif keeps_blank or not _is_blank(line):
            yield number, line


def _is_blank(line: str) -> bool:
    return not line.strip("\ufeff \t")


def _split(source: ManifestSource, chunks: Iterator[str]) -> Iterator[str | None]:
    """Lines; None for one that is too long, of which no more than a chunk is kept."""
    rest, num_skipped = "", 0
    for chunk in chunks:
        first, *others = chunk.split("\n")
        if num_skipped:
            num_skipped += len(first)
        elif len(rest) + len(first) > MAX_LINE_CHARS:
            rest, num_skipped = "", len(rest) + len(first)
        else:
            rest += first
        if num_skipped > MAX_SKIPPED_CHARS:
            raise InputError(f"manifest {source.name} has a line of more than {num_skipped} characters: not a manifest")
        if others:
            yield None if num_skipped else rest
            *whole, rest = others
            num_skipped = 0
            for line in whole:
                yield line if len(line) <= MAX_LINE_CHARS else None
    if num_skipped or rest:
        yield None if num_skipped else rest
