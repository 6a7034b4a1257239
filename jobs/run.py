"""One run of `cineray render`, in this process or on gangs of actors."""

import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from cineray.distributed.layout import Layout, check_layout
from cineray.files import read_json
from cineray.jobs.outlook import Outlook
from cineray.jobs.output.folder import OutputFolder, refuse_early
from cineray.jobs.output.lease import Lease
from cineray.jobs.output.results import ResultLog
from cineray.jobs.run_options import RunOptions, decodes_on_gang
from cineray.jobs.stopping import stop_requested
from cineray.jobs.threads import num_threads
from cineray.pipeline.loading.checkpoint import Checkpoint
from cineray.pipeline.loading.options import LoadOptions
from cineray.pipeline.media.output import Output, format_of
from cineray.pipeline.request import ClipRequest, InputError


@dataclass(frozen=True, kw_only=True, slots=True)
class RunReport:
    """What became of a run; `stopped_by` is the signal that ended it early, `abort_reason` why it was aborted.

    `num_missing` clips were promised, and nothing became of them though the run went to its end. `audit` is what
    `--audit-adapt` found out on the way.
    """

    results: ResultLog
    wall_s: float
    gangs_busy: float | None = None
    stopped_by: int | None = None
    abort_reason: str | None = None
    num_missing: int = 0
    audit: "Audit | None" = None

    @property
    def has_ended(self) -> bool:
        """Whether the run went to its end, however its clips ended."""
        return self.stopped_by is None and self.abort_reason is None

    @property
    def is_complete(self) -> bool:
        """Whether all that was asked for is there."""
        counts = self.results.counts
        return self.has_ended and not (self.num_missing or counts["failed"] or counts["quarantined"])

    def to_dict(self) -> dict[str, Any]:
        """The report for JSON, all but the clips."""
        per_hour = self.results.counts["done"] / self.wall_s * 3600 if self.wall_s else 0.0
        content = {"wall_s": round(self.wall_s, 3), "clips_per_hour": round(per_hour, 1)}
        content |= {} if self.gangs_busy is None else {"gangs_busy": self.gangs_busy}
        return content | ({} if self.audit is None else {"audit": self.audit.to_dict()})


@dataclass(frozen=True, kw_only=True, slots=True)
class RunPlan:
    """What a run renders with, and where to.

    Attributes:
        larger: gangs that may stand in the place of several at the end.
        outlook: knows of the run's clips once they are checked.
    """

    checkpoint: Checkpoint
    load_options: LoadOptions
    options: RunOptions
    out: Path
    lossless: bool
    larger: "tuple[Larger, ...]" = ()
    outlook: Outlook = field(default_factory=Outlook)


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """Clips of a run whose folder is ours: all of them, or those of one wave.

    Args:
        num_clips: of the whole run.
        num_before: clips of earlier waves.
        results: of the whole run.
    """

    num_clips: int
    requests: Iterator[ClipRequest]
    folder: OutputFolder
    lease: Lease
    num_before: int = 0
    results: ResultLog = field(default_factory=ResultLog)


if TYPE_CHECKING:  # they take seconds to import
    from cineray.jobs.audit import Audit
    from cineray.jobs.gangs.messages import RunSpec
    from cineray.jobs.gangs.queue import ClipQueue
    from cineray.jobs.gangs.slots import Slots
    from cineray.jobs.gangs.state import BatchState
    from cineray.jobs.planning.choice import Larger
    from cineray.pipeline.footprint.fit import Demand
    from cineray.pipeline.loading.weights import Identity

Renderer = Callable[[Work], RunReport]  # may be called again: the model stays in memory, or Ray up
T = TypeVar("T")


