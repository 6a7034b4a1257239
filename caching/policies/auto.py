"""`auto(psnr>=30)`, `auto(vmaf>=95)`, `auto(speedup=2.5)`: the setting of `fitted` that a quality profile names."""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from cineray.caching.plan import CachePlan, ModelFacts, check_field
from cineray.caching.policies.fitted import MAX_SPEEDUP, FittedConfig, num_computed_at
from cineray.caching.profile import QualityPoint, QualityProfile, find_profile

CONFIDENCE = 0.95  # that a clip which nobody has seen keeps the floor
MIN_RANKED = 19  # clips of which the worst is a bound of that confidence by itself: 1 / (n + 1) is 5 %
# A cliff: the next faster setting loses so much that the one before it may be at its edge. 12 dB for 0.01 of a
# threshold have been seen (vllm-omni#5840); between neighbours of a profile of the tiny models it is 1 to 5 dB.
CLIFF_DB = 8.0
Scores = Callable[[QualityPoint], Sequence[float]]
SCORES: Mapping[str, Scores] = {"psnr": lambda point: point.psnr_db, "vmaf": lambda point: point.vmaf}


@dataclass(frozen=True, kw_only=True, slots=True)
class FloorPlan:
    """Floors, and what is known of the settings that may keep them.

    Args:
        floors: by the name of the score: dB of "psnr", 0 to 100 of "vmaf".
        speedup: the setting by the profile alone, one that was measured.
    """

    floors: Mapping[str, float]
    profile: QualityProfile
    speedup: float

    @property
    def between(self) -> float:
        """A faster setting between that and the next one, which keeps a floor of PSNR alone; else `speedup`."""
        if set(self.floors) != {"psnr"} or self.profile.num_steps is None:
            return self.speedup
        return fastest_between(self.profile.points, self.floors["psnr"], self.profile.num_steps) or self.speedup


@dataclass(frozen=True, kw_only=True, slots=True)
class AutoConfig:
    """What is asked for: floors or a speed, not both; neither is the speed that `fitted` has by itself.

    Args:
        psnr: dB that a clip keeps against the uncached one, with a confidence of 95 %; written `psnr>=30`.
        vmaf: the same of VMAF, 0 to 100; written `vmaf>=95`.
        speedup: steps divided by computed steps.
        profile: name of a shipped quality profile, or a file made by `cineray calibrate quality`; "" finds one that
            fits.
    """

    psnr: float | None = None
    vmaf: float | None = None
    speedup: float | None = None
    profile: str = ""

    def __post_init__(self) -> None:
        floor, speedup = 1.0 if self.psnr is None else self.psnr, 1.0 if self.speedup is None else self.speedup
        check_field(self, "psnr", 0 < floor < math.inf, "a number of dB above 0")
        check_field(self, "vmaf", self.vmaf is None or 0 < self.vmaf <= 100, "a number above 0 and up to 100")
        check_field(self, "speedup", 1 <= speedup <= MAX_SPEEDUP, f"1 to {MAX_SPEEDUP:g}")

    def plan(self, name: str, model: ModelFacts) -> CachePlan:
        """
        Raises:
            ValueError: both are given, no profile fits, or the floor cannot be kept.
        """
        floors = self.plan_floors(name, model)
        if floors is not None:
            return FittedConfig(speedup=floors.between, profile=floors.profile.fitted).plan("fitted", model)
        config = FittedConfig() if self.speedup is None else FittedConfig(speedup=self.speedup)
        return config.plan("fitted", model)

    def plan_floors(self, name: str, model: ModelFacts) -> FloorPlan | None:
        """The floors that are asked for and the setting that keeps them; None where none is asked for.

        Raises:
            ValueError: as `plan`.
        """
        floors = {score: floor for score, floor in (("psnr", self.psnr), ("vmaf", self.vmaf)) if floor is not None}
        if floors and self.speedup is not None:
            raise ValueError(f"cache: {name} takes a floor or a speed: {name}(psnr>=30) or {name}(speedup=2.5)")
        if not floors:
            return None
        profile = self._find(model.family, model.transformer)
        if self.vmaf is not None and not all(len(point.vmaf) == len(point.psnr_db) for point in profile.points):
            raise ValueError(
                f"cache: {name}(vmaf>={self.vmaf:g}): the quality profile was measured without VMAF; make one with "
                "`cineray calibrate quality` where ffmpeg has libvmaf"
            )
        fitted = FittedConfig(profile=profile.fitted).find(model.family, model.transformer)
        if profile.fitted_digest not in ("", fitted.digest):
            raise ValueError(
                f"cache: {name}'s quality profile was measured with another profile of fitted "
                f"({profile.fitted_digest}) than {profile.fitted} is now ({fitted.digest}); make one with "
                "`cineray calibrate quality`"
            )
        allowed = {score: fastest(profile.points, floor, SCORES[score]) for score, floor in floors.items()}
        for score, speedup in allowed.items():
            if speedup is None:
                best = max(kept(SCORES[score](point)) for point in profile.points)
                raise ValueError(
                    f"cache: {name}({score}>={floors[score]:g}) cannot be kept: the slowest setting that was measured "
                    f"keeps {best:.1f}{' dB' if score == 'psnr' else ''}; ask for less, or render with --cache none"
                )
        speedup = min(speedup for speedup in allowed.values() if speedup is not None)
        return FloorPlan(floors=floors, profile=profile, speedup=speedup)

    def _find(self, family: str, transformer: Mapping[str, Any]) -> QualityProfile:
        return find_profile(QualityProfile, self.profile, family, transformer)


