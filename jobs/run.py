"""One run of `cineray render`, in this process or on gangs of actors."""

import os
import signal
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cineray.distributed.layout import Layout, check_layout
from cineray.jobs.lease import TTL_S, Lease
from cineray.jobs.output_folder import OutputFolder
from cineray.jobs.results import ResultLog
from cineray.pipeline.checkpoint import Checkpoint
from cineray.pipeline.loading import LoadOptions
from cineray.pipeline.request import ClipRequest, InputError


@dataclass(frozen=True, kw_only=True, slots=True)
class RunOptions:
    """How a run is carried out; nothing here changes pixels.

    Args:
        sp: ranks that share the tokens of one clip.
        address: of a Ray cluster; None for this machine.
        num_finishers: actors that encode prompts and decode; None for one per four gangs.
        hang_s: a gang whose step takes longer is killed.
        checkpoint_s: seconds between two step states of a clip.
    """

    sp: int = 1
    cfg_parallel: bool = False
    num_gangs: int = 1
    address: str | None = None
    num_finishers: int | None = None
    hang_s: float = 300.0
    checkpoint_s: float = 60.0
    lease_s: float = TTL_S

    def __post_init__(self) -> None:
        for name, value in (("sp", self.sp), ("gangs", self.num_gangs), ("finishers", self.num_finishers or 1)):
            if value < 1:
                raise InputError(f"--{name} must be 1 or more, got {value}")
        for name, value in (("hang-timeout", self.hang_s), ("lease-timeout", self.lease_s)):
            if not value > 0:
                raise InputError(f"--{name} must be above 0, got {value:g}")
        if not self.checkpoint_s >= 0:
            raise InputError(f"--checkpoint-every must be 0 or more, got {self.checkpoint_s:g}")

    @property
    def layout(self) -> Layout:
        """Of one gang."""
        return Layout(cfg=2 if self.cfg_parallel else 1, ulysses=self.sp)

    @property
    def uses_ray(self) -> bool:
        return self.address is not None or self.num_gangs > 1 or self.layout.world_size > 1


@dataclass(frozen=True, kw_only=True, slots=True)
class RunReport:
    """What became of a run; `stopped_by` is the signal that ended it early, `given_up` why there was no going on."""

    results: ResultLog
    wall_s: float
    gangs_busy: float | None = None
    stopped_by: int | None = None
    given_up: str | None = None

    def content(self) -> dict[str, Any]:
        """All but the clips."""
        per_hour = self.results.counts["done"] / self.wall_s * 3600 if self.wall_s else 0.0
        content = {"wall_s": round(self.wall_s, 3), "clips_per_hour": round(per_hour, 1)}
        return content | ({} if self.gangs_busy is None else {"gangs_busy": self.gangs_busy})


def render_run(
    checkpoint: Checkpoint,
    load_options: LoadOptions,
    num_clips: int,
    requests: Iterable[ClipRequest],
    options: RunOptions,
    out: Path,
    lossless: bool,
    about: dict[str, Any],
) -> RunReport:
    """Renders what is not in the folder yet.

    Args:
        about: goes into run.json.

    Raises:
        InputError: the model does not fit the layout, or cannot be loaded; no such cluster.
        OutputError: the folder is full, gone or cannot be written.
        LeasedError: another driver renders into it.
    """
    if options.uses_ray:
        _check_fits(checkpoint, options.layout)
    folder = OutputFolder(out)
    lease = Lease(folder.state, ttl_s=options.lease_s)
    try:
        with lease:
            try:
                folder.sweep()
                run = {"model": checkpoint.name, "options": asdict(load_options), "num_clips": num_clips, **about}
                run |= {"gangs": options.num_gangs, "layout": asdict(options.layout), "lossless": lossless}
                render = _render_on_gangs if options.uses_ray else _render_here
                report = render(
                    checkpoint, load_options, num_clips, iter(requests), options, folder, lease, lossless, run
                )
                lease.check()
                folder.write_json("run.json", run | report.content() | {"counts": report.results.counts})
                (folder.state / "running.json").unlink(missing_ok=True)
                return report
            finally:
                if lease.is_ours():  # else all that lies there is another driver's
                    folder.tidy()
    finally:
        folder.remove_if_empty()


