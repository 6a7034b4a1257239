"""A batch in simulated time: performs what the run's state wants, thinks up what comes of it, and tells the state.

Every decision is `BatchState`'s, the same that drives a run on Ray. Here stands how long things take and what is lost.
"""

import heapq
import random
from collections.abc import Callable, Iterable, Iterator
from itertools import count, islice
from typing import Any

from cineray.jobs.gangs import effects, events
from cineray.jobs.gangs.placement import finishers_for
from cineray.jobs.gangs.retry import RankOutcome
from cineray.jobs.gangs.state import FINISH_STEPS, START_S, BatchState, clips_ahead
from cineray.jobs.simulate.assumptions import Assumptions, PlannedClip, RankDeath
from cineray.jobs.simulate.attempt import Attempt, steps_per_save
from cineray.jobs.simulate.fleet import Clip, Finisher, Fleet, Gang, Node
from cineray.jobs.simulate.ledger import HOUR_S, Ledger, Simulated, Use

TICK_S = 1.0  # between two looks of the driver at its watchdogs, at most
DIED = (RankOutcome(kind="died", reason="lost in the simulation"),)
WITH_NODE = (RankOutcome(kind="died", reason="its node was lost in the simulation", is_node_gone=True),)
_IDLE = {"clips": Use.NO_CLIP, "prompts": Use.NO_PROMPT, "finishers": Use.NO_FINISHER, "end": Use.TAIL}


