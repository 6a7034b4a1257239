"""Every clip of a run and where it stands: pure rules, stepped by events, answering with effects.

The driver turns what Ray says into events and performs the effects; a simulator does the same with a clock of its own;
a test replays either. Nothing here waits, reads a clock, touches a disk or knows Ray. The shape is that of dask's
worker state machine (distributed/worker_state_machine.py, `handle_stimulus`).

A clip goes WAITING -> DENOISING (on a gang) -> DENOISED (latents on disk) -> FINISHING (on a finisher) -> ended.
"""

from collections import Counter, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Literal

from cineray.jobs.gangs.effects import (
    Abort,
    AssignClip,
    BuildFinisher,
    BuildGang,
    Effect,
    EncodePrompt,
    EndClip,
    FinishClip,
    ForgetPrompt,
    KillFinisher,
    KillGang,
    Log,
    RecordFailure,
    RequestStop,
    Say,
)
from cineray.jobs.gangs.events import (
    ClipsRead,
    DrainEnded,
    Event,
    FinisherLost,
    FinisherReady,
    GangEnded,
    GangPlaced,
    GangReady,
    LatentsMissing,
    NodesDraining,
    PromptEncoded,
    PromptFailed,
    PromptMissing,
    StartRequested,
    StepReached,
    StopRequested,
    Tick,
    VideoCommitted,
    VideoFailed,
)
from cineray.jobs.gangs.prompts import EncodedPrompts, WaitingClips
from cineray.jobs.gangs.retry import classify_failure, is_hung, is_quarantined, is_retired

START_S = 1800.0  # a gang that is placed may take so long to load its weights
FINISH_STEPS = 4  # a decode may take so many times as long as a step
PER_FINISHER = 3  # latents on disk: one that is decoded, two that wait; then gangs wait
IN_FINISHER = 2  # clips handed to a finisher: one is decoded, one need not wait for the driver's next turn
GANGS_PER_FINISHER = 4  # unless the user says otherwise


