"""A study's rows on disk: each is a line of DIR/rows.jsonl as soon as it is measured, and the same command goes on."""

from __future__ import annotations

import errno
import json
import os
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from cineray.files import parse_json, read_regular, shaped
from cineray.jobs.measure.study_rows import Place, TimedClip
from cineray.jobs.out_file import locked
from cineray.pipeline.request import InputError

COMMAND = "study"
ROWS_FILE = "rows.jsonl"
_ROW = TypeAdapter(TimedClip)
Setup = Mapping[str, Any]


@contextmanager
def study_folder(folder: Path) -> Iterator[None]:
    """Makes the folder, and keeps it from a second study meanwhile.

    Raises:
        InputError: it cannot be made or written, or another study runs there.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        raise InputError(f"{COMMAND}: --out {folder} is a file; give a folder") from None
    except OSError as error:
        raise InputError(f"{COMMAND}: --out {folder} cannot be made: {error.strerror}") from None
    with locked(folder / ROWS_FILE, COMMAND):
        yield


def begin_log(path: Path, setups: Mapping[str, Setup]) -> None:
    """Writes what each model's rows depend on, unless it is there.

    Raises:
        InputError: rows of another setup are there; or the file cannot be read or written.
    """
    known = {line.get("model"): line["setup"] for line in _lines(path) if isinstance(line.get("setup"), dict)}
    for model, setup in setups.items():
        if model not in known:
            append_line(path, {"model": model, "setup": dict(setup)})
        elif known[model] != setup:
            names = sorted(name for name in known[model] | setup if known[model].get(name) != setup.get(name))
            raise InputError(
                f"{COMMAND}: {path} holds rows of {model} measured with other {', '.join(names)}; choose another "
                "--out, or delete it"
            )


def read_rows(path: Path) -> dict[Place, TimedClip]:
    """All whole rows.

    Raises:
        InputError: the file cannot be read.
    """
    rows = {}
    for line in _lines(path):
        try:
            row = shaped(line["row"], _ROW)
        except (ValueError, KeyError):
            continue  # a setup, or torn: measured again
        if 0 < row.clip_s < 1e9:
            rows[row.place] = row
    return rows


def append_row(path: Path, row: TimedClip) -> None:
    """Adds a line; on a gang its first rank does, from its own process."""
    append_line(path, {"row": asdict(row)})


def append_line(path: Path, content: Mapping[str, Any]) -> None:
    """Adds a line in one write.

    Raises:
        InputError: the file cannot be written.
    """
    try:
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        with os.fdopen(os.open(path, flags, 0o666), "wb") as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise OSError(errno.EINVAL, "is not a regular file")
            file.write(f"\n{json.dumps(content)}".encode())  # a line that was torn before this one stays alone
    except OSError as error:
        raise InputError(f"{COMMAND}: {path} cannot be written: {error.strerror}") from None


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    try:
        lines = read_regular(path, follow_links=False).split(b"\n")
    except FileNotFoundError:
        return
    except OSError as error:
        raise InputError(f"{COMMAND}: {path} cannot be read: {error.strerror}") from None
    for line in lines:
        try:
            content = parse_json(line)
        except ValueError:
            continue
        if isinstance(content, dict) and ("row" in content or isinstance(content.get("model"), str)):
            yield content
