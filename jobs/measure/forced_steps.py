"""Teacher forcing: a clip on one rank leaves each step's latents and output; others step from the same latents.

Free runs in bfloat16 drift apart by themselves: a last bit of the first step is another clip after fifty. Fed with the
same latents at each step they cannot, and what is left is the error of one step.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from cineray.caching.observation import Observation
from cineray.caching.plan import CachePlan
from cineray.caching.policies.schedule import ReplayPolicy
from cineray.caching.policy import Decision, Policy
from cineray.caching.trace import Trace, trace_from
from cineray.pipeline.adapters.protocol import Advance
from cineray.pipeline.loading.checkpoint import Checkpoint
from cineray.pipeline.request import ClipRequest
from cineray.pipeline.resume.tensor_file import read_tensors, write_tensors

_DECISIONS = "decisions.json"
Place = tuple[int, int, int]  # step, branch, sample


class Recording:
    """A clip's `advance` that leaves each step's output, and the latents that follow, in a folder."""

    def __init__(self, advance: Advance, folder: Path) -> None:
        self._advance = advance
        self._folder = folder
        self._num_steps = 0

    def __call__(
        self, scheduler: Any, output: torch.Tensor, timestep: torch.Tensor, latents: torch.Tensor
    ) -> torch.Tensor:
        following = self._advance(scheduler, output, timestep, latents)
        write_tensors({"output": output, "latents": following}, {}, _step_path(self._folder, self._num_steps))
        self._num_steps += 1
        return following


class Teacher:
    """A clip's `advance` that goes on with the recorded latents, whatever the step's output is.

    Attributes:
        errors: of each step's output, its distance from the recorded one relative to that one's norm.
    """

    def __init__(self, folder: Path) -> None:
        self.errors: list[float] = []
        self._folder = folder

    def __call__(
        self, _scheduler: Any, output: torch.Tensor, _timestep: torch.Tensor, latents: torch.Tensor
    ) -> torch.Tensor:
        recorded = read_tensors(_step_path(self._folder, len(self.errors))).tensors
        expected = recorded["output"].double()
        distance = (output.detach().cpu().double() - expected).norm() / expected.norm()
        self.errors.append(distance.item())
        return recorded["latents"].to(latents.device)


@dataclass(frozen=True, kw_only=True, slots=True)
class Judged:
    """What a policy saw of one sample of one branch at one step, and what it wanted.

    Args:
        change_sum, previous_sum: of its signal, as an observation has them.
        accumulated: change since the last computed step, before this one.
        compute: it wanted the step computed.
        compute_of_recorded: the same of the recorded clip's change in the place of its own.
    """

    step: int
    branch: int
    sample: int
    change_sum: float | None
    previous_sum: float | None
    accumulated: float
    compute: bool
    compute_of_recorded: bool

    @property
    def place(self) -> Place:
        return self.step, self.branch, self.sample

    @property
    def change(self) -> float | None:
        """The relative change; None where there was none to see."""
        if self.change_sum is None or not self.previous_sum:
            return None
        return self.change_sum / self.previous_sum


class RecordedPolicy:
    """A policy that keeps what it has judged.

    Attributes:
        judged: in order.
    """

    def __init__(self, policy: Policy) -> None:
        self.signal, self.plans_ahead = policy.signal, policy.plans_ahead
        self.judged: list[Judged] = []
        self._policy = policy

    def decide(self, observation: Observation) -> Decision:
        decision = self._policy.decide(observation)
        self.judged.append(_judged(observation, decision.compute, decision.compute))
        return decision


class FollowingPolicy:
    """Judges what it sees here, and does what the recorded clip did: every step is judged from the same past.

    A policy is pure, and all that it remembers is in its observation: so it is asked with the recorded one's memory.

    Attributes:
        judged: what the policy wanted here, in order.
    """

    plans_ahead = False

    def __init__(self, policy: Policy, recorded: Sequence[Judged], trace: Trace) -> None:
        self.signal = policy.signal
        self.judged: list[Judged] = []
        self._policy = policy
        self._recorded = {one.place: one for one in recorded}
        self._replay = ReplayPolicy(trace)

    def decide(self, observation: Observation) -> Decision:
        recorded = self._recorded.get((observation.step_index, observation.branch_index, observation.sample))
        if recorded is not None:  # else an earlier step's decision held for this one
            seen = replace(observation, accumulated=recorded.accumulated)
            then = replace(seen, change_sum=recorded.change_sum, previous_sum=recorded.previous_sum)
            wanted = [self._policy.decide(either).compute for either in (seen, then)]
            self.judged.append(_judged(seen, *wanted))
        return self._replay.decide(observation)


def _judged(observation: Observation, compute: bool, compute_of_recorded: bool) -> Judged:
    return Judged(
        step=observation.step_index,
        branch=observation.branch_index,
        sample=observation.sample,
        change_sum=observation.change_sum,
        previous_sum=observation.previous_sum,
        accumulated=observation.accumulated,
        compute=compute,
        compute_of_recorded=compute_of_recorded,
    )


def recorded_plan(request: ClipRequest, checkpoint: Checkpoint) -> tuple[CachePlan | None, RecordedPolicy | None]:
    """The clip's cache with a policy that keeps what it judges; None for one that does not judge between blocks."""
    plan = checkpoint.plan_cache(request.cache)
    if not isinstance(plan, CachePlan):
        return None, None
    policy = RecordedPolicy(plan.policy)
    return replace(plan, policy=policy), policy


def keep_decisions(trace: Trace | None, policy: RecordedPolicy | None, folder: Path) -> None:
    """Leaves what the recorded clip's cache has judged and done, for `following_plan`."""
    if trace is not None and policy is not None:
        content = {"trace": trace.to_dict(), "judged": [asdict(one) for one in policy.judged]}
        (folder / _DECISIONS).write_text(json.dumps(content))


def following_plan(
    request: ClipRequest, checkpoint: Checkpoint, folder: Path
) -> tuple[CachePlan | None, FollowingPolicy | None]:
    """The cache that does as the recorded clip's did, and tells what it would have done.

    What a policy by layers does is fixed, and stays: None.
    """
    plan = checkpoint.plan_cache(request.cache)
    if not isinstance(plan, CachePlan):
        return None, None
    content = _read(folder)
    policy = FollowingPolicy(plan.policy, _judgments(content), trace_from(content["trace"]))
    return replace(plan, policy=policy), policy


def recorded_judgments(folder: Path) -> list[Judged]:
    """What the recorded clip's policy has judged; nothing without one."""
    if not (folder / _DECISIONS).is_file():
        return []
    return _judgments(_read(folder))


def _judgments(content: Any) -> list[Judged]:
    return [Judged(**row) for row in content["judged"]]


def _read(folder: Path) -> Any:
    return json.loads((folder / _DECISIONS).read_text())


def _step_path(folder: Path, step: int) -> Path:
    return folder / f"step-{step}.safetensors"
