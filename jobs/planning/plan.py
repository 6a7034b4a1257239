"""All layouts of a fleet for a batch: what fits, how long it takes, what it costs; and which to take."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from cineray.distributed.layout import Layout
from cineray.jobs.planning.evidence import ClipKind, Estimate, Evidence
from cineray.jobs.planning.layouts import Fleet, decodes_of
from cineray.jobs.planning.schedule import makespan_s
from cineray.pipeline.footprint.forecast import MemoryByPart
from cineray.pipeline.footprint.published import published_checkpoint
from cineray.pipeline.request import InputError

MAX_MORE_GANGS = 64  # than a deadline needs, that are looked at


@dataclass(frozen=True, slots=True)
class Batch:
    """Clips by kind.

    Args:
        kinds: with how many clips of each.
        is_counted: somebody said how many clips there are; else one stands for a stream of them.
    """

    kinds: tuple[tuple[ClipKind, int], ...]
    is_counted: bool

    @property
    def num_clips(self) -> int:
        return sum(count for _, count in self.kinds)


@dataclass(frozen=True, kw_only=True, slots=True)
class Forecasted:
    """Seconds of a batch on one layout.

    Args:
        step_s, clip_s: means over the clips.
        first_clip_s: of the shortest clip: none is done earlier.
        clips: (seconds, how many) of each kind.
        sources: where the seconds come from.
    """

    step_s: float
    clip_s: float
    first_clip_s: float
    clips: tuple[tuple[float, int], ...]
    sources: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One layout of the fleet.

    Args:
        layout: with its gangs.
        decode: where a clip is decoded.
        memory: of the fullest card; the kind that needs most.
        fits: into the card's memory.
        is_runnable: `cineray render` takes it.
        forecasted: None where `unknown` says why.
        makespan_s: of the batch; None for a stream.
        is_pareto: no other that fits and can be run is better in clips per hour, first clip or makespan and no worse
            in the others.
    """

    layout: Layout
    decode: str
    memory: MemoryByPart
    fits: bool
    is_runnable: bool = True
    forecasted: Forecasted | None = None
    unknown: str = ""
    makespan_s: float | None = None
    is_pareto: bool = False

    @property
    def clips_per_hour(self) -> float | None:
        return None if self.forecasted is None else 3600 * self.layout.gangs / self.forecasted.clip_s

    @property
    def gpu_hours(self) -> float | None:
        """Of the batch, or per clip of a stream."""
        if self.forecasted is None:
            return None
        busy_s = self.forecasted.clip_s / self.layout.gangs if self.makespan_s is None else self.makespan_s
        return busy_s * self.layout.world_size / 3600

    def content(self, usd_per_gpu_hour: float | None = None) -> dict[str, Any]:
        """As the contract of `plan --json` has it, and more."""
        memory, known = self.memory, self.forecasted
        content: dict[str, Any] = {
            "gangs": self.layout.gangs,
            "cfg": self.layout.cfg,
            "ring": self.layout.ring,
            "ulysses": self.layout.ulysses,
            "decode": self.decode,
            "fits": self.fits,
            "memory_bytes": {
                "weights": memory.weights,
                "activations": memory.activations,
                "cache": memory.cache,
                "vae": memory.vae,
                "text_encoder": memory.text_encoder,
                "total": memory.total,
            },
            "step_s": None if known is None else round(known.step_s, 4),
            "clip_s": None if known is None else round(known.clip_s, 2),
            "clips_per_hour": _rounded(self.clips_per_hour, 3),
            "first_clip_s": None if known is None else round(known.first_clip_s, 2),
            "makespan_s": _rounded(self.makespan_s, 1),
            "gpu_hours": _rounded(self.gpu_hours, 4),
            "cost_usd": cost_usd(self.gpu_hours, usd_per_gpu_hour),
            "pareto": self.is_pareto,
            "runnable": self.is_runnable,
            "sources": [] if known is None else list(known.sources),
        }
        return content | ({"unknown": self.unknown} if self.unknown else {})


@dataclass(frozen=True, kw_only=True, slots=True)
class OnTime:
    """The cheapest way to be done by a deadline; its gangs may be fewer than the fleet has room for."""

    row: Row
    layout: Layout
    makespan_s: float

    @property
    def gpu_hours(self) -> float:
        return self.makespan_s * self.layout.world_size / 3600


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """Rows best first, and the best for each purpose among those that fit and can be run.

    Args:
        recommended: for the makespan of a counted batch, for throughput otherwise.
    """

    rows: tuple[Row, ...]
    recommended: Row | None
    for_throughput: Row | None
    for_first_clip: Row | None
    for_makespan: Row | None
    on_time: OnTime | None


