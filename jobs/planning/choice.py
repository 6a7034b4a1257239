"""Which layout a run takes for its own clips on the machines at hand: `render --layout auto` and `--elastic-tail`.

The seconds are those of `cineray plan`. Where it knows not the model or the card (a checkpoint of one's own, a CPU),
those of study files alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from cineray.distributed.layout import Layout, fitting_layouts
from cineray.jobs.planning.evidence import ClipKind, Estimate, is_of
from cineray.jobs.planning.machines import Machines
from cineray.jobs.planning.schedule import makespan_s
from cineray.jobs.planning.study_file import Study, StudyFit
from cineray.pipeline.request import InputError

Kinds = Mapping[ClipKind, int]  # with how many clips of each


class Seconds(Protocol):
    """`Evidence`, or `StudySeconds`."""

    def estimate(self, kind: ClipKind, layout: Layout, decode: str, /) -> Estimate:
        """Of one clip on one gang; raises InputError where nothing is known."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Larger:
    """A gang that takes the room of several.

    Args:
        num_gangs: whose room it takes.
        layout: its own, of one gang.
        speedup: its steps are so many times as fast.
    """

    num_gangs: int
    layout: Layout
    speedup: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """What was chosen.

    Args:
        layout: with its gangs.
        makespan_s: of the batch by list scheduling, the longest clip first.
        clip_s: of each kind.
        sources: where the seconds come from.
        rest: (layout, makespan) of the best of each other number of ranks.
    """

    layout: Layout
    makespan_s: float
    clip_s: Mapping[ClipKind, float]
    sources: tuple[str, ...]
    rest: tuple[tuple[Layout, float], ...]

    @property
    def text(self) -> str:
        """What was chosen and why, in one line."""
        gang = replace(self.layout, gangs=1)
        others = ", ".join(f"{layout.gangs} x {_text(layout)} {seconds:,.0f} s" for layout, seconds in self.rest)
        return (
            f"{self.layout.gangs} x {_text(gang)}: {self.makespan_s:,.0f} s for all clips by the plan"
            f"{f' ({others})' if others else ''}; seconds: {'; '.join(self.sources)}"
        )


class StudySeconds:
    """Seconds from study files alone: for a card or a model that nobody has published."""

    def __init__(self, studies: Sequence[Study], gpu: str) -> None:
        self._fits = [fit for study in studies for fit in study.fits if fit.gpu == gpu]

    def estimate(self, kind: ClipKind, layout: Layout, _decode: str, /) -> Estimate:
        """The timed seconds of a layout that was timed, else those of the law.

        Raises:
            InputError: no study of such clips, or none of such a layout.
        """
        fit = self._fit(kind)
        factor = kind.steps / fit.steps
        row = next((row for row in fit.rows if row.layout == layout), None)
        if row is not None:
            denoise_s, fixed_s = row.denoise_s * factor, row.clip_s - row.denoise_s
        elif layout.ranks_per_gang == 1:
            denoise_s, fixed_s = fit.work_s * factor, fit.fixed_s
        else:
            raise InputError(f"{kind.text}: no study has timed layout {layout.text}")
        return Estimate(
            clip_s=denoise_s + fixed_s, step_s=denoise_s / kind.steps, source=f"measured on {fit.device} (study)"
        )

    def layouts(self, kinds: Iterable[ClipKind]) -> set[Layout]:
        """Those that were timed for all kinds.

        Raises:
            InputError: no study of such clips.
        """
        timed = [{row.layout for row in self._fit(kind).rows} | {Layout()} for kind in kinds]
        return set.intersection(*timed) if timed else set()

    def _fit(self, kind: ClipKind) -> StudyFit:
        found = next((f for f in self._fits if f.cache in (kind.cache, kind.policy) and is_of(f, kind)), None)
        if found is None:
            raise InputError(
                f"no source says how long clips of {kind.text} take; time them with cineray study, --study"
            )
        return found


