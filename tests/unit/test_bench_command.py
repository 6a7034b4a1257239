"""`cineray bench quality` and the calibrations of TeaCache and MagCache, as a person runs them."""

import json

import numpy as np
import pytest
import torch
from measure_runs import MeasureRuns

from cineray.jobs.cli.main import main
from cineray.jobs.measure import bench as quality_bench
from cineray.pipeline.calibrate.teacache_magcache import StepChanges, fit_polynomial

pytestmark = pytest.mark.slow


@pytest.fixture
def run(checkpoint_folder, tmp_path, capsys):
    return MeasureRuns(checkpoint_folder, tmp_path / "clips.jsonl", capsys)


def test_rows_come_in_the_order_asked_and_are_kept(run, tmp_path, monkeypatch):
    out = tmp_path / "bench.json"
    words = [
        "bench",
        "quality",
        "fewer-steps(?)",
        "interval(interval=?)",
        "none",
        "--at",
        "2",
        "--out",
        str(out),
        "--timed",
        "1",
    ]
    code, first, _ = run(*words, "--json")
    assert code == 0
    assert first is not None
    asked = [(row["asked"], row["at"], row["row"]["policy"]) for row in first["rows"]]
    # with the last step computed too, 8 steps at an interval of 3 are 0, 3, 6, 7
    assert asked == [
        ("fewer-steps(?)", 2.0, "fewer-steps(4)"),
        ("interval(interval=?)", 2.0, "interval(interval=3)"),
        ("none", None, "none"),
    ]
    assert first["rows"][2]["row"]["psnr_db"] == 100
    assert (first["rows"][2]["row"]["num_clips"], first["rows"][2]["row"]["num_timed"]) == (2, 1)
    kept = json.loads(out.read_text())["rows"]
    assert [{name: row[name] for name in kept[0]} for row in first["rows"]] == kept
    short = {"policy", "num_clips", "cost", "wall_ratio", "psnr_mean", "psnr_worst", "psnr_ci95", "ssim", "vmaf"}
    assert short < set(first["rows"][0])  # which scripts read
    assert first["rows"][0]["psnr_mean"] == kept[0]["row"]["psnr_db"]
    assert first["rows"][0]["vmaf"] == kept[0]["row"]["vmaf"]

    def no_rendering(*_):
        raise AssertionError("rendered again")

    with monkeypatch.context() as patch:
        patch.setattr("cineray.jobs.measure.quality.denoise_prepared", no_rendering)
        _, second, _ = run("bench", "quality", "none", "fewer-steps(?)", "--at", "2", "--out", str(out), "--json")
    assert second is not None
    assert [row["asked"] for row in second["rows"]] == ["none", "fewer-steps(?)"]
    assert len(json.loads(out.read_text())["rows"]) == 3  # rows that were not asked for stay


def test_sounds_are_compared_by_samples_and_spectra(checkpoint_folder, tmp_path, capsys):
    manifest, tables = tmp_path / "sounds.jsonl", tmp_path / "tables"
    manifest.write_text("".join(json.dumps({"prompt": "rain", "seed": seed, "seconds": 1.5}) + "\n" for seed in (1, 2)))
    clips = ["--model", str(checkpoint_folder("stable_audio")), "--manifest", str(manifest), "--steps", "8"]
    words = ["bench", "quality", "none", "fewer-steps(4)", "smoothcache:SCHEDULE", "interval", *clips, "--json"]
    schedule = tmp_path / "schedule.json"
    assert main(["calibrate", "smoothcache", *clips, "--alpha", "0.3", "--out", str(schedule)]) == 0
    words[4] = f"smoothcache:{schedule}"
    capsys.readouterr()
    assert main([*words, "--out", str(tmp_path / "bench.json"), "--tables", str(tables)]) == 0
    said = capsys.readouterr()
    rows = json.loads(said.out.strip().rsplit("\n", 1)[-1])["rows"]
    none, fewer, _, interval = rows
    assert (none["snr_mean"], none["snr_worst"], none["log_stft_db"], none["stft_convergence"]) == (100, 100, 0, 0)
    for row in (fewer, interval):
        assert row["snr_worst"] <= row["snr_mean"] < 100
        assert row["log_stft_db"] > 0
        assert row["stft_convergence"] > 0
        assert len(row["row"]["clips_snr_db"]) == 2
        assert row["row"]["psnr_db"] is None
    assert "SNR dB" in said.out
    assert "log STFT, dB apart" in (tables / "quality.md").read_text()
    assert (
        (tables / "quality.csv")
        .read_text()
        .startswith("policy,num_clips,speedup,wall_ratio,cpu_ratio,num_timed,snr_db,")
    )
    assert {path.name for path in tables.iterdir()} == {f"quality.{kind}" for kind in ("csv", "md", "png", "svg")}


