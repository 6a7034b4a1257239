"""Reads files that others may have put there: regular ones alone, never without end, never a traceback for JSON."""

import errno
import json
import os
import stat
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from pydantic import TypeAdapter, ValidationError

T = TypeVar("T")
MAX_WHERE = 80  # characters of the place within a file: its keys may be of any length

MAX_JSON_BYTES = 64 * 2**20  # a trace of 1,000 steps with two branches has half a megabyte


def read_regular(path: Path, max_bytes: int = MAX_JSON_BYTES, follow_links: bool = True) -> bytes:
    """The content of a regular file.

    A FIFO or a device, which could be read for ever, is refused before it is read.

    Args:
        follow_links: False refuses a symbolic link as the last part of the path.

    Raises:
        OSError: it is not there, not regular, a link, longer than `max_bytes`, or cannot be read; `strerror` says so.
    """
    with open_regular(path, follow_links) as file:
        content = file.read(max_bytes + 1)
    if len(content) > max_bytes:
        raise OSError(errno.EFBIG, f"has more than {max_bytes} bytes", str(path))
    return content


def open_regular(path: Path, follow_links: bool = True) -> BinaryIO:
    """Opens a regular file for reading.

    Raises:
        OSError: it is not there, not regular, a link, or cannot be opened; `strerror` says so.
    """
    flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | (0 if follow_links else os.O_NOFOLLOW)
    try:
        descriptor = os.open(path, flags)
    except OSError as error:
        if error.errno == errno.ELOOP and not follow_links:
            raise OSError(errno.ELOOP, "is a symbolic link", str(path)) from None
        raise
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "is not a regular file", str(path))
    return os.fdopen(descriptor, "rb")


def parse_json(text: bytes | str) -> Any:
    """JSON in UTF-8, with or without a byte order mark.

    Raises:
        ValueError: it is not JSON, or nested too deeply to be read.
    """
    try:
        return json.loads(text.decode("utf-8-sig") if isinstance(text, bytes) else text)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def read_json(path: Path, max_bytes: int = MAX_JSON_BYTES, follow_links: bool = True) -> Any:
    """What a JSON file holds.

    Raises:
        OSError: as `read_regular`.
        ValueError: as `parse_json`.
    """
    return parse_json(read_regular(path, max_bytes, follow_links))


def shaped(content: Any, shape: TypeAdapter[T]) -> T:
    """The value that parsed JSON stands for.

    Raises:
        ValueError: it has another shape; says where, in one line.
    """
    try:
        return shape.validate_python(content)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where, reason = ".".join(map(str, first["loc"])), first["msg"].removeprefix("Value error, ")
        raise ValueError(f"{where[:MAX_WHERE]}: {reason}" if where else reason) from None


def read_shaped(path: Path, shape: TypeAdapter[T], max_bytes: int = MAX_JSON_BYTES, follow_links: bool = True) -> T:
    """What a JSON file of a known shape holds.

    Raises:
        OSError: as `read_regular`.
        ValueError: as `parse_json` and `shaped`.
    """
    return shaped(read_json(path, max_bytes, follow_links), shape)