def lower_bound(values: Sequence[float]) -> float:
    """What a further clip keeps with `CONFIDENCE`: the one-sided prediction bound of a normal sample.

    Student's t of n - 1 degrees times the deviation of a new value from the mean, s sqrt(1 + 1/n); -inf for one value.
    """
    if len(values) < 2:
        return -math.inf
    spread = statistics.stdev(values) * math.sqrt(1 + 1 / len(values))
    return statistics.fmean(values) - quantile(len(values) - 1) * spread


def kept(values: Sequence[float]) -> float:
    """What a setting is said to keep: the lower bound, and no more than the worst clips did, where there are enough.

    Scores need not be normal, and VMAF is not: most clips lose nothing and a few lose much.
    """
    bound = lower_bound(values)
    return bound if len(values) < MIN_RANKED else min(bound, nearly_worst(values))


def nearly_worst(values: Sequence[float]) -> float:
    """The score that a further clip is below with at most 5 %, whatever the distribution.

    The k-th lowest of n with k / (n + 1) up to 5 % (Wilks 1941): the lowest of `MIN_RANKED` or more, the second of 39
    or more. Of fewer it is the lowest too, which says less.
    """
    return sorted(values)[max(1, _num_outside(len(values))) - 1]


@cache
def quantile(degrees: int) -> float:
    """Student's t that a value is above with `CONFIDENCE`, less its sign."""
    # takes a second to import; strict pyright wants stubs that scipy does not have
    from scipy.stats import t  # pyright: ignore[reportMissingTypeStubs]

    return float(t.ppf(CONFIDENCE, degrees))  # pyright: ignore[reportUnknownMemberType, reportUnknownArgumentType]


def fastest(points: Sequence[QualityPoint], floor: float, scores: Scores = SCORES["psnr"]) -> float | None:
    """The highest speed-up that keeps the floor, as all slower ones do, and that is not at the edge of a cliff."""
    rows = by_speed(points)
    number = _num_kept(rows, floor, scores)
    return rows[number - 1].speedup if number else None


