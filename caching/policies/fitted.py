"""Steps to compute that are fitted to a model; the clean latents of the steps between are forecast from two of them.

Whatever a step computes, all that the scheduler takes of it is where its output says the clean latents lie. These move
slowly, and so they, not the blocks' residuals, are forecast: the transformer is not called on a skipped step, ranks
have nothing to agree on, and a computed step makes good what was skipped before it (`pipeline/caches/corrector.py`).
LeMiCa (arXiv 2511.00090) has the idea of a schedule that is searched offline.

How dense the computed steps lie over the clip is a curve with a few knots (`place_steps`), for all numbers of steps and
shifts of the schedule; a profile has one for all speed-ups, or up to three (`curve_at`). They are searched on a few
clips (`pipeline/calibrate/fitted.py`).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from cineray.caching.forecast import Forecasting, places_of
from cineray.caching.observation import Observation
from cineray.caching.plan import CachePlan, ModelFacts, check_field, plan_blocks
from cineray.caching.policy import Decision, Reason, Signal, forced
from cineray.caching.profile import FittedProfile, find_profile, generic_profile, shipped_profile

MAX_SPEEDUP = 8.0
MIN_STEPS = 16  # of clips that are cached at all: below, fewer steps are as good (docs/caching.md)
# Of a curve, over the clip's places, 0 to 1: dense where a skipped step costs most, at both ends
KNOTS = (0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0)
# A profile's curves, and the speed-ups that they are searched at: the last one holds for all faster ones, too
CURVE_SPEEDUPS = {"density_at_1_4x": 1.4, "density_at_2x": 2.0, "density": 2.8}
Schedule = tuple[int, tuple[float, ...] | None]  # (steps, their noise levels)
_ALWAYS = (0, 1, -1)  # a forecast takes two steps, and nothing makes the last one good


@dataclass(frozen=True, kw_only=True, slots=True)
class FittedConfig:
    """How many steps to compute.

    Args:
        speedup: steps divided by computed steps, 1 to 8; 1 computes every step. Clips of fewer than 16 steps are
            computed.
        profile: where the computed steps lie: a shipped profile's name, a file made by `cineray calibrate fitted`, or
            "auto": the shipped one that fits the model, else the generic one.
    """

    speedup: float = 2.5
    profile: str = "auto"

    def __post_init__(self) -> None:
        is_good = math.isfinite(self.speedup) and 1 <= self.speedup <= MAX_SPEEDUP
        check_field(self, "speedup", is_good, f"1 to {MAX_SPEEDUP:g}")

    def plan(self, name: str, model: ModelFacts) -> CachePlan:
        profile = self.find(model.family, model.transformer)
        filled = replace(self, profile=profile.digest)
        forecasting = Forecasting(
            target="clean_latents",
            length=profile.length,
            branches="joint",
            corrector=True,
            curvature=profile.curvature or 0.0,
        )
        return plan_blocks(name, filled, model, FittedPolicy(self.speedup, profile), forecasting)

    def find(self, family: str, transformer: Mapping[str, Any]) -> FittedProfile:
        """
        Raises:
            ValueError: the profile is not there, or of another model.
        """
        if self.profile == "auto":
            return shipped_profile(FittedProfile, family, transformer) or generic_profile(FittedProfile)
        return find_profile(FittedProfile, self.profile, family, transformer)


@dataclass(frozen=True, slots=True)
class FittedPolicy:
    """`decide` for a `FittedConfig` and its profile."""

    speedup: float
    profile: FittedProfile
    signal: Signal = "none"
    plans_ahead: bool = False
    _known: dict[Schedule, frozenset[int]] = field(default_factory=dict[Schedule, frozenset[int]], compare=False)

    def decide(self, observation: Observation) -> Decision:
        is_off = self.speedup == 1 or observation.num_steps < MIN_STEPS
        reason = forced(observation, is_off=is_off, last_step_full=True, min_pairs=2)
        if reason is not None:
            return Decision.compute_because(reason)
        if observation.step_index in self.computed(observation.num_steps, observation.sigmas):
            return Decision.compute_because(Reason.INTERVAL)
        return Decision(compute=False, accumulated=0.0, reason=Reason.SKIP)

    def computed(self, num_steps: int, sigmas: tuple[float, ...] | None = None) -> frozenset[int]:
        """The steps that are computed."""
        schedule = (num_steps, sigmas)
        if schedule not in self._known:
            places = places_of(num_steps, sigmas)
            num_computed = num_computed_at(num_steps, self.speedup)
            computed = place_steps(curve_at(self.profile, self.speedup), num_computed, places)
            self._known[schedule] = frozenset(computed)
        return self._known[schedule]


def num_computed_at(num_steps: int, speedup: float) -> int:
    """Steps that are computed at a speed-up: never fewer than the speed-up asks for."""
    return math.ceil(num_steps / speedup - 1e-9)


def curve_at(profile: FittedProfile, speedup: float) -> tuple[float, ...]:
    """The curve at `KNOTS`: on straight lines, by the share of computed steps, between those that the profile has of
    `CURVE_SPEEDUPS`; beyond them the slowest or fastest one."""
    curves = {1 / at: curve for name, at in CURVE_SPEEDUPS.items() if (curve := getattr(profile, name)) is not None}
    shares = sorted(curves)
    knots = zip(*(curves[share] for share in shares), strict=True)
    return tuple(float(np.interp(1 / speedup, shares, of_curves)) for of_curves in knots)


def place_steps(density: Sequence[float], num_computed: int, places: Sequence[float]) -> list[int]:
    """The steps to compute, in order: the first two, the last, and between them as many as a curve puts there.

    Each step's share is proportional to the curve and to the way to the next step, and at most 1; a step is computed
    where the sum of the shares passes a half.

    Args:
        density: logarithm of the curve at `KNOTS`.
        num_computed: at least 3, at most all.
        places: of all steps, from 0 to 1, two or more (`places_of`).
    """
    num_steps = len(places)
    number = min(max(num_computed, len(_ALWAYS)), num_steps)
    shares = np.exp(np.interp(places, KNOTS, density)) * np.maximum(np.gradient(places), 1e-6)
    always = np.zeros(num_steps, bool)
    always[list(_ALWAYS)] = True
    low, high = 0.0, float(num_steps / shares.min())
    for _ in range(60):  # halvings: by 1e-18 of the range
        middle = (low + high) / 2
        is_enough = np.minimum(1, middle * shares[~always]).sum() >= number - always.sum()
        low, high = (low, middle) if is_enough else (middle, high)
    shares = np.where(always, 1.0, np.minimum(1, high * shares))
    passed = np.floor(np.cumsum(shares) + 0.5 + 1e-9)
    starts = np.diff(passed, prepend=0) > 0
    return np.nonzero(starts | always)[0].tolist()
