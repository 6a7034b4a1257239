"""DiCache (arXiv 2508.17356): skip while the accumulated change of a shallow probe stays below a threshold.

Section 3.2, "online probe profiling". What the paper leaves open is taken from the official code
(github.com/Bujiazi/DiCache at dd7f0de): WAN2.1/run_wan_dicache.py, HunyuanVideo/run_hunyuanvideo_dicache.py,
FLUX/run_flux_dicache.py.
"""

import math
from dataclasses import dataclass

from cineray.caching.forecast import Alignment, Base, Branches, Forecasting
from cineray.caching.observation import Observation
from cineray.caching.policy import Decision, Signal


@dataclass(frozen=True, kw_only=True, slots=True)
class DiCacheConfig:
    """When to skip and how to forecast.

    Args:
        threshold: accumulated relative change of the probe's output at which a step is computed; 0 never skips.
        probe_depth: blocks that run on every step.
        warmup: fraction of the steps at the start that are computed.
        last_step_full: the last step is computed.
        alignment: how a skipped step's residual is forecast from the two newest computed ones: "none" reuses the
            newest; "l1" moves along their line by the ratio of L1 distances of the probe residuals (the paper's
            dynamic cache trajectory alignment, section 3.3); "lsq" by the least-squares projection, which has a sign.
        gamma_clip: bounds of that move; 1 is the newest residual, 0 the older one.
        base: what a forecast starts from: "input" forecasts what all blocks add (the paper); "probe" takes what the
            probe blocks add as it is and forecasts only what the deep blocks add.
        branches: "separate" lets each guidance branch decide; "joint" lets the first decide for both.
        max_skips: most steps skipped in a row; 0 means no limit.
        skip_at_threshold: a change equal to the threshold still skips (HunyuanVideo's official code).
        compute_first_after_warmup: the step at the warm-up's end is computed too (FLUX's official code).
    """

    threshold: float
    probe_depth: int = 1
    warmup: float = 0.2
    last_step_full: bool = False
    alignment: Alignment = "l1"
    gamma_clip: tuple[float, float] = (1.0, 2.0)
    base: Base = "input"
    branches: Branches = "separate"
    max_skips: int = 0
    skip_at_threshold: bool = False
    compute_first_after_warmup: bool = False

    def __post_init__(self) -> None:
        def check(good: bool, name: str, allowed: str) -> None:
            if not good:
                raise ValueError(f"DiCacheConfig: {name} must be {allowed}, got {getattr(self, name)!r}")

        check(math.isfinite(self.threshold) and self.threshold >= 0, "threshold", "0 or more")
        check(self.probe_depth >= 1, "probe_depth", "1 or more blocks")
        check(0 <= self.warmup <= 1, "warmup", "a fraction of the steps, 0 to 1")
        check(self.alignment in ("none", "l1", "lsq"), "alignment", "none, l1 or lsq")
        low, high = self.gamma_clip
        check(math.isfinite(low) and math.isfinite(high) and low <= high, "gamma_clip", "two numbers, low and high")
        check(self.base in ("input", "probe"), "base", "input or probe")
        check(self.branches in ("separate", "joint"), "branches", "separate or joint")
        check(self.max_skips >= 0, "max_skips", "0 (no limit) or more")

    def policy(self) -> "DiCachePolicy":
        return DiCachePolicy(self)

    def forecasting(self) -> Forecasting:
        return Forecasting(alignment=self.alignment, gamma_clip=self.gamma_clip, base=self.base, branches=self.branches)


@dataclass(frozen=True, slots=True)
class DiCachePolicy:
    """`decide` for a `DiCacheConfig`."""

    config: DiCacheConfig
    signal: Signal = "probe"

    def decide(self, observation: Observation) -> Decision:
        forced = self._forced(observation)
        if forced is not None:
            return Decision(compute=True, accumulated=0.0, reason=forced)
        change = observation.relative_change
        if change is None or not math.isfinite(change):
            return Decision(compute=True, accumulated=0.0, reason="unknown")
        accumulated = observation.accumulated + change
        threshold = self.config.threshold
        skip = accumulated <= threshold if self.config.skip_at_threshold else accumulated < threshold
        if not skip:
            return Decision(compute=True, accumulated=0.0, reason="threshold")
        return Decision(compute=False, accumulated=accumulated, reason="skip")

    def _forced(self, observation: Observation) -> str | None:
        config = self.config
        # The official code counts calls of the transformer, two per step with guidance; for some numbers of
        # steps the branches leave the warm-up at different steps.
        call = observation.step_index * observation.num_branches + observation.branch_index
        warmup_calls = int(observation.num_branches * observation.num_steps * config.warmup)
        if config.threshold == 0:
            return "off"
        if call < warmup_calls or (call == warmup_calls and config.compute_first_after_warmup):
            return "warmup"
        if config.last_step_full and observation.step_index == observation.num_steps - 1:
            return "last"
        if observation.num_pairs == 0:
            return "empty"
        if config.max_skips and observation.num_skips_in_a_row >= config.max_skips:
            return "cap"
        return None


# The official rules. Thresholds: section 4.1 of the paper gives 0.2, 0.1 and 0.4; the Wan code's default is 0.08.
# Warm-up, clips, comparison, last step: from the code.
PAPER = {
    "wan": DiCacheConfig(threshold=0.2),
    "hunyuan-video": DiCacheConfig(threshold=0.1, gamma_clip=(1.0, 1.5), skip_at_threshold=True),
    "flux": DiCacheConfig(threshold=0.4, gamma_clip=(1.0, 1.5), last_step_full=True, compute_first_after_warmup=True),
}
