"""Points of a search that takes hours, kept as they are found: the same command resumes."""

import errno
import json
import math
import os
import stat
from collections.abc import Iterator, MutableMapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Generic, TypeVar

from pydantic import TypeAdapter

from cineray.files import parse_json, read_regular, shaped
from cineray.pipeline.calibrate.dicache import CurvePoint
from cineray.pipeline.calibrate.fitted import SchedulePoint
from cineray.pipeline.request import InputError

Point = TypeVar("Point", CurvePoint, SchedulePoint)


class TrialLog(MutableMapping[str, Point], Generic[Point]):
    """A mapping whose entries are lines of a file; `delete` it when the search is done.

    Lines of other searches are dropped, and so is a last line that was not written to its end.

    Args:
        search: what the points depend on beside their keys, as a short text.
        kind: of the points.

    Raises:
        InputError: the file cannot be read or written.
    """

    def __init__(self, path: Path, search: str, kind: type[Point]) -> None:
        self._path, self._search = path, search
        self._points: dict[str, Point] = {}
        reads = TypeAdapter(kind)
        try:
            lines = read_regular(path, follow_links=False).split(b"\n")
        except FileNotFoundError:
            lines = []
        except OSError as error:
            raise InputError(f"calibrate: {path} cannot be read: {error.strerror}; delete it to begin anew") from None
        for line in lines:
            try:
                row = parse_json(line)
                point = shaped(row["point"], reads)
                if row["search"] == search and isinstance(row["key"], str) and _is_finite(point):
                    self._points[row["key"]] = point
            except (ValueError, KeyError, TypeError):
                continue  # torn, or not ours: measured again

    def __getitem__(self, key: str) -> Point:
        return self._points[key]

    def __setitem__(self, key: str, point: Point) -> None:
        self._points[key] = point
        row = {"search": self._search, "key": key, "point": asdict(point)}
        try:
            flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
            with os.fdopen(os.open(self._path, flags, 0o666), "wb") as file:
                if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                    raise OSError(errno.EINVAL, "is not a regular file")
                file.write(f"\n{json.dumps(row)}".encode())  # a line that was torn before this one stays alone
        except OSError as error:
            raise InputError(f"calibrate: {self._path} cannot be written: {error.strerror}") from None

    def __delitem__(self, key: str) -> None:
        del self._points[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._points)

    def __len__(self) -> int:
        return len(self._points)

    @property
    def path(self) -> Path:
        return self._path

    def delete(self) -> None:
        with suppress(OSError):
            self._path.unlink()


def _is_finite(point: CurvePoint | SchedulePoint) -> bool:
    return all(map(math.isfinite, asdict(point).values()))
