"""One clip, one gang slot, one finisher slot: where each of them stands, as `BatchState` moves it on."""

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

PLACE_S = 60.0  # without a place; then it is said what is missing, and who waits for a certain place takes another


class Stage(Enum):
    """The stage of a clip."""

    WAITING = "waiting"
    DENOISING = "denoising"
    DENOISED = "denoised"
    FINISHING = "finishing"


class GangStage(Enum):
    """Where a gang stands. PLACING waits for room, as long as it takes; another gang has the room of JOINED."""

    GONE = "gone"
    PLACING = "placing"
    STARTING = "starting"
    IDLE = "idle"
    BUSY = "busy"
    JOINED = "joined"


@dataclass(slots=True)
class ClipState:
    """The state of one clip that has not ended.

    Attributes:
        strikes: why earlier attempts were lost.
        began_s: when its first attempt began; None before.
        avoids: name of the gang or finisher whose memory it did not fit into.
        num_shortages: attempts at the stage that memory was too short for.
        num_interrupted: decodes that ended with the gang that the finisher stood with.
        num_fruitless: attempts that ended with their node, since the clip's last step that was its farthest.
        farthest: step that it has reached so far.
        struck_on: nodes on which an attempt was lost, the nodes themselves staying.
        ranks: what its ranks computed on, once it is denoised.
        room: of the gang that it is or was denoised on.
        awaits: number of the larger gang that it is to go on with.
    """

    name: str
    id: str
    prompt_key: str
    strikes: list[str]
    num_steps: int = 1
    stage: Stage = Stage.WAITING
    began_s: float | None = None
    avoids: str | None = None
    num_shortages: int = 0
    num_interrupted: int = 0
    num_fruitless: int = 0
    farthest: int = 0
    struck_on: frozenset[str] = frozenset()
    ranks: tuple[Mapping[str, Any], ...] = ()
    room: int = 1
    awaits: int | None = None


@dataclass(slots=True)
class GangState:
    """One gang slot; many gangs may live in it, one after the other.

    Attributes:
        clip: name of the clip it denoises, while BUSY.
        changed_s: time of the last sign of progress.
        explain_s: after so long a wait for a place it is said what is missing.
        others: gangs whose room it has, beside its own.
        promised: name of the clip that it was made for, and that waits for it.
        told: (step of its clip, when it was told of it).
        step_s: of its clip, as it was lately; None until two steps are known.
    """

    number: int
    stage: GangStage = GangStage.GONE
    clip: str | None = None
    step: int | None = None
    nodes: frozenset[str] = frozenset()
    changed_s: float = 0.0
    explain_s: float = PLACE_S
    num_losses_in_a_row: int = 0
    is_retired: bool = False
    is_stop_requested: bool = False
    others: tuple[int, ...] = ()
    promised: str | None = None
    told: tuple[int, float] = (0, 0.0)
    step_s: float | None = None

    @property
    def name(self) -> str:
        return f"gang-{self.number}"

    @property
    def room(self) -> int:
        """In gangs as they began."""
        return 1 + len(self.others)

    @property
    def is_placed(self) -> bool:
        return self.stage in (GangStage.STARTING, GangStage.IDLE, GangStage.BUSY)


@dataclass(slots=True)
class FinisherState:
    """One finisher slot.

    Attributes:
        is_apart: it has a place of its own, which takes nothing that gangs need; else it stands in a gang's group.
        gang: in whose group it stands, and with which it ends; None while gone, or in a place of its own.
        finishing: names of clips: the one that is decoded, then those that wait in the actor.
        encoding: prompt keys.
        changed_s: time of the last sign of progress.
    """

    number: int
    is_apart: bool = True
    gang: int | None = None
    stage: str = "gone"  # gone, placing, loading, ready
    finishing: deque[str] = field(default_factory=deque)
    encoding: set[str] = field(default_factory=set)
    changed_s: float = 0.0
    num_losses_in_a_row: int = 0
    is_retired: bool = False

    @property
    def name(self) -> str:
        return f"finisher-{self.number}"
