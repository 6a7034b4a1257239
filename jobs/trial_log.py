"""Points of a search that takes hours, kept as they are found: the same command goes on from there."""

import json
from collections.abc import Iterator, MutableMapping
from dataclasses import asdict
from pathlib import Path

from pydantic import TypeAdapter

from cineray.pipeline.calibrate_weights import CurvePoint
from cineray.pipeline.request import InputError

_POINT = TypeAdapter(CurvePoint)


class TrialLog(MutableMapping[str, CurvePoint]):
    """A mapping whose entries are lines of a file; `delete` it when the search is done.

    Lines of other searches are dropped, and so is a last line that was not written to its end.

    Args:
        search: what the points depend on beside their keys, as a short text.

    Raises:
        InputError: the file cannot be read or written.
    """

    def __init__(self, path: Path, search: str) -> None:
        self._path, self._search = path, search
        self._points: dict[str, CurvePoint] = {}
        try:
            lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"calibrate: {path} cannot be read: {error}; delete it to begin anew") from None
        for line in lines:
            try:
                row = json.loads(line)
                if row["search"] == search:
                    self._points[row["key"]] = _POINT.validate_python(row["point"])
            except (ValueError, KeyError, TypeError):
                continue  # torn, or not ours: measured again

    def __getitem__(self, key: str) -> CurvePoint:
        return self._points[key]

    def __setitem__(self, key: str, point: CurvePoint) -> None:
        self._points[key] = point
        row = {"search": self._search, "key": key, "point": asdict(point)}
        try:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(f"\n{json.dumps(row)}")  # a line that was torn before this one stays alone
        except OSError as error:
            raise InputError(f"calibrate: {self._path} cannot be written: {error.strerror}") from None

    def __delitem__(self, key: str) -> None:
        del self._points[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._points)

    def __len__(self) -> int:
        return len(self._points)

    def delete(self) -> None:
        self._path.unlink(missing_ok=True)
