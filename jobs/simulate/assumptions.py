"""What a simulation takes for granted: the fleet, how long things take, how often nodes are lost."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from cineray.pipeline.request import InputError

MAX_GPUS = 1_000_000
MAX_CLIPS = 100_000_000  # some hours of simulating
SEEN_S = 2.2  # until the driver hears of a node that died: its raylet killed, Ray 2.60
RANK_SEEN_S = 0.02  # of a rank: 19 to 22 ms after its SIGKILL, on the same node
SAVE_S = 0.05  # a step state of Wan 14B at 720p: 19 MB of latents, 58 MB of UniPC's tensors, saved and flushed


@dataclass(frozen=True, kw_only=True, slots=True)
class ClipSeconds:
    """What one clip costs on a gang that is no straggler.

    Args:
        num_steps: denoising steps.
        begin_s: of each attempt, before its first step.
        encode_s: of its prompt, on a finisher.
        finish_s: decoding, writing and committing, on a finisher.
    """

    num_steps: int
    step_s: float
    begin_s: float = 0.0
    encode_s: float = 0.0
    finish_s: float = 0.0

    def __post_init__(self) -> None:
        if self.num_steps < 1:
            raise InputError(f"a clip must have 1 step or more, got {self.num_steps}")
        _check("a step must take", self.step_s, above=0)
        for name, value in (("beginning", self.begin_s), ("encoding", self.encode_s), ("finishing", self.finish_s)):
            _check(f"{name} a clip must take", value)


@dataclass(frozen=True, kw_only=True, slots=True)
class PlannedClip:
    """A clip to simulate; those with one `prompt_key` share an encoded prompt."""

    id: str
    prompt_key: str
    seconds: ClipSeconds


@dataclass(frozen=True, kw_only=True, slots=True)
class RankDeath:
    """A rank of a gang dies at this time, and the driver hears of it `seen_s` later; its node stays."""

    at_s: float
    gang: int
    seen_s: float = RANK_SEEN_S


@dataclass(frozen=True, kw_only=True, slots=True)
class Assumptions:
    """Args:
    num_gpus: in all; those that make no whole gang are left over.
    ranks_per_gang: on one node.
    num_gangs: None for as many as there is room for.
    num_finishers: None for what `cineray render` takes.
    hang_s, checkpoint_s: as the options of `cineray render`; infinity for never.
    start_s: from a node that is there to a gang that is ready.
    finisher_start_s: the same of a finisher.
    save_s: that a gang stands still while it saves a step state.
    spot_losses: of each GPU in an hour; what is lost is its node.
    notice_s: before a node is lost, its nodes drain; 0 for no notice.
    replace_s: from a node's loss to its successor.
    seen_s: until the driver hears of a loss.
    straggler_share, straggler_factor: so many nodes are slower, by that factor.
    larger: of a gang that takes the room of so many, how much faster its steps are; empty: gangs stay as they are.
    """

    num_gpus: int
    ranks_per_gang: int = 1
    gpus_per_node: int = 8
    num_gangs: int | None = None
    num_finishers: int | None = None
    hang_s: float = 300.0
    checkpoint_s: float = 60.0
    start_s: float = 0.0
    finisher_start_s: float = 0.0
    save_s: float = SAVE_S
    spot_losses: float = 0.0
    notice_s: float = 0.0
    replace_s: float = 0.0
    seen_s: float = SEEN_S
    straggler_share: float = 0.0
    straggler_factor: float = 1.0
    larger: Mapping[int, float] = field(default_factory=dict)
    seed: int = 0

    def __post_init__(self) -> None:
        for name, number in (
            ("--num-gpus", self.num_gpus),
            ("--sp", self.ranks_per_gang),
            ("--gpus-per-node", self.gpus_per_node),
            ("--gangs", 1 if self.num_gangs is None else self.num_gangs),
            ("--finishers", 1 if self.num_finishers is None else self.num_finishers),
        ):
            if not 1 <= number <= MAX_GPUS:
                raise InputError(f"{name} must be 1 to {MAX_GPUS}, got {number}")
        if self.ranks_per_gang > self.gpus_per_node:
            raise InputError(
                f"a gang of {self.ranks_per_gang} ranks does not fit on a node of {self.gpus_per_node} GPUs, and "
                "gangs stay on one node: use a smaller --sp, or a larger --gpus-per-node"
            )
        if self._room < (self.num_gangs or 1):
            raise InputError(
                f"{self.num_gpus} GPUs on nodes of {self.gpus_per_node} have room for {self._room} gangs of "
                f"{self.ranks_per_gang}, got --gangs {self.num_gangs or 1}"
            )
        for name, value in (
            ("--start-up-s", self.start_s),
            ("--finisher-start-up-s", self.finisher_start_s),
            ("--save-s", self.save_s),
            ("--spot-loss-per-gpu-hour", self.spot_losses),
            ("--preempt-notice-s", self.notice_s),
            ("--replace-s", self.replace_s),
            ("the time until a loss is seen", self.seen_s),
        ):
            _check(f"{name} must be", value)
        if not self.checkpoint_s >= 0:
            raise InputError(f"--checkpoint-interval-s must be 0 or more, or inf for never, got {self.checkpoint_s:g}")
        if not self.hang_s > 0:
            raise InputError(f"--hang-timeout must be above 0, got {self.hang_s:g}")
        if not 0 <= self.straggler_share <= 1:
            raise InputError(f"--straggler-share must be 0 to 1, got {self.straggler_share:g}")
        if not 1 <= self.straggler_factor < math.inf:
            raise InputError(f"--straggler-factor must be 1 or more, got {self.straggler_factor:g}")
        for room, speedup in self.larger.items():
            if not 2 <= room <= self.gangs_per_node:
                raise InputError(
                    f"--elastic-tail: a gang must take the room of 2 to {self.gangs_per_node} gangs, as many as a node "
                    f"has, got {room}"
                )
            if not 1 <= speedup < math.inf:
                raise InputError(f"--elastic-tail: a larger gang must be 1 or more times as fast, got {speedup:g}")

    @property
    def gangs_per_node(self) -> int:
        return self.gpus_per_node // self.ranks_per_gang

    @property
    def gangs(self) -> int:
        """How many there are."""
        return self.num_gangs or self._room

    @property
    def num_left_over(self) -> int:
        """GPUs that no gang uses."""
        return self.num_gpus - self.gangs * self.ranks_per_gang

    @property
    def _room(self) -> int:
        nodes, rest = divmod(self.num_gpus, self.gpus_per_node)
        return nodes * self.gangs_per_node + rest // self.ranks_per_gang


def _check(what: str, value: float, above: float | None = None) -> None:
    if math.isfinite(value) and (value >= 0 if above is None else value > above):
        return
    raise InputError(f"{what} {'0 or more' if above is None else f'above {above:g}'}, got {value:g}")
