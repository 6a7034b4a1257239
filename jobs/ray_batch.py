"""The loop over clips on gangs of actors: this process waits, judges and hands out; it renders nothing itself.

Each clip goes through encode (finisher), denoise (gang), decode and commit (finisher). A gang takes the next clip as
soon as its latents are on disk. Rules of retrying are in `retry`; what a gang or a finisher is, in its slot.
"""

import signal
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import ray

from cineray.jobs.clip_queue import Clip, ClipQueue
from cineray.jobs.cluster import draining_nodes
from cineray.jobs.finisher_slot import FinisherSlot
from cineray.jobs.gang_progress import GangProgress
from cineray.jobs.gang_slot import GangSlot
from cineray.jobs.lease import Lease
from cineray.jobs.metrics import RunMetrics
from cineray.jobs.output_folder import OutputFolder
from cineray.jobs.results import ClipResult, ResultLog, Status
from cineray.jobs.retry import MemberEnd, is_given_up, is_hung, judge
from cineray.jobs.slots import Slots
from cineray.jobs.stages import ClipFault, NoPrompt, PutDown, RunSpec
from cineray.jobs.stopping import asked_to_stop
from cineray.pipeline.request import InputError

POLL_S = 1.0  # of the step counter, as 0.7 ms round trips; of draining nodes, as Ray Train's watcher does every 5 s
START_S = 1800.0  # a gang that is placed may take so long to load its weights
DRAIN_S = 30.0  # to finish the step that is running; Ray's own default for a node that goes
FINISH_STEPS = 4  # a decode may take so many times as long as a step
STATUS_S = 2.0
SHOW_S = 0.2  # between two looks at bars and gauges
PER_FINISHER = 3  # latents on disk: one that is decoded, two that wait; then gangs wait
IN_FINISHER = 2  # clips handed to a finisher: one is decoded, one need not wait for the driver's next turn


