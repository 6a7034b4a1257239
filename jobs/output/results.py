"""What became of each clip: kept in a file, so that a million of them do not fill the driver's memory."""

import json
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any, Literal, TextIO

from cineray.jobs.console.terminal import print_pieces
from cineray.pipeline.request import ClipRequest

Status = Literal["done", "existing", "failed", "quarantined"]


@dataclass(frozen=True, kw_only=True, slots=True)
class ClipResult:
    """One clip of `render --json`; `cost` is the share of the uncached block evaluations that ran."""

    id: str
    status: Status
    video: str | None
    steps: int
    computed_steps: int
    skipped_steps: int
    wall_s: float
    cost: float
    error: str | None = None
    resumed_at: tuple[int, ...] = ()
    warnings: tuple[str, ...] = ()

    @classmethod
    def of(
        cls,
        request: ClipRequest,
        status: Status,
        wall_s: float,
        video: str | None = None,
        record: dict[str, Any] | None = None,
        error: str | None = None,
    ) -> "ClipResult":
        """The result of a clip and its record; `video` is None where there is none."""
        steps = 0 if video is None else request.num_inference_steps
        trace = (record or {}).get("trace", {})
        return cls(
            id=request.id,
            status=status,
            video=video,
            steps=steps,
            computed_steps=trace.get("computed_steps", steps),
            skipped_steps=trace.get("skipped_steps", 0),
            wall_s=round(wall_s, 3),
            cost=trace.get("cost", 1.0),
            error=error,
            resumed_at=tuple((record or {}).get("resumed_at", ())),
            warnings=warnings_in(record or {}),
        )

    def line(self, warning: str | None = None) -> str:
        """What a person is told of the clip: `ID: STATUS in S s -> VIDEO`, or what was wrong."""
        seconds = "" if self.status == "existing" else f" in {self.wall_s:.1f} s"
        said = f": {self.error}" if self.error else f" -> {self.video}" + (f": {warning}" if warning else "")
        return f"{self.id}: {self.status}{seconds}{said}"


def warnings_in(record: dict[str, Any]) -> tuple[str, ...]:
    """The warnings of a record that may have lain on disk."""
    found = record.get("warnings")
    return tuple(text for text in found if isinstance(text, str)) if isinstance(found, list) else ()


class ResultLog:
    """Results in the order in which they came; a temporary file that ends with the process."""

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile("w+", encoding="utf-8")  # noqa: SIM115  # for as long as this object
        self.counts: Counter[Status] = Counter()

    def add(self, result: ClipResult) -> None:
        self.counts[result.status] += 1
        values = ((field.name, getattr(result, field.name)) for field in _FIELDS)
        content = {name: value for name, value in values if value or name not in _OPTIONAL}
        self._file.write(json.dumps(content) + "\n")  # in ASCII: a path may have what no encoding has

    def __iter__(self) -> Iterator[dict[str, Any]]:
        self._file.seek(0)
        for line in self._file:
            yield json.loads(line)
        self._file.seek(0, 2)

    def print_json(self, rest: dict[str, Any], to: TextIO) -> None:
        """One line, in ASCII: an object with all clips and what `rest` has.

        Raises:
            UndeliveredError: stdout cannot be written.
        """
        print_pieces(to, self._pieces(rest))

    def _pieces(self, rest: dict[str, Any]) -> Iterator[str]:
        self._file.seek(0)
        yield '{"clips": ['
        for number, line in enumerate(self._file):
            yield (", " if number else "") + line.rstrip("\n")
        yield "], " + json.dumps(rest)[1:] + "\n"
        self._file.seek(0, 2)


_FIELDS = fields(ClipResult)
_OPTIONAL = ("error", "resumed_at", "warnings")
