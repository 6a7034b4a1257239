"""MagCache (arXiv 2506.09045): skip while calibrated residual magnitudes say that the reused one is still close.

Section 3.2 and github.com/Zehong-Ma/MagCache at df81cb1: MagCache4Wan2.1/magcache_generate.py,
MagCache4HunyuanVideo/magcache_sample_video.py, MagCache4FLUX/magcache_flux.py. The ratios do not depend on the clip,
so neither does the schedule.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from cineray.caching.observation import Observation
from cineray.caching.plan import CachePlan, ModelFacts, check_field, plan_blocks
from cineray.caching.policy import Decision, Reason, Signal, forced
from cineray.caching.profile import MagCacheProfile, find_profile


@dataclass(frozen=True, kw_only=True, slots=True)
class MagCacheConfig:
    """When to skip; a skipped step reuses the newest residual of all blocks.

    Args:
        threshold: accumulated error at which a step is computed, E in the paper; 0 never skips. Default: the profile's.
        max_skips: most steps skipped in a row, K in the paper. Default: the profile's.
        retention: fraction of the steps at the start that are computed. Default: the profile's.
        skip_at_threshold: an error equal to the threshold still skips (HunyuanVideo's and FLUX's official code).
        round_retention: the end of that fraction is rounded to the nearest call (FLUX's official code), else down.
        profile: name of a shipped profile, or a file made by `cineray calibrate magcache`; "" finds one that fits.
    """

    threshold: float | None = None
    max_skips: int | None = None
    retention: float | None = None
    skip_at_threshold: bool = False
    round_retention: bool = False
    profile: str = ""

    def __post_init__(self) -> None:
        threshold, max_skips, retention = (
            0 if value is None else value for value in (self.threshold, self.max_skips, self.retention)
        )
        check_field(self, "threshold", math.isfinite(threshold) and threshold >= 0, "0 or more")
        check_field(self, "max_skips", max_skips >= 0, "0 or more steps")
        check_field(self, "retention", 0 <= retention <= 1, "a fraction of the steps, 0 to 1")

    def plan(self, name: str, model: ModelFacts) -> CachePlan:
        """No block runs on a skipped step."""
        config, profile = self.for_model(model.family, model.transformer)
        return plan_blocks(name, config, model, config.policy(profile))

    def for_model(self, family: str, transformer: Mapping[str, Any]) -> tuple["MagCacheConfig", MagCacheProfile]:
        """The same with everything that was left open filled in from a profile, and the profile.

        Raises:
            ValueError: no profile fits.
        """
        profile = find_profile(MagCacheProfile, self.profile, family, transformer)
        open_fields = {
            name: getattr(profile, name)
            for name in ("threshold", "max_skips", "retention")
            if getattr(self, name) is None
        }
        return replace(self, profile=profile.digest, **open_fields), profile

    def policy(self, profile: MagCacheProfile) -> "MagCachePolicy":
        assert self.threshold is not None  # for_model has filled these in
        assert self.max_skips is not None
        assert self.retention is not None
        ratios = (profile.ratios["cond"], profile.ratios.get("uncond", profile.ratios["cond"]))
        return MagCachePolicy(
            threshold=self.threshold,
            max_skips=self.max_skips,
            retention=self.retention,
            skip_at_threshold=self.skip_at_threshold,
            round_retention=self.round_retention,
            ratios=ratios,
            never_skip=profile.never_skip,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class MagCachePolicy:
    """`decide` for a `MagCacheConfig`; ratios by branch index."""

    threshold: float
    max_skips: int
    retention: float
    skip_at_threshold: bool
    round_retention: bool
    ratios: tuple[tuple[float, ...], ...]
    never_skip: tuple[int, ...]
    signal: Signal = "none"
    plans_ahead: bool = False

    def decide(self, observation: Observation) -> Decision:
        retained_calls = observation.num_steps * observation.num_branches * self.retention
        reason = forced(
            observation,
            is_off=self.threshold == 0,
            is_warmup=observation.call_index < int(retained_calls + (0.5 if self.round_retention else 0)),
        )
        if reason is not None:
            return Decision.compute_because(reason)
        error = self._error(observation)
        below = error <= self.threshold if self.skip_at_threshold else error < self.threshold
        if not below:
            return Decision.compute_because(Reason.THRESHOLD)
        if observation.num_skips_in_a_row >= self.max_skips:
            return Decision.compute_because(Reason.CAP)
        if self._source_step(observation.step_index, observation) in self.never_skip:
            return Decision.compute_because(Reason.NEVER)
        return Decision(compute=False, accumulated=error, reason=Reason.SKIP)

    def _error(self, observation: Observation) -> float:
        """Sum over the steps since the last computed one, this one included, of |1 - product of ratios since then|."""
        ratios = self.ratios[min(observation.branch_index, len(self.ratios) - 1)]
        ratio, error = 1.0, 0.0
        for step in range(observation.step_index - observation.num_skips_in_a_row, observation.step_index + 1):
            ratio *= ratios[self._source_step(step, observation)]
            error += abs(1 - ratio)
        return error

    def _source_step(self, step_index: int, observation: Observation) -> int:
        return nearest_step(step_index, observation.num_steps, len(self.ratios[0]))


def nearest_step(step_index: int, num_steps: int, num_ratios: int) -> int:
    """The step of the calibration whose ratio stands for this one: nearest interpolation, halves to the even step.

    `nearest_interp` in the official code; one step takes the last ratio.
    """
    if num_steps == 1:
        return num_ratios - 1
    return round(step_index * ((num_ratios - 1) / (num_steps - 1)))
