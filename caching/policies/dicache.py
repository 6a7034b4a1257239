"""DiCache (arXiv 2508.17356): skip while the accumulated change of a shallow probe stays below a threshold.

Section 3.2, "online probe profiling". What the paper leaves open is taken from the official code
(github.com/Bujiazi/DiCache at dd7f0de): WAN2.1/run_wan_dicache.py, HunyuanVideo/run_hunyuanvideo_dicache.py,
FLUX/run_flux_dicache.py.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import repeat
from typing import Any, Literal

from cineray.caching.forecast import Alignment, Base, Branches, Forecasting
from cineray.caching.observation import Observation
from cineray.caching.plan import CachePlan, ModelFacts, check_field, plan_blocks
from cineray.caching.policy import Decision, Reason, Signal, forced
from cineray.caching.profile import DiCacheProfile, find_profile, generic_profile, shipped_profile

Probing = Literal["step", "run"]  # at every step, or once per streak of skips
DEFAULT_THRESHOLD = 0.1  # the paper's lowest (section 4.1)
DEFAULT_CLIP = (1.0, 2.0)  # of WAN2.1/run_wan_dicache.py


@dataclass(frozen=True, kw_only=True, slots=True)
class DiCacheConfig:
    """When to skip and how to forecast.

    Args:
        threshold: accumulated relative change of the probe's output at which a step is computed; 0 never skips.
            Default: the profile's, or 0.1.
        probe_depth: blocks that run on every step that is probed.
        warmup: fraction of the steps at the start that are computed.
        last_step_full: the last step is computed.
        alignment: how a skipped step's residual is forecast from the two newest computed ones: "none" reuses the
            newest; "l1" moves along their line by the ratio of L1 distances of the probe residuals (the paper's
            dynamic cache trajectory alignment, section 3.3); "lsq" by the least-squares projection, which has a sign.
        gamma_clip: bounds of that move; 1 is the newest residual, 0 the older one. Default: the profile's, or [1, 2].
        base: what a forecast starts from: "input" forecasts what all blocks add (the paper); "probe" takes what the
            probe blocks add as it is and forecasts only what the deep blocks add.
        branches: "separate" lets each guidance branch decide; "joint" lets the first decide for both.
        max_skips: most steps skipped in a row; 0 means no limit.
        skip_at_threshold: a change equal to the threshold still skips (HunyuanVideo's official code).
        compute_first_after_warmup: the step at the warm-up's end is computed too (FLUX's official code).
        look: "step" probes and decides at every step (the paper). "run" probes the first step after a computed one,
            decides there how many steps to skip, and extrapolates gamma at the rate it had there.
        profile: where the skip costs of the steps come from: a shipped profile's name, a file made by
            `cineray calibrate dicache`, "auto" for the shipped one that fits the model, else the generic one; or
            "none": all steps have the same skip cost.
        keep_every: keep and compare only every n-th token of the probe's tensors; 4 holds 2.75 token tensors per
            branch instead of 5.
        corrector: a computed step corrects the skipped ones before it (`pipeline/caches/corrector.py`), where branches
            decide jointly. Default: as the profile was calibrated, else where the model has no second branch: the
            guided difference of two overreacts to the latents of a forecast, which spoils what is corrected by it.
        adaptivity: with a profile: 1 takes the probe's change as it is, 0 the expected change of this step.
    """

    threshold: float | None = None
    probe_depth: int = 1
    warmup: float = 0.2
    last_step_full: bool = False
    alignment: Alignment = "l1"
    gamma_clip: tuple[float, float] | None = None
    base: Base = "input"
    branches: Branches = "separate"
    max_skips: int = 0
    skip_at_threshold: bool = False
    compute_first_after_warmup: bool = False
    look: Probing = "step"
    profile: str = "none"
    adaptivity: float = 1.0
    keep_every: int = 1
    corrector: bool | None = None

    def __post_init__(self) -> None:
        def check(is_good: bool, name: str, allowed: str) -> None:
            check_field(self, name, is_good, allowed)

        threshold = 0.0 if self.threshold is None else self.threshold
        check(math.isfinite(threshold) and threshold >= 0, "threshold", "0 or more")
        check(self.probe_depth >= 1, "probe_depth", "1 or more blocks")
        check(0 <= self.warmup <= 1, "warmup", "a fraction of the steps, 0 to 1")
        check(self.alignment in ("none", "l1", "lsq"), "alignment", "none, l1 or lsq")
        low, high = self.gamma_clip or (1.0, 2.0)
        check(math.isfinite(low) and math.isfinite(high) and low <= high, "gamma_clip", "two numbers, low and high")
        check(self.base in ("input", "probe"), "base", "input or probe")
        check(self.base == "input" or self.look == "step", "look", "step where base is probe")
        check(self.branches in ("separate", "joint"), "branches", "separate or joint")
        check(self.max_skips >= 0, "max_skips", "0 (no limit) or more")
        check(self.look in ("step", "run"), "look", "step or run")
        check(0 <= self.adaptivity <= 1, "adaptivity", "0 to 1")
        check(self.keep_every >= 1, "keep_every", "1 or more tokens")
        check(self.base == "input" or self.keep_every == 1, "keep_every", "1 where base is probe")

    def plan(self, name: str, model: ModelFacts) -> CachePlan:
        config, profile = self.for_model(model)
        policy, forecasting = config.policy(profile), config.forecasting()
        return plan_blocks(name, config, model, policy, forecasting, config.probe_depth)

    def for_model(self, model: ModelFacts) -> tuple["DiCacheConfig", DiCacheProfile | None]:
        """The same with everything that was left open filled in, and the profile.

        Raises:
            ValueError: the profile is not there, or of another model.
        """
        family, transformer = model.family, model.transformer
        if self.profile == "auto":
            profile = shipped_profile(DiCacheProfile, family, transformer) or generic_profile(DiCacheProfile)
        else:
            asked = self.profile != "none"
            profile = find_profile(DiCacheProfile, self.profile, family, transformer) if asked else None
        filled = replace(
            self,
            threshold=_first(self.threshold, profile and profile.threshold, DEFAULT_THRESHOLD),
            gamma_clip=_first(self.gamma_clip, profile and profile.gamma_clip, DEFAULT_CLIP),
            profile=profile.digest if profile else "none",
            # where ranks with a branch each may decide otherwise, they must not correct otherwise
            corrector=self.branches == "joint"
            and _first(self.corrector, profile and profile.corrector, profile is not None and not model.is_guided),
        )
        return filled, profile

    def policy(self, profile: DiCacheProfile | None = None) -> "DiCachePolicy":
        return DiCachePolicy(self, profile)

    def forecasting(self) -> Forecasting:
        clip = self.gamma_clip or DEFAULT_CLIP
        return Forecasting(
            alignment=self.alignment,
            gamma_clip=clip,
            base=self.base,
            branches=self.branches,
            keep_every=self.keep_every,
            corrector=bool(self.corrector),
        )


def _first(*values: Any) -> Any:
    return next(value for value in values if value is not None)


@dataclass(frozen=True, slots=True)
class DiCachePolicy:
    """`decide` for a `DiCacheConfig` that has a threshold."""

    config: DiCacheConfig
    profile: DiCacheProfile | None = None
    signal: Signal = "probe"
    _known: dict[int, tuple[list[float], list[float]]] = field(
        default_factory=dict[int, tuple[list[float], list[float]]], compare=False
    )  # of the profile, by number of steps

    @property
    def plans_ahead(self) -> bool:
        return self.config.look == "run"

    def decide(self, observation: Observation) -> Decision:
        reason = self._forced(observation)
        if reason is not None:
            return Decision.compute_because(reason)
        if self.config.look == "run" and observation.num_skips_in_a_row:
            return Decision.compute_because(Reason.THRESHOLD)  # a streak of skips has ended
        change = observation.relative_change
        if change is None or not math.isfinite(change):
            return Decision.compute_because(Reason.UNKNOWN)
        accumulated, num_steps = observation.accumulated, 0
        for cost in self._costs(observation, change):
            if not self._stays_below(accumulated + cost):
                break
            accumulated, num_steps = accumulated + cost, num_steps + 1
        if num_steps == 0:
            return Decision.compute_because(Reason.THRESHOLD)
        return Decision(compute=False, accumulated=accumulated, reason=Reason.SKIP, num_steps=num_steps)

    def _stays_below(self, accumulated: float) -> bool:
        threshold = self.config.threshold or 0.0
        return accumulated <= threshold if self.config.skip_at_threshold else accumulated < threshold

    def _costs(self, observation: Observation, change: float) -> Iterator[float]:
        """What it would cost to skip this step and each further one that may be decided now."""
        config, step, num_steps = self.config, observation.step_index, observation.num_steps
        end = step + 1
        if config.look == "run":
            end = num_steps - config.last_step_full
            end = min(end, step + config.max_skips) if config.max_skips else end
        if self.profile is None:
            return repeat(change, end - step)
        if num_steps not in self._known:
            self._known[num_steps] = self.profile.at(num_steps)
        skip_costs, expected = self._known[num_steps]
        relative_rate = (change / expected[step]) ** config.adaptivity
        return (relative_rate * expected[i] * skip_costs[i] for i in range(step, end))

    def _forced(self, observation: Observation) -> Reason | None:
        config = self.config
        # The official code counts calls of the transformer, two per step with guidance; for some numbers of
        # steps the branches leave the warm-up at different steps.
        warmup_calls = int(observation.num_branches * observation.num_steps * config.warmup)
        return forced(
            observation,
            is_off=config.threshold == 0,
            is_warmup=observation.call_index < warmup_calls + config.compute_first_after_warmup,
            last_step_full=config.last_step_full,
            min_pairs=2 if config.look == "run" else 1,
            max_skips=config.max_skips,
        )


def expected_cost(policy: DiCachePolicy, num_steps: int, probe_cost: float) -> float:
    """Share of the block evaluations that run for a clip that changes as the policy's profile expects.

    Args:
        probe_cost: share of a step's blocks that a probe runs.
    """
    assert policy.profile is not None
    _, expected = policy.profile.at(num_steps)
    step, num_pairs, num_skips, cost = 0, 0, 0, 0.0
    while step < num_steps:
        decision = policy.decide(
            Observation(
                step_index=step,
                num_steps=num_steps,
                branch_index=0,
                num_branches=1,
                sample=0,
                change_sum=expected[step] if step else None,
                previous_sum=1.0,
                accumulated=0.0,
                num_skips_in_a_row=num_skips,
                num_pairs=num_pairs,
            )
        )
        num_pairs, num_skips = (min(2, num_pairs + 1), 0) if decision.compute else (num_pairs, decision.num_steps)
        cost += 1.0 if decision.compute else probe_cost
        step += decision.num_steps
    return cost / num_steps


# Ours (docs/caching.md): one decision for both guidance branches; the probe runs once per streak of skips; each step
# has a calibrated cost, which makes a warm-up unnecessary: two computed steps are what a forecast needs.
OURS = DiCacheConfig(branches="joint", look="run", profile="auto", warmup=0.0, last_step_full=True)