def finishers_for(num_gangs: int) -> int:
    """How many finishers so many gangs have, unless the user says otherwise."""
    return -(-num_gangs // GANGS_PER_FINISHER)


def clips_ahead(num_gangs: int) -> int:
    """How many clips to have waiting for so many gangs: their prompts are encoded meanwhile."""
    return 2 * num_gangs + 2


class Stage(Enum):
    """The stage of a clip."""

    WAITING = "waiting"
    DENOISING = "denoising"
    DENOISED = "denoised"
    FINISHING = "finishing"


class GangStage(Enum):
    """Where a gang stands. PLACING waits for room, which may take as long as it likes."""

    GONE = "gone"
    PLACING = "placing"
    STARTING = "starting"
    IDLE = "idle"
    BUSY = "busy"


@dataclass(slots=True)
class ClipState:
    """The state of one clip that has not ended.

    Attributes:
        strikes: why earlier attempts were lost.
        began_s: when its first attempt began; None before.
    """

    name: str
    id: str
    prompt_key: str
    strikes: list[str]
    stage: Stage = Stage.WAITING
    began_s: float | None = None


@dataclass(slots=True)
class GangState:
    """One gang slot; many gangs may live in it, one after the other.

    Attributes:
        clip: name of the clip it denoises, while BUSY.
        changed_s: time of the last sign of progress.
    """

    number: int
    stage: GangStage = GangStage.GONE
    clip: str | None = None
    step: int | None = None
    nodes: frozenset[str] = frozenset()
    changed_s: float = 0.0
    num_losses_in_a_row: int = 0
    is_retired: bool = False
    is_stop_requested: bool = False

    @property
    def name(self) -> str:
        return f"gang-{self.number}"


@dataclass(slots=True)
class FinisherState:
    """One finisher slot.

    Attributes:
        finishing: names of clips: the one that is decoded, then those that wait in the actor.
        encoding: prompt keys.
        changed_s: time of the last sign of progress.
    """

    number: int
    stage: str = "gone"  # gone, loading, ready
    finishing: deque[str] = field(default_factory=deque)
    encoding: set[str] = field(default_factory=set)
    changed_s: float = 0.0
    num_losses_in_a_row: int = 0
    is_retired: bool = False

    @property
    def name(self) -> str:
        return f"finisher-{self.number}"


class BatchState:
    """The state of a run on gangs, and the rules that move it on.

    Args:
        hang_s: a gang whose step takes longer is killed.
        depth: clips to have waiting.

    Attributes:
        waiting, denoised: names of clips, in the order in which they go on.
        stopped_by: the signal that ends the run early.
        aborted: why it is aborted.
        counts: "retries", "losses" of gangs and "yields" so far.
        busy_s, idle_s: of all gangs together; `could_be_busy_s` leaves out the time in which no clip waited.
    """

    def __init__(self, num_gangs: int, num_finishers: int, hang_s: float, depth: int) -> None:
        self.gangs = [GangState(number) for number in range(num_gangs)]
        self.finishers = [FinisherState(number) for number in range(num_finishers)]
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
        self._gangs_on_draining: set[int] = set()
        self._finishers_gone = set(range(num_finishers))
        self._num_retired: Counter[str] = Counter()
        self._num_finishing = 0
        self._last_loss = ""
        self._now_s: float | None = None
        self._effects: list[Effect] = []

    # ---- questions

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
    def prompts(self) -> list[str]:
        """Keys of the prompts that are encoded on disk."""
        return list(self._prompts)

    # ---- the one way in

    def handle(self, event: Event, now_s: float) -> list[Effect]:
        """Moves the state on; what has to be done for it, in this order.

        Args:
            now_s: of one monotonic clock, never decreasing.
        """
        self._account(now_s)
        self._effects = []
        _HANDLERS[type(event)](self, event, now_s)
        if self.aborted is None and self.stopped_by is None:
            self._schedule(now_s)
        effects, self._effects = self._effects, []
        return effects

    # ---- events

    def _on_clips_read(self, event: ClipsRead, _now_s: float) -> None:
        for new in event.clips:
            self.clips[new.name] = ClipState(new.name, new.id, new.prompt_key, list(new.strikes))
            self._prompts.need(new.prompt_key)
            self.waiting.append(new.name, new.prompt_key)
        self.is_exhausted = self.is_exhausted or event.is_last

    def _on_start_requested(self, _event: StartRequested, now_s: float) -> None:
        self._build(now_s)

    def _on_gang_placed(self, event: GangPlaced, now_s: float) -> None:
        gang = self.gangs[event.gang]
        gang.nodes, gang.changed_s = event.nodes, now_s
        self._enter(gang, GangStage.STARTING)
        if gang.nodes & self._draining:
            self._gangs_on_draining.add(gang.number)

    def _on_gang_ready(self, event: GangReady, now_s: float) -> None:
        gang = self.gangs[event.gang]
        gang.changed_s = now_s
        self._enter(gang, GangStage.IDLE)
        self._do(Log("built", {"actor": gang.name, "pids": list(event.pids), "nodes": sorted(gang.nodes)}))

    def _on_step_reached(self, event: StepReached, now_s: float) -> None:
        gang = self.gangs[event.gang]
        if gang.stage is GangStage.BUSY:
            gang.step, gang.changed_s = event.step, now_s

    def _on_gang_ended(self, event: GangEnded, now_s: float) -> None:
        gang = self.gangs[event.gang]
        clip = None if gang.clip is None else self.clips[gang.clip]
        if event.outcomes is None and clip is not None:
            gang.num_losses_in_a_row = 0
            if event.preempted_at is None:
                self._release(gang, now_s)
                self._move(clip, Stage.DENOISED, self.denoised.append)
                return
            self._wait_first(clip)
            self.counts["yields"] += 1
            kept = {"step": event.preempted_at, "kept": event.is_kept}
            self._do(Log("yielded", {"id": clip.id, "gang": gang.name, **kept}))
            self._do(Say(f"{clip.id}: preempted after step {event.preempted_at} by {gang.name}"))
            self._kill(gang, now_s)
            return
        decision = classify_failure(event.outcomes or ())
        if clip is not None and decision.clip == "failed":
            self._fail(clip, decision.reason, now_s)
            if decision.keep_gang:
                self._release(gang, now_s)
                return
        elif clip is not None:
            is_excused = bool(gang.nodes & self._draining)
            self._strike(clip, f"{gang.name}: {decision.reason}", now_s, is_excused=is_excused)
        self._lose(gang, decision.reason, now_s)

    def _on_prompt_missing(self, event: PromptMissing, now_s: float) -> None:
        gang = self.gangs[event.gang]
        clip = self.clips[gang.clip or ""]
        gang.num_losses_in_a_row = 0
        self._release(gang, now_s)
        self._prompts.drop(clip.prompt_key)
        self.waiting.prompt_lost(clip.prompt_key)
        self._strike(clip, f"{gang.name}: {event.reason}", now_s)

    def _on_finisher_ready(self, event: FinisherReady, _now_s: float) -> None:
        self.finishers[event.finisher].stage = "ready"

    def _on_prompt_encoded(self, event: PromptEncoded, _now_s: float) -> None:
        self.finishers[event.finisher].encoding.discard(event.key)
        for old in self._prompts.add(event.key, event.warnings):
            self._do(ForgetPrompt(old))
        self.waiting.prompt_added(event.key)

    def _on_prompt_failed(self, event: PromptFailed, now_s: float) -> None:
        self.finishers[event.finisher].encoding.discard(event.key)
        for name in self.waiting.with_prompt(event.key):
            self._fail(self.clips[name], event.reason, now_s)

    def _on_video_committed(self, event: VideoCommitted, now_s: float) -> None:
        finisher, clip = self._finished(event.finisher, event.clip, now_s)
        finisher.num_losses_in_a_row = 0
        self._end(clip, "done", now_s, record=event.record)

    def _on_video_failed(self, event: VideoFailed, now_s: float) -> None:
        _, clip = self._finished(event.finisher, event.clip, now_s)
        self._fail(clip, event.reason, now_s)

    def _on_latents_missing(self, event: LatentsMissing, now_s: float) -> None:
        finisher, clip = self._finished(event.finisher, event.clip, now_s)
        self._strike(clip, f"{finisher.name} found no latents", now_s)

    def _on_finisher_lost(self, event: FinisherLost, now_s: float) -> None:
        self._lose_finisher(self.finishers[event.finisher], event.reason, now_s)

    def _on_nodes_draining(self, event: NodesDraining, _now_s: float) -> None:
        self._draining = event.nodes
        self._gangs_on_draining = {gang.number for gang in self.gangs if gang.nodes & self._draining}
        for gang in self.gangs:
            if gang.nodes & self._draining and not gang.is_stop_requested:
                gang.is_stop_requested = True
                if gang.stage is GangStage.BUSY:
                    self._do(RequestStop(gang.number))

    def _on_stop_requested(self, event: StopRequested, now_s: float) -> None:
        """Every gang preempts its clip after the step it is in; finishers end the clips they have."""
        self.stopped_by = event.signal
        self._do(Log("stopping", {"signal": event.signal}))
        for gang in self.gangs:
            if gang.stage is GangStage.BUSY:
                gang.is_stop_requested = True
                self._do(RequestStop(gang.number))
            elif gang.stage is not GangStage.GONE:
                self._kill(gang, now_s)

    def _on_drain_ended(self, _event: DrainEnded, _now_s: float) -> None:
        """A clip that has not ended by now is resumed by the next run, from its last step state."""
        self._has_drained = True

    def _on_tick(self, _event: Tick, now_s: float) -> None:
        for gang in self.gangs:
            limit_s = self._hang_s if gang.stage is GangStage.BUSY else START_S
            watched = gang.stage in (GangStage.STARTING, GangStage.BUSY)
            if watched and is_hung(now_s, gang.changed_s, limit_s):
                reason = f"no sign of progress for {limit_s:g} s"
                if gang.clip is not None:
                    self._strike(self.clips[gang.clip], f"{gang.name}: {reason}", now_s)
                self._lose(gang, reason, now_s)
        for finisher in self.finishers:
            limit_s = FINISH_STEPS * self._hang_s
            if finisher.finishing and is_hung(now_s, finisher.changed_s, limit_s):
                self._lose_finisher(finisher, f"no sign of progress for {limit_s:g} s", now_s)

    # ---- what clips and gangs go through

    def _move(self, clip: ClipState, stage: Stage, put: Callable[[str], None] | None = None) -> None:
        clip.stage = stage
        if put is not None:
            put(clip.name)

    def _wait_first(self, clip: ClipState) -> None:
        clip.stage = Stage.WAITING
        self.waiting.append_first(clip.name, clip.prompt_key)

    def _enter(self, gang: GangState, stage: GangStage) -> None:
        self._gangs_in[gang.stage].discard(gang.number)
        gang.stage = stage
        if not gang.is_retired:
            self._gangs_in[stage].add(gang.number)

    def _strike(
        self, clip: ClipState, reason: str, now_s: float, is_excused: bool = False, to_finish: bool = False
    ) -> None:
        """An attempt was lost: try again, or quarantine the clip."""
        self.counts["retries"] += 1
        if not is_excused:
            clip.strikes.append(reason)
            if is_quarantined(len(clip.strikes)):
                self._do(RecordFailure(clip.name, "quarantined", tuple(clip.strikes)))
                for gang in self.gangs:
                    gang.num_losses_in_a_row = 0  # this clip explains them
                said = f"{len(clip.strikes)} attempts were lost; the last: {reason}"
                self._end(clip, "quarantined", now_s, said)
                return
            self._do(RecordFailure(clip.name, "retrying", tuple(clip.strikes)))
        self._do(Log("retrying", {"id": clip.id, "strikes": len(clip.strikes), "reason": reason}))
        self._do(Say(f"{clip.id}: will try again ({len(clip.strikes)} strikes): {reason}"))
        if to_finish:
            self._move(clip, Stage.DENOISED, self.denoised.appendleft)
        else:
            self._wait_first(clip)

    def _fail(self, clip: ClipState, reason: str, now_s: float) -> None:
        """The clip's own input is at fault: another attempt would end alike."""
        clip.strikes.append(reason)
        self._do(RecordFailure(clip.name, "failed", tuple(clip.strikes)))
        self._end(clip, "failed", now_s, reason)

    def _end(
        self,
        clip: ClipState,
        status: Literal["done", "failed", "quarantined"],
        now_s: float,
        error: str | None = None,
        record: Mapping[str, Any] | None = None,
    ) -> None:
        if clip.stage is Stage.WAITING:
            self.waiting.remove(clip.name)
        elif clip.stage is Stage.DENOISED:
            self.denoised.remove(clip.name)
        del self.clips[clip.name]
        self._prompts.release(clip.prompt_key)
        wall_s = 0.0 if clip.began_s is None else now_s - clip.began_s
        self._do(EndClip(clip.name, status, wall_s, error, record))

    def _finished(self, number: int, name: str, now_s: float) -> tuple[FinisherState, ClipState]:
        finisher = self.finishers[number]
        finisher.finishing.remove(name)
        self._num_finishing -= 1
        finisher.changed_s = now_s
        return finisher, self.clips[name]

    def _release(self, gang: GangState, now_s: float) -> None:
        gang.clip, gang.step, gang.changed_s = None, None, now_s
        self._enter(gang, GangStage.IDLE)

    def _lose(self, gang: GangState, reason: str, now_s: float) -> None:
        self._last_loss = reason
        gang.num_losses_in_a_row += 1
        gang.is_retired = is_retired(gang.num_losses_in_a_row)
        self._num_retired["gang"] += gang.is_retired
        self.counts["losses"] += 1
        then = "retired" if gang.is_retired else "built again"
        self._do(Log("lost", {"actor": gang.name, "reason": reason, "then": then}))
        self._do(Say(f"{gang.name} was lost and is {then}: {reason}"))
        self._kill(gang, now_s)

    def _kill(self, gang: GangState, now_s: float) -> None:
        gang.clip, gang.step, gang.changed_s = None, None, now_s
        gang.nodes, gang.is_stop_requested = frozenset(), False
        self._enter(gang, GangStage.GONE)
        self._gangs_on_draining.discard(gang.number)
        self._do(KillGang(gang.number))

    def _lose_finisher(self, finisher: FinisherState, reason: str, now_s: float) -> None:
        self._last_loss = reason
        finisher.num_losses_in_a_row += 1
        finisher.is_retired = is_retired(finisher.num_losses_in_a_row)
        if finisher.is_retired:
            self._num_retired["finisher"] += 1
        else:
            self._finishers_gone.add(finisher.number)
        self._do(Log("lost", {"actor": finisher.name, "reason": reason}))
        self._do(Say(f"{finisher.name} was lost: {reason}"))
        names = list(finisher.finishing)
        finisher.stage = "gone"
        finisher.finishing.clear()
        self._num_finishing -= len(names)
        for key in finisher.encoding:
            self.waiting.prompt_lost(key)
        finisher.encoding.clear()
        for name in reversed(names[1:]):  # had not begun
            self._move(self.clips[name], Stage.DENOISED, self.denoised.appendleft)
        if names:
            self._strike(self.clips[names[0]], f"{finisher.name}: {reason}", now_s, to_finish=True)
        self._do(KillFinisher(finisher.number))

    # ---- scheduling

    def _schedule(self, now_s: float) -> None:
        if not self.clips:
            return
        self._build(now_s)
        if self.aborted is None:
            self._encode_prompts()
            self._hand_to_finishers(now_s)
            self._hand_to_gangs(now_s)

    def _build(self, now_s: float) -> None:
        for kind, number in (("gang", len(self.gangs)), ("finisher", len(self.finishers))):
            if self._num_retired[kind] == number:
                self.aborted = f"every {kind} was lost several times in a row, at last: {self._last_loss}"
                self._do(Abort(self.aborted))
                return
        for finisher in [self.finishers[number] for number in sorted(self._finishers_gone)]:
            finisher.stage, finisher.changed_s = "loading", now_s
            self._do(BuildFinisher(finisher.number))
        self._finishers_gone.clear()
        for gang in [self.gangs[number] for number in sorted(self._gangs_in[GangStage.GONE])]:
            gang.changed_s = now_s
            self._enter(gang, GangStage.PLACING)
            self._do(BuildGang(gang.number))

    def _encode_prompts(self) -> None:
        ready = [finisher for finisher in self.finishers if finisher.stage == "ready"] if self.waiting.unencoded else []
        if not ready:
            return
        for name, key in self.waiting.take_unencoded():
            if key not in self._prompts and not any(key in finisher.encoding for finisher in ready):
                finisher = min(ready, key=lambda finisher: len(finisher.encoding))
                finisher.encoding.add(key)
                self._do(EncodePrompt(finisher.number, name))

    def _hand_to_finishers(self, now_s: float) -> None:
        for finisher in self.finishers if self.denoised else ():
            while finisher.stage == "ready" and self.denoised and len(finisher.finishing) < IN_FINISHER:
                clip = self.clips[self.denoised.popleft()]
                if not finisher.finishing:
                    finisher.changed_s = now_s
                finisher.finishing.append(clip.name)
                self._num_finishing += 1
                self._move(clip, Stage.FINISHING)
                self._do(FinishClip(finisher.number, clip.name))

    def _hand_to_gangs(self, now_s: float) -> None:
        idle = self._gangs_in[GangStage.IDLE]
        if not idle or self._is_behind:
            return
        wanted = idle if self.waiting.next() is not None else idle & self._gangs_on_draining
        for gang in [self.gangs[number] for number in sorted(wanted)]:
            if gang.number in self._gangs_on_draining:
                self._kill(gang, now_s)
                continue
            name = self.waiting.next()
            if name is None:
                continue
            clip = self.clips[name]
            self.waiting.remove(name)
            clip.began_s = now_s if clip.began_s is None else clip.began_s
            self._move(clip, Stage.DENOISING)
            gang.clip, gang.step, gang.changed_s = name, None, now_s
            self._enter(gang, GangStage.BUSY)
            self._do(AssignClip(gang.number, name, self._prompts.warnings(clip.prompt_key)))

    @property
    def _is_behind(self) -> bool:
        """Finishers are so far behind that gangs must wait."""
        return len(self.denoised) + self._num_finishing >= PER_FINISHER * len(self.finishers)

    def _account(self, now_s: float) -> None:
        """Adds up how gangs spent the time since the last event."""
        passed_s = 0.0 if self._now_s is None else now_s - self._now_s
        self._now_s = now_s
        busy_s = len(self._gangs_in[GangStage.BUSY]) * passed_s
        idle_s = len(self._gangs_in[GangStage.IDLE]) * passed_s
        self.busy_s += busy_s
        self.idle_s += idle_s
        self.could_be_busy_s += busy_s + (idle_s if self.waiting else 0.0)

    def _do(self, effect: Effect) -> None:
        self._effects.append(effect)


_HANDLERS = {
    ClipsRead: BatchState._on_clips_read,
    StartRequested: BatchState._on_start_requested,
    GangPlaced: BatchState._on_gang_placed,
    GangReady: BatchState._on_gang_ready,
    StepReached: BatchState._on_step_reached,
    GangEnded: BatchState._on_gang_ended,
    PromptMissing: BatchState._on_prompt_missing,
    FinisherReady: BatchState._on_finisher_ready,
    PromptEncoded: BatchState._on_prompt_encoded,
    PromptFailed: BatchState._on_prompt_failed,
    VideoCommitted: BatchState._on_video_committed,
    VideoFailed: BatchState._on_video_failed,
    LatentsMissing: BatchState._on_latents_missing,
    FinisherLost: BatchState._on_finisher_lost,
    NodesDraining: BatchState._on_nodes_draining,
    StopRequested: BatchState._on_stop_requested,
    DrainEnded: BatchState._on_drain_ended,
    Tick: BatchState._on_tick,
}
