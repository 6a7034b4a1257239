#!/usr/bin/env python
"""Long batches of tiny clips whose processes are weighed, and drivers that are killed at random moments.

`memory` renders many clips in one process, then on gangs, and writes down resident memory, open files and threads of
the driver, the ranks and the finishers as the batch continues: they must not grow. `kills` kills the driver of a batch
with SIGKILL and waits until the last process that it started has ended.

Examples:
    python scripts/soak.py memory --clips 500
    python scripts/soak.py kills --times 20 --seed 0
"""

import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from collections import defaultdict
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import click
import psutil

SIZE = ["--width", "32", "--height", "32", "--frames", "5", "--fps", "8", "--steps", "2"]
MARK = "CINERAY_SOAK"  # an environment variable that every process of a batch inherits
EVERY_S = 1.0
LONGEST_END_S = 120.0


@dataclass(frozen=True, slots=True)
class Sample:
    """One look at one process; `num_done` clips were committed by then."""

    role: str
    num_done: int
    rss_bytes: int
    num_fds: int
    num_threads: int


def role_of(process: psutil.Process, driver: int) -> str | None:
    """What a process of a batch is; None for Ray's own and for ffmpeg."""
    if process.pid == driver:
        return "driver"
    title = " ".join(process.cmdline())
    names = {"ray::GangRank": "rank", "ray::Finisher": "finisher"}
    return next((role for begins, role in names.items() if title.startswith(begins)), None)


def marked(mark: str) -> Iterator[psutil.Process]:
    """Every process of a batch that is alive."""
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.environ().get(MARK) == mark and process.status() != psutil.STATUS_ZOMBIE:
                yield process


def start(folder: Path, num_clips: int, mark: str, *more: object) -> subprocess.Popen[bytes]:
    """A batch of clips that differ in their seeds, in a process of its own."""
    manifest = folder / "clips.jsonl"
    rows = [{"id": f"clip{i:05}", "prompt": "a red circle", "seed": i} for i in range(num_clips)]
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    render = ["render", "--manifest", manifest, "--out", folder / "out", "--cache", "dicache", *SIZE, *more]
    with (folder / "log").open("wb") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "cineray", *map(str, render)], stdout=log, stderr=log, env=os.environ | {MARK: mark}
        )


def num_committed(folder: Path) -> int:
    return len(list((folder / "out").glob("*.mp4")))


def watch(folder: Path, run: subprocess.Popen[bytes], mark: str) -> list[Sample]:
    """Weighs every process of a batch until it ends; raises if it does not end well."""
    samples = []
    while run.poll() is None:
        num_done = num_committed(folder)
        for process in marked(mark):
            with suppress(psutil.Error):
                role = role_of(process, run.pid)
                if role is not None and num_done:
                    rss_bytes, num_fds, num_threads = (
                        process.memory_info().rss,
                        process.num_fds(),
                        process.num_threads(),
                    )
                    samples.append(Sample(role, num_done, rss_bytes, num_fds, num_threads))
        time.sleep(EVERY_S)
    if run.returncode != 0:
        raise click.ClickException(f"the batch ended with {run.returncode}:\n{(folder / 'log').read_text()[-3000:]}")
    return samples


def report(name: str, samples: list[Sample], num_clips: int) -> None:
    """Medians of the second fifth of a batch, when all is warm, and of its last fifth."""
    by_role: dict[str, list[Sample]] = defaultdict(list)
    for sample in samples:
        by_role[sample.role].append(sample)
    for role, seen in by_role.items():
        early = [s for s in seen if num_clips / 5 <= s.num_done < num_clips * 2 / 5]
        late = [s for s in seen if s.num_done >= num_clips * 4 / 5]
        if not early or not late:
            raise click.ClickException(f"{name}: too few looks at the {role}; render more clips")
        changes = []
        for label, field, scale in (("MB", "rss_bytes", 1e6), ("files", "num_fds", 1), ("threads", "num_threads", 1)):
            before, after = (statistics.median(getattr(s, field) for s in part) / scale for part in (early, late))
            changes.append(f"{label} {before:.0f} -> {after:.0f}")
        print(f"| {name} | {role} | {num_clips} | {' | '.join(changes)} |", flush=True)


@click.group()
def main() -> None:
    """Long batches, and drivers that are killed."""


@main.command()
@click.option("--clips", default=500, show_default=True)
def memory(clips: int) -> None:
    """Memory, open files and threads, from the second fifth of a batch to its last."""
    for name, more in (("one process", ()), ("two gangs", ("--gangs", 2))):
        with tempfile.TemporaryDirectory(prefix="cineray-soak-") as folder:
            mark = uuid.uuid4().hex
            run = start(Path(folder), clips, mark, *more)
            report(name, watch(Path(folder), run, mark), clips)


@main.command()
@click.option("--times", default=20, show_default=True)
@click.option("--seed", default=0, show_default=True, help="Of the moments.")
def kills(times: int, seed: int) -> None:
    """Kills drivers on a Ray of their own at random moments; how long the last of their processes lived on."""
    chance, took = random.Random(seed), []
    for number in range(times):
        with tempfile.TemporaryDirectory(prefix="cineray-soak-") as folder:
            mark, after_s = uuid.uuid4().hex, chance.uniform(1.0, 40.0)
            run = start(Path(folder), 10_000, mark, "--gangs", 2, "--steps", 20)
            time.sleep(after_s)
            run.send_signal(signal.SIGKILL)
            run.wait()
            killed = time.monotonic()
            left, names = list(marked(mark)), []
            while left and time.monotonic() - killed < LONGEST_END_S:
                time.sleep(0.5)
                names = [process.name() for process in left if process.is_running()]
                left = list(marked(mark))
            took.append(time.monotonic() - killed)
            last = f"; the last: {', '.join(sorted(set(names)))}" if took[-1] > 1 else ""
            print(f"{number + 1}: killed after {after_s:.0f} s, all had ended {took[-1]:.1f} s later{last}", flush=True)
            for process in left:
                process.kill()
    print(f"{times} kills: median {statistics.median(took):.1f} s, longest {max(took):.1f} s")
    if max(took) >= LONGEST_END_S:
        raise click.ClickException("processes were left")


if __name__ == "__main__":
    main()
