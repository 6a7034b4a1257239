"""The rows of a throughput study, and the numbers that tables and plots show of them. Pure functions.

A row is one clip on one gang, timed. A cell is the medians of the rows that differ in clip, repeat and gang alone.
"""

from __future__ import annotations

import csv
import io
import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields

from cineray.distributed.layout import Layout, parse_layout

HOUR_S = 3600.0
STAGES = ("text", "denoise", "exchange", "decode", "write", "idle")


@dataclass(frozen=True, kw_only=True, slots=True)
class TimedClip:
    """One clip on one gang. Seconds are those of the gang's first rank, where nothing else is said.

    Args:
        clip_s: text, and then from the ranks' common start to the end of the last of them.
        text_s: encoding of the prompts, in a process of its own.
        denoise_s: the whole loop, exchanges included.
        exchange_s: of the loop, in attention's exchanges outside its kernel: packing, sending, waiting for others; mean
            over the ranks. None where it cannot be told apart (rings, guidance halves, GPUs).
        idle_s: what a rank has nothing to do, mean over the ranks.
        computed_share: of the block evaluations of an uncached clip, those that ran.
    """

    model: str
    cache: str
    layout: str
    steps: int
    clip: str
    repeat: int
    gang: int
    clip_s: float
    text_s: float
    denoise_s: float
    exchange_s: float | None
    decode_s: float
    write_s: float
    idle_s: float
    computed_share: float

    @property
    def place(self) -> Place:
        """What makes it another measurement than all others."""
        return Place(self.model, self.cache, self.layout, self.steps, self.clip, self.repeat, self.gang)


@dataclass(frozen=True, slots=True)
class Place:
    """A measurement that is to be made, or was."""

    model: str
    cache: str
    layout: str
    steps: int
    clip: str
    repeat: int
    gang: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Cell:
    """Medians over the rows of one (model, cache, layout, steps).

    Args:
        spread: largest less smallest of the clips' seconds, as a share of the median.
        stages: seconds of each of STAGES, mean over the ranks; they add up to `clip_s`.
        has_exchange: exchanges were told apart; else they are in "denoise".
    """

    model: str
    cache: str
    layout: Layout
    steps: int
    num_rows: int
    clip_s: float
    denoise_s: float
    spread: float
    stages: dict[str, float]
    has_exchange: bool
    computed_share: float

    @property
    def ranks(self) -> int:
        return self.layout.world_size

    @property
    def clips_per_hour(self) -> float:
        """Of all gangs together."""
        return self.layout.gangs * HOUR_S / self.clip_s

    def cost(self, usd_per_hour: float) -> float:
        """Of one clip, in USD, where one rank costs so much an hour."""
        return usd_per_hour * self.layout.ranks_per_gang * self.clip_s / HOUR_S


def cells_of(rows: Iterable[TimedClip]) -> list[Cell]:
    """The cells of all rows: models and caches in the order in which they come, layouts from few ranks to many."""
    grouped: dict[tuple[str, str, str, int], list[TimedClip]] = defaultdict(list)
    for row in rows:
        grouped[row.model, row.cache, row.layout, row.steps].append(row)
    models = list(dict.fromkeys(model for model, *_ in grouped))
    caches = list(dict.fromkeys(cache for _, cache, *_ in grouped))
    cells = [_cell(same) for same in grouped.values()]
    return sorted(
        cells,
        key=lambda c: (models.index(c.model), caches.index(c.cache), c.ranks, c.layout.gangs, c.layout.cfg, -c.steps),
    )


def _cell(rows: Sequence[TimedClip]) -> Cell:
    first, layout = rows[0], parse_layout(rows[0].layout)
    clip_s = statistics.median(row.clip_s for row in rows)
    has_exchange = all(row.exchange_s is not None for row in rows)
    return Cell(
        model=first.model,
        cache=first.cache,
        layout=layout,
        steps=first.steps,
        num_rows=len(rows),
        clip_s=clip_s,
        denoise_s=statistics.median(row.denoise_s for row in rows),
        spread=(max(row.clip_s for row in rows) - min(row.clip_s for row in rows)) / clip_s,
        stages=_stages(rows, layout.ranks_per_gang, clip_s),
        has_exchange=has_exchange,
        computed_share=statistics.median(row.computed_share for row in rows),
    )


