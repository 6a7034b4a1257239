"""`cineray calibrate dicache`, as a person runs it, and the search for skip costs."""

from pathlib import Path

import numpy as np
import pytest
from test_bench_command import clips, run  # noqa: F401  # fixtures
from test_dicache_runs import profile

from cineray.caching.profile import DiCacheProfile
from cineray.pipeline.calibrate.dicache import KNOTS, StepCostSearch, with_step_costs

pytestmark = pytest.mark.slow


def test_a_calibrated_profile_is_used_and_comes_out_the_same_again(run, tmp_path):  # noqa: F811
    out = [tmp_path / "a.json", tmp_path / "b.json"]
    for path in out:
        code, said, err = run("calibrate", "dicache", "--trials", "1", "--out", str(path), "--json", steps=12)
        assert code == 0
    assert out[0].read_text() == out[1].read_text()
    found = DiCacheProfile.model_validate_json(out[0].read_text())
    assert len(found.skip_costs) == 12
    assert said["threshold"] == found.threshold
    assert "proposes threshold" in err
    assert len(said["curve"]) == 9
    code, measured, _ = run("bench", "quality", f"dicache(profile={out[0]})", "--json", steps=12)
    assert code == 0
    assert measured["rows"][0]["row"]["speedup"] > 1
    assert sorted(p.name for p in tmp_path.glob("*.json")) == ["a.json", "b.json"]


def test_a_search_that_is_stopped_goes_on_where_it_was(run, tmp_path, monkeypatch):  # noqa: F811
    measure, measured = StepCostSearch._measure, []

    def stop_after(num_points: int):
        def counted(self, *arguments):
            if len(measured) == num_points:
                raise KeyboardInterrupt
            measured.append(arguments)
            return measure(self, *arguments)

        measured.clear()
        monkeypatch.setattr(StepCostSearch, "_measure", counted)

    def calibrate(out: Path) -> tuple[int, str]:
        code, _, err = run("calibrate", "dicache", "--trials", "1", "--out", str(out), steps=12)
        return code, err

    stop_after(99)
    assert calibrate(tmp_path / "whole.json")[0] == 0
    num_points = len(measured)
    stop_after(4)
    code, _ = calibrate(tmp_path / "a.json")
    assert code == 130
    assert not (tmp_path / "a.json").exists()
    trials = tmp_path / "a.json.trials"
    trials.write_text(trials.read_text() + '\n{"search": "tor')
    stop_after(99)
    code, err = calibrate(tmp_path / "a.json")
    assert code == 0
    assert "resuming from 4 points of an earlier run" in err
    assert "trials, best so far" in err
    assert len(measured) == num_points - 4
    assert (tmp_path / "a.json").read_text() == (tmp_path / "whole.json").read_text()
    assert not list(tmp_path.glob("*.trials"))


def test_a_floor_is_kept_on_every_clip_or_refused(run, tmp_path, monkeypatch):  # noqa: F811
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
    ("words", "steps", "message"),
    [
        (["--trials", "-1"], 12, "trials must be 0 or more, got -1"),
        ([], 8, "dicache needs clips of 10 or more steps"),
        (["--out", "/nowhere/a.json"], 12, "/nowhere/a.json cannot be written"),
    ],
)
def test_bad_input(run, tmp_path, words, steps, message):  # noqa: F811
    code, _, err = run("calibrate", "dicache", "--out", str(tmp_path / "a.json"), *words, steps=steps)
    assert code == 2
    assert message in err
    assert not list(tmp_path.glob("*.json"))


def test_skip_costs_keep_the_expected_clip_s_total_change():
    expected = tuple(np.linspace(0.01, 0.05, 50))
    with_costs = with_step_costs(profile(expected=expected), np.linspace(3, -3, len(KNOTS)))
    assert np.dot(with_costs.skip_costs, expected) == pytest.approx(sum(expected), rel=1e-3)
    assert with_costs.skip_costs[0] / with_costs.skip_costs[-1] == pytest.approx(np.exp(6), rel=1e-2)


def test_the_search_keeps_only_what_raises_the_score(monkeypatch, tmp_path):
    """Against a score that wants the middle light and the ends heavy."""
    search = StepCostSearch.__new__(StepCostSearch)
    search._num_steps, search._trial = 50, Path(tmp_path / "trial.json")

    def score(self, known, speedups):
        logs = np.log(known.skip_costs)
        return float(logs[0] + logs[-1] - 2 * logs[25])

    monkeypatch.setattr(StepCostSearch, "_score", score)
    scores = []
    found = search.run(profile(), (2.0,), 40, lambda trial, best: scores.append(best))
    assert scores == sorted(scores)
    assert scores[-1] == pytest.approx(score(search, found, ()))
    assert scores[-1] > scores[0] + 1
