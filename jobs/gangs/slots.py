"""The gangs and finishers of a run, from before its clips are known until it ends."""

from collections.abc import Iterable
from dataclasses import dataclass, replace

from cineray.jobs.gangs.actors import Actors
from cineray.jobs.gangs.effects import BuildFinisher, BuildGang, Effect, KillFinisher, KillGang
from cineray.jobs.gangs.finisher_slot import FinisherSlot
from cineray.jobs.gangs.gang_slot import GangSlot
from cineray.jobs.gangs.messages import RunSpec
from cineray.jobs.gangs.placement import Fleet, group_of_larger
from cineray.jobs.planning.choice import Larger


@dataclass(frozen=True, slots=True)
class Slots:
    """All of them; an actor that is lost is built again in its slot."""

    gangs: list[GangSlot]
    finishers: list[FinisherSlot]

    @classmethod
    def of(cls, spec: RunSpec, fleet: Fleet, actors: Actors, larger: Iterable[Larger] = ()) -> "Slots":
        shapes = {1: (spec, fleet.group)}
        for gang in larger:
            run = spec.run.on(gang.layout)
            shapes[gang.num_gangs] = (
                replace(spec, run=run),
                group_of_larger(fleet.group, gang.layout.ranks_per_gang),
            )
        gangs = [
            GangSlot(
                number=number,
                spec=spec,
                group=fleet.group,
                shapes=shapes,
                resources=fleet.rank,
                actor=actors.rank,
            )
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
            case BuildGang(number, others):
                self.gangs[number].build(1 + len(others))
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