def _stages(rows: Sequence[TimedClip], ranks: int, clip_s: float) -> dict[str, float]:
    """Mean seconds of a rank in each stage, in the proportions of all rows together."""
    total: dict[str, float] = dict.fromkeys(STAGES, 0.0)
    for row in rows:
        exchange_s = row.exchange_s or 0.0
        shared = {
            "text": row.text_s / ranks,
            "denoise": row.denoise_s - exchange_s,
            "exchange": exchange_s,
            "write": row.write_s / ranks,
            "idle": row.idle_s,
        }
        # what is left: decoding, by one rank or by all, and what lies between the stages
        for stage, seconds in (shared | {"decode": max(0.0, row.clip_s - sum(shared.values()))}).items():
            total[stage] += seconds
    scale = clip_s / sum(total.values())
    return {stage: seconds * scale for stage, seconds in total.items()}


def full_cells(cells: Iterable[Cell]) -> list[Cell]:
    """Without those of fewer steps, which serve to tell a step's time alone."""
    all_cells = list(cells)
    steps = {model: max(c.steps for c in all_cells if c.model == model) for model in {c.model for c in all_cells}}
    return [cell for cell in all_cells if cell.steps == steps[cell.model]]


def find_cell(cells: Iterable[Cell], model: str, cache: str, layout: Layout) -> Cell | None:
    return next((c for c in cells if (c.model, c.cache, c.layout) == (model, cache, layout)), None)


def efficiency(cell: Cell, cells: Sequence[Cell]) -> float | None:
    """Clips per rank and hour, as a share of those on one rank; None where one rank was not timed."""
    alone = find_cell(cells, cell.model, cell.cache, Layout())
    return None if alone is None else alone.clip_s * cell.layout.gangs / (cell.clip_s * cell.ranks)


def cache_gain(cell: Cell, cells: Sequence[Cell]) -> float | None:
    """How many times as fast as without a cache on the same layout; None where that was not timed."""
    uncached = find_cell(cells, cell.model, "none", cell.layout)
    return None if uncached is None or cell.cache == "none" else uncached.clip_s / cell.clip_s


@dataclass(frozen=True, slots=True)
class StepTime:
    """From two numbers of steps: seconds of a further step, and what a clip takes without any.

    `layout` is of one gang.
    """

    model: str
    layout: Layout
    steps: tuple[int, int]
    step_s: float
    fixed_s: float


def step_times(cells: Sequence[Cell]) -> list[StepTime]:
    """Of uncached clips that were timed with two numbers of steps; a cache's steps are not alike."""
    full, found = full_cells(cells), []
    for many in full:
        few = [c for c in cells if (c.model, c.cache, c.layout) == (many.model, many.cache, many.layout)]
        less = min(few, key=lambda c: c.steps)
        if many.cache == "none" and less.steps < many.steps:
            step_s = (many.clip_s - less.clip_s) / (many.steps - less.steps)
            both = less.steps, many.steps
            found.append(StepTime(many.model, many.layout, both, step_s, many.clip_s - many.steps * step_s))
    return found


@dataclass(frozen=True, slots=True)
class WeakScaling:
    """One gang of so many ranks against as many gangs of one rank, in clips per hour.

    Args:
        is_measured: the gangs were timed side by side; else it is one rank's clips per hour times the ranks, as if
            gangs did not slow each other.
    """

    model: str
    cache: str
    layout: Layout
    together: float
    apart: float
    is_measured: bool


def weak_scaling(cells: Sequence[Cell], num_units: int) -> list[WeakScaling]:
    """For every timed gang of two ranks or more whose single rank was timed too.

    Args:
        num_units: cores or GPUs; more gangs than these cannot be reckoned to run side by side.
    """
    found = []
    for cell in cells:
        alone = find_cell(cells, cell.model, cell.cache, Layout())
        if cell.layout.gangs > 1 or cell.ranks == 1 or alone is None:
            continue
        side_by_side = find_cell(cells, cell.model, cell.cache, Layout(gangs=cell.ranks))
        apart = min(cell.ranks, num_units) * alone.clips_per_hour
        if side_by_side is not None:
            apart = side_by_side.clips_per_hour
        found.append(
            WeakScaling(
                cell.model, cell.cache, cell.layout, cell.clips_per_hour, apart, is_measured=side_by_side is not None
            )
        )
    return found


def csv_text(rows: Iterable[TimedClip]) -> str:
    """One line per measurement, in seconds; empty where a stage could not be told apart."""
    out = io.StringIO()
    writer = csv.DictWriter(out, [field.name for field in fields(TimedClip)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(row) for row in rows)
    return out.getvalue()
