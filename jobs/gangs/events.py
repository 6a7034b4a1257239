"""Events of a run on gangs, as plain values: from Ray, a simulator or a log alike."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from cineray.jobs.gangs.retry import RankOutcome


@dataclass(frozen=True, slots=True)
class NewClip:
    """A clip of the manifest that is not committed yet.

    Args:
        name: of this clip alone in the run.
        strikes: attempts that an earlier run lost.
        num_steps: that it is denoised in.
    """

    name: str
    id: str
    prompt_key: str
    strikes: Sequence[str] = ()
    num_steps: int = 1


@dataclass(frozen=True, slots=True)
class ClipsRead:
    """Clips were read from the manifest; `is_last` says that there are no more."""

    clips: tuple[NewClip, ...] = ()
    is_last: bool = False


@dataclass(frozen=True, slots=True)
class StartRequested:
    """Actors should start although no clip is known yet."""


@dataclass(frozen=True, slots=True)
class GangPlaced:
    """A gang has its place on these nodes and begins to load its weights."""

    gang: int
    nodes: frozenset[str]


@dataclass(frozen=True, slots=True)
class GangReady:
    """All ranks of a gang have loaded and met."""

    gang: int
    pids: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class StepReached:
    """A gang's first rank told of a step that it had not told of before."""

    gang: int
    step: int


@dataclass(frozen=True, slots=True)
class GangEnded:
    """What a gang was doing has ended: its start, or a clip.

    Args:
        outcomes: of its ranks, if not all of them answered; None where all did.
        preempted_at: the step after which the clip was preempted; None where its latents are on disk.
        is_kept: the state of that step is on disk.
        ranks: what its ranks computed on, where the latents are on disk.
    """

    gang: int
    outcomes: tuple[RankOutcome, ...] | None = None
    preempted_at: int | None = None
    is_kept: bool = False
    ranks: tuple[Mapping[str, Any], ...] = ()


@dataclass(frozen=True, slots=True)
class PromptMissing:
    """A gang's ranks could not all read the encoded prompt of its clip; the gang is well."""

    gang: int
    reason: str


@dataclass(frozen=True, slots=True)
class FinisherPlaced:
    """A finisher has its place and begins to load its part of the model."""

    finisher: int


@dataclass(frozen=True, slots=True)
class FinishersInTheWay:
    """A gang waits for room that these finishers take, which have places of their own."""

    finishers: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class FinisherReady:
    """A finisher has loaded its part of the model."""

    finisher: int


@dataclass(frozen=True, slots=True)
class PromptEncoded:
    """A prompt lies encoded on disk; `warnings` say what of it the text encoder did not read."""

    finisher: int
    key: str
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class PromptFailed:
    """A prompt could not be encoded; "memory": for want of it."""

    finisher: int
    key: str
    reason: str
    fault: Literal["input", "memory"] = "input"


@dataclass(frozen=True, slots=True)
class VideoCommitted:
    """A clip's video stands under its final name; `record` is its sidecar's."""

    finisher: int
    clip: str
    record: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class VideoFailed:
    """A clip's latents could not be decoded or written; "memory": for want of it."""

    finisher: int
    clip: str
    reason: str
    fault: Literal["input", "memory"] = "input"


@dataclass(frozen=True, slots=True)
class LatentsMissing:
    """A finisher found no whole latents of a clip."""

    finisher: int
    clip: str


@dataclass(frozen=True, slots=True)
class FinisherLost:
    """A finisher died, or could not start; `is_node_gone`: with its node."""

    finisher: int
    reason: str
    is_node_gone: bool = False


@dataclass(frozen=True, slots=True)
class NodesDraining:
    """All nodes that will be taken away soon."""

    nodes: frozenset[str]


@dataclass(frozen=True, slots=True)
class StopRequested:
    """The driver was sent this signal."""

    signal: int


@dataclass(frozen=True, slots=True)
class DrainEnded:
    """Gangs and finishers that were to stop have had their time."""


@dataclass(frozen=True, slots=True)
class Tick:
    """Time has passed."""


Event = (
    ClipsRead
    | StartRequested
    | GangPlaced
    | GangReady
    | StepReached
    | GangEnded
    | PromptMissing
    | FinisherPlaced
    | FinishersInTheWay
    | FinisherReady
    | PromptEncoded
    | PromptFailed
    | VideoCommitted
    | VideoFailed
    | LatentsMissing
    | FinisherLost
    | NodesDraining
    | StopRequested
    | DrainEnded
    | Tick
)