def render_run(
    asked: RunPlan,
    check: Callable[[], tuple[int, Iterable[ClipRequest]]],
    takes_long: bool,
    about: dict[str, Any],
    render_all: "Callable[[Renderer, Work], RunReport] | None" = None,
) -> RunReport:
    """Renders what is not in the folder yet.

    Args:
        check: gives the number of clips and a stream of them, all of which have been checked.
        takes_long: the check does, so that gangs come up meanwhile.
        about: goes into run.json.
        render_all: renders the run's clips with a renderer that is up; else all of them go into one call.

    Raises:
        InputError: bad clips; the model does not fit the layout, or cannot be loaded; no such cluster.
        OutputError: the folder is full, gone or cannot be written.
        LeasedError: another driver renders into it.
    """
    options, early = asked.options, None
    refuse_early(asked.out)
    if options.uses_ray:
        _check_fits(asked.checkpoint, options.layout)
    with ExitStack() as stack:
        # into a folder that is in use, or has all clips already, no gang should start for nothing
        if options.uses_ray and takes_long and _is_unused(asked.out):
            checking = _in_thread(check)
            early = stack.enter_context(_gangs(asked, start_now=True))
            num_clips, requests = checking.result()
        else:
            num_clips, requests = check()
        with held_folder(asked.out, asked.checkpoint.model.output, options.lease_s) as (folder, lease):
            run = {"model": asked.checkpoint.name, "options": asdict(asked.load_options), "num_clips": num_clips}
            run |= {**about, "gangs": options.num_gangs, "layout": asdict(options.layout), "lossless": asked.lossless}
            ready = _gangs(asked) if options.uses_ray else _model_here(asked)
            with nullcontext(early) if early else ready as render:
                folder.write_json("run.json", run)
                work = Work(num_clips=num_clips, requests=iter(requests), folder=folder, lease=lease)
                report = render(work) if render_all is None else render_all(render, work)
                if report.has_ended:
                    report = replace(report, num_missing=num_clips - report.results.counts.total())
            lease.check()
            folder.write_json("run.json", run | report.to_dict() | {"counts": report.results.counts})
            folder.delete(folder.state / "running.json")
            if report.is_complete:
                folder.delete_stale_clips()
            return report


def add_to_run(plan: RunPlan, more: dict[str, Any]) -> None:
    """Adds to the run.json of a run that has ended.

    Raises:
        OutputError: the folder is gone or cannot be written.
        LeasedError: another driver renders into it.
    """
    with held_folder(plan.out, plan.checkpoint.model.output, plan.options.lease_s) as (folder, _):
        content = read_json(plan.out / "run.json", follow_links=False)
        folder.write_json("run.json", (content if isinstance(content, dict) else {}) | more)


@contextmanager
def held_folder(out: Path, output: Output, lease_s: float) -> Iterator[tuple[OutputFolder, Lease]]:
    """The output folder and its lease, swept on entering and tidied on leaving."""
    folder = OutputFolder(out, output)
    lease = Lease(folder.state, ttl_s=lease_s)
    try:
        with lease:
            try:
                folder.remove_leftovers()
                folder.own_log()
                yield folder, lease
            except InputError:  # such as a file that is gone: another driver tidied it away while this one slept
                lease.check_now()
                raise
            finally:
                if lease.is_ours():  # else all that lies there is another driver's
                    folder.remove_leftovers()  # after actors that were killed as they wrote
                    folder.remove_empty_folders()
    finally:
        folder.remove_if_empty()


def _is_unused(out: Path) -> bool:
    try:
        return next(out.iterdir(), None) is None
    except OSError:
        return not os.path.lexists(out)


def _in_thread(call: Callable[[], T]) -> "Future[T]":
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(call())
        except BaseException as error:  # noqa: BLE001  # whoever waits for the result raises it
            future.set_exception(error)

    threading.Thread(target=run, name="cineray-check", daemon=True).start()
    return future


def _check_fits(checkpoint: Checkpoint, layout: Layout) -> None:
    try:
        check_layout(layout, checkpoint.num_heads, checkpoint.num_calls)
    except ValueError as error:
        raise InputError(f"model {checkpoint.name}: {error}") from None


@contextmanager
def _model_here(asked: RunPlan) -> Iterator[Renderer]:
    """Loads the model into this process."""
    from cineray.jobs.console.progress import RenderProgress
    from cineray.jobs.in_process import Batch, render_batch
    from cineray.pipeline.loading.model import load_model

    asked.checkpoint.model.output.check()
    use_threads(asked.checkpoint, asked.load_options)
    model = load_model(asked.checkpoint, asked.load_options)

    def render(work: Work) -> RunReport:
        began = time.monotonic()
        with stop_requested() as request, RenderProgress(work.num_clips, work.num_before) as progress:
            batch = Batch(
                model=model,
                folder=work.folder,
                lease=work.lease,
                progress=progress,
                lossless=asked.lossless,
                checkpoint_s=asked.options.checkpoint_s,
                is_stop_requested=lambda: request.number is not None,
            )
            render_batch(batch, work.requests, work.results)
        wall_s = time.monotonic() - began
        return RunReport(results=work.results, wall_s=wall_s, stopped_by=request.number)

    yield render


def use_threads(checkpoint: Checkpoint, options: LoadOptions) -> None:
    """Sets this process's number of threads to what fits the model, where it renders on a CPU."""
    config, counts = checkpoint.configs.transformer, checkpoint.model.layout.counts
    number = num_threads(config, counts) if options.device == "cpu" else None
    if number is not None:
        import torch

        torch.set_num_threads(number)


