"""What a run on gangs has to do next, as its state says: plain values, performed by the driver or counted by a test."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True, slots=True)
class BuildGang:
    """Ask for a place and start the ranks there; in the room of `others`, too, which are gone."""

    gang: int
    others: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class KillGang:
    """Kill every rank and give the place back."""

    gang: int


@dataclass(frozen=True, slots=True)
class ExplainWait:
    """Say what a gang is missing that has waited for its place for so long."""

    gang: int
    waited_s: float


@dataclass(frozen=True, slots=True)
class AssignClip:
    """Let an idle gang denoise a clip; `warnings` say what of its prompts was not read."""

    gang: int
    clip: str
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class RequestStop:
    """Let a busy gang preempt its clip after the current step."""

    gang: int


@dataclass(frozen=True, slots=True)
class BuildFinisher:
    """Start a finisher, in the placement group of a gang that has its place; None: in a place of its own."""

    finisher: int
    gang: int | None = None


@dataclass(frozen=True, slots=True)
class KillFinisher:
    """Kill a finisher."""

    finisher: int


@dataclass(frozen=True, slots=True)
class EncodePrompt:
    """Let a finisher encode the prompt of a clip, for all clips that share it."""

    finisher: int
    clip: str


@dataclass(frozen=True, slots=True)
class FinishClip:
    """Let a finisher decode and commit a clip whose latents are on disk.

    Args:
        ranks: say what they were computed on.
        room: of the gang that ended them, in gangs as they began.
    """

    finisher: int
    clip: str
    ranks: tuple[Mapping[str, Any], ...] = ()
    room: int = 1


@dataclass(frozen=True, slots=True)
class ForgetPrompt:
    """Remove an encoded prompt from the disk."""

    key: str


@dataclass(frozen=True, slots=True)
class RecordFailure:
    """Write down what a clip has been through."""

    clip: str
    status: Literal["retrying", "failed", "quarantined"]
    reasons: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class EndClip:
    """A clip is out of hand, `wall_s` after its first attempt began; `record` is that of one that is done."""

    clip: str
    status: Literal["done", "failed", "quarantined"]
    wall_s: float
    error: str | None = None
    record: Mapping[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class Log:
    """A line of events.jsonl."""

    event: str
    fields: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Say:
    """A line for the person who watches."""

    message: str


@dataclass(frozen=True, slots=True)
class Abort:
    """The run is aborted."""

    reason: str


Effect = (
    BuildGang
    | KillGang
    | ExplainWait
    | AssignClip
    | RequestStop
    | BuildFinisher
    | KillFinisher
    | EncodePrompt
    | FinishClip
    | ForgetPrompt
    | RecordFailure
    | EndClip
    | Log
    | Say
    | Abort
)
