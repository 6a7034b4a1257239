"""`cineray simulate`: what it answers, writes and refuses."""

import json
import re

import pytest
from PIL import Image

from cineray.jobs.cli.main import main

SMALL = ("--num-gpus", "16", "--sp", "4", "--clip-s", "100", "--steps", "20")


@pytest.fixture
def simulate(capsys):
    """Runs `cineray simulate`: (exit code, stdout, stderr)."""

    def run(*arguments):
        code = main(["simulate", *map(str, arguments)])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def test_it_says_where_time_goes_and_that_it_is_simulated(simulate):
    code, out, err = simulate(*SMALL, "--num-clips", 40, "--start-up-s", 30, "--finish-s", 5)
    assert code == 0
    assert out.startswith("Simulated, not measured: 40 clips on 16 GPUs as 4 gangs of 4 ranks, 1 finisher\n")
    assert re.search(r"^ makespan +1,0\d\d\.\d s", out, re.MULTILINE)
    assert re.search(r"^ clips +40 done", out, re.MULTILINE)
    assert re.search(r"^ starting up, loading weights +0\.1 ", out, re.MULTILINE)
    headers = [line for line in out.splitlines() if "simulated" in line]
    assert len(headers) == 2
    assert "events simulated in" in err


def test_json_is_one_object_with_what_was_assumed(simulate):
    losses = ("--spot-loss-per-gpu-hour", 0.5, "--preempt-notice-s", 60, "--replace-s", 20, "--seed", 7)
    arguments = (*SMALL, "--num-clips", 300, "--encode-s", 1, "--finish-s", 3, *losses, "--json")
    code, out, _ = simulate(*arguments)
    assert code == 0
    content = json.loads(out.splitlines()[-1])
    assert set(content) == {"simulated", "assumed"}
    found, assumed = content["simulated"], content["assumed"]
    assert found["clips"] == {"done": 300, "failed": 0, "quarantined": 0, "unfinished": 0}
    assert found["preempted"] > 0
    assert sum(found["clips_done_per_hour"]) == 300
    assert sum(found["gpu_hours"].values()) == pytest.approx(16 * found["makespan_s"] / 3600, rel=1e-3)
    assert (assumed["num_clips"], assumed["num_gangs"], assumed["num_finishers"], assumed["seed"]) == (300, 4, 1, 7)
    assert simulate(*arguments)[1] == out  # the same again
    assert simulate(*arguments[:-2], 8, "--json")[1] != out


def test_gangs_that_grow_end_a_batch_of_few_clips_sooner(simulate):
    few = ("--num-gpus", 8, "--num-clips", 10, "--clip-s", 1800, "--start-up-s", 60)
    _, out, _ = simulate(*few, "--elastic-tail", "2=1.97,4=3.75,8=6.52", "--json")
    found = json.loads(out.splitlines()[-1])["simulated"]
    plain = json.loads(simulate(*few, "--json")[1].splitlines()[-1])["simulated"]
    assert found["grown"] == 2
    assert found["makespan_s"] < 0.7 * plain["makespan_s"]
    assert "clips moved to larger gangs" in out


def test_a_manifests_clips_take_the_steps_of_their_rows_and_share_prompts(simulate, tmp_path):
    manifest = tmp_path / "m.jsonl"
    rows = [{"prompt": "a red circle"}, {"prompt": "a red circle", "steps": 10}, {"prompt": "a blue square"}]
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    one = ("--num-gpus", 1, "--clip-s", 100, "--steps", 20, "--save-s", 0, "--encode-s", 1000, "--json")
    code, out, _ = simulate("--manifest", manifest, *one)
    assert code == 0
    found = json.loads(out.splitlines()[-1])["simulated"]
    assert found["makespan_s"] == 2000 + 100  # two prompts, and the last clip
    assert found["gpu_hours"]["computing"] == pytest.approx(250 / 3600, abs=1e-4)


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_a_picture_says_that_it_is_simulated(simulate, tmp_path, suffix):
    path = tmp_path / f"plot.{suffix}"
    path.write_text("an older one")
    code, _, _ = simulate(*SMALL, "--num-clips", 10, "--plot", path)
    assert code == 0
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    first = path.read_bytes()
    if suffix == "png":
        with Image.open(path) as picture:
            assert picture.size == (1350, 900)
            assert picture.info["Title"].startswith("Simulated, not measured: 10 clips")
    else:
        assert b"Simulated, not measured: 10 clips" in first
    simulate(*SMALL, "--num-clips", 10, "--plot", path)
    assert path.read_bytes() == first


