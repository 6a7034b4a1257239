"""Every clip of a run and where it stands: pure rules, stepped by events, answering with effects.

The driver turns what Ray says into events and performs the effects; a simulator does the same with a clock of its own;
a test replays either. Nothing here waits, reads a clock, touches a disk or knows Ray. The shape is that of dask's
worker state machine (distributed/worker_state_machine.py, `handle_stimulus`).

A clip goes WAITING -> DENOISING (on a gang) -> DENOISED (latents on disk) -> FINISHING (on a finisher) -> ended.
"""

from cineray.jobs.gangs.effects import Effect, ExplainWait, ForgetPrompt, Log, RequestStop, Say
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
from cineray.jobs.gangs.handing_out import HandingOut
from cineray.jobs.gangs.members import ClipState, GangStage, Stage
from cineray.jobs.gangs.retry import MAX_PROMPT_TRIES, MAX_STRIKES, classify_failure, is_hung

START_S = 1800.0  # a gang or a finisher that is placed may take so long to load its weights
REPEAT_S = 300.0  # between two times that it is said
FINISH_STEPS = 4  # a decode may take so many times as long as a step


def clips_ahead(num_gangs: int) -> int:
    """How many clips to have waiting for so many gangs: their prompts are encoded meanwhile."""
    return 2 * num_gangs + 2


class BatchState(HandingOut):
    """The rules that move the state of a run on, event by event."""

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
