"""The actors as Ray sees them: ranks of a gang, which denoise, and finishers, which encode before and decode after.

What they do stands in `rank_work` and `finisher_work`, which the actors' processes import and the driver does not: it
starts in a second and does without torch. Latents and prompts cross between actors as files of the output folder, so
that nothing is lost with an actor.
"""

import os
import threading
from dataclasses import dataclass
from typing import Any

import ray

from cineray.jobs.allocator import grow_segments
from cineray.jobs.console.terminal import begin_printing
from cineray.jobs.exact_products import multiply_exactly
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
from cineray.jobs.threads import wait_passively


class GangRank:
    """One rank of a gang. The name begins its lines in the log."""

    def __init__(self, name: str, spec: RunSpec) -> None:
        _begin_process(spec)
        from cineray.jobs.gangs.rank_work import RankWork

        self._name = name
        self._work = RankWork(spec)

    def __repr__(self) -> str:
        return self._name

    def place(self) -> WorkerLocation:
        return _location()

    def open_rendezvous(self) -> tuple[str, int]:
        return self._work.open_rendezvous(ray.util.get_node_ip_address())

    def join(self, rank: int, host: str, port: int) -> None:
        self._work.join(rank, host, port)

    def denoise(self, task: Task) -> Denoised | Preempted | NoPrompt | ClipFault:
        return self._work.denoise(task)

    @ray.method(concurrency_group="control")
    def step_count(self) -> StepCount:
        return self._work.step_count

    @ray.method(concurrency_group="control")
    def stop(self) -> None:
        """Asks the gang to put its clip down after the current step, and every later one."""
        self._work.stop_requested.set()

    @ray.method(concurrency_group="life")
    def wait_until_death(self) -> None:
        """Never returns: its failure is how the driver hears of this process's death, busy or idle."""
        threading.Event().wait()


class Finisher:
    """What is done to a clip before and after the gangs."""

    def __init__(self, name: str, spec: RunSpec) -> None:
        _begin_process(spec)
        from cineray.jobs.gangs.finisher_work import FinisherWork

        self._name = name
        self._work = FinisherWork(spec)

    def __repr__(self) -> str:
        return self._name

    def place(self) -> WorkerLocation:
        return _location()

    def load(self, shares_gpu: bool) -> None:
        self._work.load(shares_gpu)

    @ray.method(concurrency_group="encode")
    def encode(self, task: Task) -> tuple[str, ...] | ClipFault:
        return self._work.encode(task)

    def finish(self, task: Task) -> dict[str, Any] | ClipFault | None:
        return self._work.finish(task)

    @ray.method(concurrency_group="life")
    def wait_until_death(self) -> None:
        threading.Event().wait()


def _location() -> WorkerLocation:
    context = ray.get_runtime_context()
    devices = context.get_accelerator_ids().get("GPU", [])
    return WorkerLocation(node_id=context.get_node_id(), device=",".join(devices), pid=os.getpid())


def _begin_process(spec: RunSpec) -> None:
    """Prepares an actor's process, before it imports torch. Its lines reach the driver's terminal through Ray's log."""
    begin_printing()
    wait_passively()
    multiply_exactly()
    if spec.options.device == "cuda":
        grow_segments()


# calls of the named groups run beside the main one, in threads of their own
RANK_GROUPS = {"control": 1, "life": 1}
FINISHER_GROUPS = {"encode": 1, "life": 1}


@dataclass(frozen=True, kw_only=True, slots=True)
class Actors:
    """The classes of actors that a run starts, as `ray.remote` makes them."""

    rank: Any
    finisher: Any


def actors_of(rank: type[GangRank] = GangRank, finisher: type[Finisher] = Finisher) -> Actors:
    """Actors of these classes."""
    return Actors(
        rank=ray.remote(concurrency_groups=RANK_GROUPS)(rank),  # type: ignore[call-overload]
        finisher=ray.remote(concurrency_groups=FINISHER_GROUPS)(finisher),  # type: ignore[call-overload]
    )
