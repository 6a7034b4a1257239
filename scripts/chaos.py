#!/usr/bin/env python
"""Renders a batch while its processes are killed and frozen at random, and checks that nothing was lost.

A cluster of three Ray nodes on this machine: two hold a gang of two ranks each, the head the finisher. Ranks, whole
nodes and the driver are hit by SIGKILL and SIGSTOP; a driver that ends is started again, with the same command, until
it says that all is done. Then every clip must be committed exactly once, every video must decode, every sidecar must
say what the video's own tag says, and the pixels must be those of a run in one process that nobody disturbed.

Example:
    python scripts/chaos.py --clips 60 --incidents 25 --seed 0
"""

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
from ray.cluster_utils import Cluster

from cineray.pipeline.media.video import read_metadata, read_video

SIZE = ["--width", "32", "--height", "32", "--frames", "5", "--fps", "8", "--lossless"]
KINDS = ("kill rank", "freeze rank", "kill node", "drain node", "kill driver", "freeze driver")
STORE_BYTES = 80 * 2**20
START_S = 90.0  # for gangs to come up between two incidents, or to feel one, on a busy machine


@dataclass
class Chaos:
    """One batch, its cluster and its driver."""

    folder: Path
    model: str
    num_clips: int
    steps: int
    random: random.Random
    ranks: int = 2
    starts: int = 0
    exits: Counter[int] = field(default_factory=Counter)
    incidents: list[str] = field(default_factory=list)
    frozen: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.out = self.folder / "out"
        self.manifest = self.folder / "clips.jsonl"
        self.write_manifest()
        node = {"num_cpus": self.ranks, "object_store_memory": STORE_BYTES, "include_dashboard": False}
        self.cluster = Cluster(initialize_head=True, head_node_args=node)
        self.node = {name: value for name, value in node.items() if name != "include_dashboard"}
        self.nodes = [self.cluster.add_node(**self.node) for _ in range(2)]
        self.driver = self.start_driver()

    def write_manifest(self) -> None:
        rows = [
            {"id": f"clip{i:03}", "prompt": "a red circle", "seed": i, "steps": self.steps}
            for i in range(self.num_clips)
        ]
        self.manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def command(self, out: Path, *more: object) -> list[str]:
        render = ["render", "--manifest", self.manifest, "--out", out, "--model", self.model, *SIZE, *more]
        return [sys.executable, "-m", "cineray", *map(str, render)]

    def start_driver(self) -> subprocess.Popen[bytes]:
        self.starts += 1
        log = (self.folder / f"driver{self.starts}.log").open("wb")
        ray = ("--gangs", 2, "--sp", self.ranks, "--address", self.cluster.address)
        patience = ("--hang-timeout", 8, "--lease-timeout", 5, "--checkpoint-every", 0.1)
        return subprocess.Popen(self.command(self.out, *ray, *patience), stdout=log, stderr=log)

    def events(self) -> list[dict[str, Any]]:
        try:
            lines = (self.out / "events.jsonl").read_text().splitlines(keepends=True)
        except FileNotFoundError:
            return []
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def count(self, name: str) -> int:
        return sum(event["event"] == name for event in self.events())

    def built(self) -> dict[str, dict[str, Any]]:
        """What was said of each gang that is up now as it was built: the pids of its ranks, its nodes."""
        up: dict[str, dict[str, Any]] = {}
        for event in self.events():
            if event["event"] == "built":
                up[event["actor"]] = event
            elif event["event"] == "lost":
                up.pop(event["actor"], None)
        return {gang: said for gang, said in up.items() if all(Path(f"/proc/{pid}").exists() for pid in said["pids"])}

    def gangs(self) -> dict[str, list[int]]:
        """Pids of the ranks of each gang that is up now."""
        return {gang: said["pids"] for gang, said in self.built().items()}

    def run(self, planned: list[str]) -> None:
        """Until a driver has ended with all done; raises if one ends with something else.

        On a machine that has rendered all before all harm is done, the manifest grows by clips: every incident happens.
        """
        planned = list(planned)
        share = self.num_clips / (len(planned) + 1)
        while True:
            self.wait(lambda: self.is_over() or bool(self.gangs()), START_S)
            if self.is_over() and self.end_of_driver() == 0:
                if not planned:
                    return
                self.num_clips += 2
                self.write_manifest()
                self.driver = self.start_driver()
            if planned and self.gangs():
                # all over the batch, and somewhere in a clip: they take about a second each
                due = int(len(self.incidents) * share)
                self.wait(lambda: self.is_over() or self.num_committed() >= due, START_S)  # noqa: B023  # called here
                self.wait(self.is_over, self.random.uniform(0.2, 2.0))
                if not self.is_over() and self.gangs():
                    kind = planned.pop(0)
                    print(f"{len(self.incidents) + 1}: {kind}, {self.num_committed()} clips done", flush=True)
                    if self.harm(kind):
                        self.incidents.append(kind)
                    else:
                        planned.insert(0, kind)
                    self.wait(lambda: self.is_over() or not self.gangs(), 1.0)
            elif not planned:
                self.wait(self.is_over, 600)

    def harm(self, kind: str) -> bool:
        """False if it came too late, because a driver had done all before it felt anything."""
        felt = {"kill node": "lost", "drain node": "yielded"}.get(kind, "")
        num_felt = self.count(felt)
        if kind in ("kill rank", "freeze rank"):
            pids = self.random.choice(sorted(self.gangs().items()))[1]
            os.kill(self.random.choice(pids), signal.SIGKILL if kind == "kill rank" else signal.SIGSTOP)
        elif kind == "kill node":
            node = self.take_node()
            self.cluster.remove_node(node, allow_graceful=False)
            self.nodes.append(self.cluster.add_node(**self.node))
        elif kind == "drain node":
            node = self.take_node()
            reason = ("--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot")
            drain = ("drain-node", "--address", self.cluster.address, "--node-id", node.node_id, *reason)
            ray = [sys.executable, "-m", "ray.scripts.scripts", *drain, "--deadline-remaining-seconds", "20"]
            subprocess.run(ray, check=True, capture_output=True)
            self.nodes.append(self.cluster.add_node(**self.node))
        elif kind == "kill driver":
            self.driver.kill()
        else:
            # its successor waits until the lease is stale, then the sleeper wakes and must see that it has lost
            self.driver.send_signal(signal.SIGSTOP)
            frozen, self.driver = self.driver, self.start_driver()
            lease = self.out / ".state"
            old = max((int(path.name.split(".")[1]) for path in lease.glob("lease.*.json")), default=0)
            self.wait(lambda: (lease / f"lease.{old + 1}.json").exists() or self.is_over(), 60)
            frozen.send_signal(signal.SIGCONT)
            frozen.wait(60)
            self.exits[frozen.returncode] += 1
            if frozen.returncode == 0:
                return False
            if frozen.returncode != 75:
                raise RuntimeError(f"a driver that had lost its lease ended with {frozen.returncode}, not 75")
        if felt:  # before the next incident: a driver that is killed in between would never tell
            self.wait(lambda: self.is_over() or self.count(felt) > num_felt, START_S)
        return not felt or self.count(felt) > num_felt

    def take_node(self) -> Any:
        """One that has a gang on it, no longer counted among the nodes."""
        busy = {node for said in self.built().values() for node in said["nodes"]}
        node = self.random.choice([node for node in self.nodes if node.node_id in busy] or self.nodes)
        self.nodes.remove(node)
        return node

    def is_over(self) -> bool:
        return self.driver.poll() is not None

    def end_of_driver(self) -> int:
        """Its exit code; starts the next one if there is more to do."""
        code = self.driver.returncode
        self.exits[code] += 1
        if code not in (0, 1, -signal.SIGKILL):  # 1: a clip was hit three times; asked again, it is tried again
            log = (self.folder / f"driver{self.starts}.log").read_text()
            raise RuntimeError(f"a driver ended with {code}:\n{log[-3000:]}")
        if code != 0:
            self.driver = self.start_driver()
        return code

    def num_committed(self) -> int:
        return len(list(self.out.glob("*.mp4")))

    def wait(self, condition: Any, timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        while not condition() and time.monotonic() < deadline:
            time.sleep(0.05)

    def check(self) -> None:
        """Compares with an undisturbed run; raises AssertionError."""
        subprocess.run(self.command(self.folder / "undisturbed"), check=True, capture_output=True)
        expected, found = pixels(self.folder / "undisturbed"), pixels(self.out)
        assert len(expected) == self.num_clips
        assert found == expected, f"differ: {sorted(k for k in expected if found.get(k) != expected[k])}"
        assert not (self.out / ".state").exists(), sorted((self.out / ".state").rglob("*"))

    def close(self) -> None:
        if self.driver.poll() is None:
            self.driver.kill()
        self.cluster.shutdown()


def pixels(out: Path) -> dict[str, str]:
    """SHA-256 of every clip's frames by id; checks that it is there once and that its sidecar is its own."""
    found: dict[str, str] = {}
    for video in sorted(out.glob("*.mp4")):
        clip, mark, _ = video.name.rsplit(".", 2)
        assert clip not in found, f"{clip} is committed twice"
        sidecar = json.loads(video.with_suffix(".json").read_text())
        for name in ("timings", "hardware", "video"):  # not known to the video
            sidecar.pop(name, None)
        assert sidecar == read_metadata(video), f"{video.name}: the sidecar is not the video's"
        assert (sidecar["id"], sidecar["fingerprint"]) == (clip, mark)
        found[clip] = hashlib.sha256(read_video(video).tobytes()).hexdigest()
    return found


@click.command()
@click.option("--clips", default=60, show_default=True, help="Clips to render.")
@click.option("--incidents", default=25, show_default=True, help="Processes to kill or freeze.")
@click.option("--steps", default=40, show_default=True, help="Denoising steps of each clip.")
@click.option("--seed", default=0, show_default=True, help="Of the incidents.")
@click.option("--model", default="tiny-wan", show_default=True)
def main(clips: int, incidents: int, steps: int, seed: int, model: str) -> None:
    """Renders a batch under fire and checks that nothing was lost."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="cineray-chaos-") as folder:
        chaos = Chaos(Path(folder), model, clips, steps, random.Random(seed))
        try:
            chaos.run([chaos.random.choice(KINDS) for _ in range(incidents)])
        finally:
            chaos.close()
        chaos.check()
        resumed = sum("resumed_at" in json.loads(path.read_text()) for path in chaos.out.glob("clip*.json"))
        log = Counter(event["event"] for event in chaos.events())
        print(f"{chaos.num_clips} clips, each committed once, with the pixels of an undisturbed run")
        print(f"{len(chaos.incidents)} incidents: {dict(Counter(chaos.incidents))}")
        print(f"{chaos.starts} drivers, exit codes {dict(chaos.exits)}; {resumed} clips went on in their middle")
        print(f"events: {dict(log)}; {time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()
