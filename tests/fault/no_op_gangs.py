"""Gangs and finishers on a real Ray whose actors answer at once and render nothing: for what Ray places, and where."""

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray import cloudpickle

from cineray.distributed.layout import Layout
from cineray.jobs.gangs import events
from cineray.jobs.gangs.actors import Finisher, GangRank, actors_of
from cineray.jobs.gangs.effects import Effect
from cineray.jobs.gangs.messages import RunSpec, WorkerLocation
from cineray.jobs.gangs.placement import Fleet, plan_fleet
from cineray.jobs.gangs.slots import Slots
from cineray.jobs.gangs.state import BatchState
from cineray.jobs.planning.choice import Larger
from cineray.jobs.run_options import RunOptions
from cineray.pipeline.loading.options import LoadOptions

PATIENCE_S = 240.0


class NoOpRank(GangRank):
    """Has a place, and does nothing there."""

    def __init__(self, name: str, _spec: RunSpec) -> None:
        self._name = name

    def open_rendezvous(self) -> tuple[str, int]:
        return "", 0

    def join(self, rank: int, host: str, port: int) -> None:
        pass


class NoOpFinisher(Finisher):
    """The same."""

    def __init__(self, name: str, _spec: RunSpec) -> None:
        self._name = name

    def load(self, shares_gpu: bool) -> None:
        self._shares_gpu = shares_gpu

    def is_told_that_it_shares(self) -> bool:
        """Whether a rank is on its GPU, as it was told."""
        return self._shares_gpu


@dataclass
class NoOpBatch:
    """A run whose clips nobody renders: its actors are placed, and that is all."""

    fleet: Fleet
    state: BatchState
    slots: Slots

    @classmethod
    def begun(
        cls,
        layout: Layout,
        num_gangs: int,
        num_finishers: int | None,
        nodes: Sequence[Any],
        larger: Sequence[Larger] = (),
    ) -> "NoOpBatch":
        """Asks Ray for all places, with pretended GPUs."""
        fleet = plan_fleet("cuda", layout, num_gangs, num_finishers, nodes)
        cloudpickle.register_pickle_by_value(sys.modules[__name__])  # Ray's workers cannot import a test
        spec = RunSpec(model="none", options=LoadOptions(), out=Path("none"), lossless=False, run=RunOptions())
        speedups = {gang.num_gangs: gang.speedup for gang in larger}
        state = BatchState(fleet.num_gangs, fleet.num_finishers, 300.0, 4, fleet.num_apart, speedups)
        batch = cls(fleet, state, Slots.of(spec, fleet, actors_of(NoOpRank, NoOpFinisher), larger))
        clip = events.NewClip("a", "a", "p", num_steps=10**6)
        batch.tell(events.ClipsRead((clip,), is_last=True))
        return batch

    def tell(self, *happened: events.Event) -> None:
        for event in happened:
            for effect in self.state.handle(event, time.monotonic()):
                self.perform(effect)

    def perform(self, effect: Effect) -> None:
        self.slots.perform(effect)  # clips stay where they are

    def until(self, condition: Callable[[], bool]) -> None:
        """Hears what Ray says until the condition holds."""
        deadline = time.monotonic() + PATIENCE_S
        slots = (*self.slots.gangs, *self.slots.finishers)
        while not condition():
            assert time.monotonic() < deadline, (self.state.gangs, self.state.finishers)
            owners: dict[Any, Any] = {ref: slot for slot in slots for ref in slot.refs()}
            ready, _ = ray.wait(list(owners), num_returns=1, timeout=0.5)
            for ref in ready:
                if ref in owners[ref].refs():
                    self.tell(*owners[ref].on_ready(ref))
            for gang in self.slots.gangs:
                self.tell(*gang.settle(time.monotonic()))

    def all_are_placed(self) -> bool:
        finishers = all(finisher.stage in ("loading", "ready") for finisher in self.state.finishers)
        return finishers and all(gang.is_placed for gang in self.state.gangs)

    def gang_places(self) -> list[list[WorkerLocation]]:
        """Of each gang, in the order of its ranks."""
        return [ray.get([rank.place.remote() for rank in gang._ranks]) for gang in self.slots.gangs]

    def finisher_places(self) -> list[WorkerLocation]:
        return ray.get([finisher._actor.place.remote() for finisher in self.slots.finishers])

    def finishers_sharing(self) -> list[bool]:
        """Whether each finisher was told that a rank is on its GPU."""
        return ray.get([finisher._actor.is_told_that_it_shares.remote() for finisher in self.slots.finishers])

    def end(self) -> None:
        self.slots.destroy()