def test_calibrations_of_pixels_refuse_sounds(checkpoint_folder, tmp_path, capsys):
    manifest, out = tmp_path / "sounds.jsonl", tmp_path / "profile.json"
    manifest.write_text('{"prompt": "rain"}\n')
    for command in ("dicache", "quality"):
        words = ["calibrate", command, "--model", str(checkpoint_folder("stable_audio")), "--manifest", str(manifest)]
        capsys.readouterr()
        assert main([*words, "--out", str(out)]) == 2
        assert "makes sounds, and quality is measured in pixels" in capsys.readouterr().err
        assert not out.exists()


def test_an_interrupted_bench_goes_on_where_it_was(run, tmp_path, monkeypatch):
    out = tmp_path / "bench.json"
    words = ["bench", "quality", "fewer-steps(4)", "interval", "--out", str(out)]
    measure = quality_bench.QualityMeter.measure

    def stop_at_interval(self, policy):
        if policy == "interval":
            raise KeyboardInterrupt
        return measure(self, policy)

    with monkeypatch.context() as patch:
        patch.setattr(quality_bench.QualityMeter, "measure", stop_at_interval)
        assert run(*words)[0] == 130
    kept = json.loads(out.read_text())
    assert [row["asked"] for row in kept["rows"]] == ["fewer-steps(4)"]
    kept["rows"][0]["row"]["psnr_db"] = 12.34  # would be measured differently
    out.write_text(json.dumps(kept))
    _, result, _ = run(*words, "--json")
    assert result is not None
    assert [row["row"]["policy"] for row in result["rows"]] == ["fewer-steps(4)", "interval"]
    assert result["rows"][0]["row"]["psnr_db"] == 12.34
    kept["rows"][0]["row"]["text"] = "a policy that meant something else"
    out.write_text(json.dumps(kept))
    _, result, _ = run(*words, "--json")
    assert result is not None
    assert result["rows"][0]["row"]["psnr_db"] != 12.34
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


def test_what_is_out_of_reach_is_told(run):
    code, result, _ = run("bench", "quality", "dicache(threshold=?,max_skips=1)", "--at", "4", "--json")
    assert code == 0
    assert result is not None
    (row,) = result["rows"]
    assert row["row"] is None
    assert 1 < row["best_speedup"] < 2


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["dicash"], "unknown policy 'dicash'"),
        (["dicache(threshold=?)"], "leaves an option open; give speed-ups to reach, as --at 2.0"),
        (["dicache(threshold=?)", "--at", "0.5"], "--at must be 1 to 8 for 8 steps, got 0.5"),
        (["dicache(threshold=?)", "--at", "nan"], "--at must be 1 to 8 for 8 steps, got nan"),
        (["magcache(threshold=?)", "--at", "2"], "magcache has no profile of this model"),
        (["none", "--out", "/no/such/folder/bench.json"], "/no/such/folder/bench.json cannot be written"),
    ],
)
def test_bad_input_is_told_before_anything_renders(run, words, said, monkeypatch):
    monkeypatch.setattr("cineray.jobs.measure.quality.denoise_prepared", None)
    code, _, err = run("bench", "quality", *words)
    assert code == 2
    assert said in err


def test_a_file_of_another_bench_is_refused(run, tmp_path):
    out = tmp_path / "bench.json"
    assert run("bench", "quality", "fewer-steps(4)", "--out", str(out))[0] == 0
    before = out.read_text()
    code, _, err = run("bench", "quality", "fewer-steps(4)", "--out", str(out), steps=6)
    assert code == 2
    assert "holds rows measured with different clips; choose another --out" in err
    assert out.read_text() == before
    out.write_text("[]")
    code, _, err = run("bench", "quality", "fewer-steps(4)", "--out", str(out))
    assert code == 2
    assert "is not a file of this command" in err
    assert main(["bench", "quality", "none"]) == 2


