"""Which setting the clips to come get, by what the audited clips of their batch kept: pure, values in and out.

A quality profile says of each speed-up what its own clips kept: a mean and a spread. An audited clip is so many spreads
above or below that mean. Of the settings those are taken at which both of these keep the floor:

- what a further clip keeps with a confidence of 95 %, by the profile's spread around its mean, which is moved by the
  mean of the audited clips: as many spreads at each setting, for the spread grows with the speed-up, as errors do;
- what the worst of the audited clips would keep there, that is the worst but 5 %: a clip nobody has seen is below the
  lowest of n with a probability of 1 / (n + 1), whatever the clips' distribution.

A clip that falls below its floor makes the next setting slower than its own at once; faster it gets by one setting
at a time. Each step is monotone: no lower score of an audited clip makes the next setting faster.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from cineray.caching.policies.auto import SCORES, FloorPlan, by_speed, nearly_worst, num_kept, quantile, without_flips
from cineray.caching.profile import ANY_FAMILY, QualityPoint

UNCACHED = 1.0
# Audited clips at a setting or faster ones before a faster one is tried: with 2, half a percent fewer clips of the
# shipped profiles keep their floor, each model going by the other's profile (scripts/replay_audits.py).
FASTER_AFTER = 3
# What another model's profile counts as, in audited clips, when they say by how much its means are off. The tiny models
# are 1 to 9 dB apart at equal settings, about as far as clips of one model are: a profile says as much as one of them.
# As three, half a percent fewer clips keep their floor.
ANOTHERS_WEIGHT = 1.0
LEAST_SPREAD = 0.5  # dB, or points of VMAF: of equal scores, so that none is infinitely far off


@dataclass(frozen=True, kw_only=True, slots=True)
class AuditedClip:
    """
    Args:
        speedup: setting that it was rendered with.
        scores: against the uncached clip, by name: dB of "psnr", 0 to 100 of "vmaf"; those that are known.
    """

    speedup: float
    scores: Mapping[str, float]

    def falls_below(self, floors: Mapping[str, float]) -> bool:
        return any(self.scores.get(name, math.inf) < floor for name, floor in floors.items())


def policy_at(plan: FloorPlan, speedup: float) -> str:
    """The cache of a clip that is rendered with a setting."""
    return "none" if speedup == UNCACHED else f"fitted(speedup={speedup!r},profile={plan.profile.fitted})"


def next_speedup(plan: FloorPlan, now: float, audited: Sequence[AuditedClip], num_new: int) -> float:
    """The setting of the clips to come.

    Args:
        now: that of the clips until now: one of the profile's, or `UNCACHED`, which is final: nothing is learned of
            uncached clips.
        audited: all until now, in order; of settings that the profile has not, nothing is learned.
        num_new: how many of the last ones were not known when `now` was chosen.

    Returns:
        One of the profile's; `UNCACHED` where even the slowest, once it was tried, does not keep the floor.
    """
    rows = by_speed(plan.profile.points)
    places = {point.speedup: place for place, point in enumerate(rows)}
    known = [clip for clip in audited if clip.speedup in places]
    if now not in places or not known:
        return now
    num_until_now = places[now] + 1
    allowed = (_num_kept(rows, name, floor, known, _weight(plan)) for name, floor in plan.floors.items())
    number = min(num_until_now if count is None else count for count in allowed)
    newest = audited[len(audited) - num_new :]
    below = [places[clip.speedup] for clip in newest if clip.speedup in places and clip.falls_below(plan.floors)]
    number = min([number, *below])
    if number > num_until_now:
        is_faster_tried = sum(clip.speedup >= now for clip in known) >= FASTER_AFTER
        number = num_until_now + is_faster_tried
    if number:
        return rows[number - 1].speedup
    slowest = rows[0].speedup
    return UNCACHED if any(clip.speedup == slowest for clip in known) else slowest


def _num_kept(
    rows: Sequence[QualityPoint], name: str, floor: float, audited: Sequence[AuditedClip], weight: float
) -> int | None:
    """How many settings, from the slowest on, keep the floor of a score by the profile and by the audited clips.

    None where the score of no audited clip is known.
    """
    scores = SCORES[name]
    values = [scores(point) for point in rows]
    about = {point.speedup: _mean_and_spread(row) for point, row in zip(rows, values, strict=True)}
    off = [
        (clip.scores[name] - about[clip.speedup][0]) / about[clip.speedup][1] for clip in audited if name in clip.scores
    ]
    if not off:
        return None
    shift = math.fsum(off) / (len(off) + weight)
    worst = nearly_worst(off)
    width = quantile(min(map(len, values)) - 1) * math.sqrt(1 + 1 / (len(off) + weight))
    below = [_mean_and_spread(row) for row in without_flips(values)]
    bounds, bounds_below = (
        [mean + spread * min(shift - width, worst) for mean, spread in rows_about]
        for rows_about in (about.values(), below)
    )
    return num_kept(rows, bounds, bounds_below, floor)


def _mean_and_spread(values: Sequence[float]) -> tuple[float, float]:
    return statistics.fmean(values), max(LEAST_SPREAD, statistics.stdev(values))


def _weight(plan: FloorPlan) -> float:
    """What the profile counts as in audited clips: a model's own as the clips it was measured on."""
    if plan.profile.family == ANY_FAMILY:
        return ANOTHERS_WEIGHT
    return float(min(len(point.psnr_db) for point in plan.profile.points))
