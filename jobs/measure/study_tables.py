"""A study as Markdown tables. Pure functions."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from cineray.jobs.measure.study_law import heldout_errors
from cineray.jobs.measure.study_rows import (
    STAGES,
    Cell,
    StepTime,
    WeakScaling,
    cache_gain,
    efficiency,
    full_cells,
    step_times,
    weak_scaling,
)
from cineray.jobs.planning.study_file import Study


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """A whole study, as it is shown.

    Args:
        cells: of all numbers of steps.
        where: device and cores, in a few words.
        sizes: of each model's clips, in a few words.
        study: the laws, where there are any.
        price: of a rank and hour in USD.
    """

    cells: Sequence[Cell]
    where: str
    num_units: int
    sizes: dict[str, str]
    study: Study | None
    price: float | None = None

    @property
    def full(self) -> list[Cell]:
        return full_cells(self.cells)


def markdown(found: Measured) -> str:
    """All tables, each with a sentence that says what it shows."""
    parts = [
        "# Throughput study",
        f"Measured on {found.where}. Each number is the median of the clips in its cell; one clip before them did not "
        "count.",
        "\n".join(f"- {model}: {size}" for model, size in found.sizes.items()),
        "## Latency and throughput",
        "Efficiency: clips per rank and hour, as a share of those on one rank. Spread: largest less smallest, as a "
        "share of the median.",
        latency_table(found),
        "## Where the seconds of a rank go",
        "Mean over the ranks; idle: the others encode, decode or write. Exchange is what attention spends outside its "
        "kernel: packing, sending, waiting; `-`: it could not be told apart, and is in denoise.",
        stage_table(found.full),
    ]
    if gains := gain_table(found.full):
        parts += ["## What the cache gains on more ranks", "Times as fast as without, on the same layout.", gains]
    if steps := step_times(found.cells):
        parts += [
            "## Seconds of a step",
            "From two numbers of steps, uncached: a further step, and what a clip takes without any.",
            step_table(steps),
        ]
    if weak := weak_scaling(found.full, found.num_units):
        parts += [
            "## One gang of N ranks, or N gangs of one",
            "Clips per hour. Reckoned: one rank's clips per hour times the ranks, at most one a core or GPU, as if "
            "gangs did not slow each other.",
            weak_table(weak),
        ]
    if found.study is not None:
        parts += [
            "## The law",
            "T = fixed + work / ranks + exchange, fitted (study.json). Left out: each layout by the law of the others; "
            "above zero it says more seconds than were measured. Ranks at work are at most the cores or GPUs "
            f"({found.num_units}).",
            law_table(found.study, found.full, found.num_units),
        ]
    return "\n\n".join(parts) + "\n"


def latency_table(found: Measured) -> str:
    cost = [] if found.price is None else ["USD per clip"]
    head = ["model", "cache", "layout", "ranks", "s per clip", "clips per hour", "efficiency", "spread", "clips", *cost]
    return _table(head, (_latency(cell, found) for cell in found.full))


def _latency(cell: Cell, found: Measured) -> list[str]:
    share = efficiency(cell, found.full)
    cost = [] if found.price is None else [f"{cell.cost(found.price):.4g}"]
    return [
        cell.model,
        cell.cache,
        cell.layout.text,
        str(cell.ranks),
        _seconds(cell.clip_s),
        f"{cell.clips_per_hour:,.0f}" if cell.clips_per_hour >= 100 else f"{cell.clips_per_hour:.3g}",
        "-" if share is None else f"{share:.0%}",
        f"{cell.spread:.0%}",
        str(cell.num_rows),
        *cost,
    ]


def stage_table(cells: Sequence[Cell]) -> str:
    def line(cell: Cell) -> list[str]:
        shares = {stage: f"{seconds / cell.clip_s:.1%}" for stage, seconds in cell.stages.items()}
        if not cell.has_exchange:
            shares["exchange"] = "-"
        return [cell.model, cell.cache, cell.layout.text, *(shares[stage] for stage in STAGES)]

    return _table(["model", "cache", "layout", *STAGES], map(line, cells))


def gain_table(cells: Sequence[Cell]) -> str:
    """Empty where no cache was timed beside uncached clips."""
    gains = [(cell, cache_gain(cell, cells)) for cell in cells]
    lines = [
        [cell.model, cell.cache, cell.layout.text, f"{gain:.2f}x", f"{1 / cell.computed_share:.2f}x"]
        for cell, gain in gains
        if gain is not None
    ]
    return _table(["model", "cache", "layout", "gain", "by blocks"], lines) if lines else ""


def step_table(steps: Iterable[StepTime]) -> str:
    lines = [
        [s.model, s.layout.text, " and ".join(map(str, s.steps)), _seconds(s.step_s), _seconds(s.fixed_s)]
        for s in steps
    ]
    return _table(["model", "layout", "steps", "s per step", "s without steps"], lines)


def weak_table(rows: Iterable[WeakScaling]) -> str:
    lines = [
        [
            r.model,
            r.cache,
            r.layout.text,
            f"{r.together:,.0f}",
            f"{r.apart:,.0f}",
            "measured" if r.is_measured else "reckoned",
        ]
        for r in rows
    ]
    return _table(["model", "cache", "gang", "1 gang", "N gangs of 1", "N gangs are"], lines)


def law_table(study: Study, cells: Sequence[Cell], num_units: int) -> str:
    lines = []
    for fit in study.fits:
        same = [c for c in cells if (c.model, c.cache) == (fit.model, fit.cache) and c.layout.gangs == 1]
        errors = heldout_errors(same, num_units)
        exchanges = ", ".join(f"{e.layout.text} {_seconds(e.exchange_s)}" for e in fit.exchanges)
        said = ", ".join(f"{layout} {error:+.1%}" for layout, error in errors.items()) or "too few layouts"
        lines.append([fit.model, fit.cache, _seconds(fit.fixed_s), _seconds(fit.work_s), exchanges, said])
    return _table(["model", "cache", "fixed s", "work s", "exchange s", "left out"], lines)


def _seconds(seconds: float) -> str:
    return f"{seconds:.1f}" if abs(seconds) >= 100 else f"{seconds:.3f}" if abs(seconds) < 1 else f"{seconds:.2f}"


def _table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows)
