"""Policies that do not look: a fixed interval, and the replay of a trace."""

from dataclasses import dataclass

from cineray.caching.controller import BRANCH_ORDER
from cineray.caching.observation import Observation
from cineray.caching.policy import Decision
from cineray.caching.trace import Trace


@dataclass(frozen=True, kw_only=True, slots=True)
class IntervalPolicy:
    """Computes every `interval`-th step after the warm-up, and the last one (FORA, arXiv 2407.01425, per step)."""

    interval: int
    warmup: float
    last_step_full: bool

    def decide(self, observation: Observation) -> Decision:
        warmup_steps = int(observation.num_steps * self.warmup)
        since = observation.step_index - warmup_steps
        if since < 0:
            return Decision(compute=True, accumulated=0.0, reason="warmup")
        if observation.num_pairs == 0:
            return Decision(compute=True, accumulated=0.0, reason="empty")
        if self.last_step_full and observation.step_index == observation.num_steps - 1:
            return Decision(compute=True, accumulated=0.0, reason="last")
        compute = since % self.interval == 0
        return Decision(compute=compute, accumulated=0.0, reason="interval" if compute else "skip")


class ReplayPolicy:
    """Does what a trace says, gammas included; computes where the trace says nothing."""

    def __init__(self, trace: Trace) -> None:
        self._entries = {(e.step, e.branch, e.sample): e for e in trace.entries}

    def decide(self, observation: Observation) -> Decision:
        branch = BRANCH_ORDER[observation.branch_index]
        entry = self._entries.get((observation.step_index, branch, observation.sample))
        if entry is None or entry.compute or observation.num_pairs == 0:
            return Decision(compute=True, accumulated=0.0, reason="replay" if entry else "unknown")
        return Decision(compute=False, accumulated=0.0, reason="replay", gamma=entry.gamma)
