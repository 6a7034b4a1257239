"""`cineray calibrate fitted` and `quality`, as a person runs them, on tiny random models."""

import json

import numpy as np
import pytest
from measure_runs import MeasureRuns

from cineray.caching.policies.fitted import curve_at
from cineray.caching.profile import FittedProfile, QualityProfile, generic_profile
from cineray.jobs.cli.main import main
from cineray.jobs.measure import calibration
from cineray.pipeline.calibrate.fitted import search_schedule
from cineray.pipeline.loading.checkpoint import open_checkpoint

pytestmark = pytest.mark.slow


@pytest.fixture
def run(checkpoint_folder, tmp_path, capsys):
    return MeasureRuns(checkpoint_folder, tmp_path / "clips.jsonl", capsys)


@pytest.mark.parametrize("model", ["wan", "hunyuan"])
def test_a_profile_of_a_model_is_measured_and_used(run, tmp_path, model):
    out = tmp_path / "fitted.json"
    words = ("calibrate", "fitted", "--trials", "4", "--out", str(out), "--json")
    code, result, _ = run(*words, model=model, steps=16)
    assert code == 0
    assert result["score_db"] >= result["first_score_db"] > 0
    profile = FittedProfile.model_validate_json(out.read_text())
    assert list(profile.density) == result["density"]
    assert run(*words, model=model, steps=16)[1] == result
    assert [path.name for path in tmp_path.iterdir()] == ["clips.jsonl", "fitted.json"]
    policy = f"fitted(speedup=2,profile={out})"
    _, rows, _ = run("bench", "quality", policy, "--json", model=model, steps=16)
    assert rows is not None
    assert rows["rows"][0]["cost"] == 0.5


@pytest.mark.parametrize(
    ("model", "prompt"),
    [
        ("tiny-open-sora", "a red circle moving left on a navy background"),
        ("tiny-dit", "a red circle on a navy background"),
        ("tiny-audio", "a low bright tone rising"),
    ],
)
def test_models_that_teacache_does_not_know_have_profiles_too(tmp_path, model, prompt):
    out = tmp_path / "fitted.json"
    assert (
        main(["calibrate", "fitted", prompt, "--model", model, "--trials", "1", "--steps", "16", "--out", str(out)])
        == 0
    )
    profile = FittedProfile.model_validate_json(out.read_text())
    assert len(profile.transformer) > 2
    policy = f"fitted(speedup=2,profile={out})"
    assert open_checkpoint(model).plan_cache(policy) is not None
    with pytest.raises(ValueError, match="is for another model"):
        open_checkpoint("tiny-wan").plan_cache(policy)


def test_a_quality_profile_is_measured_once_and_promises_a_floor(run, tmp_path):
    fitted, out = tmp_path / "fitted.json", tmp_path / "quality.json"
    run("calibrate", "fitted", "--trials", "0", "--out", str(fitted), steps=16)
    run.manifest.write_text("".join(json.dumps({"prompt": "a red circle", "seed": s}) + "\n" for s in (1, 2, 3)))
    words = ["calibrate", "quality", "--profile", str(fitted), "--out", str(out), "--json"]
    code, result, _ = run(*words, steps=16)
    assert code == 0
    assert result is not None
    assert [row["speedup"] for row in result["floors"]][:2] == [1.1, 1.25]
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
    assert "needs clips of 16 or more steps" in said


WANTED = {1.4: (0, 1, 2, 0, -2, -1, 0), 2.0: (1, 2, 3, 0, -3, -2, -1), 2.8: (3, 0, -2, -2, -1, 0, 2)}


@pytest.mark.parametrize("speedups", [(2.0, 2.8), (1.4, 2.0, 2.8)])
def test_a_search_keeps_what_is_better_at_each_speed_and_takes_the_same_way_each_time(speedups):
    start = generic_profile(FittedProfile)
    if 1.4 in speedups:
        start = start.model_copy(update={"density_at_1_4x": start.density})
    wanted = {speedup: WANTED[speedup] for speedup in speedups}
    tried = {speedup: [] for speedup in speedups}

    def score(profile, speedup):
        tried[speedup].append(profile)
        at_ends = abs(profile.length - 0.1) + abs(profile.curvature - 0.9)
        return -at_ends - sum(map(abs, np.subtract(curve_at(profile, speedup), wanted[speedup])))

    told = []
    found = search_schedule(start, score, 200, lambda done, best: told.append((done, best)))
    assert [done for done, _ in told] == list(range(201))
    bests = [best for _, best in told]
    assert bests == sorted(bests)
    assert bests[-1] > bests[0] / 3
    assert abs(found.length - 0.1) + abs(found.curvature - 0.9) < 0.15
    for speedup, profiles in tried.items():
        assert score(found, speedup) == max(score(profile, speedup) for profile in [*profiles])
    assert (found.family, found.source) == (start.family, start.source)
    again = search_schedule(start, score, 200, lambda *_: None)
    assert again == found
    one = search_schedule(start, lambda profile, _: -abs(profile.length - start.length), 5, lambda *_: None)
    assert one == start  # nothing is better, and one curve stays one


def test_points_that_an_earlier_run_measured_are_not_measured_again(run, tmp_path, monkeypatch):
    out = tmp_path / "fitted.json"
    words = ("calibrate", "fitted", "--trials", "2", "--out", str(out))
    with monkeypatch.context() as patched:
        patched.setattr(calibration.TrialLog, "delete", lambda _: None)  # as if it had been stopped before
        run(*words, steps=16)
    first = out.read_text()
    assert (tmp_path / "fitted.json.trials").exists()
    code, _, said = run(*words, steps=16)
    assert code == 0
    assert "resuming from 6 points" in said
    assert not (tmp_path / "fitted.json.trials").exists()
    assert out.read_text() == first
