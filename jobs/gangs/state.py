"""Every clip of a run and where it stands: pure rules, stepped by events, answering with effects.

The driver turns what Ray says into events and performs the effects; a simulator does the same with a clock of its own;
a test replays either. Nothing here waits, reads a clock, touches a disk or knows Ray. The shape is that of dask's
worker state machine (distributed/worker_state_machine.py, `handle_stimulus`).

A clip goes WAITING -> DENOISING (on a gang) -> DENOISED (latents on disk) -> FINISHING (on a finisher) -> ended.
"""

import math
from collections import Counter, deque
from collections.abc import Callable, Mapping
from typing import Any, Literal

from cineray.jobs.gangs.effects import (
    Abort,
    AssignClip,
    BuildFinisher,
    BuildGang,
    Effect,
    EncodePrompt,
    EndClip,
    ExplainWait,
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
    FinisherPlaced,
    FinisherReady,
    FinishersInTheWay,
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
from cineray.jobs.gangs.members import PLACE_S, ClipState, FinisherState, GangStage, GangState, Stage
from cineray.jobs.gangs.prompts import EncodedPrompts, WaitingClips
from cineray.jobs.gangs.retry import (
    MAX_FRUITLESS,
    MAX_PROMPT_TRIES,
    MAX_STRIKES,
    classify_failure,
    is_hung,
    is_quarantined,
    is_retired,
)
from cineray.jobs.gangs.tail import Growth, Standing, grow

START_S = 1800.0  # a gang or a finisher that is placed may take so long to load its weights
REPEAT_S = 300.0  # between two times that it is said
FINISH_STEPS = 4  # a decode may take so many times as long as a step
PER_FINISHER = 3  # latents on disk: one that is decoded, two that wait; then gangs wait
IN_FINISHER = 2  # clips handed to a finisher: one is decoded, one need not wait for the driver's next turn


def clips_ahead(num_gangs: int) -> int:
    """How many clips to have waiting for so many gangs: their prompts are encoded meanwhile."""
    return 2 * num_gangs + 2


class BatchState:
    """The state of a run on gangs, and the rules that move it on.

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
    def is_in_tail(self) -> bool:
        """Whether gangs may grow, and no clip is left for one that is idle: then `Tick` says what follows."""
        in_hand = len(self.waiting) > self._num_awaiting or not self.is_exhausted
        is_ending = self.stopped_by is not None or self.aborted is not None
        return bool(self._larger and self.clips) and not (in_hand or is_ending)

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
            self.clips[new.name] = ClipState(new.name, new.id, new.prompt_key, list(new.strikes), new.num_steps)
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
            self._leaving.add(gang.number)

    def _on_gang_ready(self, event: GangReady, now_s: float) -> None:
        gang = self.gangs[event.gang]
        self._start_s = max(self._start_s, now_s - gang.changed_s)
        gang.changed_s = now_s
        self._enter(gang, GangStage.IDLE)
        self._do(Log("built", {"actor": gang.name, "pids": list(event.pids), "nodes": sorted(gang.nodes)}))

    def _on_step_reached(self, event: StepReached, now_s: float) -> None:
        gang = self.gangs[event.gang]
        if gang.stage is GangStage.BUSY:
            gang.step, gang.changed_s = event.step, now_s
            clip = self.clips[gang.clip or ""]
            if event.step > clip.farthest:
                clip.farthest, clip.num_fruitless = event.step, 0
            known, at_s = gang.told
            if event.step > known:
                step_s = (now_s - at_s) / (event.step - known)
                gang.step_s = step_s if gang.step_s is None else (gang.step_s + step_s) / 2
            gang.told = event.step, now_s

    def _on_gang_ended(self, event: GangEnded, now_s: float) -> None:
        gang = self.gangs[event.gang]
        clip = None if gang.clip is None else self.clips[gang.clip]
        growth = self._growing.pop(gang.number, None)
        if event.outcomes is None and clip is not None:
            gang.num_losses_in_a_row = 0
            if event.preempted_at is None:
                clip.ranks, clip.num_shortages = event.ranks, 0
                ranks = [dict(rank) for rank in event.ranks]
                self._do(Log("denoised", {"id": clip.id, "gang": gang.name, "ranks": ranks}))
                self._release(gang, now_s)
                self._move(clip, Stage.DENOISED, self.denoised.append)
                return
            self._wait_first(clip)
            self.counts["yields"] += 1
            kept = {"step": event.preempted_at, "kept": event.is_kept}
            self._do(Log("yielded", {"id": clip.id, "gang": gang.name, **kept}))
            self._do(Say(f"{clip.id}: preempted after step {event.preempted_at} by {gang.name}"))
            if growth is not None and event.is_kept and not gang.nodes & self._draining:
                self._grow(growth, clip, now_s)
            if gang.stage is GangStage.BUSY:
                self._put_down(gang, now_s)
            return
        decision = classify_failure(event.outcomes or ())
        if clip is not None and decision.clip == "failed":
            self._fail(clip, decision.reason, now_s)
            if decision.keep_gang:
                self._release(gang, now_s)
                return
        elif clip is not None and decision.clip == "elsewhere":
            self._move_elsewhere(clip, gang.name, decision.reason, now_s)
            if decision.keep_gang:
                self._release(gang, now_s)
                return
        elif clip is not None:
            is_excused = self._is_excused(clip, gang, decision.is_node_gone)
            self._strike(clip, f"{gang.name}: {decision.reason}", now_s, is_excused=is_excused)
        self._lose(gang, decision.reason, now_s, is_node_gone=decision.is_node_gone)

    def _on_prompt_missing(self, event: PromptMissing, now_s: float) -> None:
        gang = self.gangs[event.gang]
        clip = self.clips[gang.clip or ""]
        gang.num_losses_in_a_row = 0
        self._release(gang, now_s)
        self._prompts.drop(clip.prompt_key)
        self.waiting.prompt_lost(clip.prompt_key)
        self._strike(clip, f"{gang.name}: {event.reason}", now_s)

    def _on_finisher_placed(self, event: FinisherPlaced, now_s: float) -> None:
        finisher = self.finishers[event.finisher]
        finisher.stage, finisher.changed_s = "loading", now_s

    def _on_finishers_in_the_way(self, event: FinishersInTheWay, now_s: float) -> None:
        for number in event.finishers:
            finisher = self.finishers[number]
            if finisher.is_apart and finisher.stage != "gone":
                self._do(Say(f"{finisher.name} makes room for a gang, and will stand with one"))
                finisher.is_apart = False
                self._empty(finisher, "made room for a gang", now_s, is_excused=True)

    def _on_finisher_ready(self, event: FinisherReady, now_s: float) -> None:
        finisher = self.finishers[event.finisher]
        finisher.stage, finisher.changed_s = "ready", now_s
        stands_with = None if finisher.gang is None else self.gangs[finisher.gang].name
        self._do(Log("ready", {"actor": finisher.name, "with": stands_with}))

    def _on_prompt_encoded(self, event: PromptEncoded, now_s: float) -> None:
        finisher = self.finishers[event.finisher]
        finisher.encoding.discard(event.key)
        finisher.changed_s = now_s
        self._prompt_failures.pop(event.key, None)
        for old in self._prompts.add(event.key, event.warnings):
            self._do(ForgetPrompt(old))
        self.waiting.prompt_added(event.key)

    def _on_prompt_failed(self, event: PromptFailed, now_s: float) -> None:
        """Another finisher tries; where that fails too, the clips that wait for the prompt are let go."""
        finisher = self.finishers[event.finisher]
        finisher.encoding.discard(event.key)
        finisher.changed_s = now_s
        failures = self._prompt_failures.setdefault(event.key, [])
        failures.append(event.finisher)
        is_short = event.fault == "memory"
        if len(failures) < (MAX_STRIKES if is_short else MAX_PROMPT_TRIES):
            self._do(Log("retrying", {"prompt": event.key, "actor": finisher.name, "reason": event.reason}))
            self._do(Say(f"a prompt will be encoded again, {finisher.name} could not: {event.reason}"))
            self.waiting.prompt_lost(event.key)
            return
        del self._prompt_failures[event.key]
        for name in self.waiting.with_prompt(event.key):
            if is_short:
                self._quarantine(self.clips[name], f"its prompt does not fit: {event.reason}", now_s)
            else:
                self._fail(self.clips[name], event.reason, now_s)

    def _on_video_committed(self, event: VideoCommitted, now_s: float) -> None:
        finisher, clip = self._finished(event.finisher, event.clip, now_s)
        finisher.num_losses_in_a_row = 0
        self._end(clip, "done", now_s, record=event.record)

    def _on_video_failed(self, event: VideoFailed, now_s: float) -> None:
        finisher, clip = self._finished(event.finisher, event.clip, now_s)
        if event.fault == "memory":
            self._move_elsewhere(clip, finisher.name, event.reason, now_s, to_finish=True)
        else:
            self._fail(clip, event.reason, now_s)

    def _on_latents_missing(self, event: LatentsMissing, now_s: float) -> None:
        finisher, clip = self._finished(event.finisher, event.clip, now_s)
        self._strike(clip, f"{finisher.name} found no latents", now_s)

    def _on_finisher_lost(self, event: FinisherLost, now_s: float) -> None:
        self._lose_finisher(self.finishers[event.finisher], event.reason, now_s, event.is_node_gone)

    def _on_nodes_draining(self, event: NodesDraining, _now_s: float) -> None:
        self._draining = event.nodes
        for gang in self.gangs:
            if gang.nodes & self._draining and not gang.is_stop_requested:
                gang.is_stop_requested = True
                if gang.stage is GangStage.BUSY:
                    self._do(RequestStop(gang.number))
        self._leaving = {gang.number for gang in self.gangs if self._is_leaving(gang)}

    def _on_stop_requested(self, event: StopRequested, now_s: float) -> None:
        """Every gang preempts its clip after the step it is in; finishers end the clips they have."""
        self.stopped_by = event.signal
        self._growing.clear()
        self._do(Log("stopping", {"signal": event.signal}))
        for gang in self.gangs:
            if gang.stage is GangStage.BUSY:
                gang.is_stop_requested = True
                self._do(RequestStop(gang.number))
            elif gang.stage not in (GangStage.GONE, GangStage.JOINED) and not self._hosts_work(gang):
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
                    clip = self.clips[gang.clip]
                    self._strike(clip, f"{gang.name}: {reason}", now_s, is_excused=self._is_excused(clip, gang))
                self._lose(gang, reason, now_s)
            waited_s = now_s - gang.changed_s
            if gang.stage is GangStage.PLACING and waited_s >= gang.explain_s:
                gang.explain_s = waited_s + REPEAT_S
                self._do(ExplainWait(gang.number, waited_s))
                if gang.others:
                    self._stay(f"{gang.name} finds no place as a larger gang")
                    self._kill(gang, now_s)
        for finisher in self.finishers:
            is_loading = finisher.stage == "loading" or (finisher.stage == "placing" and not finisher.is_apart)
            limit_s = START_S if is_loading else FINISH_STEPS * self._hang_s
            is_watched = is_loading or finisher.finishing or finisher.encoding
            if is_watched and is_hung(now_s, finisher.changed_s, limit_s):
                self._lose_finisher(finisher, f"no sign of progress for {limit_s:g} s", now_s)
            self._look_elsewhere(finisher, now_s)
        if self.is_in_tail and self._gangs_in[GangStage.IDLE]:
            self._look_for_growth(now_s)

    def _look_elsewhere(self, finisher: FinisherState, now_s: float) -> None:
        """A finisher that finds no place of its own stands with a gang, as soon as one has its place."""
        waits = finisher.stage == "placing" and finisher.is_apart
        if waits and now_s - finisher.changed_s >= PLACE_S and any(gang.is_placed for gang in self.gangs):
            self._do(
                Say(f"{finisher.name} has found no place of its own for {PLACE_S:g} s, and will stand with a gang")
            )
            finisher.is_apart = False
            self._empty(finisher, "no place", now_s, is_excused=True)

    # ---- fewer clips than gangs

    def _look_for_growth(self, now_s: float) -> None:
        """Lets clips be preempted that would be done sooner in the room of several gangs."""
        coming = [(number, growth.num_gangs) for number, growth in self._growing.items()]
        coming += [(gang.number, gang.room) for gang in self.gangs if gang.promised is not None]
        standing = [Standing(gang=number, room=room, node="", rest_s=math.inf) for number, room in coming]
        passed_over = self._leaving | self._reserved | {number for number, _ in coming}
        hosts = {finisher.gang for finisher in self.finishers if finisher.finishing}
        for number in sorted((self._gangs_in[GangStage.IDLE] | self._gangs_in[GangStage.BUSY]) - passed_over):
            gang, may_move = self.gangs[number], number not in hosts and len(self.gangs[number].nodes) == 1
            if gang.stage is GangStage.BUSY:
                standing.append(self._busy(gang, may_move, now_s))
            elif may_move:
                standing.append(Standing(gang=number, room=gang.room, node=min(gang.nodes)))
        for growth in grow(standing, self._larger, self._start_s, self._num_starting(now_s)):
            gang = self.gangs[growth.gang]
            self._growing[gang.number] = growth
            gang.is_stop_requested = True
            self._leaving.add(gang.number)
            self._do(RequestStop(gang.number))

    def _num_starting(self, now_s: float) -> int:
        """Gangs whose room comes soon: clips move away from it, or they start, or have not waited for long."""
        elsewhere = sum(number not in growth.room for number, growth in self._growing.items())
        starting = [self.gangs[number] for number in self._gangs_in[GangStage.STARTING]]
        placing = [self.gangs[number] for number in self._gangs_in[GangStage.PLACING]]
        starting += [gang for gang in placing if now_s - gang.changed_s < PLACE_S]
        return elsewhere + len([gang for gang in starting if gang.promised is None])

    def _busy(self, gang: GangState, may_move: bool, now_s: float) -> Standing:
        rest_s, (step, at_s) = math.inf, gang.told
        if gang.step_s is not None:
            left = self.clips[gang.clip or ""].num_steps - step
            rest_s = max(0.0, left * gang.step_s - (now_s - at_s))
        node, step_s = min(gang.nodes, default=""), gang.step_s if may_move else None
        return Standing(gang=gang.number, room=gang.room, node=node, rest_s=rest_s, step_s=step_s)

    @property
    def _reserved(self) -> set[int]:
        """Gangs whose room a larger one will take: they take no clip."""
        return {number for growth in self._growing.values() for number in growth.room}

    def _grow(self, growth: Growth, clip: ClipState, now_s: float) -> None:
        """The clip has been preempted: its larger gang is built, if the room for it is still there."""
        gangs = [self.gangs[number] for number in growth.room]
        are_there = all(gang.number == growth.gang or gang.stage is GangStage.IDLE for gang in gangs)
        if not (self._larger and are_there and len({gang.nodes for gang in gangs}) == 1):
            return
        lead = gangs[0]
        room = [number for gang in gangs for number in (gang.number, *gang.others)]
        for gang in gangs:
            self._kill(gang, now_s)
        lead.others = tuple(number for number in room if number != lead.number)[: growth.num_gangs - 1]
        for number in lead.others:
            self._enter(self.gangs[number], GangStage.JOINED)
        clip.awaits, lead.promised = lead.number, clip.name
        self._num_awaiting += 1
        self.counts["growths"] += 1
        took = ", ".join(self.gangs[number].name for number in lead.others)
        self._do(
            Log("grown", {"actor": lead.name, "room": [f"gang-{number}" for number in lead.others], "id": clip.id})
        )
        self._do(Say(f"{clip.id}: goes on with {lead.name} in the room of {took}, too: {growth.saved_s:.0f} s sooner"))
        self._begin_placing(lead, now_s)

    def _stay(self, reason: str) -> None:
        """No gang grows any more."""
        self._larger = {}
        self._do(Say(f"{reason}: gangs are as large as they were from now on"))

    def _forget_awaited(self, clip: ClipState) -> None:
        if clip.awaits is not None:
            self.gangs[clip.awaits].promised = clip.awaits = None
            self._num_awaiting -= 1

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

    def _is_excused(self, clip: ClipState, gang: GangState, is_node_gone: bool = False) -> bool:
        """Whether the loss of its gang says nothing of the clip.

        It does not where the node went, unless that comes again and again before a step more is done; nor the second
        time on a node while there are others: then the node may be at fault, and the clip goes elsewhere.
        """
        if gang.nodes & self._draining:
            return True
        if is_node_gone:
            clip.num_fruitless += 1
            return clip.num_fruitless <= MAX_FRUITLESS
        is_known = bool(gang.nodes & clip.struck_on)
        clip.struck_on |= gang.nodes
        return is_known and self._has_another_node(clip)

    def _has_another_node(self, clip: ClipState) -> bool:
        """Whether a gang works, and would take the clip, that stands only where the clip was not lost yet."""
        working = self._gangs_in[GangStage.IDLE] | self._gangs_in[GangStage.BUSY]
        gangs = (self.gangs[number] for number in working - self._leaving)
        return any(gang.name != clip.avoids and not gang.nodes & clip.struck_on for gang in gangs)

    def _strike(
        self, clip: ClipState, reason: str, now_s: float, is_excused: bool = False, to_finish: bool = False
    ) -> None:
        """An attempt was lost: try again, or quarantine the clip."""
        self.counts["retries"] += 1
        if not is_excused:
            clip.strikes.append(reason)
            if is_quarantined(len(clip.strikes)):
                clip.strikes.pop()
                self._quarantine(clip, reason, now_s)
                return
            self._do(RecordFailure(clip.name, "retrying", tuple(clip.strikes)))
        self._do(Log("retrying", {"id": clip.id, "strikes": len(clip.strikes), "reason": reason}))
        self._do(Say(f"{clip.id}: will try again ({len(clip.strikes)} strikes): {reason}"))
        if to_finish:
            self._move(clip, Stage.DENOISED, self.denoised.appendleft)
        else:
            self._wait_first(clip)

    def _quarantine(self, clip: ClipState, reason: str, now_s: float) -> None:
        clip.strikes.append(reason)
        self._do(RecordFailure(clip.name, "quarantined", tuple(clip.strikes)))
        for gang in self.gangs:
            gang.num_losses_in_a_row = 0  # this clip explains them
        said = f"{len(clip.strikes)} attempts were lost; the last: {reason}"
        self._end(clip, "quarantined", now_s, said)

    def _move_elsewhere(self, clip: ClipState, actor: str, reason: str, now_s: float, to_finish: bool = False) -> None:
        """Memory was too short for the clip: another gang or finisher has more, or nobody in its way."""
        clip.avoids = actor
        clip.num_shortages += 1
        if clip.num_shortages > 1:
            reason = f"the clip does not fit: {reason}"
        self._strike(clip, f"{actor}: {reason}", now_s, to_finish=to_finish)

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
        self._forget_awaited(clip)
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

    def _lose(self, gang: GangState, reason: str, now_s: float, is_node_gone: bool = False) -> None:
        self._last_loss = reason
        gang.num_losses_in_a_row += not is_node_gone
        gang.is_retired = is_retired(gang.num_losses_in_a_row)
        self._num_retired["gang"] += gang.is_retired
        self.counts["losses"] += 1
        if gang.others:
            self._stay(f"{gang.name} was lost as a larger gang")
        then = "retired" if gang.is_retired else "built again"
        self._do(Log("lost", {"actor": gang.name, "reason": reason, "then": then}))
        self._do(Say(f"{gang.name} was lost and is {then}: {reason}"))
        self._kill(gang, now_s)

    def _kill(self, gang: GangState, now_s: float) -> None:
        gang.clip, gang.step, gang.changed_s = None, None, now_s
        self._enter(gang, GangStage.GONE)
        for finisher in self.finishers:
            if finisher.gang == gang.number:
                self._take_along(finisher, gang, now_s)
        gang.nodes, gang.is_stop_requested = frozenset(), False
        self._leaving.discard(gang.number)
        self._growing.pop(gang.number, None)
        if gang.others:
            for number in gang.others:
                self._enter(self.gangs[number], GangStage.GONE)
            gang.others = ()
            if gang.promised is not None:
                self._forget_awaited(self.clips[gang.promised])
        self._do(KillGang(gang.number))

    def _put_down(self, gang: GangState, now_s: float) -> None:
        """The gang is not needed where it stands; it goes when no finisher that stands with it is at a clip."""
        if self._hosts_work(gang):
            self._release(gang, now_s)
        else:
            self._kill(gang, now_s)

    def _hosts_work(self, gang: GangState) -> bool:
        return any(finisher.gang == gang.number and finisher.finishing for finisher in self.finishers)

    def _take_along(self, finisher: FinisherState, gang: GangState, now_s: float) -> None:
        """A finisher ends with the gang that it stands with.

        The clip that it decodes bears no blame, but not for ever: a decode that takes the machine along does so again.
        """
        is_excused = True
        if finisher.finishing:
            clip = self.clips[finisher.finishing[0]]
            clip.num_interrupted += 1
            is_excused = self._is_leaving(gang) or clip.num_interrupted <= MAX_STRIKES
        self._empty(finisher, f"{gang.name}, which it stood with, has ended", now_s, is_excused=is_excused)

    def _is_leaving(self, gang: GangState) -> bool:
        """Whether the gang takes no clip any more where it stands."""
        return gang.is_stop_requested or bool(gang.nodes & self._draining)

    def _lose_finisher(self, finisher: FinisherState, reason: str, now_s: float, is_node_gone: bool = False) -> None:
        self._last_loss = reason
        finisher.num_losses_in_a_row += not is_node_gone
        finisher.is_retired = is_retired(finisher.num_losses_in_a_row)
        self._num_retired["finisher"] += finisher.is_retired
        self._do(Log("lost", {"actor": finisher.name, "reason": reason}))
        self._do(Say(f"{finisher.name} was lost: {reason}"))
        self._empty(finisher, reason, now_s, is_excused=is_node_gone)

    def _empty(self, finisher: FinisherState, reason: str, now_s: float, is_excused: bool = False) -> None:
        """The finisher ends; its clips and prompts are handed out anew."""
        names = list(finisher.finishing)
        finisher.stage, finisher.gang = "gone", None
        if not finisher.is_retired:
            self._finishers_gone.add(finisher.number)
        finisher.finishing.clear()
        self._num_finishing -= len(names)
        for key in finisher.encoding:
            self.waiting.prompt_lost(key)
        finisher.encoding.clear()
        for name in reversed(names[1:]):  # had not begun
            self._move(self.clips[name], Stage.DENOISED, self.denoised.appendleft)
        if names:
            clip = self.clips[names[0]]
            self._strike(clip, f"{finisher.name}: {reason}", now_s, is_excused=is_excused, to_finish=True)
        self._do(KillFinisher(finisher.number))

    # ---- scheduling

    def _schedule(self, now_s: float) -> None:
        if not self.clips:
            return
        self._build(now_s)
        if self.aborted is None:
            self._encode_prompts(now_s)
            self._hand_to_finishers(now_s)
            self._hand_to_gangs(now_s)

    def _build(self, now_s: float) -> None:
        for kind, number in (("gang", len(self.gangs)), ("finisher", len(self.finishers))):
            if self._num_retired[kind] == number:
                self.aborted = f"every {kind} was lost several times in a row, at last: {self._last_loss}"
                self._do(Abort(self.aborted))
                return
        for gang in [self.gangs[number] for number in sorted(self._gangs_in[GangStage.GONE])]:
            self._begin_placing(gang, now_s)  # first, as who asks Ray first for a place has it first
        for finisher in [self.finishers[number] for number in sorted(self._finishers_gone)]:
            host = None if finisher.is_apart else self._host(finisher, now_s)
            if finisher.is_apart or host is not None:
                finisher.stage, finisher.changed_s = "placing", now_s
                finisher.gang = None if host is None else host.number
                self._finishers_gone.discard(finisher.number)
                self._do(BuildFinisher(finisher.number, finisher.gang))

    def _begin_placing(self, gang: GangState, now_s: float) -> None:
        gang.changed_s, gang.explain_s = now_s, PLACE_S
        self._enter(gang, GangStage.PLACING)
        self._do(BuildGang(gang.number, gang.others))

    def _host(self, finisher: FinisherState, now_s: float) -> GangState | None:
        """The gang that a finisher stands with: one and the same, or where that has no place, the one with fewest."""
        first = self.gangs[finisher.number % len(self.gangs)]
        if first.is_placed and not self._is_leaving(first):
            return first
        if first.stage is GangStage.PLACING and now_s - first.changed_s < PLACE_S:
            return None
        placed = [gang for gang in self.gangs if gang.is_placed and not self._is_leaving(gang)]
        hosted = Counter(other.gang for other in self.finishers)
        return min(placed, key=lambda gang: hosted[gang.number], default=None)

    def _takes_work(self, finisher: FinisherState) -> bool:
        is_leaving = finisher.gang is not None and self._is_leaving(self.gangs[finisher.gang])
        return finisher.stage == "ready" and not is_leaving

    def _encode_prompts(self, now_s: float) -> None:
        ready = [f for f in self.finishers if self._takes_work(f)] if self.waiting.unencoded else []
        if not ready:
            return
        for name, key in self.waiting.take_unencoded():
            if key not in self._prompts and not any(key in finisher.encoding for finisher in self.finishers):
                failed = self._prompt_failures.get(key, ())
                finisher = min(ready, key=lambda finisher: (finisher.number in failed, len(finisher.encoding)))
                if not (finisher.finishing or finisher.encoding):
                    finisher.changed_s = now_s
                finisher.encoding.add(key)
                self._do(EncodePrompt(finisher.number, name))

    def _hand_to_finishers(self, now_s: float) -> None:
        ready = [finisher for finisher in self.finishers if self._takes_work(finisher)] if self.denoised else []
        for finisher in ready:
            while self.denoised and len(finisher.finishing) < IN_FINISHER:
                others = len(ready) - 1
                name = next((n for n in self.denoised if not self._avoids(n, finisher, others)), None)
                if name is None:
                    break
                self.denoised.remove(name)
                clip = self.clips[name]
                if not (finisher.finishing or finisher.encoding):
                    finisher.changed_s = now_s
                finisher.finishing.append(clip.name)
                self._num_finishing += 1
                self._move(clip, Stage.FINISHING)
                self._do(FinishClip(finisher.number, clip.name, clip.ranks, clip.room))

    def _hand_to_gangs(self, now_s: float) -> None:
        idle = self._gangs_in[GangStage.IDLE]
        for gang in [self.gangs[number] for number in sorted(idle & self._leaving)]:
            self._put_down(gang, now_s)
        if not idle or self._is_behind or self.waiting.next() is None:
            return
        others = len(idle) + len(self._gangs_in[GangStage.BUSY]) - 1
        for gang in [self.gangs[number] for number in sorted(idle - self._leaving - self._reserved)]:
            name = self._next_clip(gang, others)
            if name is None:
                continue
            clip = self.clips[name]
            self.waiting.remove(name)
            clip.began_s = now_s if clip.began_s is None else clip.began_s
            self._forget_awaited(clip)
            self._move(clip, Stage.DENOISING)
            clip.room = gang.room
            gang.clip, gang.step, gang.changed_s = name, None, now_s
            gang.told, gang.step_s = (clip.farthest, now_s), None
            self._enter(gang, GangStage.BUSY)
            self._do(AssignClip(gang.number, name, self._prompts.warnings(clip.prompt_key)))

    def _next_clip(self, gang: GangState, num_others: int) -> str | None:
        """The first waiting clip with its prompt that need not wait for another gang."""
        if gang.promised is not None:
            return gang.promised if self.clips[gang.promised].prompt_key in self._prompts else None
        name = self.waiting.next()
        if name is None or not self._avoids(name, gang, num_others):
            return name
        ready = (name for name in self.waiting if self.clips[name].prompt_key in self._prompts)
        return next((name for name in ready if not self._avoids(name, gang, num_others)), None)

    def _avoids(self, name: str, actor: GangState | FinisherState, num_others: int) -> bool:
        """Whether a clip that this one's memory was too small for, or its node lost, had better wait for others."""
        clip = self.clips[name]
        if clip.awaits is not None:
            return not isinstance(actor, GangState) or actor.number != clip.awaits
        if isinstance(actor, GangState) and clip.struck_on & actor.nodes:
            return self._has_another_node(clip)
        return clip.avoids == actor.name and num_others > 0

    @property
    def _is_behind(self) -> bool:
        """Finishers are so far behind that gangs must wait."""
        return len(self.denoised) + self._num_finishing >= PER_FINISHER * len(self.finishers)

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
    FinisherPlaced: BatchState._on_finisher_placed,
    FinishersInTheWay: BatchState._on_finishers_in_the_way,
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
