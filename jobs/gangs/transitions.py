"""What clips, gangs and finishers go through: attempts that are lost, ends, actors that are killed or moved."""

from collections.abc import Mapping
from typing import Any, Literal

from cineray.jobs.gangs.effects import EndClip, KillFinisher, KillGang, Log, RecordFailure, Say
from cineray.jobs.gangs.fleet_state import FleetState
from cineray.jobs.gangs.members import ClipState, FinisherState, GangStage, GangState, Stage
from cineray.jobs.gangs.retry import MAX_FRUITLESS, MAX_STRIKES, is_quarantined, is_retired


class Transitions(FleetState):
    """What becomes of a clip, a gang or a finisher; who is next is not decided here."""

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
