"""Calibrates `fitted`: where over the steps of a clip the computed ones keep its latents best.

Clips are denoised over and over, at two or three speed-ups, each with schedules that a curve with a few knots makes; a
random search keeps what brings their last latents nearer to the uncached ones. Nothing is decoded.
"""

import math
import statistics
from collections.abc import Callable, MutableMapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch

from cineray.caching.plan import CachePlan
from cineray.caching.policies.fitted import CURVE_SPEEDUPS, curve_at
from cineray.caching.profile import FittedProfile
from cineray.pipeline.loading.model import LoadedModel
from cineray.pipeline.render import denoise_prepared, prepare_clip
from cineray.pipeline.request import ClipRequest

MAX_DB = 60.0  # latents that are nearer to each other give equal frames
_WORST = 0.3  # share of the worst clip in a curve's score, beside the mean
_FIRST_MOVE, _LEAST_MOVE, _MOST_MOVE = 0.5, 0.12, 1.0  # deviation of a trial's step, in log density
_SHARED_EVERY = 4  # trials to one that moves what the curves share: the length and the curvature
_AFTER_GAIN, _AFTER_LOSS = 1.3, 0.93  # what a move becomes; of (1 + 1) evolution strategies, one gain in five trials

OnTrial = Callable[[int, float], None]  # (trials done, best score so far in dB)


@dataclass(frozen=True, kw_only=True, slots=True)
class SchedulePoint:
    """How far below the uncached latents the error of the last latents lies, over the calibration's clips."""

    mean_db: float
    worst_db: float


class ScheduleSearch:
    """Denoises the calibration's clips over and over.

    Args:
        requests: all with the same number of steps.
        folder: for the profiles that are tried.
        known: points that need not be measured; new ones are put there.
    """

    def __init__(
        self,
        model: LoadedModel,
        requests: Sequence[ClipRequest],
        folder: Path,
        known: MutableMapping[str, SchedulePoint],
    ) -> None:
        self._model = model
        self._requests = [replace(request, cache="none") for request in requests]
        self._trial = folder / "trial.json"
        self._known = known
        self._prepared = [prepare_clip(model, request) for request in self._requests]
        self._references = [self._latents(number, None) for number in range(len(requests))]

    def run(self, start: FittedProfile, num_trials: int, on_trial: OnTrial) -> FittedProfile:
        """The best curves that were found from these on; the same ones each time."""
        return search_schedule(start, self.score, num_trials, on_trial)

    def score(self, profile: FittedProfile, speedup: float) -> float:
        """In dB, of the clips' mean and worst."""
        point = self.point(profile, speedup)
        return (1 - _WORST) * point.mean_db + _WORST * point.worst_db

    def mean_score(self, profile: FittedProfile) -> float:
        """In dB, over the speed-ups of the profile's curves."""
        return statistics.fmean(self.score(profile, CURVE_SPEEDUPS[name]) for name in _curves_of(profile))

    def point(self, profile: FittedProfile, speedup: float) -> SchedulePoint:
        """What the profile keeps; measured once for all profiles that are alike at this speed-up."""
        others = dict.fromkeys(CURVE_SPEEDUPS)
        alike = profile.model_copy(update=others | {"density": curve_at(profile, speedup)})
        key = f"{alike.digest} {speedup!r}"
        if key not in self._known:
            self._trial.write_text(alike.model_dump_json())
            plan = self._model.checkpoint.plan_cache(f"fitted(profile={self._trial},speedup={speedup!r})")
            assert isinstance(plan, CachePlan)
            decibels = [self._decibels(number, plan) for number in range(len(self._requests))]
            self._known[key] = SchedulePoint(
                mean_db=round(statistics.fmean(decibels), 3), worst_db=round(min(decibels), 3)
            )
        return self._known[key]

    def _decibels(self, number: int, plan: CachePlan) -> float:
        reference = self._references[number].double()
        error = (self._latents(number, plan).double() - reference).square().sum() / reference.square().sum()
        return MAX_DB if error == 0 else min(MAX_DB, -10 * math.log10(error))

    def _latents(self, number: int, plan: CachePlan | None) -> torch.Tensor:
        prepared, request = self._prepared[number], self._requests[number]
        return denoise_prepared(self._model, request, prepared, lambda *_: None, plan=plan).latents.cpu()


