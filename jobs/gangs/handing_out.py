"""Who gets what next: places for actors, prompts and clips for those that are free, room for larger gangs."""

import math
from collections import Counter

from cineray.jobs.gangs.effects import (
    Abort,
    AssignClip,
    BuildFinisher,
    BuildGang,
    EncodePrompt,
    FinishClip,
    Log,
    RequestStop,
    Say,
)
from cineray.jobs.gangs.members import PLACE_S, ClipState, FinisherState, GangStage, GangState, Stage
from cineray.jobs.gangs.tail import Growth, Standing, grow
from cineray.jobs.gangs.transitions import Transitions

IN_FINISHER = 2  # clips handed to a finisher: one is decoded, one need not wait for the driver's next turn


class HandingOut(Transitions):
    """Gives work to who is free for it."""

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

    def _look_elsewhere(self, finisher: FinisherState, now_s: float) -> None:
        """A finisher that finds no place of its own stands with a gang, as soon as one has its place."""
        waits = finisher.stage == "placing" and finisher.is_apart
        if waits and now_s - finisher.changed_s >= PLACE_S and any(gang.is_placed for gang in self.gangs):
            self._do(
                Say(f"{finisher.name} has found no place of its own for {PLACE_S:g} s, and will stand with a gang")
            )
            finisher.is_apart = False
            self._empty(finisher, "no place", now_s, is_excused=True)

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

    def _busy(self, gang: GangState, may_move: bool, now_s: float) -> Standing:
        rest_s, (step, at_s) = math.inf, gang.told
        if gang.step_s is not None:
            left = self.clips[gang.clip or ""].num_steps - step
            rest_s = max(0.0, left * gang.step_s - (now_s - at_s))
        node, step_s = min(gang.nodes, default=""), gang.step_s if may_move else None
        return Standing(gang=gang.number, room=gang.room, node=node, rest_s=rest_s, step_s=step_s)

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