def make_plan(
    fleet: Fleet,
    batch: Batch,
    layouts: Iterable[Layout],
    evidence: Evidence,
    is_runnable: Callable[[Layout, str], bool] = lambda *_: True,
    deadline_s: float | None = None,
) -> Plan:
    """Compares layouts.

    Args:
        layouts: of the whole fleet.
        is_runnable: whether `cineray render` takes a layout and a place to decode.
        deadline_s: from the start of the batch.

    Raises:
        InputError: nothing is known of such clips on such cards.
    """
    model = published_checkpoint(batch.kinds[0][0].shape.model).model
    rows = [
        _row(fleet, batch, layout, decode, evidence, is_runnable(layout, decode))
        for layout in layouts
        for decode in decodes_of(layout, model)
    ]
    if rows and all(row.forecasted is None for row in rows):
        raise InputError(rows[0].unknown)
    rows = mark_pareto(rows)
    rows.sort(key=_order)
    good = [row for row in rows if row.fits and row.is_runnable and row.forecasted is not None]
    for_makespan = best(good, lambda row: row.makespan_s or 0.0) if batch.is_counted else None
    for_throughput = best(good, lambda row: -(row.clips_per_hour or 0.0))
    return Plan(
        rows=tuple(rows),
        recommended=for_makespan or for_throughput,
        for_throughput=for_throughput,
        for_first_clip=best(good, lambda row: row.forecasted.first_clip_s if row.forecasted else 0.0),
        for_makespan=for_makespan,
        on_time=None if deadline_s is None else on_time(good, deadline_s),
    )


def best(rows: Sequence[Row], worth: Callable[[Row], float]) -> Row | None:
    """The first of the rows with the least worth."""
    return min(rows, key=worth, default=None)


def on_time(rows: Sequence[Row], deadline_s: float) -> OnTime | None:
    """The fewest GPU-hours that end by a deadline, with as many of a row's gangs as that takes; None if none does.

    Of two that cost as much, the one on fewer cards.
    """
    found: list[OnTime] = []
    for row in rows:
        if row.forecasted is None:
            continue
        low, high = 1, row.layout.gangs
        while low < high:  # more gangs are never later
            middle = (low + high) // 2
            is_enough = makespan_s(row.forecasted.clips, middle) <= deadline_s
            low, high = (low, middle) if is_enough else (middle + 1, high)
        # a few more may divide the clips better, and be cheaper for it
        for gangs in {*range(low, min(row.layout.gangs, low + MAX_MORE_GANGS) + 1), row.layout.gangs}:
            ends_s = makespan_s(row.forecasted.clips, gangs)
            if ends_s <= deadline_s:
                found.append(OnTime(row=row, layout=replace(row.layout, gangs=gangs), makespan_s=ends_s))
    return min(found, key=lambda f: (round(f.gpu_hours, 6), f.layout.world_size), default=None)


def mark_pareto(rows: Sequence[Row]) -> list[Row]:
    """Marks the rows that fit, can be run, and are beaten by no other such row."""
    points = [_point(row) if row.fits and row.is_runnable else None for row in rows]

    def is_beaten(point: tuple[float, ...]) -> bool:
        return any(o is not None and o != point and all(a <= b for a, b in zip(o, point, strict=True)) for o in points)

    return [
        replace(row, is_pareto=point is not None and not is_beaten(point))
        for row, point in zip(rows, points, strict=True)
    ]


def cost_usd(gpu_hours: float | None, usd_per_gpu_hour: float | None) -> float | None:
    """At a price; None where one of them is not known."""
    return None if gpu_hours is None or usd_per_gpu_hour is None else round(gpu_hours * usd_per_gpu_hour, 2)


def _row(fleet: Fleet, batch: Batch, layout: Layout, decode: str, evidence: Evidence, is_runnable: bool) -> Row:
    gang = replace(layout, gangs=1)
    memories = [evidence.work_of(kind.shape, gang, kind.cache, decode)[0] for kind, _ in batch.kinds]
    memory = max(memories, key=lambda m: m.total)
    row = Row(
        layout=layout,
        decode=decode,
        memory=memory,
        fits=memory.total <= fleet.gpu.memory_bytes,
        is_runnable=is_runnable,
    )
    try:
        estimates = [(evidence.estimate(kind, gang, decode), count) for kind, count in batch.kinds]
    except InputError as error:
        return replace(row, unknown=error.lines[0])
    forecasted = _forecasted(estimates)
    ends_s = makespan_s(forecasted.clips, layout.gangs) if batch.is_counted else None
    return replace(row, forecasted=forecasted, makespan_s=ends_s)


def _forecasted(estimates: Sequence[tuple[Estimate, int]]) -> Forecasted:
    num_clips = sum(count for _, count in estimates)
    return Forecasted(
        step_s=sum(e.step_s * count for e, count in estimates) / num_clips,
        clip_s=sum(e.clip_s * count for e, count in estimates) / num_clips,
        first_clip_s=min(e.clip_s for e, _ in estimates),
        clips=tuple((e.clip_s, count) for e, count in estimates),
        sources=tuple(dict.fromkeys(e.source for e, _ in estimates)),
    )


def _point(row: Row) -> tuple[float, ...] | None:
    """What is to be small."""
    if row.forecasted is None:
        return None
    return (-(row.clips_per_hour or 0.0), row.forecasted.first_clip_s, row.makespan_s or 0.0)


def _order(row: Row) -> tuple[Any, ...]:
    known = row.forecasted
    if known is None:
        return (not row.fits, True, 0.0, 0.0, row.layout.ranks_per_gang)
    ends_s = row.makespan_s if row.makespan_s is not None else -(row.clips_per_hour or 0.0)
    # of equals the one that renders as `render` does by itself, and whose pixels are the untiled ones
    return (not row.fits, False, round(ends_s, 6), known.clip_s, row.decode == "tiled", row.layout.ring)


def _rounded(value: float | None, digits: int) -> float | None:
    return None if value is None else round(value, digits)
