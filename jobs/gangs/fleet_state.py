"""What a run on gangs consists of, and what can be asked of it; nothing here decides."""

from collections import Counter, deque
from collections.abc import Callable, Mapping
from typing import Literal

from cineray.jobs.gangs.effects import Effect, Say
from cineray.jobs.gangs.members import PLACE_S, ClipState, FinisherState, GangStage, GangState, Stage
from cineray.jobs.gangs.prompts import EncodedPrompts, WaitingClips
from cineray.jobs.gangs.tail import Growth

PER_FINISHER = 3  # latents on disk: one that is decoded, two that wait; then gangs wait


class FleetState:
    """The clips, gangs and finishers of a run, with what is asked of them.

    Args:
        hang_s: a gang whose step takes longer is killed.
        depth: clips to have waiting.
        num_apart: the first so many finishers have places of their own; None for all.
        larger: of a gang that takes the room of so many, how much faster its steps are; empty: gangs stay as they are.

    Attributes:
        waiting, denoised: names of clips, in the order in which they go on.
        stopped_by: the signal that ends the run early.
        aborted: why it is aborted.
        counts: "retries", "losses" of gangs, "yields" and "growths" so far.
        busy_s, idle_s: of all gangs together; `could_be_busy_s` leaves out the time in which no clip waited.
    """

    def __init__(
        self,
        num_gangs: int,
        num_finishers: int,
        hang_s: float,
        depth: int,
        num_apart: int | None = None,
        larger: Mapping[int, float] | None = None,
    ) -> None:
        self.gangs = [GangState(number) for number in range(num_gangs)]
        self.finishers = [
            FinisherState(number, is_apart=num_apart is None or number < num_apart) for number in range(num_finishers)
        ]
        self.clips: dict[str, ClipState] = {}
        self._prompts = EncodedPrompts()
        self.waiting = WaitingClips(self._prompts)
        self.denoised: deque[str] = deque()
        self.is_exhausted = False
        self.stopped_by: int | None = None
        self.aborted: str | None = None
        self.busy_s = 0.0
        self.idle_s = 0.0
        self.could_be_busy_s = 0.0
        self.counts: Counter[str] = Counter()
        self._has_drained = False
        self._hang_s = hang_s
        self._depth = depth
        self._draining: frozenset[str] = frozenset()
        self._gangs_in: dict[GangStage, set[int]] = {stage: set() for stage in GangStage}  # but for retired ones
        self._gangs_in[GangStage.GONE] = set(range(num_gangs))
        self._leaving: set[int] = set()  # gangs that `_is_leaving` says
        self._finishers_gone = set(range(num_finishers))  # but for retired ones
        self._num_retired: Counter[str] = Counter()
        self._num_finishing = 0
        self._prompt_failures: dict[str, list[int]] = {}  # key -> numbers of finishers that could not encode it
        self._larger = dict(larger or {})
        self._growing: dict[int, Growth] = {}  # by the gang whose clip is to move
        self._num_awaiting = 0  # clips that wait for a larger gang
        self._start_s = 0.0  # that a gang took to start, at most
        self._last_loss = ""
        self._now_s: float | None = None
        self._effects: list[Effect] = []

    @property
    def is_over(self) -> bool:
        """Nothing is left to do, or to wait for."""
        if self.aborted is not None:
            return True
        if self.stopped_by is not None:
            return self._has_drained or not any(
                clip.stage in (Stage.DENOISING, Stage.FINISHING) for clip in self.clips.values()
            )
        return self.is_exhausted and not self.clips

    @property
    def num_wanted(self) -> int:
        """Clips to read from the manifest now."""
        if self.is_exhausted or self.stopped_by is not None or self.aborted is not None:
            return 0
        return max(0, self._depth - len(self.waiting))

    @property
    def idle_reason(self) -> Literal["clips", "prompts", "finishers", "end"]:
        """What gangs that are idle now wait for; "end": no clip is left for them."""
        if self._is_behind:
            return "finishers"
        if self.waiting:
            return "prompts"
        return "end" if self.is_exhausted else "clips"

    @property
    def is_in_tail(self) -> bool:
        """Whether gangs may grow, and no clip is left for one that is idle: then `Tick` says what follows."""
        in_hand = len(self.waiting) > self._num_awaiting or not self.is_exhausted
        is_ending = self.stopped_by is not None or self.aborted is not None
        return bool(self._larger and self.clips) and not (in_hand or is_ending)

    @property
    def prompts(self) -> list[str]:
        """Keys of the prompts that are encoded on disk."""
        return list(self._prompts)

    @property
    def _is_behind(self) -> bool:
        """Finishers are so far behind that gangs must wait."""
        return len(self.denoised) + self._num_finishing >= PER_FINISHER * len(self.finishers)

    def _is_leaving(self, gang: GangState) -> bool:
        """Whether the gang takes no clip any more where it stands."""
        return gang.is_stop_requested or bool(gang.nodes & self._draining)

    def _hosts_work(self, gang: GangState) -> bool:
        return any(finisher.gang == gang.number and finisher.finishing for finisher in self.finishers)

    def _takes_work(self, finisher: FinisherState) -> bool:
        is_leaving = finisher.gang is not None and self._is_leaving(self.gangs[finisher.gang])
        return finisher.stage == "ready" and not is_leaving

    def _has_another_node(self, clip: ClipState) -> bool:
        """Whether a gang works, and would take the clip, that stands only where the clip was not lost yet."""
        working = self._gangs_in[GangStage.IDLE] | self._gangs_in[GangStage.BUSY]
        gangs = (self.gangs[number] for number in working - self._leaving)
        return any(gang.name != clip.avoids and not gang.nodes & clip.struck_on for gang in gangs)

    @property
    def _reserved(self) -> set[int]:
        """Gangs whose room a larger one will take: they take no clip."""
        return {number for growth in self._growing.values() for number in growth.room}

    def _num_starting(self, now_s: float) -> int:
        """Gangs whose room comes soon: clips move away from it, or they start, or have not waited for long."""
        elsewhere = sum(number not in growth.room for number, growth in self._growing.items())
        starting = [self.gangs[number] for number in self._gangs_in[GangStage.STARTING]]
        placing = [self.gangs[number] for number in self._gangs_in[GangStage.PLACING]]
        starting += [gang for gang in placing if now_s - gang.changed_s < PLACE_S]
        return elsewhere + len([gang for gang in starting if gang.promised is None])

    def _do(self, effect: Effect) -> None:
        self._effects.append(effect)

    def _enter(self, gang: GangState, stage: GangStage) -> None:
        self._gangs_in[gang.stage].discard(gang.number)
        gang.stage = stage
        if not gang.is_retired:
            self._gangs_in[stage].add(gang.number)

    def _move(self, clip: ClipState, stage: Stage, put: Callable[[str], None] | None = None) -> None:
        clip.stage = stage
        if put is not None:
            put(clip.name)

    def _wait_first(self, clip: ClipState) -> None:
        clip.stage = Stage.WAITING
        self.waiting.append_first(clip.name, clip.prompt_key)

    def _account(self, now_s: float) -> None:
        """Adds up how gangs spent the time since the last event."""
        passed_s = 0.0 if self._now_s is None else now_s - self._now_s
        self._now_s = now_s
        busy_s = self._room_of(GangStage.BUSY) * passed_s
        idle_s = self._room_of(GangStage.IDLE) * passed_s
        self.busy_s += busy_s
        self.idle_s += idle_s
        self.could_be_busy_s += busy_s + (idle_s if self.waiting else 0.0)

    def _room_of(self, stage: GangStage) -> int:
        """In gangs as they began."""
        if not self._gangs_in[GangStage.JOINED]:
            return len(self._gangs_in[stage])
        return sum(self.gangs[number].room for number in self._gangs_in[stage])

    def _stay(self, reason: str) -> None:
        """No gang grows any more."""
        self._larger = {}
        self._do(Say(f"{reason}: gangs are as large as they were from now on"))

    def _forget_awaited(self, clip: ClipState) -> None:
        if clip.awaits is not None:
            self.gangs[clip.awaits].promised = clip.awaits = None
            self._num_awaiting -= 1
