"""The driver of a batch on gangs of actors: hears what happens, asks `BatchState` what follows, and does it.

Each clip goes through encode (finisher), denoise (gang), decode and commit (finisher). The rules stand in
`batch_state`; what Ray is asked to do, in the slots. This process renders nothing itself.
"""

import signal
import time
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import ray

from cineray.jobs.gangs import effects, events
from cineray.jobs.gangs.cluster import draining_nodes, nodes_now
from cineray.jobs.gangs.finisher_slot import FinisherSlot
from cineray.jobs.gangs.gang_slot import GangSlot, scheduling_state
from cineray.jobs.gangs.members import GangStage, Stage
from cineray.jobs.gangs.messages import RunSpec
from cineray.jobs.gangs.metrics import RunMetrics
from cineray.jobs.gangs.placement import make_room, wait_reason
from cineray.jobs.gangs.progress import GangProgress
from cineray.jobs.gangs.queue import ClipQueue
from cineray.jobs.gangs.slots import Slots
from cineray.jobs.gangs.state import BatchState
from cineray.jobs.output.folder import OutputFolder
from cineray.jobs.output.lease import Lease
from cineray.jobs.output.results import ClipResult, ResultLog
from cineray.jobs.stopping import stop_requested

POLL_S = 1.0  # of the step counter, as 0.7 ms round trips; of draining nodes, as Ray Train's watcher does every 5 s
DRAIN_S = 30.0  # to finish the step that is running; Ray's own default for a node that goes
STATUS_S = 2.0
SHOW_S = 0.2  # between two looks at bars and gauges
WAIT_S = 0.2  # for something to happen