@dataclass(slots=True)
class RayBatch:
    """One run. `stopped_by` is the signal that ended it early, `given_up` says why there was no going on."""

    spec: RunSpec
    slots: Slots
    folder: OutputFolder
    lease: Lease
    queue: ClipQueue
    results: ResultLog
    progress: GangProgress
    metrics: RunMetrics
    hang_s: float
    denoising: dict[str, Clip] = field(default_factory=dict)
    denoised: deque[Clip] = field(default_factory=deque)
    finishing: dict[str, Clip] = field(default_factory=dict)
    stopped_by: int | None = None
    given_up: str | None = None
    busy_s: float = 0.0
    could_be_busy_s: float = 0.0
    _last_loss: str = ""
    _draining: frozenset[str] = frozenset()
    _next_poll_s: float = 0.0
    _next_status_s: float = 0.0
    _tick_s: float = 0.0
    _next_show_s: float = 0.0

    @property
    def gangs(self) -> list[GangSlot]:
        return self.slots.gangs

    @property
    def finishers(self) -> list[FinisherSlot]:
        return self.slots.finishers

    @property
    def gangs_busy(self) -> float | None:
        """Share of the time in which gangs were denoising, of all the time in which there were clips for them."""
        return round(self.busy_s / self.could_be_busy_s, 4) if self.could_be_busy_s else None

    def run(self) -> None:
        """Renders all that is not there yet.

        Raises:
            InputError: an actor cannot load the model; or, as OutputError, the folder is full or gone.
            LeasedError: another driver has taken it over.
        """
        with asked_to_stop(self._on_stop):
            try:
                self._tick_s = time.monotonic()
                while not self._is_over():
                    self._turn()
                if self.stopped_by:
                    self._drain()
            finally:
                self.slots.destroy()
                if self.lease.is_ours():
                    self.queue.close()

    def _is_over(self) -> bool:
        in_hand = self.queue.waiting or self.denoising or self.denoised or self.finishing
        return self.stopped_by is not None or self.given_up is not None or (self.queue.is_exhausted and not in_hand)

    def _turn(self) -> None:
        self.lease.check()
        for result in self.queue.fill():
            self._tell(result)
        while self.queue.doubted:
            self.progress.say(self.queue.doubted.pop(0))
        if self._is_over():
            return  # all were there: no actor needs to start
        self._build()
        self._hand_out()
        stages, num_waiting = [gang.stage for gang in self.gangs], len(self.queue.waiting)
        self._listen()
        self._poll()
        self._account(stages, num_waiting)

    def _build(self) -> None:
        self.slots.build()
        for kind, slots in (("gang", self.gangs), ("finisher", self.finishers)):
            if all(slot.is_given_up for slot in slots):
                self.given_up = f"every {kind} was lost several times in a row, at last: {self._last_loss}"

    def _hand_out(self) -> None:
        ready = [finisher for finisher in self.finishers if finisher.stage == "ready"]
        being_encoded = {task.prompt_key for finisher in ready for task in finisher.encoding.values()}
        for task in self.queue.prompts_wanted():
            if ready and task.prompt_key not in being_encoded:
                min(ready, key=lambda finisher: len(finisher.encoding)).encode(task)
                being_encoded.add(task.prompt_key)
        for finisher in ready:
            while self.denoised and len(finisher.finishing) < IN_FINISHER:
                clip = self.denoised.popleft()
                self.finishing[clip.task.name] = clip
                finisher.finish(clip.task)
        for gang in self.gangs:
            num_latents = len(self.denoised) + len(self.finishing)
            if gang.stage != "idle" or num_latents >= PER_FINISHER * len(self.finishers):
                continue
            if gang.nodes & self._draining:
                gang.destroy()
                continue
            clip = self.queue.take_ready()
            if clip is not None:
                self.folder.check(f"clip {clip.id} was to be rendered")
                self.denoising[clip.task.name] = clip
                self.progress.warn(clip.id, clip.task.warnings)
                self.folder.log_event("running", id=clip.id, fingerprint=clip.task.mark, gang=gang.name)
                gang.assign(clip.task)

    def _listen(self, timeout_s: float = 0.2) -> None:
        owners: dict[Any, GangSlot | FinisherSlot] = {
            ref: slot for slot in (*self.gangs, *self.finishers) for ref in slot.refs()
        }
        if not owners:
            time.sleep(timeout_s)
            return
        ready, _ = ray.wait(list(owners), num_returns=1, timeout=timeout_s, fetch_local=False)
        more, _ = ray.wait(list(owners), num_returns=len(owners), timeout=0, fetch_local=False)
        for ref in dict.fromkeys([*ready, *more]):
            owners[ref].take(ref)
        now_s = time.monotonic()
        for gang in self.gangs:
            if gang.stage != "gone" and gang.is_settled(now_s):
                self._settle(gang)
        for finisher in self.finishers:
            self._settle_finisher(finisher)

    def _settle(self, gang: GangSlot) -> None:
        gang.raise_input_error()
        ends = gang.member_ends()
        if all(end.kind == "answered" for end in ends):
            if gang.stage == "busy":
                self._settle_clip(gang)
            else:
                gang.advance()
                if gang.stage == "idle":
                    nodes = sorted(gang.nodes)
                    self.folder.log_event("built", actor=gang.name, pids=gang.pids, nodes=nodes)
            return
        verdict = judge(ends)
        clip = self._clip_of(gang)
        if clip is not None and verdict.clip == "failed":
            self._fail(clip, verdict.reason)
            if verdict.keep_gang:
                gang.advance()
                return
        elif clip is not None:
            self._strike(clip, f"{gang.name}: {verdict.reason}", is_excused=bool(gang.nodes & self._draining))
        self._lose(gang, verdict.reason)

    def _settle_clip(self, gang: GangSlot) -> None:
        clip = self._clip_of(gang)
        assert clip is not None
        answer = gang.ends[0]
        gang.num_losses_in_a_row = 0
        if isinstance(answer, NoPrompt):
            self.queue.forget_prompt(clip.task.prompt_key)
            self._strike(clip, f"{gang.name}: {answer.reason}")
            gang.advance()
            return
        if not isinstance(answer, PutDown):
            self.denoised.append(clip)
            gang.advance()
            return
        self.queue.put_back(clip)
        self.folder.log_event("yielded", id=clip.id, gang=gang.name, step=answer.step, kept=answer.kept)
        self.metrics.yields.inc()
        self.progress.say(f"{clip.id}: put down after step {answer.step} by {gang.name}")
        gang.destroy()

    def _settle_finisher(self, finisher: FinisherSlot) -> None:
        for kind, task, answer in finisher.answers:
            if isinstance(answer, InputError):
                raise answer
            if kind == "encoded":
                self._settle_prompt(task.prompt_key, answer)
            else:
                self._settle_video(finisher, self.finishing.pop(task.name), answer)
        finisher.answers.clear()
        if finisher.lost is not None:
            self._last_loss = finisher.lost
            finisher.num_losses_in_a_row += 1
            finisher.is_given_up = is_given_up(finisher.num_losses_in_a_row)
            self.folder.log_event("lost", actor=finisher.name, reason=finisher.lost)
            self.progress.say(f"{finisher.name} was lost: {finisher.lost}")
            clips = [self.finishing.pop(task.name) for task in finisher.finishing.values()]
            self.denoised.extendleft(reversed(clips[1:]))  # had not begun
            if clips:
                self._strike(clips[0], f"{finisher.name}: {finisher.lost}", queue_to=self.denoised)
            finisher.destroy()
            finisher.lost = None

    def _settle_prompt(self, key: str, answer: Any) -> None:
        if not isinstance(answer, ClipFault | MemberEnd):
            self.queue.add_prompt(key, answer)
            return
        for clip in [clip for clip in self.queue.waiting if clip.task.prompt_key == key]:
            self.queue.waiting.remove(clip)
            self._fail(clip, answer.reason)

    def _settle_video(self, finisher: FinisherSlot, clip: Clip, answer: Any) -> None:
        if answer is None:  # the latents are gone: denoise again
            self._strike(clip, f"{finisher.name} found no latents")
        elif isinstance(answer, ClipFault | MemberEnd):
            self._fail(clip, answer.reason)
        else:
            finisher.num_losses_in_a_row = 0
            self.queue.end(clip, is_done=True)
            wall_s = time.monotonic() - (clip.began_s or 0.0)
            video = str(self.folder.video_path(clip.task.request, clip.task.mark))
            result = ClipResult.of(clip.task.request, "done", wall_s, video, answer)
            self._tell(result, warning=answer.get("warning"))

    def _strike(self, clip: Clip, reason: str, is_excused: bool = False, queue_to: deque[Clip] | None = None) -> None:
        self.metrics.retries.inc()
        if not is_excused and self.queue.strike(clip, reason):
            self._end(clip, "quarantined", f"{len(clip.strikes)} attempts were lost; the last: {reason}")
            for gang in self.gangs:
                gang.num_losses_in_a_row = 0  # this clip explains them
            return
        self.folder.log_event("retrying", id=clip.id, strikes=len(clip.strikes), reason=reason)
        self.progress.say(f"{clip.id}: will try again ({len(clip.strikes)} strikes): {reason}")
        if queue_to is None:
            self.queue.put_back(clip)
        else:
            queue_to.appendleft(clip)

    def _fail(self, clip: Clip, reason: str) -> None:
        clip.strikes.append(reason)
        self.queue.write_trouble(clip, "failed")
        self._end(clip, "failed", reason)

    def _end(self, clip: Clip, status: Status, error: str) -> None:
        self.queue.end(clip, is_done=False)
        wall_s = 0.0 if clip.began_s is None else time.monotonic() - clip.began_s
        self._tell(ClipResult.of(clip.task.request, status, wall_s, error=error))

    def _lose(self, gang: GangSlot, reason: str) -> None:
        self._last_loss = reason
        gang.num_losses_in_a_row += 1
        gang.is_given_up = is_given_up(gang.num_losses_in_a_row)
        said = "given up" if gang.is_given_up else "built again"
        self.folder.log_event("lost", actor=gang.name, reason=reason, then=said)
        self.metrics.losses.inc()
        self.progress.say(f"{gang.name} was lost and is {said}: {reason}")
        gang.destroy()

    def _clip_of(self, gang: GangSlot) -> Clip | None:
        return None if gang.task is None else self.denoising.pop(gang.task.name, None)

    def _poll(self) -> None:
        now_s = time.monotonic()
        for gang in self.gangs:
            gang.poll(now_s, POLL_S)
            limit_s = self.hang_s if gang.stage == "busy" else START_S
            # nobody waits for a place: it comes when there is room
            if gang.stage in ("busy", "meeting", "joining") and is_hung(now_s, gang.changed_s, limit_s):
                reason = f"no sign of progress for {limit_s:g} s"
                clip = self._clip_of(gang)
                if clip is not None:
                    self._strike(clip, f"{gang.name}: {reason}")
                self._lose(gang, reason)
        for finisher in self.finishers:
            if finisher.finishing and is_hung(now_s, finisher.began_s, FINISH_STEPS * self.hang_s):
                finisher.lost = f"no sign of progress for {FINISH_STEPS * self.hang_s:g} s"
                self._settle_finisher(finisher)
        if now_s >= self._next_poll_s:
            self._next_poll_s = now_s + POLL_S
            self._draining = draining_nodes()
            for gang in self.gangs:
                if gang.nodes & self._draining and not gang.is_asked_to_stop:
                    gang.ask_to_stop()
        if now_s >= self._next_status_s:
            self._next_status_s = now_s + STATUS_S
            self._write_status()

    def _account(self, stages: Sequence[str], num_waiting: int) -> None:
        """Adds up how gangs spent the time since the last call.

        Args:
            stages: of the gangs, as they were while this process waited: what it heard ended them.
        """
        now_s = time.monotonic()
        passed_s, self._tick_s = now_s - self._tick_s, now_s
        busy_s, idle_s = (stages.count(stage) * passed_s for stage in ("busy", "idle"))
        self.busy_s += busy_s
        self.could_be_busy_s += busy_s + (idle_s if num_waiting else 0.0)
        self.metrics.spent(busy_s, idle_s)
        if now_s >= self._next_show_s:
            self._next_show_s = now_s + SHOW_S
            self.progress.update(self.gangs)
            self.metrics.observe(len(self.queue.waiting), self.gangs)

    def _write_status(self) -> None:
        """For `cineray status`: what runs now."""
        running = [
            {"id": gang.task.request.id, "on": gang.name}
            | ({} if gang.pulse is None else {"step": gang.pulse.step, "steps": gang.pulse.num_steps})
            for gang in self.gangs
            if gang.stage == "busy" and gang.task is not None
        ]
        running += [{"id": clip.id, "on": "finisher"} for clip in self.finishing.values()]
        self.folder.write_json(".state/running.json", {"running": running, "counts": self.results.counts}, None)

    def _drain(self) -> None:
        """Every gang puts its clip down after the step it is in; finishers end the clip they have."""
        deadline = time.monotonic() + DRAIN_S
        self.folder.log_event("stopping", signal=self.stopped_by)
        for gang in self.gangs:
            if gang.stage == "busy":
                gang.ask_to_stop()
            else:
                gang.destroy()
        while time.monotonic() < deadline and (self.denoising or self.finishing):
            self._listen(0.05)

    def _on_stop(self, number: int) -> None:
        self.stopped_by = number
        self.progress.say(f"{signal.Signals(number).name}: gangs put their clips down after this step")

    def _tell(self, result: ClipResult, warning: str | None = None) -> None:
        self.results.add(result)
        self.metrics.count(result, self.spec.model)
        error: dict[Literal["error"], str] = {"error": result.error} if result.error else {}
        if result.status != "existing":
            self.folder.log_event(result.status, id=result.id, wall_s=result.wall_s, **error)
        self.progress.end_clip(result, warning)
