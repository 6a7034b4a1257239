"""The gangs and finishers of a run, from before its clips are known until it ends."""

from dataclasses import dataclass

from cineray.jobs.gangs.actors import Actors
from cineray.jobs.gangs.effects import BuildFinisher, BuildGang, Effect, KillFinisher, KillGang
from cineray.jobs.gangs.finisher_slot import FinisherSlot
from cineray.jobs.gangs.gang_slot import GangSlot
from cineray.jobs.gangs.messages import RunSpec
from cineray.jobs.gangs.placement import Fleet


@dataclass(frozen=True, slots=True)
class Slots:
    """All of them; an actor that is lost is built again in its slot."""

    gangs: list[GangSlot]
    finishers: list[FinisherSlot]

    @classmethod
    def of(cls, spec: RunSpec, fleet: Fleet, actors: Actors) -> "Slots":
        gangs = [
            GangSlot(number=number, spec=spec, group=fleet.group, resources=fleet.rank, actor=actors.rank)
            for number in range(fleet.num_gangs)
        ]
        finishers = [
            FinisherSlot(number=number, spec=spec, fleet=fleet, actor=actors.finisher)
            for number in range(fleet.num_finishers)
        ]
        return cls(gangs, finishers)

    def perform(self, effect: Effect) -> bool:
        """Starts or kills an actor, if that is the effect."""
        match effect:
            case BuildGang(number):
                self.gangs[number].build()
            case KillGang(number):
                self.gangs[number].destroy()
            case BuildFinisher(number, gang):
                self.finishers[number].build(None if gang is None else self.gangs[gang].placement)
            case KillFinisher(number):
                self.finishers[number].destroy()
            case _:
                return False
        return True

    def destroy(self) -> None:
        """Kills every actor."""
        for slot in (*self.gangs, *self.finishers):
            slot.destroy()
