"""Calibrates `fitted`: where over the steps of a clip the computed ones keep its latents best.

Clips are denoised over and over, at a few speed-ups, with schedules that a curve with a few knots makes; a random
search keeps what brings their last latents nearer to the uncached ones. Nothing is decoded.
"""

import math
from collections.abc import Callable, MutableMapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from cineray.caching.plan import CachePlan
from cineray.caching.profile import FittedProfile
from cineray.pipeline.loading.model import LoadedModel
from cineray.pipeline.render import denoise_prepared, prepare_clip
from cineray.pipeline.request import ClipRequest

SPEEDUPS = (2.0, 2.8)  # at which curves are compared: one that is good at both is so from 1.5x to 4x (docs/caching.md)
MAX_DB = 60.0  # latents that are nearer to each other give equal frames
_WORST = 0.3  # share of the worst clip in a curve's score, beside the mean
_FIRST_MOVE, _LEAST_MOVE, _MOST_MOVE = 0.5, 0.12, 1.0  # deviation of a trial's step, in log density
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
        """The best curve that was found from this one on; the same one each time."""
        return search_schedule(start, self.score, num_trials, on_trial)

    def score(self, profile: FittedProfile) -> float:
        """In dB, mean over `SPEEDUPS` of the clips' mean and worst."""
        points = [self.point(profile, speedup) for speedup in SPEEDUPS]
        return math.fsum((1 - _WORST) * p.mean_db + _WORST * p.worst_db for p in points) / len(points)

    def point(self, profile: FittedProfile, speedup: float) -> SchedulePoint:
        key = f"{profile.digest} {speedup!r}"
        if key not in self._known:
            self._trial.write_text(profile.model_dump_json())
            plan = self._model.checkpoint.plan_cache(f"fitted(profile={self._trial},speedup={speedup!r})")
            assert isinstance(plan, CachePlan)
            decibels = [self._decibels(number, plan) for number in range(len(self._requests))]
            mean = math.fsum(decibels) / len(decibels)
            self._known[key] = SchedulePoint(mean_db=round(mean, 3), worst_db=round(min(decibels), 3))
        return self._known[key]

    def _decibels(self, number: int, plan: CachePlan) -> float:
        reference = self._references[number].double()
        error = (self._latents(number, plan).double() - reference).square().sum() / reference.square().sum()
        return MAX_DB if error == 0 else min(MAX_DB, -10 * math.log10(error))

    def _latents(self, number: int, plan: CachePlan | None) -> torch.Tensor:
        prepared, request = self._prepared[number], self._requests[number]
        return denoise_prepared(self._model, request, prepared, lambda *_: None, plan=plan).latents.cpu()


def search_schedule(
    start: FittedProfile, score: Callable[[FittedProfile], float], num_trials: int, on_trial: OnTrial
) -> FittedProfile:
    """The profile of the highest score that a random search found: a (1 + 1) evolution strategy over the curve's knots,
    the length and the curvature (Rechenberg 1973; its rule for the size of a move).

    Args:
        num_trials: curves to try; the same ones each time.
        on_trial: called for the start, as trial 0, and after each trial.
    """
    random = np.random.default_rng(0)
    found, best, size = start, score(start), _FIRST_MOVE
    on_trial(0, best)
    for trial in range(1, num_trials + 1):
        values = np.array([*found.density, math.log(found.length), found.curvature or 0.0])
        moved = random.random(len(values)) < 0.5
        moved[random.integers(len(values))] = True
        tried = _profile_of(start, values + size * moved * random.normal(size=len(values)))
        tried_score = score(tried)
        if tried_score > best:
            found, best, size = tried, tried_score, min(_MOST_MOVE, size * _AFTER_GAIN)
        else:
            size = max(_LEAST_MOVE, size * _AFTER_LOSS)
        on_trial(trial, best)
    return found


def _profile_of(start: FittedProfile, values: np.ndarray) -> FittedProfile:
    """The profile with this curve, its height taken out, this logarithm of the length, and this curvature."""
    knots, log_length, curvature = values[:-2], values[-2], values[-1]
    density = np.clip(knots - knots.mean(), -6, 6)
    length = float(np.clip(np.exp(log_length), 0.05, 2))
    return start.model_copy(
        update={
            "density": tuple(np.round(density, 3).tolist()),
            "length": round(length, 3),
            "curvature": round(float(np.clip(curvature, 0, 1)), 2),
        }
    )
