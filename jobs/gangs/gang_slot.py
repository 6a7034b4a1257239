"""A gang of actors as Ray sees it: calls that are out and what they answered, told to the driver as events.

One slot outlives many gangs. What follows from an event is `batch_state`'s to say.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import ray
from ray import exceptions
from ray.util.placement_group import (
    PlacementGroup,
    placement_group,
    placement_group_table,
    remove_placement_group,
)
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from cineray.jobs.gangs.events import Event, GangEnded, GangPlaced, GangReady, PromptMissing, StepReached
from cineray.jobs.gangs.messages import (
    ClipFault,
    Denoised,
    NoPrompt,
    Preempted,
    RunSpec,
    StepCount,
    Task,
    WorkerLocation,
)
from cineray.jobs.gangs.placement import GangGroup, Resources
from cineray.jobs.gangs.retry import RankOutcome
from cineray.jobs.output.hardware import summed_up
from cineray.pipeline.loading.errors import LoadingError
from cineray.pipeline.request import InputError, explain

# the last three are no subclasses of RayActorError
DEATHS = (
    exceptions.RayActorError,
    exceptions.NodeDiedError,
    exceptions.WorkerCrashedError,
    exceptions.OutOfMemoryError,
)
GRACE_S = 2.0  # after one rank's error: the death of another arrives 0.02 s (same node) to 2.2 s (node) later
Stage = Literal["placing", "rendezvous", "joining", "idle", "busy", "gone"]


@dataclass(slots=True)
class GangSlot:
    """The actors of one slot and the calls that they have not answered yet.

    Attributes:
        spec, group: of the gang that is there, or was there last.
        shapes: the same of gangs by their room, in gangs as they began; 1 is always among them.
        resources: what one rank takes of the group.
        task: the clip that the gang has, while busy.
        answers: how each rank's part of the current call ended, by rank.
    """

    number: int
    spec: RunSpec
    group: GangGroup
    resources: Resources
    shapes: Mapping[int, tuple[RunSpec, GangGroup]] = field(repr=False)
    actor: Any = field(repr=False)  # of `Actors`
    stage: Stage = "gone"
    task: Task | None = None
    answers: dict[int, Any] = field(default_factory=dict)
    step_count: StepCount | None = None
    first_end_s: float | None = None
    num_built: int = 0
    _pids: tuple[int, ...] = ()
    _group: PlacementGroup | None = None
    _ranks: list[Any] = field(default_factory=list)
    _calls: dict[Any, int] = field(default_factory=dict)
    _lives: dict[Any, int] = field(default_factory=dict)
    _step_count_call: Any = None
    _step_count_began_s: float = 0.0

    @property
    def name(self) -> str:
        return f"gang-{self.number}"

    @property
    def num_ranks(self) -> int:
        return self.group.num_ranks

    @property
    def placement(self) -> PlacementGroup | None:
        """The placement group of the gang that is there, or is to come."""
        return self._group

    def refs(self) -> list[Any]:
        """Everything that the loop waits for."""
        return [*self._calls, *self._lives, *([self._step_count_call] if self._step_count_call is not None else [])]

    def build(self, room: int = 1) -> None:
        """Asks Ray for a place and starts the ranks there; they come up when there is room.

        Args:
            room: of the gang, in gangs as they began.
        """
        self.num_built += 1
        self.spec, self.group = self.shapes[room]
        # one bundle is on one node; several bundles each on another one
        self._group = placement_group([self.group.bundle] * self.group.num_nodes, strategy="STRICT_SPREAD")
        self._ranks = [
            self.actor.options(
                name=f"cineray-{self.name}-r{index}-{self.num_built}-{self._group.id.hex()[:6]}",
                num_cpus=self.resources.num_cpus,
                num_gpus=self.resources.num_gpus,
                max_restarts=0,
                max_task_retries=0,
                scheduling_strategy=PlacementGroupSchedulingStrategy(
                    placement_group=self._group, placement_group_bundle_index=self.group.node_of(index)
                ),
            ).remote(f"{self.name}/r{index}", self.spec)
            for index in range(self.num_ranks)
        ]
        self._lives = {rank.wait_until_death.remote(): index for index, rank in enumerate(self._ranks)}
        self._call("placing", lambda rank: rank.place.remote())

    def assign(self, task: Task) -> None:
        self.task = task
        self._call("busy", lambda rank: rank.denoise.remote(task))

    def request_stop(self) -> None:
        """The gang puts its clip down after the current step."""
        # one rank is enough, but it may be the one that is lost
        forget([rank.stop.remote() for rank in self._ranks])

    def poll(self, now_s: float, every_s: float) -> None:
        if self.stage == "busy" and self._step_count_call is None and now_s - self._step_count_began_s >= every_s:
            self._step_count_began_s = now_s
            self._step_count_call = self._ranks[0].step_count.remote()

    def on_ready(self, ref: Any) -> list[Event]:
        """Takes in one of `refs` that is ready; what that says already."""
        now_s = time.monotonic()
        if ref == self._step_count_call:
            self._step_count_call = None
            answer = outcome(ref)
            if isinstance(answer, StepCount) and answer != self.step_count:
                self.step_count = answer
                return [StepReached(self.number, answer.step)]
            return []
        index = self._lives.pop(ref, None)
        answer = outcome(ref)
        if index is None:
            index = self._calls.pop(ref)
        elif not isinstance(answer, RankOutcome) or answer.kind != "died":
            return []
        known = self.answers.get(index)
        if not (isinstance(known, RankOutcome) and known.kind == "died"):
            self.answers[index] = answer
        if isinstance(answer, RankOutcome | ClipFault | InputError) and self.first_end_s is None:
            self.first_end_s = now_s
        return []

    def settle(self, now_s: float) -> list[Event]:
        """What the current call has come to, if it can be judged; goes on with building.

        Raises:
            InputError: a rank found fault with the model or the output folder: another attempt would end alike.
        """
        if self.stage == "gone" or not self._is_settled(now_s):
            return []
        for answer in self.answers.values():
            if isinstance(answer, InputError):
                raise answer
        outcomes = self._outcomes()
        if any(end.kind != "answered" for end in outcomes):
            self._begin("idle")  # if it is to be kept
            self.task = None
            return [GangEnded(self.number, outcomes)]
        return self._advance()

    def _is_settled(self, now_s: float) -> bool:
        """All answered, or one failed and the others had their time."""
        if self.first_end_s is None:
            return len(self.answers) == self.num_ranks
        died = any(isinstance(end, RankOutcome) and end.kind == "died" for end in self.answers.values())
        return died or len(self.answers) == self.num_ranks or now_s - self.first_end_s > GRACE_S

    def _advance(self) -> list[Event]:
        """Goes on after a call that every rank answered."""
        if self.stage == "placing":
            places: list[WorkerLocation] = [self.answers[index] for index in range(self.num_ranks)]
            order = sorted(range(self.num_ranks), key=lambda i: (places[i].order, i))
            self._ranks = [self._ranks[i] for i in order]
            self._lives = {ref: order.index(i) for ref, i in self._lives.items()}
            self._pids = tuple(places[i].pid for i in order)
            self._begin("rendezvous")
            self._calls = {self._ranks[0].open_rendezvous.remote(): 0}
            self.answers = dict.fromkeys(range(1, self.num_ranks))  # they have nothing to say yet
            return [GangPlaced(self.number, frozenset(place.node_id for place in places))]
        if self.stage == "rendezvous":
            host, port = self.answers[0]
            ranks = {id(rank): index for index, rank in enumerate(self._ranks)}
            self._call("joining", lambda rank: rank.join.remote(ranks[id(rank)], host, port))
            return []
        was_joining, answer = self.stage == "joining", self.answers[0]
        ranks = [rank.hardware for rank in self.answers.values() if isinstance(rank, Denoised) and rank.hardware]
        self._begin("idle")
        self.task = None
        if was_joining:
            return [GangReady(self.number, self._pids)]
        if isinstance(answer, NoPrompt):
            return [PromptMissing(self.number, answer.reason)]
        if isinstance(answer, Preempted):
            return [GangEnded(self.number, preempted_at=answer.step, is_kept=answer.kept)]
        return [GangEnded(self.number, ranks=tuple(summed_up(ranks)))]

    def _outcomes(self) -> tuple[RankOutcome, ...]:
        """How each rank's part ended, as `classify_failure` takes it."""

        def end(answer: Any) -> RankOutcome:
            if isinstance(answer, RankOutcome):
                return answer
            if isinstance(answer, ClipFault):
                return RankOutcome(kind="raised", reason=answer.reason, fault=answer.fault)
            return RankOutcome(kind="answered")

        silent = RankOutcome(kind="silent")
        return tuple(end(self.answers[index]) if index in self.answers else silent for index in range(self.num_ranks))

    def destroy(self) -> None:
        """Kills every rank and gives the place back."""
        for rank in self._ranks:
            ray.kill(rank, no_restart=True)
        if self._group is not None:
            remove_placement_group(self._group)
        forget(self.refs())
        self._ranks, self._calls, self._lives, self._step_count_call, self._group = [], {}, {}, None, None
        self.task = None
        self._begin("gone")

    def _call(self, stage: Stage, call: Callable[[Any], Any]) -> None:
        self._begin(stage)
        self._calls = {call(rank): index for index, rank in enumerate(self._ranks)}

    def _begin(self, stage: Stage) -> None:
        self.stage = stage
        self.answers = {}
        self.first_end_s = None
        self.step_count = None


