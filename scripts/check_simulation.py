#!/usr/bin/env python
"""Compares the simulation with a real run: two gangs of one rank render a batch, one rank is killed in the middle.

The simulation gets that run's own seconds (a step, what a clip takes beside its steps, start-up, decoding, the time of
the kill) and must find the makespan from them: what is tested is the queue, the retry, the checkpoint and the tail, not
whether seconds can be foretold. `undisturbed` says what would have been without the kill.

Examples:
    python scripts/check_simulation.py --clips 10 --steps 100

Prints one JSON object. Starts a Ray of its own on this machine.
"""

import json
import os
import signal
import tempfile
import time
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import mean
from typing import Any

import click
from bench_batch import PROMPT, events, start_render

from cineray.jobs.manifest.row import Row
from cineray.jobs.simulate.assumptions import Assumptions, ClipSeconds, RankDeath
from cineray.jobs.simulate.clips import planned_rows
from cineray.jobs.simulate.ledger import HOUR_S, Use
from cineray.jobs.simulate.world import SimulatedBatch

NUM_GANGS = 2
KILL_AT = 0.6  # of the victim's second clip


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What a run took, in seconds.

    Args:
        before_s: from the command's start to the first actor, less what starts an actor.
        first_s: from then until the first clip begins, which waits for its prompt.
        start_s: from a gang's loss to the next gang.
        beside_s: a clip on its gang, beside its steps.
        killed_s: from the first actor on.
    """

    makespan_s: float
    before_s: float
    first_s: float
    start_s: float
    step_s: float
    beside_s: float
    finish_s: float
    killed_s: float
    seen_s: float
    num_resumed: int


@click.command(help=__doc__, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--clips", default=10, show_default=True)
@click.option("--steps", default=100, show_default=True)
@click.option("--checkpoint-every", "checkpoint_s", default=2.0, show_default=True, metavar="S")
@click.option("--model", default="tiny-wan", show_default=True, metavar="NAME|DIR")
def main(clips: int, steps: int, checkpoint_s: float, model: str) -> None:
    with tempfile.TemporaryDirectory(prefix="cineray-check-") as short:
        folder = Path(short)
        with (folder / "m.jsonl").open("w") as file:
            for number in range(clips):
                file.write(json.dumps({"prompt": PROMPT, "seed": number, "steps": steps}) + "\n")
        measured = run(folder / "m.jsonl", folder / "out", model, steps, checkpoint_s)
    seconds = ClipSeconds(
        num_steps=steps, step_s=measured.step_s, begin_s=measured.beside_s, finish_s=measured.finish_s
    )
    assumed = Assumptions(
        num_gpus=NUM_GANGS,
        gpus_per_node=1,
        num_finishers=1,
        checkpoint_s=checkpoint_s,
        start_s=measured.start_s,
        finisher_start_s=measured.first_s,
        save_s=0.0,  # it is part of the steps' own seconds
    )
    found = {}
    for name, deaths in (
        ("killed", [RankDeath(at_s=measured.killed_s, gang=0, seen_s=measured.seen_s)]),
        ("undisturbed", []),
    ):
        rows = (Row(number, PROMPT) for number in range(clips))
        found[name] = SimulatedBatch(assumed, planned_rows(rows, lambda _: seconds), deaths).run()
    simulated_s = measured.before_s + found["killed"].makespan_s
    report = {
        "measured_makespan_s": round(measured.makespan_s, 2),
        "simulated_makespan_s": round(simulated_s, 2),
        "error_percent": round(100 * (simulated_s / measured.makespan_s - 1), 2),
        "simulated_undisturbed_s": round(measured.before_s + found["undisturbed"].makespan_s, 2),
        "simulated_lost_s": round(found["killed"].gpu_hours[Use.LOST] * HOUR_S, 2),
        "simulated_retries": found["killed"].num_retries,
    }
    print(json.dumps(report | {name: round(value, 3) for name, value in vars(measured).items()}))


def run(manifest: Path, out: Path, model: str, steps: int, checkpoint_s: float) -> Measured:
    """Renders the batch on two gangs and kills the first one's rank in the middle of its second clip."""
    driver = start_render(manifest, out, model, "--gangs", "2", "--checkpoint-every", str(checkpoint_s))
    try:
        killed_at = kill_in_second_clip(out, driver)
        printed, said = driver.communicate()
    finally:
        driver.kill()
    if driver.returncode != 0:
        raise click.ClickException(f"the run ended with {driver.returncode}:\n{said}")
    summary = json.loads(printed.splitlines()[-1])
    log = events(out)
    began = max(e["time"] for e in log if e["event"] == "done") - summary["wall_s"]
    built = [e["time"] for e in log if e["event"] == "built" and e["actor"].startswith("gang")]
    lost_at = next(e["time"] for e in log if e["event"] == "lost")
    start_s = min(at for at in built if at > lost_at) - lost_at
    up_at = mean(built[:NUM_GANGS])
    resumed = [clip["id"] for clip in summary["clips"] if clip.get("resumed_at")]
    records = [json.loads(p.read_text()) for p in out.glob("*.json") if p.name.count(".") == 2]
    timings = {record["id"]: record["timings"] for record in records if "timings" in record}
    whole = [clip for clip in timings if clip not in resumed]
    step_s = mean(timings[clip]["denoise_s"] / steps for clip in whole)
    before_s = up_at - start_s - began
    return Measured(
        makespan_s=summary["wall_s"],
        before_s=before_s,
        first_s=min(e["time"] for e in log if e["event"] == "running") - began - before_s,
        start_s=start_s,
        step_s=step_s,
        beside_s=max(0.0, mean(gaps(log, whole)) - step_s * steps),
        finish_s=mean(timings[clip]["decode_s"] + timings[clip]["write_s"] for clip in timings),
        killed_s=killed_at - began - before_s,
        seen_s=max(0.0, lost_at - killed_at),
        num_resumed=len(resumed),
    )


def kill_in_second_clip(out: Path, driver: Any) -> float:
    """When it was done."""
    while driver.poll() is None:
        running = [e for e in events(out) if e["event"] == "running" and e["gang"] == "gang-0"]
        if len(running) >= 2:
            clip_s = running[1]["time"] - running[0]["time"]
            time.sleep(KILL_AT * clip_s)
            pid = next(e["pids"][0] for e in events(out) if e["event"] == "built" and e["actor"] == "gang-0")
            os.kill(pid, signal.SIGKILL)
            return time.time()
        time.sleep(0.05)
    raise click.ClickException("the run ended before its second clip began")


def gaps(log: list[dict[str, Any]], whole: list[str]) -> list[float]:
    """Seconds from one clip's beginning to the next one's on the same gang: it was never idle between them."""
    found = []
    for gang in {e["gang"] for e in log if e["event"] == "running"}:
        mine = [e for e in log if e.get("gang") == gang and e["event"] == "running"]
        found += [b["time"] - a["time"] for a, b in pairwise(mine) if a["id"] in whole]
    return found


if __name__ == "__main__":
    main()