@dataclass(slots=True)
class RayBatch:
    """One run: `state` decides, this performs."""

    spec: RunSpec
    state: BatchState
    slots: Slots
    folder: OutputFolder
    lease: Lease
    queue: ClipQueue
    results: ResultLog
    progress: GangProgress
    metrics: RunMetrics
    _stop_signal: int | None = None
    _draining: frozenset[str] = frozenset()
    _spent_s: tuple[float, float] = (0.0, 0.0)
    _next_s: dict[str, float] = field(default_factory=dict)
    _found: list[events.Event] = field(default_factory=list)

    @property
    def gangs_busy(self) -> float | None:
        """Share of the time in which gangs were denoising, of all the time in which there were clips for them."""
        state = self.state
        return round(state.busy_s / state.could_be_busy_s, 4) if state.could_be_busy_s else None

    def run(self) -> None:
        """Renders all that is not there yet.

        Raises:
            InputError: an actor cannot load the model; or, as OutputError, the folder is full or gone.
            LeasedError: another driver has taken it over.
        """
        with stop_requested(self._on_stop):
            try:
                while not self.state.is_over:
                    self._turn()
            finally:
                self.slots.destroy()
                if self.lease.is_ours():
                    for key in self.state.prompts:
                        self.folder.delete_prompt(key)

    def _turn(self) -> None:
        self.lease.check()
        if self._stop_signal is not None and self.state.stopped_by is None:
            self._next_s["give up"] = time.monotonic() + DRAIN_S
            self._handle(events.StopRequested(self._stop_signal))
        if self._is_due("give up"):
            self._handle(events.DrainEnded())
        self._read()
        if self.state.is_over:
            return  # all were there: no actor needs to start
        self._listen()
        self._poll()

    def _read(self) -> None:
        wanted = self.state.num_wanted
        if not wanted:
            return
        new, known = self.queue.read(wanted)
        for result in known:
            self._tell(result)
        while self.queue.doubted:
            self.progress.say(self.queue.doubted.pop(0))
        self._handle(events.ClipsRead(tuple(new), is_last=self.queue.is_exhausted))

    def _listen(self) -> None:
        slots = (*self.slots.gangs, *self.slots.finishers)
        owners: dict[Any, GangSlot | FinisherSlot] = {ref: slot for slot in slots for ref in slot.refs()}
        if not owners:
            time.sleep(WAIT_S)
            return
        ready, _ = ray.wait(list(owners), num_returns=1, timeout=WAIT_S, fetch_local=False)
        more, _ = ray.wait(list(owners), num_returns=len(owners), timeout=0, fetch_local=False)
        heard = {*ready, *more}
        for ref, slot in owners.items():  # in the slots' own order
            if ref in heard and ref in slot.refs():  # its slot may have been emptied meanwhile
                self._handle(*slot.on_ready(ref))
        now_s = time.monotonic()
        for gang in self.slots.gangs:
            self._handle(*gang.settle(now_s))

    def _poll(self) -> None:
        now_s = time.monotonic()
        for gang in self.slots.gangs:
            gang.poll(now_s, POLL_S)
        if self._is_due("nodes", POLL_S):
            draining = draining_nodes()
            if draining != self._draining:
                self._draining = draining
                self._handle(events.NodesDraining(draining))
        self._handle(events.Tick())
        found, self._found = self._found, []
        self._handle(*found)
        if self._is_due("status", STATUS_S):
            self._write_status()
        if self._is_due("show", SHOW_S):
            self.progress.update(self.slots.gangs, self.state.gangs)
            self.metrics.observe(len(self.state.waiting), [gang.stage.value for gang in self.state.gangs])

    def _is_due(self, what: str, every_s: float | None = None) -> bool:
        """Whether it is time, and if so when it will be again; None for what is due once, after it was set."""
        now_s = time.monotonic()
        if now_s < self._next_s.get(what, float("inf") if every_s is None else 0.0):
            return False
        self._next_s[what] = float("inf") if every_s is None else now_s + every_s
        return True

    def _handle(self, *happened: events.Event) -> None:
        for event in happened:
            for effect in self.state.handle(event, time.monotonic()):
                self._perform(effect)
        self.metrics.count_up(self.state.counts)
        spent_s = (self.state.busy_s, self.state.idle_s)
        self.metrics.spent(spent_s[0] - self._spent_s[0], spent_s[1] - self._spent_s[1])
        self._spent_s = spent_s

    def _perform(self, effect: effects.Effect) -> None:
        gangs, finishers, tasks = self.slots.gangs, self.slots.finishers, self.queue.tasks
        if self.slots.perform(effect):
            return
        match effect:
            case effects.ExplainWait(gang, waited_s):
                self._explain_wait(gangs[gang], waited_s)
            case effects.AssignClip(gang, name, unread):
                self._assign(gangs[gang], name, unread)
            case effects.RequestStop(gang):
                gangs[gang].request_stop()
            case effects.EncodePrompt(finisher, name):
                finishers[finisher].encode(tasks[name])
            case effects.FinishClip(finisher, name, ranks, room):
                layout = None if room == 1 else gangs[0].shapes[room][0].run.layout
                finishers[finisher].finish(replace(tasks[name], ranks=ranks, layout=layout))
            case effects.ForgetPrompt(key):
                self.folder.delete_prompt(key)
            case effects.RecordFailure(name, status, reasons):
                self.queue.record_failure(name, status, reasons)
            case effects.EndClip():
                self._end(effect)
            case effects.Log(event, fields):
                self.folder.log_event(event, **fields)
            case effects.Say(message):
                self.progress.say(message)

    def _explain_wait(self, gang: GangSlot, waited_s: float) -> None:
        nodes = nodes_now()
        state = scheduling_state(gang.placement)
        reason = wait_reason(gang.group.bundle, gang.group.num_nodes, list(nodes.values()), state)
        self.progress.say(f"{gang.name} has waited {waited_s:.0f} s for a place: {reason}")
        self.folder.log_event("waiting", actor=gang.name, waited_s=round(waited_s), reason=reason)
        places = {slot.number: slot.node_id for slot in self.slots.finishers if slot.node_id is not None}
        in_the_way = make_room(gang.group, self.slots.finishers[0].fleet.apart.bundle, nodes, places)
        if in_the_way:
            self._found.append(events.FinishersInTheWay(in_the_way))

    def _assign(self, gang: GangSlot, name: str, unread: tuple[str, ...]) -> None:
        task = self.queue.warned(name, unread)
        self.folder.check(f"clip {task.request.id} was to be rendered")
        self.progress.warn(task.request.id, task.warnings)
        self.folder.log_event("running", id=task.request.id, fingerprint=task.fingerprint, gang=gang.name)
        gang.assign(task)

    def _end(self, effect: effects.EndClip) -> None:
        task = self.queue.end(effect.clip, is_done=effect.status == "done")
        video = str(self.folder.video_path(task.request, task.fingerprint)) if effect.status == "done" else None
        record = None if effect.record is None else dict(effect.record)
        result = ClipResult.of(task.request, effect.status, effect.wall_s, video, record, effect.error)
        self._tell(result, warning=(record or {}).get("warning"))

    def _write_status(self) -> None:
        """Writes down what runs now, for `cineray status`."""
        tasks = self.queue.tasks
        running = []
        for slot, gang in zip(self.slots.gangs, self.state.gangs, strict=True):
            if gang.stage is GangStage.BUSY and gang.clip is not None:
                row = {"id": tasks[gang.clip].request.id, "on": gang.name}
                pulse = slot.step_count
                running.append(row | ({} if pulse is None else {"step": pulse.step, "steps": pulse.num_steps}))
        finishing = [clip for clip in self.state.clips.values() if clip.stage is Stage.FINISHING]
        running += [{"id": clip.id, "on": "finisher"} for clip in finishing]
        self.folder.write_json(".state/running.json", {"running": running, "counts": self.results.counts}, None)

    def _on_stop(self, number: int) -> None:
        self._stop_signal = number
        self.progress.say(f"{signal.Signals(number).name}: gangs put their clips down after this step")

    def _tell(self, result: ClipResult, warning: str | None = None) -> None:
        self.results.add(result)
        self.metrics.count(result, self.spec.model)
        error: dict[Literal["error"], str] = {"error": result.error} if result.error else {}
        if result.status != "existing":
            self.folder.log_event(result.status, id=result.id, wall_s=result.wall_s, **error)
        self.progress.end_clip(result, warning)
