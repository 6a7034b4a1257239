"""FBCache: skip while what the first block adds stays close to what it added at the last computed step.

From ParaAttention (github.com/chengzeyi/ParaAttention at 4de137c, first_block_cache) and diffusers' FirstBlockCache:
sum |p_t - p_c| / sum |p_c| below a threshold skips; the deep blocks' addition is reused on top of the first block's.
"""

import math
from dataclasses import dataclass

from cineray.caching.forecast import Forecasting
from cineray.caching.observation import Observation
from cineray.caching.plan import CachePlan, ModelFacts, check_field, plan_blocks
from cineray.caching.policy import Decision, Reason, Signal


@dataclass(frozen=True, kw_only=True, slots=True)
class FirstBlockConfig:
    """Args: as in `DiCacheConfig`; 0.05 is the default threshold of diffusers' FirstBlockCacheConfig."""

    threshold: float = 0.05
    probe_depth: int = 1

    def __post_init__(self) -> None:
        check_field(self, "threshold", math.isfinite(self.threshold) and self.threshold >= 0, "0 or more")
        check_field(self, "probe_depth", self.probe_depth >= 1, "1 or more blocks")

    def plan(self, name: str, model: ModelFacts) -> CachePlan:
        return plan_blocks(name, self, model, FirstBlockPolicy(self), Forecasting(base="probe"), self.probe_depth)


@dataclass(frozen=True, slots=True)
class FirstBlockPolicy:
    """`decide` for a `FirstBlockConfig`."""

    config: FirstBlockConfig
    signal: Signal = "probe-residual"
    plans_ahead: bool = False

    def decide(self, observation: Observation) -> Decision:
        change = observation.relative_change
        if observation.num_pairs == 0 or change is None or not math.isfinite(change):
            return Decision.compute_because(Reason.UNKNOWN if observation.num_pairs else Reason.EMPTY)
        skip = change < self.config.threshold
        return Decision(compute=not skip, accumulated=change, reason=Reason.SKIP if skip else Reason.THRESHOLD)
