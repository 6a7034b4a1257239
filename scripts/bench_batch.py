#!/usr/bin/env python
"""What the driver of a batch costs: the first clip of a long manifest, clips per second, the price of Ray.

Examples:
    python scripts/bench_batch.py million --lines 1000000
    python scripts/bench_batch.py dispatch --clips 3000 --gangs 4
    python scripts/bench_batch.py overhead --clips 8 --rounds 3

Each prints one JSON object. Run it on a machine that does nothing else.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

import click

from cineray.distributed.layout import Layout
from cineray.jobs.gangs.actors import Finisher, GangRank, actors_of
from cineray.jobs.gangs.cluster import connected, nodes_now
from cineray.jobs.gangs.driver import RayBatch
from cineray.jobs.gangs.messages import ClipFault, Denoised, Preempted, RunSpec, Task
from cineray.jobs.gangs.metrics import RunMetrics
from cineray.jobs.gangs.placement import plan_fleet
from cineray.jobs.gangs.progress import GangProgress
from cineray.jobs.gangs.queue import ClipQueue
from cineray.jobs.gangs.slots import Slots
from cineray.jobs.gangs.state import BatchState
from cineray.jobs.manifest.check import RunDefaults, check_manifest
from cineray.jobs.output.folder import OutputFolder
from cineray.jobs.output.lease import Lease
from cineray.jobs.output.results import ResultLog
from cineray.jobs.run_options import RunOptions
from cineray.pipeline.loading.checkpoint import Checkpoint, open_checkpoint
from cineray.pipeline.loading.options import LoadOptions
from cineray.pipeline.loading.weights import identify

PROMPT = "a red circle moving left on a navy background"
# both of what is compared get one thread per process, as actors have, and one priority: Ray's workers are nice by 15
ALIKE = {"OMP_NUM_THREADS": "1", "RAY_worker_niceness": "0"}


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110}, help=__doc__)
def main() -> None:
    pass


model_option = click.option("--model", default="tiny-wan", show_default=True, metavar="NAME|DIR")


@main.command()
@click.option("--lines", default=1_000_000, show_default=True, help="Of the manifest.")
@click.option("--steps", default=20, show_default=True, help="Denoising steps of a clip.")
@model_option
def million(lines: int, steps: int, model: str) -> None:
    """Seconds until a long manifest's first clip renders and is done, and the driver's peak memory.

    Counts from the start of `cineray render --address local`, and stops it after three clips.
    """
    with tempfile.TemporaryDirectory(prefix="cineray-bench-") as short:
        folder = Path(short)
        manifest, out = write_manifest(folder / "m.jsonl", lines, steps), folder / "out"
        began, peak_bytes = time.time(), 0
        driver = start_render(manifest, out, model, "--address", "local")
        while driver.poll() is None and num_done(out) < min(3, lines):
            peak_bytes = max(peak_bytes, peak_memory(driver.pid))
            time.sleep(0.05)
        peak_bytes = max(peak_bytes, peak_memory(driver.pid))
        driver.send_signal(signal.SIGTERM)
        _, said = driver.communicate(timeout=120)
        if num_done(out) < min(3, lines):
            raise click.ClickException(f"the driver ended with {driver.returncode}:\n{said}")
        first = {kind: next(e["time"] for e in events(out) if e["event"] == kind) for kind in ("running", "done")}
    report(
        lines=lines,
        first_clip_begins_s=round(first["running"] - began, 2),
        first_clip_done_s=round(first["done"] - began, 2),
        driver_peak_mb=round(peak_bytes / 1e6, 1),
    )


class NoOpRank(GangRank):
    """Answers as a rank does and renders nothing."""

    def __init__(self, name: str, _spec: RunSpec) -> None:
        self._name = name

    def open_rendezvous(self) -> tuple[str, int]:
        return "", 0

    def join(self, rank: int, host: str, port: int) -> None:
        pass

    def denoise(self, task: Task) -> Denoised | Preempted | ClipFault:  # noqa: ARG002
        return Denoised(busy_s=0.0)


class NoOpFinisher(Finisher):
    """Answers as a finisher does; no video is written."""

    def __init__(self, name: str, _spec: RunSpec) -> None:
        self._name = name

    def load(self, shares_gpu: bool) -> None:
        pass

    def encode(self, task: Task) -> tuple[str, ...] | ClipFault:  # type: ignore[override]  # noqa: ARG002  # undecorated
        return ()

    def finish(self, task: Task) -> dict[str, Any] | ClipFault | None:  # noqa: ARG002
        return {}


@main.command()
@click.option("--clips", default=3000, show_default=True)
@click.option("--gangs", default=4, show_default=True, help="Of one rank.")
@click.option("--finishers", default=1, show_default=True)
@model_option
def dispatch(clips: int, gangs: int, finishers: int, model: str) -> None:
    """Clips per second through queue, gangs and finishers where rendering does nothing.

    A no-op clip goes the whole way of a real one: read from the checked manifest, fingerprint, look for its video and
    its strikes, handed to a gang's actor and to a finisher's, two lines of events.jsonl, its result. The actors are
    processes on a real Ray, whose methods return at once: no prompt is encoded, no step taken, no video written.
    """
    checkpoint = open_checkpoint(model)
    with tempfile.TemporaryDirectory(prefix="cineray-bench-") as short:
        folder = OutputFolder(Path(short) / "out")
        manifest = write_manifest(Path(short) / "m.jsonl", clips, 20)
        spec = RunSpec(
            model=model,
            options=LoadOptions(),
            out=folder.path,
            lossless=False,
            run=RunOptions(num_gangs=gangs),
        )
        with Lease(folder.state) as lease, connected(None, gangs + finishers), GangProgress(clips) as progress:
            fleet = plan_fleet("cpu", Layout(), gangs, finishers, list(nodes_now().values()), is_one_machine=True)
            slots = Slots.of(spec, fleet, actors_of(NoOpRank, NoOpFinisher))
            results = ResultLog()
            batch = RayBatch(
                spec=spec,
                state=BatchState(gangs, finishers, hang_s=300.0, depth=2 * gangs + 2, num_apart=fleet.num_apart),
                slots=slots,
                folder=folder,
                lease=lease,
                queue=new_queue(manifest, folder, checkpoint, spec),
                results=results,
                progress=progress,
                metrics=RunMetrics(),
            )
            began_s = time.process_time()
            batch.run()
            driver_s = time.process_time() - began_s
        assert results.counts["done"] == clips, results.counts
        wall_s = rendering_s(folder.path)
    report(
        clips=clips,
        gangs=gangs,
        finishers=finishers,
        wall_s=round(wall_s, 3),
        clips_per_s=round(clips / wall_s, 1),
        driver_cpu_ms_per_clip=round(driver_s / clips * 1000, 3),
    )


def new_queue(manifest: Path, folder: OutputFolder, checkpoint: Checkpoint, spec: RunSpec) -> ClipQueue:
    """The queue of a run over a manifest."""
    defaults = RunDefaults(**asdict(checkpoint.defaults), seed=0, cache="none")
    requests = check_manifest(manifest, defaults, checkpoint).requests()
    return ClipQueue(requests, folder, checkpoint, identify(checkpoint), spec)


@main.command()
@click.option("--clips", default=8, show_default=True)
@click.option("--rounds", default=3, show_default=True, help="Pairs of runs.")
@click.option("--steps", default=50, show_default=True)
@model_option
def overhead(clips: int, rounds: int, steps: int, model: str) -> None:
    """Wall time on Ray (one gang of one rank, one finisher) against a loop in one process: A B A B, medians.

    On Ray from the first clip's start to the last one's commit; start-up is told apart. In one process from the loaded
    model on. One thread per process in both; the finisher of Ray's may use a second core.
    """
    on_ray, alone, start_ups = [], [], []
    with tempfile.TemporaryDirectory(prefix="cineray-bench-") as short:
        manifest = write_manifest(Path(short) / "m.jsonl", clips, steps)
        for number in range(rounds):
            out, began = Path(short) / f"ray{number}", time.time()
            finish(start_render(manifest, out, model, "--address", "local"))
            on_ray.append(rendering_s(out))
            start_ups.append(next(e["time"] for e in events(out) if e["event"] == "running") - began)
            out = Path(short) / f"alone{number}"
            alone.append(json.loads(finish(start_render(manifest, out, model)).splitlines()[-1])["wall_s"])
    report(
        clips=clips,
        on_ray_s=[round(s, 2) for s in on_ray],
        alone_s=[round(s, 2) for s in alone],
        start_up_s=round(median(start_ups), 2),
        overhead_percent=round((median(on_ray) / median(alone) - 1) * 100, 1),
    )


def write_manifest(path: Path, num_lines: int, steps: int) -> Path:
    with path.open("w") as file:
        for number in range(num_lines):
            row = {"id": f"clip-{number:07}", "prompt": PROMPT, "seed": number, "steps": steps}
            file.write(json.dumps(row) + "\n")
    return path


def start_render(manifest: Path, out: Path, model: str, *more: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "cineray", "render", "--manifest", manifest, "--out", out, "--model", model]
    return subprocess.Popen(
        [*map(str, command), "--json", *more],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | ALIKE,
    )


def finish(render: subprocess.Popen[str]) -> str:
    """What it printed; raises if it failed."""
    printed, said = render.communicate()
    if render.returncode != 0:
        raise click.ClickException(f"a run ended with {render.returncode}:\n{said}")
    return printed


def events(out: Path) -> list[dict[str, Any]]:
    try:
        lines = (out / "events.jsonl").read_text().splitlines(keepends=True)
    except FileNotFoundError:
        return []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def num_done(out: Path) -> int:
    return sum(event["event"] == "done" for event in events(out))


def rendering_s(out: Path) -> float:
    """From the first clip's start to the last one's end."""
    log = events(out)
    began = next(event["time"] for event in log if event["event"] == "running")
    return max(event["time"] for event in log if event["event"] == "done") - began


def peak_memory(pid: int) -> int:
    """Bytes that a process has held at most, as Linux says; 0 if it is gone."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")), 0)


def report(**content: Any) -> None:
    print(json.dumps(content))


if __name__ == "__main__":
    main()
