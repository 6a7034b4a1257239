"""A finisher actor as Ray sees it: calls that are out and what they answered, told to the driver as events."""

from dataclasses import dataclass, field
from typing import Any, Literal

import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from cineray.jobs.gangs.events import (
    Event,
    FinisherLost,
    FinisherPlaced,
    FinisherReady,
    LatentsMissing,
    PromptEncoded,
    PromptFailed,
    VideoCommitted,
    VideoFailed,
)
from cineray.jobs.gangs.gang_slot import forget, outcome
from cineray.jobs.gangs.messages import ClipFault, RunSpec, Task, WorkerLocation
from cineray.jobs.gangs.placement import Fleet
from cineray.jobs.gangs.retry import RankOutcome
from cineray.pipeline.request import InputError


@dataclass(slots=True)
class FinisherSlot:
    """The actor of one slot and the calls that it has not answered yet.

    Attributes:
        node_id: of a place of its own that it has.
    """

    number: int
    spec: RunSpec
    fleet: Fleet
    actor: Any = field(repr=False)  # of `Actors`
    _finishing: dict[Any, Task] = field(default_factory=dict)
    _encoding: dict[Any, Task] = field(default_factory=dict)
    node_id: str | None = None
    _group: PlacementGroup | None = None
    _actor: Any = None
    _place: Any = None
    _load: Any = None
    _life: Any = None

    @property
    def name(self) -> str:
        return f"finisher-{self.number}"

    def refs(self) -> list[Any]:
        # its death last: what it answered before counts
        calls = (self._place, self._load, *self._finishing, *self._encoding, self._life)
        return [ref for ref in calls if ref is not None]

    def build(self, host: PlacementGroup | None) -> None:
        """Starts the actor in a gang's placement group; None: in one of its own, when there is room."""
        resources = self.fleet.apart if host is None else self.fleet.hosted
        if host is None:  # Ray serves groups in their order, those of gangs before
            host = self._group = placement_group([resources.bundle], strategy="STRICT_PACK")
        index = self.number // self.fleet.num_gangs % self.fleet.group.num_nodes if self._group is None else 0
        self._actor = self.actor.options(
            num_cpus=resources.num_cpus,
            num_gpus=resources.num_gpus,
            max_restarts=0,
            max_task_retries=0,
            scheduling_strategy=PlacementGroupSchedulingStrategy(
                placement_group=host, placement_group_bundle_index=index
            ),
        ).remote(self.name, self.spec)
        self._life, self._place = self._actor.wait_until_death.remote(), self._actor.place.remote()
        self._load = self._actor.load.remote(self._group is None)

    def encode(self, task: Task) -> None:
        self._encoding[self._actor.encode.remote(task)] = task

    def finish(self, task: Task) -> None:
        self._finishing[self._actor.finish.remote(task)] = task

    def on_ready(self, ref: Any) -> list[Event]:
        """Takes in one of `refs` that is ready; what that says.

        Raises:
            InputError: the finisher found fault with the model or the output folder.
        """
        answer = outcome(ref)
        if isinstance(answer, InputError):
            raise answer
        if ref == self._life:
            self._life = None
        if isinstance(answer, RankOutcome):  # it died, or its device is not well: it says of a clip's faults itself
            return [FinisherLost(self.number, answer.reason, answer.is_node_gone)]
        if ref == self._place:
            self._place = None
            location: WorkerLocation = answer
            self.node_id = None if self._group is None else location.node_id
            return [FinisherPlaced(self.number)]
        if ref == self._load:
            self._load = None
            return [FinisherReady(self.number)]
        if ref in self._finishing:
            return [self._finished(self._finishing.pop(ref), answer)]
        if ref in self._encoding:
            return [self._encoded(self._encoding.pop(ref), answer)]
        return []

    def _encoded(self, task: Task, answer: Any) -> Event:
        if isinstance(answer, ClipFault):
            return PromptFailed(self.number, task.prompt_key, answer.reason, _fault(answer))
        return PromptEncoded(self.number, task.prompt_key, tuple(answer))

    def _finished(self, task: Task, answer: Any) -> Event:
        if answer is None:
            return LatentsMissing(self.number, task.name)
        if isinstance(answer, ClipFault):
            return VideoFailed(self.number, task.name, answer.reason, _fault(answer))
        return VideoCommitted(self.number, task.name, answer)

    def destroy(self) -> None:
        if self._actor is not None:
            ray.kill(self._actor, no_restart=True)
        if self._group is not None:
            remove_placement_group(self._group)
        forget(self.refs())
        self._actor = self._place = self._load = self._life = self._group = self.node_id = None
        self._encoding, self._finishing = {}, {}


def _fault(answer: ClipFault) -> Literal["input", "memory"]:
    return "memory" if answer.fault == "memory" else "input"
