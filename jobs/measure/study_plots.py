"""A study as pictures: latency, throughput, stages, what a cache gains on more ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from io import BytesIO
from typing import Any

from cineray.jobs.measure.study_rows import STAGES, Cell, cache_gain, weak_scaling
from cineray.jobs.measure.study_tables import Measured

FORMATS = ("png", "svg")
DPI = 130
# Okabe and Ito's palette, which the colour-blind can tell apart (jfly.uni-koeln.de/color, 2008); markers tell it too
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
MARKERS = "osD^vPX"
STAGE_COLOURS = dict(zip(STAGES, ("#56B4E9", "#0072B2", "#D55E00", "#009E73", "#F0E442", "#BBBBBB"), strict=True))


def draw_all(found: Measured) -> dict[str, bytes]:
    """Every picture's content by its file's name; `cache_gain` is left out where nothing was cached."""
    pictures: dict[str, Callable[[Any, Sequence[Cell], Measured], None]] = {
        "latency": _latency,
        "throughput": _throughput,
        "stages": _stages,
    }
    titles = {
        "latency": "Seconds of a clip",
        "throughput": "Clips per hour",
        "stages": "Where a rank's seconds go",
        "cache_gain": "What a cache gains on more ranks",
    }
    if any(cache_gain(cell, found.full) for cell in found.full):
        pictures["cache_gain"] = _cache_gain
    return {
        f"{name}.{kind}": _draw(found, draw, titles[name], kind) for name, draw in pictures.items() for kind in FORMATS
    }


def _draw(found: Measured, draw: Callable[[Any, Sequence[Cell], Measured], None], title: str, kind: str) -> bytes:
    """One picture with a column for each model."""
    from matplotlib import rc_context  # takes half a second
    from matplotlib.figure import Figure  # without pyplot no display is asked for

    models = list(dict.fromkeys(cell.model for cell in found.full))
    most = max(sum(cell.model == model for cell in found.full) for model in models)
    height = max(4.2, 1.8 + 0.3 * most) if draw is _stages else 4.2
    figure = Figure(figsize=(max(6.4, 4.8 * len(models)), height), layout="constrained")
    for model, axes in zip(models, figure.subplots(1, len(models), squeeze=False)[0], strict=True):
        axes.set_title(f"{model}: {found.sizes.get(model, '')}", fontsize=8)
        draw(axes, [cell for cell in found.full if cell.model == model], found)
        axes.spines[["top", "right"]].set_visible(False)
        if draw is not _stages:
            axes.set_ylim(bottom=0)  # now that everything is drawn, the top is known
    figure.suptitle(f"{title}, measured on {found.where}", fontsize=10)
    content = BytesIO()
    about = {"Title": title} | ({"Date": None} if kind == "svg" else {})
    with rc_context({"svg.hashsalt": "cineray"}):  # the same study gives the same file
        figure.savefig(content, format=kind, dpi=DPI, metadata=about)
    return content.getvalue()


def _latency(axes: Any, cells: Sequence[Cell], _: Measured) -> None:
    _lines(axes, cells, lambda cell: cell.clip_s)
    axes.set_ylabel("time of one clip (s)")


def _throughput(axes: Any, cells: Sequence[Cell], found: Measured) -> None:
    _lines(axes, cells, lambda cell: cell.clips_per_hour)
    labels = _layouts(cells)
    caches = list(dict.fromkeys(cell.cache for cell in cells))
    reckoned = [row for row in weak_scaling(cells, found.num_units) if not row.is_measured]
    for number, cache in enumerate(caches):
        rows = [row for row in reckoned if row.cache == cache]
        axes.scatter(
            [labels.index(row.layout.text) for row in rows],
            [row.apart for row in rows],
            marker="_",
            s=160,
            color=COLOURS[number % len(COLOURS)],
            label="as many gangs of one rank, reckoned, in the same colours" if number == 0 and rows else None,
        )
    axes.set_ylabel("clips per hour, all ranks together")
    axes.legend(fontsize=7, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.14))


def _cache_gain(axes: Any, cells: Sequence[Cell], _: Measured) -> None:
    cached = [cell for cell in cells if cache_gain(cell, cells) is not None]
    axes.axhline(1.0, color="#888888", linewidth=0.8, linestyle=":")
    _lines(axes, cached, lambda cell: cache_gain(cell, cells) or 0.0, first=1)
    axes.set_ylabel("times as fast as without a cache")


def _lines(axes: Any, cells: Sequence[Cell], value: Callable[[Cell], float], first: int = 0) -> None:
    """A line for each cache over the layouts, from few ranks to many.

    Args:
        first: number of the first cache's colour, so that a cache has one colour in all pictures.
    """
    labels = _layouts(cells)
    for number, cache in enumerate(dict.fromkeys(cell.cache for cell in cells), start=first):
        same = [cell for cell in cells if cell.cache == cache]
        axes.plot(
            [labels.index(cell.layout.text) for cell in same],
            [value(cell) for cell in same],
            marker=MARKERS[number % len(MARKERS)],
            color=COLOURS[number % len(COLOURS)],
            linewidth=1.2,
            label=cache if len(cache) <= 40 else f"{cache[:37]}...",
        )
    axes.set_xticks(range(len(labels)), labels)
    axes.set_xlim(-0.4, len(labels) - 0.6)
    axes.set_xlabel("layout (ranks of one clip; gangsN: N clips at a time)")
    axes.grid(axis="y", linewidth=0.3)
    if cells:
        axes.legend(fontsize=8)


def _layouts(cells: Sequence[Cell]) -> list[str]:
    by_ranks = sorted(cells, key=lambda cell: (cell.ranks, cell.layout.gangs, cell.layout.cfg))
    return list(dict.fromkeys(cell.layout.text for cell in by_ranks))


def _stages(axes: Any, cells: Sequence[Cell], _: Measured) -> None:
    names = [f"{cell.cache.split('(')[0][:20]}, {cell.layout.text}" for cell in cells]
    left = [0.0] * len(cells)
    for stage in STAGES:
        widths = [100 * cell.stages[stage] / cell.clip_s for cell in cells]
        axes.barh(range(len(cells)), widths, left=left, color=STAGE_COLOURS[stage], label=stage, edgecolor="white")
        left = [a + b for a, b in zip(left, widths, strict=True)]
    axes.set_yticks(range(len(cells)), names, fontsize=7)
    axes.invert_yaxis()
    axes.set_xlim(0, 100)
    axes.set_xlabel("share of a rank's time (%)")
    axes.legend(fontsize=7, ncols=6, loc="upper center", bbox_to_anchor=(0.45, -0.14), handlelength=1, columnspacing=1)
