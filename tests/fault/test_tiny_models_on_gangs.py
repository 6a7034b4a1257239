"""Tiny checkpoints on two gangs, one of which is killed: no clip is lost, and each has the pixels of one process."""

import hashlib
import json
import signal
from typing import Any

import pytest
import ray
from gang_runs import Harm

from cineray.jobs.cli.main import main
from cineray.pipeline.loading.checkpoint import open_checkpoint

pytestmark = [pytest.mark.ray, pytest.mark.exhaustive]  # what test_gang_faults shows, on more models

CLIP, STILL = "a red circle moving left on a navy background", "a red circle on a navy background"
TONE = "a low bright tone rising"


@pytest.fixture(scope="module", autouse=True)
def _cluster():
    """A Ray with room for two gangs of a rank and a finisher."""
    ray.init(address="local", num_cpus=3, include_dashboard=False, object_store_memory=80 * 2**20)
    yield
    ray.shutdown()


@pytest.mark.parametrize(
    ("model", "prompt", "steps"),  # so many that a clip can be caught in the middle: a second or more
    [("tiny-wan2.2", CLIP, 30), ("tiny-dit", STILL, 30), ("tiny-audio", TONE, 100), ("tiny-open-sora", CLIP, 30)],
)
def test_a_rank_that_dies_loses_no_clip(model, prompt, steps, tmp_path, capsys):
    manifest = tmp_path / "m.jsonl"
    rows = [{"id": name, "prompt": prompt, "seed": i, "steps": steps} for i, name in enumerate("abc")]
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = ["render", "--manifest", str(manifest), "--model", model, "--lossless", "--json"]
    out, alone = tmp_path / "out", tmp_path / "alone"
    assert main([*command, "--out", str(alone)]) == 0
    harm = Harm(out, "b", signal.SIGKILL)
    assert main([*command, "--out", str(out), "--gangs", "2", "--checkpoint-every", "0"]) == 0
    assert harm.end() == 1
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert {clip["status"] for clip in summary["clips"]} == {"done"}
    assert pixels(out, model) == pixels(alone, model)
    assert len(pixels(out, model)) == len(rows)


def pixels(out: Any, model: str) -> dict[str, str]:
    """SHA-256 of every clip's frames by its file's name, which has its id and its fingerprint."""
    output = open_checkpoint(model).model.output
    return {
        file.name: hashlib.sha256(output.read(file).tobytes()).hexdigest() for file in out.glob(f"*{output.suffix}")
    }
