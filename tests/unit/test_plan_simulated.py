"""`cineray plan --simulate`: the plan's layouts in simulated time."""

import json

import pytest

from cineray.jobs.cli.main import main

HD = ["--model", "wan2.1-t2v-14b", "--gpu", "h100", "--width", "1280", "--height", "720", "--num-gpus", "8"]


@pytest.fixture
def plan(capsys):
    """Runs `cineray plan`: (exit code, stdout, stderr)."""

    def run(*arguments):
        code = main(["plan", *HD, *map(str, arguments)])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def rows(stdout):
    return {row["layout"]: row for row in json.loads(stdout.splitlines()[-1])["simulated"]}


def test_each_size_of_gang_is_simulated_with_the_plans_own_seconds(plan):
    code, stdout, _ = plan("--num-clips", 16, "--simulate", "--json")
    assert code == 0
    content = json.loads(stdout.splitlines()[-1])
    assert len(content["simulated"]) == 4
    for row in content["simulated"]:
        forecast = next(
            r for r in content["layouts"] if r["gangs"] == row["assumed"]["num_gangs"] and r["decode"] == row["decode"]
        )
        assert row["simulated"]["clips"]["done"] == 16
        # what is beside the steps is done beside them, but for the last clip's
        assert row["simulated"]["makespan_s"] == pytest.approx(forecast["makespan_s"], rel=0.06)
    head = next(line for line in stdout.splitlines() if "simulated, not measured" in line.lower())
    assert head.startswith("Simulated, not measured")
    assert "clips, simulated" in stdout


def test_what_befalls_a_batch_and_what_larger_gangs_save_is_in_it(plan):
    _, stdout, _ = plan("--num-clips", 10, "--simulate", "--start-up-s", 60, "--json")
    _, grown, _ = plan("--num-clips", 10, "--simulate", "--start-up-s", 60, "--elastic-tail", "--json")
    losses = ("--spot-loss-per-gpu-hour", 2, "--replace-s", 60)
    _, lossy, _ = plan("--num-clips", 40, "--simulate", "--layout", "gangs8", *losses, "--json")
    assert rows(grown)["gangs8"]["simulated"]["makespan_s"] < 0.7 * rows(stdout)["gangs8"]["simulated"]["makespan_s"]
    assert rows(grown)["gangs8"]["assumed"]["larger"]
    (row,) = rows(lossy).values()
    assert row["simulated"]["nodes_lost"] > 0
    assert row["simulated"]["clips"]["done"] == 40


def test_a_manifests_clips_have_seconds_of_their_own(plan, tmp_path):
    manifest = tmp_path / "m.jsonl"
    lines = [{"prompt": "short", "steps": 10}] * 3 + [{"prompt": "long", "steps": 100}]
    manifest.write_text("".join(json.dumps(line) + "\n" for line in lines))
    _, stdout, _ = plan("--manifest", manifest, "--simulate", "--layout", "gangs8", "--json")
    (row,) = rows(stdout).values()
    assert row["simulated"]["clips"]["done"] == 4
    assert row["simulated"]["makespan_s"] == pytest.approx(2 * 1838, rel=0.02)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--simulate",), "--simulate needs a batch with an end; give --manifest or --num-clips"),
        (("--num-clips", 3, "--start-up-s", 5), "give --simulate, too"),
        (("--num-clips", 3, "--elastic-tail"), "give --simulate, too"),
        (("--num-clips", 3, "--simulate", "--replace-s", -1), "--replace-s"),
    ],
)
def test_what_makes_no_sense_is_refused_in_a_line(plan, arguments, said):
    code, _, stderr = plan(*arguments)
    (line,) = stderr.splitlines()
    assert code == 2
    assert said in line
