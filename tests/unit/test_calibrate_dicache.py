"""`cineray calibrate dicache`, as a person runs it, and the search for skip costs."""

from itertools import accumulate
from pathlib import Path

import numpy as np
import pytest
from measure_runs import MeasureRuns
from test_dicache_runs import profile

from cineray.caching.profile import DiCacheProfile
from cineray.jobs.cli.main import main
from cineray.jobs.measure import calibration
from cineray.pipeline.calibrate.dicache import KNOTS, StepCostSearch, search_step_costs, with_step_costs
from cineray.pipeline.loading.checkpoint import open_checkpoint

pytestmark = pytest.mark.slow


@pytest.fixture
def run(checkpoint_folder, tmp_path, capsys):
    return MeasureRuns(checkpoint_folder, tmp_path / "clips.jsonl", capsys)


def test_a_calibrated_profile_is_used_and_comes_out_the_same_of_a_search_that_is_stopped(run, tmp_path, monkeypatch):
    whole, measure, measured = tmp_path / "whole.json", StepCostSearch._measure, []

    def stop_after(num_points: int):
        def counted(self, *arguments):
            if len(measured) == num_points:
                raise KeyboardInterrupt
            measured.append(arguments)
            return measure(self, *arguments)

        measured.clear()
        monkeypatch.setattr(StepCostSearch, "_measure", counted)

    def calibrate(out: Path):
        return run("calibrate", "dicache", "--trials", "1", "--json", "--out", str(out), steps=12)

    stop_after(99)
    code, said, err = calibrate(whole)
    assert code == 0
    found = DiCacheProfile.model_validate_json(whole.read_text())
    assert len(found.skip_costs) == 12
    assert said["threshold"] == found.threshold
    assert "proposes threshold" in err
    assert len(said["curve"]) == 9
    num_points = len(measured)
    stop_after(4)
    code, _, _ = calibrate(tmp_path / "a.json")
    assert code == 130
    assert not (tmp_path / "a.json").exists()
    trials = tmp_path / "a.json.trials"
    trials.write_text(trials.read_text() + '\n{"search": "tor')
    stop_after(99)
    code, _, err = calibrate(tmp_path / "a.json")
    assert code == 0
    assert "resuming from 4 points of an earlier run" in err
    assert "trials, best so far" in err
    assert len(measured) == num_points - 4
    assert (tmp_path / "a.json").read_text() == whole.read_text()
    assert not list(tmp_path.glob("*.trials"))
    code, used, _ = run("bench", "quality", f"dicache(profile={whole})", "--json", steps=12)
    assert code == 0
    assert used["rows"][0]["row"]["speedup"] > 1
    assert sorted(p.name for p in tmp_path.glob("*.json")) == ["a.json", "whole.json"]


def test_a_floor_is_kept_on_every_clip_or_refused(run, tmp_path, monkeypatch):
    monkeypatch.setattr(calibration, "CURVE", (1.5, 2.5, 3.5))  # as good as all nine
    out = tmp_path / "a.json"
    code, said, _ = run("calibrate", "dicache", "--trials", "0", "--floor", "20", "--out", str(out), "--json", steps=12)
    assert code == 0
    kept = [point for point in said["curve"] if point["worst_psnr_db"] >= 20]
    assert max(kept, key=lambda p: p["speedup"])["threshold"] == said["threshold"]
    out.unlink()
    code, _, err = run("calibrate", "dicache", "--trials", "0", "--floor", "100", "--out", str(out), steps=12)
    assert code == 2
    assert "no threshold keeps 100.0 dB on every clip; the best keeps" in err
    assert "stays in" in err
    assert not list(tmp_path.glob("*.json"))
    with monkeypatch.context() as patch:
        patch.setattr(StepCostSearch, "_measure", None)
        words = ["calibrate", "dicache", "--trials", "0", "--floor", "20", "--out", str(out), "--json"]
        code, again, _ = run(*words, steps=12)  # what was measured is not measured again
    assert code == 0
    assert again == said
    assert not list(tmp_path.glob("*.trials"))


@pytest.mark.parametrize(
    ("model", "prompt"),
    [
        ("tiny-open-sora", "a red circle moving left on a navy background"),
        ("tiny-dit", "a red circle on a navy background"),
    ],
)
def test_models_that_teacache_does_not_know_have_profiles_too(tmp_path, monkeypatch, model, prompt):
    monkeypatch.setattr(calibration, "CURVE", (2.0,))
    monkeypatch.setattr("cineray.pipeline.calibrate.dicache.SPEEDUPS", (2.0,))
    out = tmp_path / "dicache.json"
    words = ["calibrate", "dicache", prompt, "--model", model, "--trials", "0", "--steps", "10", "--out", str(out)]
    assert main(words) == 0
    found = DiCacheProfile.model_validate_json(out.read_text())
    assert all(change > 0 for change in found.expected_change)
    assert open_checkpoint(model).plan_cache(f"dicache(profile={out})") is not None
    with pytest.raises(ValueError, match="is for another model"):
        open_checkpoint("tiny-wan").plan_cache(f"dicache(profile={out})")


@pytest.mark.parametrize(
    ("words", "steps", "message"),
    [
        (["--trials", "-1"], 12, "trials must be 0 or more, got -1"),
        ([], 8, "dicache needs clips of 10 or more steps"),
        (["--out", "/nowhere/a.json"], 12, "/nowhere/a.json cannot be written"),
    ],
)
def test_bad_input(run, tmp_path, words, steps, message):
    code, _, err = run("calibrate", "dicache", "--out", str(tmp_path / "a.json"), *words, steps=steps)
    assert code == 2
    assert message in err
    assert not list(tmp_path.glob("*.json"))


def test_skip_costs_keep_the_expected_clip_s_total_change():
    expected = tuple(np.linspace(0.01, 0.05, 50))
    with_costs = with_step_costs(profile(expected=expected), np.linspace(3, -3, len(KNOTS)))
    assert np.dot(with_costs.skip_costs, expected) == pytest.approx(sum(expected), rel=1e-3)
    assert with_costs.skip_costs[0] / with_costs.skip_costs[-1] == pytest.approx(np.exp(6), rel=1e-2)


def test_the_search_keeps_only_what_raises_the_score():
    """Against a score that wants the middle light and the ends heavy."""
    tried, told = [], []

    def score(known):
        logs = np.log(known.skip_costs)
        tried.append((float(logs[0] + logs[-1] - 2 * logs[25]), known))
        return tried[-1][0]

    found = search_step_costs(profile(), score, 40, lambda trial, best: told.append((trial, best)))
    assert [trial for trial, _ in told] == list(range(41))
    assert [best for _, best in told] == list(accumulate((value for value, _ in tried), max))
    best, known = max(tried, key=lambda pair: pair[0])
    assert found == known
    assert best > tried[0][0] + 1
    assert min(value for value, _ in tried[1:]) < tried[0][0]  # some trials were worse, and were not kept
