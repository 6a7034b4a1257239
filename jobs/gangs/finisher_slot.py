"""A finisher actor as Ray sees it: calls that are out and what they answered, told to the driver as events."""

from dataclasses import dataclass, field
from typing import Any

import ray

from cineray.jobs.gangs.events import (
    Event,
    FinisherLost,
    FinisherReady,
    LatentsMissing,
    PromptEncoded,
    PromptFailed,
    VideoCommitted,
    VideoFailed,
)
from cineray.jobs.gangs.gang_slot import Resources, forget, outcome
from cineray.jobs.gangs.messages import ClipFault, RunSpec, Task
from cineray.jobs.gangs.retry import RankOutcome
from cineray.pipeline.request import InputError


@dataclass(slots=True)
class FinisherSlot:
    """The actor of one slot and the calls that it has not answered yet."""

    number: int
    spec: RunSpec
    resources: Resources
    actor: Any = field(repr=False)  # of `Actors`
    _finishing: dict[Any, Task] = field(default_factory=dict)
    _encoding: dict[Any, Task] = field(default_factory=dict)
    _actor: Any = None
    _load: Any = None
    _life: Any = None

    @property
    def name(self) -> str:
        return f"finisher-{self.number}"

    def refs(self) -> list[Any]:
        # its death last: what it answered before counts
        return [ref for ref in (self._load, *self._finishing, *self._encoding, self._life) if ref is not None]

    def build(self) -> None:
        self._actor = self.actor.options(
            num_cpus=self.resources.num_cpus,
            num_gpus=self.resources.num_gpus,
            max_restarts=0,
            max_task_retries=0,
        ).remote(self.name, self.spec)
        self._life, self._load = self._actor.wait_until_death.remote(), self._actor.load.remote()

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
        is_lost = isinstance(answer, RankOutcome) and (answer.kind == "died" or ref == self._load)
        if ref == self._life:
            self._life = None
        if is_lost:
            return [FinisherLost(self.number, answer.reason)]
        if ref == self._load:
            self._load = None
            return [FinisherReady(self.number)]
        if ref in self._finishing:
            return [self._finished(self._finishing.pop(ref), answer)]
        if ref in self._encoding:
            return [self._encoded(self._encoding.pop(ref), answer)]
        return []

    def _encoded(self, task: Task, answer: Any) -> Event:
        if isinstance(answer, ClipFault | RankOutcome):
            return PromptFailed(self.number, task.prompt_key, answer.reason)
        return PromptEncoded(self.number, task.prompt_key, tuple(answer))

    def _finished(self, task: Task, answer: Any) -> Event:
        if answer is None:
            return LatentsMissing(self.number, task.name)
        if isinstance(answer, ClipFault | RankOutcome):
            return VideoFailed(self.number, task.name, answer.reason)
        return VideoCommitted(self.number, task.name, answer)

    def destroy(self) -> None:
        if self._actor is not None:
            ray.kill(self._actor, no_restart=True)
        forget(self.refs())
        self._actor = self._load = self._life = None
        self._encoding, self._finishing = {}, {}
