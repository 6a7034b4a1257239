"""Runs `cineray render` on a Ray of the tests' own, and does harm to its processes from a thread."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cineray.jobs.cli.main import main
from cineray.pipeline.media.video import read_video

SMALL = ["--width", "32", "--height", "32", "--frames", "5", "--fps", "8", "--lossless"]


def write_manifest(path: Path, ids: list[str], steps: int) -> Path:
    """Clips that differ in their seeds alone: one prompt."""
    rows = [{"id": name, "prompt": "a red circle", "seed": i, "steps": steps} for i, name in enumerate(ids)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def arguments(manifest: Path, out: Path, model: Path, *more: object) -> list[str]:
    return ["render", "--manifest", str(manifest), "--out", str(out), "--model", str(model), *SMALL, *map(str, more)]


def events(out: Path) -> list[dict[str, Any]]:
    """Whole lines of events.jsonl so far."""
    try:
        lines = (out / "events.jsonl").read_text().splitlines(keepends=True)
    except FileNotFoundError:
        return []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def steps_on_disk(out: Path, clip: str) -> bool:
    return any((out / ".state" / "steps").glob(f"{clip}.*.safetensors"))


@dataclass
class Harm:
    """Sends a signal to a rank while it renders `clip`, once a step state is on disk; at most `times` times."""

    out: Path
    clip: str
    number: signal.Signals
    rank: int = 0
    times: int = 1
    done: int = 0

    def __post_init__(self) -> None:
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def end(self) -> int:
        """How often harm was done."""
        self._ended.set()
        self._thread.join(10)
        return self.done

    def _watch(self) -> None:
        seen = 0
        while not self._ended.wait(0.02) and self.done < self.times:
            log = events(self.out)
            starts = [(i, e) for i, e in enumerate(log) if e["event"] == "running" and e["id"] == self.clip]
            if len(starts) > seen and steps_on_disk(self.out, self.clip):
                index, event = starts[-1]
                seen = len(starts)
                pids = next(e["pids"] for e in reversed(log[:index]) if e.get("actor") == event["gang"])
                os.kill(pids[self.rank], self.number)
                self.done += 1


def render(capsys: Any, *args: Any) -> tuple[int, dict[str, Any], str]:
    """(exit code, the JSON of stdout, stderr) of a run whose driver is this process."""
    capsys.readouterr()
    code = main([*arguments(*args), "--json"])
    captured = capsys.readouterr()
    lines = captured.out.splitlines()
    return code, json.loads(lines[-1]) if lines else {}, captured.err


def render_here(*args: Any) -> int:
    """The exit code of a run in this process, whose lines nobody reads."""
    return main(arguments(*args))


def start_driver(*args: Any) -> subprocess.Popen[str]:
    """A driver in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "cineray", *arguments(*args), "--json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONSAFEPATH": "1"},
    )


def pixels(out: Path) -> dict[str, str]:
    """SHA-256 of every committed clip's frames, by id; fails if one id has two videos or no whole sidecar."""
    found: dict[str, str] = {}
    for video in sorted(out.glob("*.mp4")):
        clip, mark, _ = video.name.rsplit(".", 2)
        assert clip not in found, f"{clip} is committed twice"
        sidecar = json.loads(video.with_suffix(".json").read_text())
        assert (sidecar["id"], sidecar["fingerprint"]) == (clip, mark)
        found[clip] = hashlib.sha256(read_video(video).tobytes()).hexdigest()
    return found


def sidecar(out: Path, clip: str) -> dict[str, Any]:
    (path,) = (p for p in out.glob(f"{clip}.*.json") if not p.name.endswith(".trace.json"))
    return json.loads(path.read_text())