def fastest_between(points: Sequence[QualityPoint], floor_db: float, num_steps: int) -> float | None:
    """The highest speed-up that keeps the floor, measured or on the lines between two neighbours that were.

    Lines of PSNR over the speed-ups that whole steps give: one through the lower bounds, and one for each clip. As few
    steps are computed as leave the first and nearly the worst of the others at the floor or above it. VMAF has no
    lines: near its end it hardly falls.

    Args:
        num_steps: of the clips that the points were measured on.
    """
    rows = by_speed(points)
    bounds = [lower_bound(row.psnr_db) for row in rows]
    number = _num_kept(rows, floor_db, SCORES["psnr"])
    if number == 0:
        return None
    measured = rows[number - 1].speedup
    if number == len(rows) or kept(rows[number].psnr_db) >= floor_db:  # all keep it, or the next one is beyond a cliff
        return measured
    slow, fast = rows[number - 1 : number + 1]
    if len(slow.psnr_db) != len(fast.psnr_db):
        return measured
    most, fewest = num_computed_at(num_steps, slow.speedup), num_computed_at(num_steps, fast.speedup)
    computed = most
    while computed - 1 > fewest:
        share = (num_steps / (computed - 1) - num_steps / most) / (num_steps / fewest - num_steps / most)
        bound = bounds[number - 1] + share * (bounds[number] - bounds[number - 1])
        clips = [begin + share * (end - begin) for begin, end in zip(slow.psnr_db, fast.psnr_db, strict=True)]
        if min(bound, nearly_worst(clips)) < floor_db:
            break
        computed -= 1
    return measured if computed == most else math.ceil(1000 * num_steps / computed) / 1000  # as short as can be said


def by_speed(points: Sequence[QualityPoint]) -> list[QualityPoint]:
    """The slowest first."""
    return sorted(points, key=lambda point: point.speedup)


def without_flips(scores: Sequence[Sequence[float]]) -> list[Sequence[float]]:
    """Each setting's scores, without falls of single clips at that setting alone: up to 5 % of its clips, those that
    fall most, are lifted to the lower of their scores at the two neighbours.

    A clip may become another one at a setting and keep 50 dB at a slower and at a faster one. That speaks against that
    setting, not against those beyond it: what gets worse with the speed-up does so at the neighbour too.

    Args:
        scores: of the same clips at each setting, in the order of the settings; of others nothing is lifted.
    """
    if len({len(row) for row in scores}) > 1:
        return list(scores)
    around = zip(scores, scores[1:], scores[2:], strict=False)
    return [*scores[:1], *(_lifted(*three) for three in around), *scores[1:][-1:]]


def _lifted(before: Sequence[float], now: Sequence[float], after: Sequence[float]) -> list[float]:
    lifts = [max(0.0, min(ends) - score) for *ends, score in zip(before, after, now, strict=True)]
    largest = sorted(range(len(now)), key=lambda clip: -lifts[clip])[: _num_outside(len(now))]
    return [score + lifts[clip] if clip in largest else score for clip, score in enumerate(now)]


def _num_outside(num_clips: int) -> int:
    """The k of which a further clip lies below the k-th lowest with at most 5 %; 0 of fewer than `MIN_RANKED`."""
    return math.floor((1 - CONFIDENCE) * (num_clips + 1) + 1e-9)


def num_kept(rows: Sequence[QualityPoint], bounds: Sequence[float], bounds_below: Sequence[float], floor: float) -> int:
    """How many settings, from the slowest on, are allowed: the last one keeps the floor, those below it do, and it is
    not at the edge of a cliff.

    Args:
        rows: the slowest first.
        bounds: what a clip keeps at each.
        bounds_below: the same without flips, for a setting that is slower than the one which is taken.
    """
    for number in range(len(rows), 0, -1):
        means = [statistics.fmean(row.psnr_db) for row in rows[number - 1 : number + 1]]
        is_at_cliff = means[0] - means[-1] > CLIFF_DB
        if not is_at_cliff and min(bounds[number - 1], *bounds_below[: number - 1], math.inf) >= floor:
            return number
    return 0


def _num_kept(rows: Sequence[QualityPoint], floor: float, scores: Scores) -> int:
    values = [scores(row) for row in rows]
    return num_kept(rows, [kept(row) for row in values], [kept(row) for row in without_flips(values)], floor)