def _check_fits(checkpoint: Checkpoint, layout: Layout) -> None:
    heads = checkpoint.configs.transformer.get("num_attention_heads", 1)
    try:
        check_layout(layout, heads, 2 if checkpoint.size_rule.takes_negative_prompt else 1)
    except ValueError as error:
        raise InputError(f"model {checkpoint.name}: {error}") from None


def _render_here(
    checkpoint: Checkpoint,
    load_options: LoadOptions,
    num_clips: int,
    requests: Iterator[ClipRequest],
    options: RunOptions,
    folder: OutputFolder,
    lease: Lease,
    lossless: bool,
    run: dict[str, Any],
) -> RunReport:
    from cineray.jobs.batch import Batch, render_batch
    from cineray.jobs.progress import RenderProgress
    from cineray.pipeline.loading import load_model

    model = load_model(checkpoint, load_options)
    folder.write_json("run.json", run)
    results, began = ResultLog(), time.monotonic()
    with _asked_to_stop() as signals, RenderProgress(num_clips) as progress:
        batch = Batch(
            model=model,
            folder=folder,
            lease=lease,
            progress=progress,
            lossless=lossless,
            checkpoint_s=options.checkpoint_s,
            is_asked_to_stop=lambda: bool(signals),
        )
        render_batch(batch, requests, results)
    wall_s = time.monotonic() - began
    return RunReport(results=results, wall_s=wall_s, stopped_by=signals[0] if signals else None)


@contextmanager
def _asked_to_stop() -> Iterator[list[int]]:
    """Collects SIGTERM and Ctrl-C instead of dying of them; the second one interrupts at once."""
    signals: list[int] = []

    def on_signal(number: int, _: object) -> None:
        if signals:
            raise KeyboardInterrupt
        signals.append(number)

    before = {number: signal.signal(number, on_signal) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield signals
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _render_on_gangs(
    checkpoint: Checkpoint,
    load_options: LoadOptions,
    num_clips: int,
    requests: Iterator[ClipRequest],
    options: RunOptions,
    folder: OutputFolder,
    lease: Lease,
    lossless: bool,
    run: dict[str, Any],
) -> RunReport:
    if options.address is None and "ray" not in sys.modules:
        # read when ray is imported: it would listen on every interface, whatever address it is given
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    from cineray.jobs.clip_queue import ClipQueue
    from cineray.jobs.cluster import connected, missing_resources, plan_fleet
    from cineray.jobs.gang_progress import GangProgress
    from cineray.jobs.metrics import RunMetrics
    from cineray.jobs.ray_batch import RayBatch
    from cineray.jobs.stages import RunSpec
    from cineray.pipeline.loading import check_device, identify

    if options.address is None:
        check_device(load_options.device)
    identity = identify(checkpoint)
    fleet = plan_fleet(load_options.device, options.num_gangs, options.layout.world_size, options.num_finishers)
    spec = RunSpec(
        model=checkpoint.name,
        options=load_options,
        out=folder.path.resolve(),
        lossless=lossless,
        layout=options.layout,
        checkpoint_s=options.checkpoint_s,
        collective_s=2 * options.hang_s,  # the driver notices first
    )
    results, began = ResultLog(), time.monotonic()
    depth = 2 * options.num_gangs + 2
    with connected(options.address, fleet), GangProgress(num_clips) as progress:
        missing = missing_resources(fleet)
        if missing and options.address is None:
            raise InputError(missing)
        if missing:
            progress.say(f"{missing}; waiting: an autoscaler may bring one")
        folder.write_json("run.json", run)
        batch = RayBatch(
            spec=spec,
            fleet=fleet,
            folder=folder,
            lease=lease,
            queue=ClipQueue(requests, folder, checkpoint, identity, spec, depth),
            results=results,
            progress=progress,
            metrics=RunMetrics(),
            hang_s=options.hang_s,
        )
        batch.run()
    return RunReport(
        results=results,
        wall_s=time.monotonic() - began,
        gangs_busy=batch.gangs_busy,
        stopped_by=batch.stopped_by,
        given_up=batch.given_up,
    )
