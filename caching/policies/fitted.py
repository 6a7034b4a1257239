"""Steps to compute, and forecasts of those between, that are fitted to how a model's residuals move over the steps.

What all blocks add at a step, the residual, lies close to the line through those of the two newest computed steps. How
far along it is best is least squares over the residuals of a few uncached clips. So is the error that is left, and the
steps to compute for a given speed-up are a shortest path over these errors (LeMiCa, arXiv 2511.00090, has the idea of a
path over measured errors; DiCache, arXiv 2508.17356, that of a forecast along the line, section 3.3). Nothing is looked
at while a clip renders: no block runs on a skipped step, ranks have nothing to agree on, and the speed is known before.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cineray.caching.forecast import Forecasting
from cineray.caching.observation import Observation
from cineray.caching.plan import CachePlan, ModelFacts, check_field, plan_blocks
from cineray.caching.policy import Decision, Reason, Signal, forced
from cineray.caching.profile import FittedProfile, find_profile, generic_profile, shipped_profile

MAX_SPEEDUP = 8.0
MAX_SKIPS = 8  # in a row; the longest that any schedule of the tiny models takes at 4x
MIN_STEPS = 16  # of clips that are cached at all: below, fewer steps are as good (docs/caching.md)
# How much more an error costs at both ends, see `step_weights`: of 1 + 3, 10 or 30 exp(-10 t / T), with and without a
# late one, the best on three clips of tiny-wan at 17 and 20 of 50 steps (51.9 dB, worst 51.0; 59.9, 58.5)
EARLY_WEIGHT, EARLY_SHARE = 30.0, 0.1
LATE_WEIGHT, LATE_STEPS = 3.0, 1.0
NUGGET = 0.003  # of a residual's norm: what differs between a clip and those of the profile, at every step for itself
_GAMMA = (0.0, MAX_SKIPS + 2.0)  # two neighbours computed, then the longest run of skips: 1 + 8 steps along the line

Numbers = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, slots=True)
class FittedConfig:
    """How many steps to compute.

    Args:
        speedup: steps divided by computed steps, 1 to 8; 1 computes every step. Clips of fewer than 16 steps are
            computed.
        profile: where the residuals come from: a shipped profile's name, a file made by `cineray calibrate fitted`, or
            "auto": the shipped one that fits the model, else the generic one.
        corrector: a computed step corrects the skipped ones before it (`pipeline/caches/corrector.py`).
            Default: where the model has no second branch, as for `dicache`.
    """

    speedup: float = 2.5
    profile: str = "auto"
    corrector: bool | None = None

    def __post_init__(self) -> None:
        is_good = math.isfinite(self.speedup) and 1 <= self.speedup <= MAX_SPEEDUP
        check_field(self, "speedup", is_good, f"1 to {MAX_SPEEDUP:g}")

    def plan(self, name: str, model: ModelFacts) -> CachePlan:
        profile = self.find(model.family, model.transformer)
        corrector = not model.is_guided if self.corrector is None else self.corrector
        filled = replace(self, profile=profile.digest, corrector=corrector)
        policy = FittedPolicy(self.speedup, profile)
        return plan_blocks(
            name, filled, model, policy, Forecasting(alignment="plan", gamma_clip=_GAMMA, corrector=corrector)
        )

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
    _known: dict[int, Mapping[int, float]] = field(default_factory=dict[int, Mapping[int, float]], compare=False)

    def decide(self, observation: Observation) -> Decision:
        is_off = self.speedup == 1 or observation.num_steps < MIN_STEPS
        reason = forced(observation, is_off=is_off, last_step_full=True, min_pairs=2, max_skips=MAX_SKIPS)
        if reason is not None:
            return Decision.compute_because(reason)
        gamma = self._gammas(observation.num_steps).get(observation.step_index)
        if gamma is None:
            return Decision.compute_because(Reason.INTERVAL)
        return Decision(compute=False, accumulated=0.0, reason=Reason.SKIP, gamma=gamma)

    def _gammas(self, num_steps: int) -> Mapping[int, float]:
        if num_steps not in self._known:
            products, weights = self.profile.at(num_steps)
            self._known[num_steps] = schedule(products, weights, math.ceil(num_steps / self.speedup - 1e-9))
        return self._known[num_steps]


def schedule(products: Numbers, weights: Numbers, num_computed: int) -> dict[int, float]:
    """Gamma of each step that is skipped; the others are computed.

    The first two and the last step are computed. Of all choices whose runs of skips are at most `MAX_SKIPS` long, the
    one with the least sum of squares of weighted errors.

    Args:
        products: inner products of the steps' residuals [T, T].
        weights: what an error at each step costs [T].
        num_computed: steps to compute; at least as many as `MAX_SKIPS` allows are.
    """
    num_steps, most = len(weights), MAX_SKIPS + 1
    gammas, errors = forecasts(products + np.diag(NUGGET**2 * np.diag(products)))
    # cost[a, g, n]: of computing a - g, a and a + n, and nothing between
    cost = np.zeros((num_steps, most + 1, most + 1))
    for n in range(2, most + 1):
        skipped = np.minimum(np.arange(num_steps) + n - 1, num_steps - 1)
        cost[:, :, n] = cost[:, :, n - 1] + (weights[skipped] ** 2)[:, None] * errors[:, :, n - 1]
    best, came_from = _shortest_paths(cost, num_steps, most)
    reachable = np.nonzero(np.isfinite(best[:, -1].min(axis=1)))[0]
    number = int(reachable[np.argmin(np.abs(reachable - max(2, num_computed)))])
    step, gap = num_steps - 1, int(np.argmin(best[number, -1]))
    found: dict[int, float] = {}
    while number > 2:
        before_gap, before = int(came_from[number, step, gap]), step - gap
        found |= {before + n: float(gammas[before, before_gap, n]) for n in range(1, gap)}
        step, gap, number = before, before_gap, number - 1
    return dict(sorted(found.items()))


def _shortest_paths(cost: Numbers, num_steps: int, most: int) -> tuple[Numbers, NDArray[np.int64]]:
    """(least cost of computing k steps of which a - g and a are the last [k, a, g]; the gap before a - g)."""
    best = np.full((num_steps + 1, num_steps, most + 1), np.inf)
    came_from = np.zeros(best.shape, dtype=np.int64)
    best[2, 1, 1] = 0.0
    for number in range(3, num_steps + 1):
        for gap in range(1, most + 1):
            before = best[number - 1, : num_steps - gap] + cost[: num_steps - gap, :, gap]  # [a - g, gap before]
            best[number, gap:, gap] = before.min(axis=1)
            came_from[number, gap:, gap] = before.argmin(axis=1)
    return best, came_from


def forecasts(products: Numbers) -> tuple[Numbers, Numbers]:
    """(gamma, squared error) of the best forecast of step a + n along the line from a - g to a [a, g, n].

    Least squares: 1 + <r_(a+n) - r_a, d> / |d|^2 with d = r_a - r_(a-g), within `_GAMMA`.
    """
    num_steps, most = len(products), MAX_SKIPS + 1
    gammas = np.ones((num_steps, most + 1, most + 1))
    errors = np.zeros_like(gammas)

    def square(i: Any, j: Any) -> Numbers:
        return products[i, i] - 2 * products[i, j] + products[j, j]

    for g in range(1, most + 1):
        for n in range(1, most + 1):
            a = np.arange(g, num_steps - n)
            if not len(a):
                continue
            now, older = a + n, a - g
            moved = products[now, a] - products[now, older] - products[a, a] + products[a, older]
            span = np.maximum(square(a, older), np.finfo(np.float64).tiny)
            gamma = np.clip(1 + moved / span, *_GAMMA)
            gammas[a, g, n] = gamma
            along = gamma - 1
            errors[a, g, n] = np.maximum(square(now, a) - 2 * along * moved + along**2 * span, 0)
    return gammas, errors


def step_weights(sizes: Numbers, steps: Numbers) -> Numbers:
    """What an error of the residual costs at each step [T]: what the output's norm makes of it, times the step, more
    at both ends.

    An error of an early step moves the layout, which later steps follow instead of correcting it; those of the last
    steps are not corrected by any. On tiny-wan the final latents of clips in which one step alone was skipped were off
    by 9 to 40 times (steps 2 to 9 of 50), 5 (13), 0.5 to 0.8 (26 to 46) and 3.3 times (48) what its own error says.

    Args:
        sizes: norm of the hidden states after the last block.
        steps: what the scheduler's sigma falls by.
    """
    place = np.arange(len(sizes)) / len(sizes)
    before_last = np.arange(len(sizes))[::-1] - 1.0  # the last step itself is always computed
    early = 1 + EARLY_WEIGHT * np.exp(-place / EARLY_SHARE)
    return steps / sizes * early * (1 + LATE_WEIGHT * np.exp(-before_last / LATE_STEPS))