def choose(
    machines: Machines,
    kinds: Kinds,
    layouts: Iterable[Layout],
    seconds: Seconds,
    decode_of: Callable[[Layout], str] = lambda _: "finisher",
) -> Choice:
    """The layout that ends the batch soonest; of equals the one whose first clip is done first.

    Args:
        kinds: of the clips that are left to render.
        layouts: of one gang, whatever fits.
        decode_of: where the clips of gangs of a layout are decoded.

    Raises:
        InputError: nothing is known of such clips on any of the layouts, or none has room.
    """
    num_clips = sum(kinds.values())
    found: list[tuple[float, float, int, Layout, dict[ClipKind, Estimate]]] = []
    unknown = "no layout has room"
    for gang in layouts:
        num_gangs = min(machines.gangs_of(gang.ranks_per_gang), num_clips)
        if not num_gangs:
            continue
        try:
            estimates = {kind: seconds.estimate(kind, gang, decode_of(gang)) for kind in kinds}
        except InputError as error:
            unknown = error.lines[0]
            continue
        ends_s = makespan_s([(estimates[kind].clip_s, count) for kind, count in kinds.items()], num_gangs)
        first_s = min(estimate.clip_s for estimate in estimates.values())
        found.append((round(ends_s, 6), first_s, gang.ring, replace(gang, gangs=num_gangs), estimates))
    if not found:
        raise InputError(unknown)
    found.sort(key=lambda row: row[:3])
    ends_s, _, _, layout, estimates = found[0]
    rest: dict[int, tuple[Layout, float]] = {}
    for other_s, _, _, other, _ in found[1:]:
        if other.ranks_per_gang != layout.ranks_per_gang:
            rest.setdefault(other.ranks_per_gang, (other, other_s))
    return Choice(
        layout=layout,
        makespan_s=ends_s,
        clip_s={kind: estimate.clip_s for kind, estimate in estimates.items()},
        sources=tuple(dict.fromkeys(estimate.source for estimate in estimates.values())),
        rest=tuple(rest[ranks] for ranks in sorted(rest)),
    )


def larger_gangs(
    base: Layout, machines: Machines, kinds: Kinds, layouts: Iterable[Layout], seconds: Seconds
) -> tuple[Larger, ...]:
    """Gangs that could stand in the place of several, smallest first; each faster than those before it.

    Args:
        base: the layout of one gang.
        layouts: of one gang, whatever fits.

    Raises:
        InputError: nothing is known of such clips on the gang's own layout.
    """
    ranks = base.ranks_per_gang
    before_s = _step_s(kinds, base, seconds)
    fastest: dict[int, Larger] = {}
    for layout in layouts:
        num_gangs, rest = divmod(layout.ranks_per_gang, ranks)
        if rest or num_gangs < 2 or layout.ranks_per_gang > max(machines.places, default=0):
            continue
        try:
            speedup = before_s / _step_s(kinds, layout, seconds)
        except InputError:
            continue
        if num_gangs not in fastest or speedup > fastest[num_gangs].speedup:
            fastest[num_gangs] = Larger(num_gangs=num_gangs, layout=layout, speedup=speedup)
    found: list[Larger] = []
    for num_gangs in sorted(fastest):
        if fastest[num_gangs].speedup > (found[-1].speedup if found else 1.0):
            found.append(fastest[num_gangs])
    return tuple(found)


def all_layouts(machines: Machines, num_heads: int, num_branches: int, num_tokens: int) -> list[Layout]:
    """Layouts of one gang of every size that divides the largest node's places; each rank has a token or more."""
    most = max(machines.places, default=0)
    sizes = [ranks for ranks in range(1, most + 1) if most % ranks == 0]
    fitting = (layout for ranks in sizes for layout in fitting_layouts(ranks, num_heads, num_branches))
    return [layout for layout in fitting if layout.sequence_ranks <= num_tokens]


def _step_s(kinds: Kinds, layout: Layout, seconds: Seconds) -> float:
    """Of all kinds, each weighed with its steps and clips."""
    return sum(seconds.estimate(kind, layout, "finisher").step_s * kind.steps * n for kind, n in kinds.items())


def _text(layout: Layout) -> str:
    gang = replace(layout, gangs=1)
    return "1 rank" if gang.ranks_per_gang == 1 else gang.text
