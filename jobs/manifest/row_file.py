"""Rows in a temporary file that has no name: what was checked once is used as it was, and memory does not grow."""

import json
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any

from cineray.pipeline.request import InputError

_ENCODE = json.JSONEncoder(separators=(",", ":")).encode
BATCH = 64  # rows that are encoded at once, which costs a third; a row has at most some 100 kB


class RowFile:
    """Lists of plain values, written once and then read as often as need be.

    Nobody else can change it: the file has no name, and ends with the process.

    Args:
        what: the rows are, for messages.

    Raises:
        InputError: there is no temporary folder, or no room in it; so do `add` and reading.
    """

    def __init__(self, what: str) -> None:
        self._what = what
        self._num_rows = 0
        self._batch: list[Sequence[Any]] = []
        try:
            self._file = tempfile.TemporaryFile()  # noqa: SIM115  # for as long as this object
        except OSError as error:
            raise self._unusable(error) from None

    def __len__(self) -> int:
        return self._num_rows

    def add(self, row: Sequence[Any]) -> None:
        self._num_rows += 1
        self._batch.append(row)
        if len(self._batch) >= BATCH:
            self._write()

    def _write(self) -> None:
        batch, self._batch = self._batch, []
        try:
            self._file.write(_ENCODE(batch).encode() + b"\n")
        except OSError as error:
            raise self._unusable(error) from None

    def __iter__(self) -> Iterator[list[Any]]:
        num_read = 0
        if self._batch:
            self._write()
        try:
            self._file.seek(0)  # and flushes
            for line in self._file:
                for row in json.loads(line):
                    num_read += 1
                    yield row
        except OSError as error:
            raise self._unusable(error) from None
        if num_read != self._num_rows:
            raise InputError(f"{self._what}: {num_read} of {self._num_rows} rows are left in the temporary file")

    def _unusable(self, error: OSError) -> InputError:
        return InputError(
            f"no temporary file for {self._what}: {error.strerror or error}; set TMPDIR to a folder with room for it"
        )
