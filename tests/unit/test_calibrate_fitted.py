"""`cineray calibrate fitted` and `quality`, as a person runs them, on tiny random models."""

import json

import numpy as np
import pytest
from measure_runs import MeasureRuns

from cineray.caching.call import CallPlan, StepContext
from cineray.caching.profile import FittedProfile, QualityProfile
from cineray.pipeline.calibrate.fitted import MAX_TOKENS, ResidualRecorder

pytestmark = pytest.mark.slow


@pytest.fixture
def run(checkpoint_folder, tmp_path, capsys):
    return MeasureRuns(checkpoint_folder, tmp_path / "clips.jsonl", capsys)


@pytest.mark.parametrize("model", ["wan", "hunyuan"])
def test_a_profile_of_a_model_is_measured_and_used(run, tmp_path, model):
    out = tmp_path / "fitted.json"
    code, result, _ = run("calibrate", "fitted", "--out", str(out), "--json", model=model, steps=16)
    assert code == 0
    assert result == {"profile": str(out), "steps": 16, "clips": 2}
    profile = FittedProfile.model_validate_json(out.read_text())
    products, weights = profile.at(16)
    assert products[-1, -1] == pytest.approx(1)
    assert np.linalg.eigvalsh(products).min() > -1e-4
    assert weights.max() == 1
    assert weights.min() > 0
    policy = f"fitted(speedup=2,profile={out})"
    _, rows, _ = run("bench", "quality", policy, "--json", model=model, steps=16)
    assert rows is not None
    assert rows["rows"][0]["cost"] == 0.5


def test_a_quality_profile_is_measured_once_and_promises_a_floor(run, tmp_path):
    fitted, out = tmp_path / "fitted.json", tmp_path / "quality.json"
    run("calibrate", "fitted", "--out", str(fitted), steps=16)
    run.manifest.write_text("".join(json.dumps({"prompt": "a red circle", "seed": s}) + "\n" for s in (1, 2, 3)))
    words = ["calibrate", "quality", "--profile", str(fitted), "--out", str(out), "--json"]
    code, result, _ = run(*words, steps=16)
    assert code == 0
    assert result is not None
    assert [row["speedup"] for row in result["floors"]][:2] == [1.25, 1.5]
    profile = QualityProfile.model_validate_json(out.read_text())
    assert all(len(point.psnr_db) == 3 for point in profile.points)
    assert run(*words, steps=16)[1] == result  # from OUT.bench.json
    code, _, said = run("bench", "quality", f"auto(psnr>=99,profile={out})", steps=16)
    assert code == 2
    assert "cannot be kept: the slowest setting that was measured keeps" in said


def test_too_few_clips_or_steps(run, tmp_path):
    out = str(tmp_path / "out.json")
    assert run("calibrate", "quality", "--out", out, steps=16)[0] == 2
    code, _, said = run("calibrate", "fitted", "--out", out, steps=8)
    assert code == 2
    assert "needs clips of 10 or more steps" in said


def test_few_tokens_of_a_long_clip_are_kept_and_branches_are_combined_as_guidance_does():
    import torch

    recorder = ResidualRecorder()
    values = torch.zeros(1, 3 * MAX_TOKENS, 2)
    for branch, added in (("cond", 3.0), ("uncond", 1.0)):
        context = StepContext(branch=branch, step_index=0, num_steps=2, num_branches=2)
        plan = CallPlan(context=context, compute_rows=[0], skip_rows=[], gammas=[])
        recorder.remember(plan, values, values + added)
    products, sizes = recorder.clip(4.0)
    assert products.tolist() == [[2 * MAX_TOKENS * 9.0**2]]  # 1 + 4 (3 - 1)
    assert sizes[0] == pytest.approx((2 * MAX_TOKENS) ** 0.5 * 9)