def _spec(asked: RunPlan, out: Path, demands: "tuple[Demand, ...]") -> "RunSpec":
    from cineray.jobs.gangs.messages import RunSpec

    return RunSpec(
        model=asked.checkpoint.name,
        options=asked.load_options,
        file_format=format_of(asked.checkpoint.model.output),
        out=out.resolve(),
        lossless=asked.lossless,
        run=asked.options,
        decodes_on_gang=decodes_on_gang(asked.options, asked.load_options, asked.checkpoint.model),
        demands=demands,
    )


def _queue(asked: RunPlan, work: Work, identity: "Identity", spec: "RunSpec", shares_gpu: bool) -> "ClipQueue":
    """A run's clips for its gangs, each with what it takes of GPUs where the actors were not told of that already."""
    from cineray.jobs.gangs.queue import ClipQueue

    demands_of = partial(asked.outlook.demands_of, shares_gpu=shares_gpu) if not spec.demands else None
    return ClipQueue(work.requests, work.folder, asked.checkpoint, identity, spec, demands_of)


@contextmanager
def _gangs(asked: RunPlan, start_now: bool = False) -> Iterator[Renderer]:
    """Connects to Ray; this process imports no torch.

    Args:
        start_now: the actors too; else they start when the first clip is to be rendered.
    """
    options = asked.options
    if options.is_local and "ray" not in sys.modules:
        # read when ray is imported: it would listen on every interface, whatever address it is given
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    from cineray.jobs.gangs.actors import actors_of
    from cineray.jobs.gangs.cluster import connected, nodes_now
    from cineray.jobs.gangs.driver import RayBatch
    from cineray.jobs.gangs.events import StartRequested
    from cineray.jobs.gangs.metrics import RunMetrics
    from cineray.jobs.gangs.placement import crossing, finishers_for, missing_room, plan_fleet
    from cineray.jobs.gangs.progress import GangProgress
    from cineray.jobs.gangs.slots import Slots
    from cineray.jobs.gangs.state import BatchState, clips_ahead
    from cineray.pipeline.loading.device import check_device
    from cineray.pipeline.loading.weights import identify

    if options.is_local:
        check_device(asked.load_options.device)
    identity = identify(asked.checkpoint)
    began: float | None = time.monotonic()  # of the first call, which waits for Ray too
    num_actors = options.num_gangs * options.layout.world_size + finishers_for(options.num_gangs, options.num_finishers)
    with connected(None if options.is_local else options.address, num_actors), ExitStack() as stack:
        nodes = list(nodes_now().values())
        device, num_gangs = asked.load_options.device, options.num_gangs
        fleet = plan_fleet(device, options.layout, num_gangs, options.num_finishers, nodes, options.is_local)
        missing = missing_room(fleet, nodes)
        if missing and options.is_local:
            raise InputError(missing)
        shares_gpu = fleet.num_apart < fleet.num_finishers
        larger = asked.larger if fleet.group.num_nodes == 1 else ()

        def new_actors(out: Path, demands: "tuple[Demand, ...]") -> "tuple[RunSpec, Slots, BatchState]":
            spec = _spec(asked, out, demands)
            slots = Slots.of(spec, fleet, actors_of(), larger)
            state = BatchState(
                fleet.num_gangs,
                fleet.num_finishers,
                options.hang_s,
                clips_ahead(fleet.num_gangs),
                fleet.num_apart,
                {gang.num_gangs: gang.speedup for gang in larger},
            )
            return spec, slots, state

        # gangs that start before the clips are checked know of no demands, and are told with each clip
        early = new_actors(asked.out, ()) if start_now else None

        def render(work: Work) -> RunReport:
            nonlocal began, early
            began_here, began = time.monotonic() if began is None else began, None
            actors, early = early or new_actors(work.folder.path, asked.outlook.demands(shares_gpu)), None
            spec, slots, state = actors
            queue = _queue(asked, work, identity, spec, shares_gpu)
            with GangProgress(work.num_clips, work.num_before) as progress:
                if missing:
                    progress.say(f"{missing}; waiting: an autoscaler may bring one")
                if asked.load_options.offload == "model" and asked.checkpoint.num_experts == 1:
                    progress.say("--offload model: finishers offload; a rank's transformer is in use all the time")
                if slow := crossing(options.layout, fleet.group):
                    progress.say(slow)
                batch = RayBatch(
                    spec=spec,
                    state=state,
                    slots=slots,
                    folder=work.folder,
                    lease=work.lease,
                    queue=queue,
                    results=work.results,
                    progress=progress,
                    metrics=RunMetrics(),
                )
                batch.run()
            return RunReport(
                results=work.results,
                wall_s=time.monotonic() - began_here,
                gangs_busy=batch.gangs_busy,
                stopped_by=state.stopped_by,
                abort_reason=state.aborted,
            )

        if early is not None:
            _, slots, state = early
            stack.callback(slots.destroy)
            for effect in state.handle(StartRequested(), time.monotonic()):
                slots.perform(effect)
        yield render