def test_a_run_that_would_be_aborted_says_why(simulate):
    code, out, err = simulate(*SMALL, "--num-clips", 10, "--start-up-s", 5000)
    assert code == 0
    assert re.search(r"^ clips +10 unfinished", out, re.MULTILINE)
    assert "the simulated run ends early: every gang was lost" in err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--num-gpus", 8, "--clip-s", 5), "give --num-clips N or --manifest FILE, one of them"),
        (("--num-gpus", 8, "--clip-s", 5, "--num-clips", 2, "--manifest", "m.jsonl"), "one of them"),
        (("--num-gpus", 8, "--num-clips", 2), "give --clip-s"),
        (("--num-clips", 2, "--clip-s", 5), "Missing option '--num-gpus'"),
        (("--num-gpus", 8, "--num-clips", 0, "--clip-s", 5), "--num-clips must be 1 to"),
        (("--num-gpus", 8, "--num-clips", 2, "--clip-s", 0), "a step must take above 0, got 0"),
        (("--num-gpus", 8, "--num-clips", 2, "--clip-s", "nan"), "a step must take above 0, got nan"),
        (("--num-gpus", 8, "--num-clips", 2, "--clip-s", 5, "--steps", 0), "--steps must be 1 to 1000, got 0"),
        (("--num-gpus", 8, "--num-clips", 2, "--clip-s", 5, "--finish-s", -1), "finishing a clip must take 0 or more"),
        (("--num-gpus", 8, "--num-clips", 2, "--clip-s", 5, "--sp", 16), "does not fit on a node of 8 GPUs"),
        (("--num-gpus", 8, "--num-clips", 2, "--clip-s", 5, "--plot", "p.jpg"), "must be a file named .png or .svg"),
        (("--num-gpus", 8, "--num-clips", 2, "--clip-s", 5, "--plot", "no/p.png"), "--plot no/p.png cannot be written"),
        (("--num-gpus", 8, "--manifest", "no.jsonl", "--clip-s", 5), "no.jsonl"),
        (("--num-gpus", 8, "--num-clips", 2, "--clip-s", 5, "--elastic-tail", "2"), "must be such as 2=1.9,4=3.6"),
        (("--num-gpus", 8, "--num-clips", 2, "--clip-s", 5, "--elastic-tail", "9=5"), "the room of 2 to 8 gangs"),
        (("--num-gpus", "x", "--num-clips", 2, "--clip-s", 5), "Invalid value for '--num-gpus'"),
    ],
)
def test_bad_input_is_refused_in_a_line(simulate, arguments, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = simulate(*arguments)
    (line,) = err.splitlines()
    assert (code, out) == (2, "")
    assert said in line
    assert not list(tmp_path.iterdir())


def test_bad_rows_are_refused_by_number(simulate, tmp_path):
    manifest = tmp_path / "m.jsonl"
    manifest.write_text('{"prompt": "a"}\n{"prompt": "b", "steps": 0}\n{"steps": 3}\n')
    code, _, err = simulate("--manifest", manifest, "--num-gpus", 8, "--clip-s", 5)
    assert code == 2
    assert [line.split("m.jsonl ")[1] for line in err.splitlines()] == [
        "line 2: steps must be 1 to 1000, got 0",
        "line 3: prompt is required",
    ]