class SimulatedBatch:
    """A run of a batch on an assumed fleet. Deterministic: equal arguments give an equal result.

    Args:
        clips: a stream; read only as far ahead as the run reads.
        deaths: of ranks, beside the nodes that the assumptions take away at random.
        on_end: called with the number of clips that have ended, for a progress display.
    """

    def __init__(
        self,
        assumed: Assumptions,
        clips: Iterable[PlannedClip],
        deaths: Iterable[RankDeath] = (),
        on_end: Callable[[int], None] = lambda _: None,
    ) -> None:
        num_finishers = finishers_for(assumed.gangs, assumed.num_finishers)
        gangs = assumed.gangs
        self.state = BatchState(gangs, num_finishers, assumed.hang_s, clips_ahead(gangs), larger=assumed.larger)
        self.ledger = Ledger()
        self.now_s = 0.0
        self._assumed = assumed
        self._fleet = Fleet.of(assumed, num_finishers)
        self._unread: Iterator[PlannedClip] = iter(clips)
        self._deaths = list(deaths)
        self._on_end = on_end
        self._random = random.Random(assumed.seed)
        self._clips: dict[str, Clip] = {}
        self._draining: frozenset[str] = frozenset()
        self._num_idle = 0
        self._num_read = 0
        self._num_events = 0
        self._looks = False
        self._order = count()
        self._coming: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []

    def run(self) -> Simulated:
        """Runs the batch to its end.

        Raises:
            RuntimeError: the run is not over and nothing more can happen: a fault of the run's rules.
        """
        for node in self._fleet.nodes:
            self._bring(node)
        for death in self._deaths:
            self._in(death.at_s, self._kill_rank, self._fleet.gangs[death.gang], death.seen_s)
        self._read()
        while not self.state.is_over:
            if not self._coming:
                raise RuntimeError(f"the simulated run stands still after {self.now_s:g} s")
            at_s, _, happens, arguments = heapq.heappop(self._coming)
            self._pass_time(at_s)
            happens(*arguments)
        return self._report()

    # ---- time

    def _in(self, after_s: float, happens: Callable[..., None], *arguments: Any) -> None:
        heapq.heappush(self._coming, (self.now_s + after_s, next(self._order), happens, arguments))

    def _pass_time(self, now_s: float) -> None:
        if self._num_idle and now_s > self.now_s:
            self._spend(_IDLE[self.state.idle_reason], self._num_idle * (now_s - self.now_s))
        self.now_s = now_s

    def _use(self, gang: Gang, use: Use | None) -> None:
        """From now on the gang's GPUs do this; None is idle, whose time `_pass_time` sums up."""
        if gang.use is not None:
            self._spend(gang.use, gang.room * (self.now_s - gang.since_s))
        self._num_idle += gang.room * ((use is None) - (gang.use is None))
        gang.use, gang.since_s = use, self.now_s

    def _spend(self, use: Use, gang_s: float) -> None:
        """Args: gang_s: seconds of gangs as they began."""
        self.ledger.gpu_s[use] += gang_s * self._assumed.ranks_per_gang

    # ---- the run's state

    def _tell(self, event: events.Event) -> None:
        self._num_events += 1
        for effect in self.state.handle(event, self.now_s):
            perform = _PERFORM.get(type(effect))
            if perform is not None:
                perform(self, effect)
        if self.state.num_wanted:
            self._read()
        if self.state.is_in_tail and not self._looks:
            self._looks = True
            self._in(TICK_S, self._look)

    def _look(self) -> None:
        """The driver asks gangs for their steps every second; here while something may follow from that."""
        self._looks = False
        self._tick()

    def _read(self) -> None:
        while wanted := self.state.num_wanted:
            new: list[events.NewClip] = []
            for plan in islice(self._unread, wanted):
                name = str(self._num_read)
                self._num_read += 1
                self._clips[name] = Clip(name, plan)
                new.append(events.NewClip(name, plan.id, plan.prompt_key, num_steps=plan.seconds.num_steps))
            self._tell(events.ClipsRead(tuple(new), is_last=len(new) < wanted))

    # ---- nodes

    def _bring(self, node: Node) -> None:
        """A node comes up, with a lifetime of its own."""
        assumed = self._assumed
        node.life += 1
        node.is_there, node.is_draining = True, False
        is_straggler = self._random.random() < assumed.straggler_share
        node.slowness = assumed.straggler_factor if is_straggler else 1.0
        losses_per_s = assumed.spot_losses * assumed.gpus_per_node / HOUR_S
        if losses_per_s:
            lives_s = self._random.expovariate(losses_per_s)
            if assumed.notice_s:
                self._in(max(0.0, lives_s - assumed.notice_s), self._give_notice, node)
            self._in(lives_s, self._lose_node, node)
        for gang in node.gangs:
            if gang.is_wanted:
                self._in(0.0, self._place, gang, gang.life)
        for finisher in node.finishers:
            if finisher.is_wanted:
                self._in(0.0, self._start_finisher, finisher, finisher.life)

    def _give_notice(self, node: Node) -> None:
        node.is_draining = True
        self._draining |= {node.name}
        self._tell(events.NodesDraining(self._draining))

    def _lose_node(self, node: Node) -> None:
        self.ledger.num_nodes_lost += 1
        node.is_there = False
        for gang in node.gangs:
            if gang.is_there:
                self._lose_gang(gang, self._assumed.seen_s, WITH_NODE)
        for finisher in node.finishers:
            if finisher.is_there:
                finisher.is_there = False
                finisher.life += 1
                self._in(self._assumed.seen_s, self._tell_finisher_lost, finisher, finisher.life)
        self._in(self._assumed.replace_s, self._bring, node)
        if node.is_draining:
            self._in(self._assumed.seen_s, self._forget_draining, node.name)

    def _forget_draining(self, name: str) -> None:
        self._draining -= {name}
        self._tell(events.NodesDraining(self._draining))

    def _kill_rank(self, gang: Gang, seen_s: float) -> None:
        if gang.is_there:
            self._lose_gang(gang, seen_s, DIED)

    def _lose_gang(self, gang: Gang, seen_s: float, outcomes: tuple[RankOutcome, ...]) -> None:
        self._tell_steps(gang)  # the driver has asked it within the last second
        self._end_attempt(gang)
        self._use(gang, Use.NO_NODE)
        gang.is_there = False
        gang.life += 1
        self._in(seen_s, self._tell_gang_lost, gang, gang.life, outcomes)

    def _tell_gang_lost(self, gang: Gang, life: int, outcomes: tuple[RankOutcome, ...]) -> None:
        if gang.life == life:
            self._tell(events.GangEnded(gang.number, outcomes=outcomes))

    def _tell_finisher_lost(self, finisher: Finisher, life: int) -> None:
        if finisher.life == life:
            self._tell(events.FinisherLost(finisher.number, WITH_NODE[0].reason, is_node_gone=True))

    # ---- gangs

    def _build_gang(self, effect: effects.BuildGang) -> None:
        gang = self._fleet.gangs[effect.gang]
        gang.is_wanted = True
        for number in effect.others:
            other = self._fleet.gangs[number]
            self._use(other, Use.NO_NODE)
            other.room = 0
            gang.others += (other,)
            gang.room += 1
        if gang.node.takes_actors:
            self._in(0.0, self._place, gang, gang.life)

    def _place(self, gang: Gang, life: int) -> None:
        if gang.life != life or not gang.is_wanted or not gang.node.takes_actors:
            return  # where its node is going, `_bring` asks again on the next one
        gang.is_wanted, gang.is_there = False, True
        self._use(gang, Use.STARTING)
        self._in(self._assumed.start_s, self._be_ready, gang, life)
        self._watch(self._assumed.start_s, START_S)
        self._tell(events.GangPlaced(gang.number, frozenset({gang.node.name})))

    def _be_ready(self, gang: Gang, life: int) -> None:
        if gang.life == life:
            self._use(gang, None)
            self._tell(events.GangReady(gang.number))

    def _assign(self, effect: effects.AssignClip) -> None:
        gang, clip = self._fleet.gangs[effect.gang], self._clips[effect.clip]
        if not gang.is_there:
            return  # it is dead, and the driver does not know yet
        seconds = clip.plan.seconds
        step_s = seconds.step_s * gang.node.slowness / self._assumed.larger.get(gang.room, 1.0)
        self._use(gang, Use.COMPUTING)
        gang.clip, gang.told_step = clip, clip.num_kept
        gang.attempt = Attempt(
            num_steps=seconds.num_steps - clip.num_kept,
            begin_s=seconds.begin_s,
            step_s=step_s,
            save_s=self._assumed.save_s,
            steps_per_save=steps_per_save(step_s, self._assumed.checkpoint_s),
        )
        self._in(gang.attempt.total_s, self._end_denoising, gang, gang.life)
        self._watch(seconds.begin_s + step_s, self._assumed.hang_s)

    def _end_denoising(self, gang: Gang, life: int) -> None:
        if gang.life != life:
            return
        assert gang.attempt is not None
        self._end_attempt(gang, gang.attempt.num_steps, gang.attempt.num_saves)
        self._use(gang, None)
        self._tell(events.GangEnded(gang.number))

    def _request_stop(self, effect: effects.RequestStop) -> None:
        gang = self._fleet.gangs[effect.gang]
        if gang.attempt is None:
            return  # it is dead, and the driver does not know yet
        step = gang.attempt.num_done(self.now_s - gang.since_s) + 1
        if step < gang.attempt.num_steps:  # in its last step it ends instead
            gang.life += 1
            stops_s = gang.since_s + gang.attempt.step_ends_s(step) + self._assumed.save_s
            self._in(stops_s - self.now_s, self._be_preempted, gang, gang.life, step)

    def _be_preempted(self, gang: Gang, life: int, step: int) -> None:
        if gang.life != life:
            return
        assert gang.attempt is not None
        self._end_attempt(gang, step, (step - 1) // gang.attempt.steps_per_save + 1)
        self._tell(events.GangEnded(gang.number, preempted_at=step, is_kept=True))

    def _end_attempt(self, gang: Gang, num_kept: int | None = None, num_saves: int = 0) -> None:
        """Sums up where the attempt's time went, if there is one; None: it is cut short, what is not saved is lost."""
        attempt, clip = gang.attempt, gang.clip
        gang.attempt = gang.clip = None
        if attempt is None or clip is None:
            return
        spent_s = self.now_s - gang.since_s
        if num_kept is None:
            num_kept = attempt.num_saved(spent_s)
            num_saves = num_kept // attempt.steps_per_save
            computed_s = num_kept * attempt.step_s
        else:
            computed_s = spent_s - num_saves * attempt.save_s
        if clip.name not in self._clips:
            computed_s = 0.0  # quarantined a moment ago: its steps are kept for nobody
        clip.num_kept += num_kept
        clip.gpu_s += gang.room * computed_s * self._assumed.ranks_per_gang
        self._spend(Use.SAVING, gang.room * num_saves * attempt.save_s)
        self._spend(Use.LOST, gang.room * (spent_s - num_saves * attempt.save_s - computed_s))
        gang.since_s = self.now_s

    def _kill_gang(self, effect: effects.KillGang) -> None:
        gang = self._fleet.gangs[effect.gang]
        self._end_attempt(gang)
        self._use(gang, Use.RETIRED if self.state.gangs[gang.number].is_retired else Use.NO_NODE)
        gang.is_there = gang.is_wanted = False
        gang.life += 1
        for other in gang.others:
            other.room, other.since_s = 1, self.now_s
        gang.room, gang.others = 1, ()

    # ---- watchdogs

    def _watch(self, silent_s: float, limit_s: float) -> None:
        """The driver looks every second; here it looks when somebody has been silent for too long."""
        if silent_s > limit_s:
            self._in(limit_s + TICK_S, self._tick)

    def _tick(self) -> None:
        for gang in self._fleet.gangs:
            self._tell_steps(gang)
        self._tell(events.Tick())

    def _tell_steps(self, gang: Gang) -> None:
        """Tells the run how far the gang's clip is, if it has not been told."""
        if gang.attempt is None or gang.clip is None:
            return
        step = gang.clip.num_kept + gang.attempt.num_done(self.now_s - gang.since_s)
        if step > gang.told_step:
            gang.told_step = step
            self._tell(events.StepReached(gang.number, step))

    # ---- finishers

    def _build_finisher(self, effect: effects.BuildFinisher) -> None:
        finisher = self._fleet.finishers[effect.finisher]
        finisher.is_wanted = True
        if finisher.node.takes_actors:
            self._in(0.0, self._start_finisher, finisher, finisher.life)

    def _start_finisher(self, finisher: Finisher, life: int) -> None:
        if finisher.life == life and finisher.is_wanted and finisher.node.takes_actors:
            finisher.is_wanted, finisher.is_there = False, True
            self._tell(events.FinisherPlaced(finisher.number))
            self._in(self._assumed.finisher_start_s, self._finisher_ready, finisher, life)

    def _finisher_ready(self, finisher: Finisher, life: int) -> None:
        if finisher.life == life:
            self._tell(events.FinisherReady(finisher.number))

    def _kill_finisher(self, effect: effects.KillFinisher) -> None:
        finisher = self._fleet.finishers[effect.finisher]
        finisher.is_there = finisher.is_wanted = False
        finisher.life += 1
        finisher.finishing.clear()
        finisher.encoding.clear()

    def _finish_clip(self, effect: effects.FinishClip) -> None:
        finisher = self._fleet.finishers[effect.finisher]
        finisher.finishing.append(self._clips[effect.clip])
        if len(finisher.finishing) == 1:
            self._begin_finishing(finisher)

    def _begin_finishing(self, finisher: Finisher) -> None:
        if finisher.finishing and finisher.is_there:
            finish_s = finisher.finishing[0].plan.seconds.finish_s
            self._in(finish_s, self._end_finishing, finisher, finisher.life)
            self._watch(finish_s, FINISH_STEPS * self._assumed.hang_s)

    def _end_finishing(self, finisher: Finisher, life: int) -> None:
        if finisher.life == life:
            clip = finisher.finishing.popleft()
            self._begin_finishing(finisher)
            self._tell(events.VideoCommitted(finisher.number, clip.name))

    def _encode_prompt(self, effect: effects.EncodePrompt) -> None:
        finisher = self._fleet.finishers[effect.finisher]
        finisher.encoding.append(self._clips[effect.clip])
        if len(finisher.encoding) == 1:
            self._begin_encoding(finisher)

    def _begin_encoding(self, finisher: Finisher) -> None:
        if finisher.encoding and finisher.is_there:
            self._in(finisher.encoding[0].plan.seconds.encode_s, self._end_encoding, finisher, finisher.life)

    def _end_encoding(self, finisher: Finisher, life: int) -> None:
        if finisher.life == life:
            plan = finisher.encoding.popleft().plan
            self._begin_encoding(finisher)
            self._tell(events.PromptEncoded(finisher.number, plan.prompt_key))

    # ---- ends

    def _end_clip(self, effect: effects.EndClip) -> None:
        clip = self._clips.pop(effect.clip)
        self.ledger.end_clip(effect.status, self.now_s, clip.gpu_s)
        self._on_end(self.ledger.ended.total())

    def _report(self) -> Simulated:
        ledger, counts = self.ledger, self.state.counts
        for gang in self._fleet.gangs:
            self._end_attempt(gang)
            self._use(gang, None)
        for clip in self._clips.values():
            ledger.gpu_s[Use.LOST] += clip.gpu_s
        ledger.gpu_s[Use.LEFT_OVER] = self._assumed.num_left_over * self.now_s
        return Simulated(
            makespan_s=self.now_s,
            ended=dict(ledger.ended),
            num_unfinished=len(self._clips),
            gpu_hours={use: seconds / HOUR_S for use, seconds in ledger.gpu_s.items()},
            per_hour=tuple(ledger.per_hour),
            num_retries=counts["retries"],
            num_gangs_lost=counts["losses"],
            num_preempted=counts["yields"] - counts["growths"],
            num_grown=counts["growths"],
            num_nodes_lost=ledger.num_nodes_lost,
            num_retired=sum(gang.is_retired for gang in self.state.gangs),
            aborted=self.state.aborted,
            num_events=self._num_events,
        )


_PERFORM: dict[type[effects.Effect], Callable[[SimulatedBatch, Any], None]] = {
    effects.BuildGang: SimulatedBatch._build_gang,
    effects.KillGang: SimulatedBatch._kill_gang,
    effects.AssignClip: SimulatedBatch._assign,
    effects.RequestStop: SimulatedBatch._request_stop,
    effects.BuildFinisher: SimulatedBatch._build_finisher,
    effects.KillFinisher: SimulatedBatch._kill_finisher,
    effects.EncodePrompt: SimulatedBatch._encode_prompt,
    effects.FinishClip: SimulatedBatch._finish_clip,
    effects.EndClip: SimulatedBatch._end_clip,
}
