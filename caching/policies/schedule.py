"""Policies that need no signal: a fixed interval, and the replay of a trace."""

import math
from dataclasses import dataclass

from cineray.caching.forecast import Alignment, Forecasting
from cineray.caching.observation import BRANCH_ORDER, Observation
from cineray.caching.plan import CachePlan, ModelFacts, check_field, plan_blocks
from cineray.caching.policy import Decision, Reason, Signal, forced
from cineray.caching.trace import Trace


@dataclass(frozen=True, kw_only=True, slots=True)
class IntervalConfig:
    """Every `interval`-th step after the warm-up is computed, the others reuse (FORA, arXiv 2407.01425, per step).

    Args: as in `DiCacheConfig`; only an alignment needs a probe.
    """

    interval: int = 2
    probe_depth: int = 0
    warmup: float = 0.0
    last_step_full: bool = True
    alignment: Alignment = "none"
    gamma_clip: tuple[float, float] = (1.0, 2.0)

    def __post_init__(self) -> None:
        low, high = self.gamma_clip
        least = int(self.alignment != "none")
        is_range = math.isfinite(low) and math.isfinite(high) and low <= high
        check_field(self, "alignment", self.alignment != "plan", "none, l1 or lsq")
        check_field(self, "gamma_clip", is_range, "two numbers, low and high")
        check_field(self, "interval", self.interval >= 1, "1 or more steps")
        check_field(self, "probe_depth", self.probe_depth >= least, "1 or more blocks to align, else 0 or more")
        check_field(self, "warmup", 0 <= self.warmup <= 1, "a fraction of the steps, 0 to 1")

    def plan(self, name: str, model: ModelFacts) -> CachePlan:
        forecasting = Forecasting(alignment=self.alignment, gamma_clip=self.gamma_clip)
        return plan_blocks(name, self, model, IntervalPolicy(self), forecasting, self.probe_depth)


@dataclass(frozen=True, slots=True)
class IntervalPolicy:
    """`decide` for an `IntervalConfig`."""

    config: IntervalConfig
    signal: Signal = "none"
    plans_ahead: bool = False

    def decide(self, observation: Observation) -> Decision:
        since_warmup = observation.step_index - int(observation.num_steps * self.config.warmup)
        reason = forced(observation, is_warmup=since_warmup < 0)
        if reason is not None:
            return Decision.compute_because(reason)
        if self.config.last_step_full and observation.step_index == observation.num_steps - 1:
            return Decision.compute_because(Reason.LAST)
        compute = since_warmup % self.config.interval == 0
        return Decision(compute=compute, accumulated=0.0, reason=Reason.INTERVAL if compute else Reason.SKIP)


class ReplayPolicy:
    """Does what a trace says, gammas included; computes where the trace says nothing."""

    signal: Signal = "none"
    plans_ahead: bool = False

    def __init__(self, trace: Trace) -> None:
        self._entries = {(e.step, e.branch, e.sample): e for e in trace.entries}

    def decide(self, observation: Observation) -> Decision:
        branch = BRANCH_ORDER[observation.branch_index]
        entry = self._entries.get((observation.step_index, branch, observation.sample))
        if entry is None or entry.compute or observation.num_pairs == 0:
            return Decision.compute_because(Reason.REPLAY if entry else Reason.UNKNOWN)
        return Decision(compute=False, accumulated=0.0, reason=Reason.REPLAY, gamma=entry.gamma)