Score = Callable[[FittedProfile, float], float]  # of a profile at one of `CURVE_SPEEDUPS`, in dB


def search_schedule(start: FittedProfile, score: Score, num_trials: int, on_trial: OnTrial) -> FittedProfile:
    """The profile of the highest scores that a random search found: for each curve, and for length and curvature, a
    (1 + 1) evolution strategy (Rechenberg 1973; its rule for the size of a move). A trial moves all curves, each of
    which is judged at its own speed-up alone, or what they share, which is judged at all. The curves are those at 2x
    and from 2.8x on, and the slower one if there is one to start from.

    Args:
        num_trials: to make; the same ones each time.
        on_trial: called for the start, as trial 0, and after each trial, with the scores' mean.
    """
    random = np.random.default_rng(0)
    profile = start.model_copy(update={"density_at_2x": start.density_at_2x or start.density})
    best = _Best(profile, {name: score(profile, CURVE_SPEEDUPS[name]) for name in _curves_of(profile)})
    on_trial(0, best.mean_score)
    for trial in range(1, num_trials + 1):
        if trial % _SHARED_EVERY == 0:
            best.move_shared(score, random)
        else:
            for name in best.scores:
                best.move_curve(name, score, random)
        on_trial(trial, best.mean_score)
    found = best.profile
    return found if found.density_at_2x != found.density else found.model_copy(update={"density_at_2x": None})


def _curves_of(profile: FittedProfile) -> list[str]:
    return [name for name in CURVE_SPEEDUPS if getattr(profile, name) is not None]


@dataclass(slots=True)
class _Best:
    """The best profile so far, the scores of its curves, and how far the next moves go: of each curve, and of what they
    share."""

    profile: FittedProfile
    scores: dict[str, float]
    sizes: dict[str, float] = field(default_factory=lambda: dict.fromkeys(CURVE_SPEEDUPS, _FIRST_MOVE))
    shared_size: float = _FIRST_MOVE

    @property
    def mean_score(self) -> float:
        return statistics.fmean(self.scores.values())

    def move_curve(self, name: str, score: Score, random: np.random.Generator) -> None:
        curve = _moved(getattr(self.profile, name), self.sizes[name], random)
        tried = self.profile.model_copy(update={name: curve})
        tried_score = score(tried, CURVE_SPEEDUPS[name])
        is_better = tried_score > self.scores[name]
        self.sizes[name] = _next_size(self.sizes[name], is_better)
        if is_better:
            self.profile, self.scores[name] = tried, tried_score

    def move_shared(self, score: Score, random: np.random.Generator) -> None:
        tried = _with_shared_moved(self.profile, self.shared_size, random)
        scores = {name: score(tried, CURVE_SPEEDUPS[name]) for name in self.scores}
        is_better = sum(scores.values()) > sum(self.scores.values())
        self.shared_size = _next_size(self.shared_size, is_better)
        if is_better:
            self.profile, self.scores = tried, scores


def _next_size(size: float, is_better: bool) -> float:
    return min(_MOST_MOVE, size * _AFTER_GAIN) if is_better else max(_LEAST_MOVE, size * _AFTER_LOSS)


def _moved(curve: Sequence[float], size: float, random: np.random.Generator) -> tuple[float, ...]:
    """The curve with about half of its knots moved, its height taken out."""
    knots = np.array(curve)
    is_moved = random.random(len(knots)) < 0.5
    is_moved[random.integers(len(knots))] = True
    knots = knots + size * is_moved * random.normal(size=len(knots))
    return tuple(np.round(np.clip(knots - knots.mean(), -6, 6), 3).tolist())


def _with_shared_moved(profile: FittedProfile, size: float, random: np.random.Generator) -> FittedProfile:
    """The profile with another length and curvature."""
    length_by, curvature_by = size * random.normal(size=2)
    length = float(np.clip(profile.length * np.exp(length_by), 0.05, 2))
    curvature = float(np.clip((profile.curvature or 0.0) + curvature_by, 0, 1))
    return profile.model_copy(update={"length": round(length, 3), "curvature": round(curvature, 2)})
