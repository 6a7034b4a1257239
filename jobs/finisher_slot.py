"""A finisher actor as the driver sees it: loading, working, lost, started again."""

import time
from dataclasses import dataclass, field
from typing import Any, Literal

import ray

from cineray.jobs.gang_slot import Resources, forget, outcome
from cineray.jobs.retry import MemberEnd
from cineray.jobs.stages import RunSpec, Task
from cineray.pipeline.request import InputError


@dataclass(slots=True)
class FinisherSlot:
    """The state of one finisher; the driver's loop moves it on.

    Attributes:
        finishing: the clip that is being decoded, then those that wait behind it in the actor.
        began_s: monotonic time of the last sign of progress.
        encoding: prompt keys that are being encoded.
        lost: why the actor is no more, until the driver has dealt with it.
        answers: what calls returned, until the driver has dealt with them.
    """

    number: int
    spec: RunSpec
    resources: Resources
    actor: Any = field(repr=False)  # of `Actors`
    stage: Literal["gone", "loading", "ready"] = "gone"
    finishing: dict[Any, Task] = field(default_factory=dict)
    began_s: float = 0.0
    encoding: dict[Any, Task] = field(default_factory=dict)
    answers: list[tuple[Literal["encoded", "finished"], Task, Any]] = field(default_factory=list)
    lost: str | None = None
    num_losses_in_a_row: int = 0
    is_given_up: bool = False
    _actor: Any = None
    _load: Any = None
    _life: Any = None

    @property
    def name(self) -> str:
        return f"finisher-{self.number}"

    def refs(self) -> list[Any]:
        return [ref for ref in (self._load, self._life, *self.finishing, *self.encoding) if ref is not None]

    def build(self) -> None:
        self._actor = self.actor.options(
            num_cpus=self.resources.num_cpus,
            num_gpus=self.resources.num_gpus,
            max_restarts=0,
            max_task_retries=0,
        ).remote(self.name, self.spec)
        self._life, self._load = self._actor.live.remote(), self._actor.load.remote()
        self.stage, self.lost = "loading", None
        self.began_s = time.monotonic()

    def encode(self, task: Task) -> None:
        self.encoding[self._actor.encode.remote(task)] = task

    def finish(self, task: Task) -> None:
        if not self.finishing:
            self.began_s = time.monotonic()
        self.finishing[self._actor.finish.remote(task)] = task

    def take(self, ref: Any) -> None:
        """Takes in one of `refs` that is ready."""
        answer = outcome(ref)
        died = isinstance(answer, MemberEnd) and answer.kind == "died"
        if died:
            self.lost = self.lost or answer.reason
        if ref == self._life:
            self._life = None
        elif ref == self._load:
            self._load = None
            if isinstance(answer, MemberEnd):
                self.lost = self.lost or answer.reason
            elif isinstance(answer, InputError):
                raise answer
            else:
                self.stage = "ready"
        elif ref in self.finishing:
            if not died:
                self.began_s = time.monotonic()
                self.answers.append(("finished", self.finishing.pop(ref), answer))
        elif not died:
            self.answers.append(("encoded", self.encoding.pop(ref), answer))
        else:
            self.encoding.pop(ref)

    def destroy(self) -> None:
        if self._actor is not None:
            ray.kill(self._actor, no_restart=True)
        forget(self.refs())
        self._actor = self._load = self._life = None
        self.encoding, self.finishing, self.stage = {}, {}, "gone"