def scheduling_state(group: PlacementGroup | None) -> str:
    """What Ray says of a placement group that has no place yet, as NO_RESOURCES or INFEASIBLE."""
    if group is None:
        return "unknown"
    try:
        return str(placement_group_table(group)["stats"]["scheduling_state"])
    except Exception:  # noqa: BLE001  # it tells more than is needed, and its form is Ray's own
        return "unknown"


def forget(refs: list[Any]) -> None:
    """Lets go of calls whose answers nobody wants; else Ray would print their errors."""
    for ref in refs:
        ref.future().add_done_callback(lambda future: future.exception())


def outcome(ref: Any) -> Any:
    """What a call that is ready returned; a RankOutcome if it failed, an InputError if that would fail anywhere."""
    try:
        return ray.get(ref)
    except DEATHS as death:
        return RankOutcome(kind="died", reason=_first_line(death), is_node_gone=_is_of_node(death))
    except exceptions.RayTaskError as error:
        if isinstance(error.cause, InputError) and not isinstance(error.cause, LoadingError):
            return InputError(*error.cause.lines)
        if isinstance(error.cause, LoadingError):
            return RankOutcome(kind="raised", reason=explain(error.cause))
        return RankOutcome(kind="raised", reason=f"{type(error.cause).__name__}: {_first_line(error.cause)}")
    except exceptions.RayError as error:
        return RankOutcome(kind="raised", reason=f"{type(error).__name__}: {_first_line(error)}")


def _is_of_node(death: BaseException) -> bool:
    """Whether a process died because its node did.

    Of a rank alone its raylet tells, and Ray says "died". Where the raylet is gone too, nobody does, and Ray 2.60 gives
    up after two seconds with "unavailable"; that a node is dead it knows 15 s later, and says in words.
    """
    of_node = (exceptions.NodeDiedError, exceptions.ActorUnavailableError)
    return isinstance(death, of_node) or "node has died" in str(death)


def _first_line(error: BaseException) -> str:
    """The line of an error that tells most: Ray's are long, and begin with what everybody knows."""
    lines = [line.strip() for line in str(error).strip().splitlines() if line.strip()]
    telling = [line for line in lines if "died" in line.lower() or "killed" in line.lower() or "exit" in line.lower()]
    return " ".join((telling or lines or [type(error).__name__])[:1])[:300]
