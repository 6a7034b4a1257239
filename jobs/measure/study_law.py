"""From a study's cells to the laws that `cineray plan --study` reads. Pure functions.

The law of one (model, cache): T(layout) = fixed + work / ranks + exchange(layout). `fixed` is measured: what of a clip
is not its denoising. `work` and the exchange of an unseen layout are fitted to the denoising of all layouts, by least
squares of the relative error, neither below zero: work / ranks at work + (exchange where there is more than one rank).
Ranks at work are at most the machine's cores or GPUs: four ranks on two cores share the work by two.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from cineray.jobs.measure.study_rows import Cell
from cineray.jobs.planning.study_file import Study, StudyExchange, StudyFit, StudyRow


@dataclass(frozen=True, kw_only=True, slots=True)
class StudiedClips:
    """What all clips of one model share.

    Args:
        guided: two calls of the transformer per step.
        device: as its maker calls it.
        gpu: as `cineray plan --gpu` calls it; "cpu" on a CPU, else "other" for a card that it does not know.
        num_units: cores or GPUs that ranks run on.
    """

    model: str
    width: int
    height: int
    frames: int
    steps: int
    guided: bool
    device: str
    gpu: str
    num_units: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Law:
    """Seconds of a clip: fixed_s + work_s / ranks at work, and exchange_s where there is more than one rank."""

    fixed_s: float
    work_s: float
    exchange_s: float
    num_units: int

    def clip_s(self, ranks: int) -> float:
        return self.fixed_s + self.work_s / min(ranks, self.num_units) + (self.exchange_s if ranks > 1 else 0.0)


def fit_law(cells: Sequence[Cell], num_units: int) -> Law:
    """The law of cells of one (model, cache), each of one gang.

    Raises:
        ValueError: they are all of one number of ranks at work.
    """
    import numpy as np
    from scipy.optimize import nnls

    if not is_enough(cells, num_units):
        raise ValueError("a law needs cells of two different numbers of ranks at work")
    sides = [[1 / min(c.ranks, num_units) / c.denoise_s, float(c.ranks > 1) / c.denoise_s] for c in cells]
    (work_s, exchange_s), _ = nnls(np.array(sides), np.ones(len(cells)))
    if work_s <= 0:  # more ranks only made it slower: all that a rank does counts as work, as seen by the fewest ranks
        fewest = min(cells, key=lambda c: c.ranks)
        work_s, exchange_s = fewest.denoise_s * min(fewest.ranks, num_units), 0.0
    fixed_s = statistics.median(c.clip_s - c.denoise_s for c in cells)
    return Law(fixed_s=fixed_s, work_s=float(work_s), exchange_s=float(exchange_s), num_units=num_units)


def is_enough(cells: Sequence[Cell], num_units: int) -> bool:
    """Whether work and exchange can be told apart."""
    return len({min(cell.ranks, num_units) for cell in cells}) > 1


def heldout_errors(cells: Sequence[Cell], num_units: int) -> dict[str, float]:
    """Relative error of the law on each layout that it did not see: fitted to all others.

    Above zero it says more seconds than were measured. A layout is left out of the answer where the others are too
    few.
    """
    errors = {}
    for cell in cells:
        others = [other for other in cells if other is not cell]
        if is_enough(others, num_units):
            errors[cell.layout.text] = fit_law(others, num_units).clip_s(cell.ranks) / cell.clip_s - 1
    return errors


def study_of(cells: Sequence[Cell], clips: Mapping[str, StudiedClips], made: str) -> Study | None:
    """The study file's content; None where no model was timed on two numbers of ranks.

    Args:
        cells: with the whole number of steps.
        made: when, in ISO 8601.
    """
    fits = []
    for model, cache in dict.fromkeys((cell.model, cell.cache) for cell in cells):
        same = [c for c in cells if (c.model, c.cache) == (model, cache) and c.layout.gangs == 1]
        if is_enough(same, clips[model].num_units):
            fits.append(_fit(same, clips[model]))
    return Study(version=1, made=made, fits=tuple(fits)) if fits else None


def _fit(cells: Sequence[Cell], clips: StudiedClips) -> StudyFit:
    law = fit_law(cells, clips.num_units)
    errors = heldout_errors(cells, clips.num_units)
    return StudyFit(
        model=clips.model,
        width=clips.width,
        height=clips.height,
        frames=clips.frames,
        steps=clips.steps,
        guided=clips.guided,
        device=clips.device,
        gpu=clips.gpu,
        cache=cells[0].cache,
        computed_share=min(1.0, max(1e-6, statistics.median(c.computed_share for c in cells))),
        fixed_s=max(0.0, law.fixed_s),
        work_s=law.work_s,
        exchanges=tuple(
            StudyExchange(
                cfg=c.layout.cfg,
                ring=c.layout.ring,
                ulysses=c.layout.ulysses,
                # beyond an even share of the work, whatever it is: also a wait for a core
                exchange_s=max(0.0, c.denoise_s - law.work_s / c.ranks),
            )
            for c in cells
            if c.ranks > 1
        ),
        heldout_error=max(map(abs, errors.values())) if errors else None,
        rows=tuple(
            StudyRow(
                cfg=c.layout.cfg,
                ring=c.layout.ring,
                ulysses=c.layout.ulysses,
                clip_s=c.clip_s,
                denoise_s=c.denoise_s,
                num_clips=c.num_rows,
            )
            for c in cells
        ),
    )