@pytest.mark.parametrize("model", ["wan", "hunyuan"])
def test_calibrated_profiles_are_used(run, tmp_path, model):
    tea, mag = tmp_path / "tea.json", tmp_path / "mag.json"
    code, fitted, _ = run("calibrate", "teacache", "--out", str(tea), "--json", model=model)
    assert code == 0
    assert fitted is not None
    signals = ["timestep-embedding", "timestep-projection"] if model == "wan" else ["modulated-input"]
    assert list(fitted["coefficients"]) == signals
    assert all(len(c) == 5 for c in fitted["coefficients"].values())
    code, measured, _ = run("calibrate", "magcache", "--out", str(mag), "--json", model=model)
    assert code == 0
    assert measured is not None
    branches = ["cond", "uncond"] if model == "wan" else ["cond"]
    assert list(measured["ratios"]) == branches
    assert all(len(r) == 8 and r[0] == 1 for r in measured["ratios"].values())
    policies = [f"teacache(profile={tea},threshold=100)", f"magcache(profile={mag},threshold=100)"]
    _, result, _ = run("bench", "quality", *policies, "--json", model=model)
    assert result is not None
    # TeaCache: first and last step. MagCache: int(0.2 calls) of warm-up, then 4 skips at most; Wan's are 3 of 16 calls,
    # so that cond computes steps 0, 1, 6 and uncond 0, 5
    assert result["rows"][0]["row"]["speedup"] == 4
    assert result["rows"][1]["row"]["speedup"] == pytest.approx(16 / 5 if model == "wan" else 4)
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


def test_ratios_and_changes_are_those_of_the_residuals(loaded, new_request):
    """Against the residuals as plain hooks see them: mean over tokens of |r_t| / |r_(t-1)|, and relative L1."""
    from cineray.pipeline.calibrate.teacache_magcache import magnitude_ratios, measure_steps

    model = loaded("wan")
    requests = [new_request(num_inference_steps=5, seed=s, guidance_scale=1.0) for s in (1, 2)]
    transformer = model.pipe.transformer
    blocks_input, blocks_output = [], []
    taps = [
        transformer.patch_embedding.register_forward_hook(
            lambda m, a, out: blocks_input.append(out.flatten(2).mT.clone())
        ),
        transformer.norm_out.register_forward_hook(lambda m, a, out: blocks_output.append(a[0].clone())),
    ]
    changes = measure_steps(model, requests, ("timestep-embedding", "timestep-projection"), lambda done: None)
    for tap in taps:
        tap.remove()
    residuals = torch.stack(blocks_output) - torch.stack(blocks_input)  # [clips * 5, 1, S, D]
    for clip in (0, 1):
        now, before = residuals[clip * 5 + 1 : clip * 5 + 5], residuals[clip * 5 : clip * 5 + 4]
        ratio = (now.norm(dim=-1) / before.norm(dim=-1)).mean(dim=(1, 2))
        change = (now - before).abs().sum(dim=(1, 2, 3)) / before.abs().sum(dim=(1, 2, 3))
        assert changes.magnitude["cond"][clip] == pytest.approx(ratio.tolist(), rel=1e-4)
        assert changes.residual["cond"][clip] == pytest.approx(change.tolist(), rel=1e-4)
    means = np.mean(changes.magnitude["cond"], axis=0)
    assert magnitude_ratios(changes)["cond"] == pytest.approx([1.0, *means], abs=1e-5)
    # the embedding knows the timestep alone
    first, second = changes.signals["timestep-embedding"]["cond"]
    assert first == second


def test_the_polynomial_that_made_the_changes_is_found_again():
    truth = np.array([3.0, -2.0, 0.5, 1.0, 0.1])
    changes = StepChanges()
    for x in np.linspace(0.01, 1, 8).reshape(2, 4):
        changes.signals["modulated-input"]["cond"].append(x.tolist())
        changes.residual["cond"].append(np.polyval(truth, x).tolist())
    coefficients, explained = fit_polynomial(changes, "modulated-input")
    assert coefficients == pytest.approx(truth)
    assert explained == pytest.approx(1)


def test_too_few_steps_for_a_polynomial_are_told(run, tmp_path):
    code, _, err = run("calibrate", "teacache", "--out", str(tmp_path / "tea.json"), steps=4)
    assert code == 2
    assert "needs more than 4 changes, got 3; use clips with more steps" in err
    assert not list(tmp_path.glob("*tea.json*"))
    for words, said in (
        (["teacache", "--threshold", "nan"], "threshold must be 0 or more"),
        (["magcache", "--max-skips", "-1"], "max-skips must be 0 or more, got -1"),
    ):
        code, _, err = run("calibrate", *words, "--out", str(tmp_path / "tea.json"))
        assert code == 2
        assert said in err
