"""`cineray plan`: what it answers, in the forms that people and scripts read, and what it refuses."""

import csv
import io
import json
import shlex
import subprocess
import sys

import click
import pytest

from cineray.jobs.cli.main import cineray, main
from cineray.jobs.planning.cache_share import computed_share_of
from cineray.jobs.planning.sidecars import read_sidecars
from cineray.pipeline.request import InputError

WAN = ["--model", "wan2.1-t2v-14b", "--gpu", "h100"]
HD = [*WAN, "--width", "1280", "--height", "720", "--frames", "81", "--steps", "50"]
EIGHT = [*HD, "--num-gpus", "8"]


@pytest.fixture
def plan(capsys):
    """Runs `cineray plan`: (exit code, stdout, stderr)."""

    def run(*arguments):
        code = main(["plan", *map(str, arguments)])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def said(stdout):
    return json.loads(stdout.splitlines()[-1])


def test_json_is_as_agreed_best_first(plan):
    code, stdout, _ = plan(*EIGHT, "--json")
    assert code == 0
    content = said(stdout)
    rows = content["layouts"]
    agreed = {"gangs", "cfg", "ring", "ulysses", "fits", "memory_bytes", "step_s", "clip_s", "clips_per_hour"}
    for row in rows:
        assert agreed <= set(row)
        assert {"weights", "activations", "cache", "vae", "total"} <= set(row["memory_bytes"])
        assert row["gangs"] * row["cfg"] * row["ring"] * row["ulysses"] == 8
        assert row["sources"]
    fitting = [row["clips_per_hour"] for row in rows if row["fits"]]
    assert fitting == sorted(fitting, reverse=True)
    assert content["forecast"] is True
    best = content["recommended"]
    assert best["runnable"]
    assert best["clips_per_hour"] == max(r["clips_per_hour"] for r in rows if r["runnable"] and r["fits"])


def test_a_batch_is_planned_to_be_done_soonest_within_a_price_and_a_deadline(plan):
    _, stdout, _ = plan(*EIGHT, "--num-clips", 20, "--price", "2.5", "--deadline", "2h", "--json")
    content = said(stdout)
    best, on_time = content["recommended"], content["best"]["deadline"]
    assert best["makespan_s"] == min(r["makespan_s"] for r in content["layouts"] if r["fits"] and r["runnable"])
    assert best["cost_usd"] == pytest.approx(best["gpu_hours"] * 2.5, abs=0.01)
    assert on_time["makespan_s"] <= 7200
    assert on_time["gpu_hours"] <= best["gpu_hours"]


def test_people_get_a_table_of_a_hundred_columns_with_the_source_of_each_number(plan):
    _, stdout, _ = plan(*EIGHT, "--num-clips", 10, "--price", "2.5", "--deadline", "1h")
    *lines, last = stdout.splitlines()
    assert max(len(line) for line in lines) <= 100
    assert lines[0].startswith("Forecast, not measured")
    assert any(line.lstrip("* ").startswith("2 x ulysses4") and line.rstrip().endswith(" b") for line in lines)
    assert "b   published: Wan2.1 T2V-14B 720p, H800/H100, 2025-02" in lines
    assert any(line.startswith("* ") for line in lines)
    assert last.startswith("cineray render ")


def test_a_sound_is_planned_without_pixels(plan):
    code, stdout, _ = plan("--model", "stable-audio-open-1.0", "--gpu", "h100", "--num-clips", 10)
    assert code == 0
    assert stdout.splitlines()[1].split() == ["10:", "stable-audio-open-1.0,", "100", "steps"]


@pytest.mark.parametrize(
    ("model", "decodes"),
    [
        ("flux.1-dev", {"finisher", "tiled"}),
        ("stable-audio-open-1.0", {"finisher"}),
        ("dit-xl-2-256", {"finisher", "tiled"}),
        ("open-sora-1.2", {"finisher", "tiled"}),
        ("wan2.1-t2v-1.3b", {"finisher", "tiled", "gang"}),
    ],
)
def test_every_layout_is_timed_with_the_ways_to_decode_that_render_takes(plan, model, decodes):
    code, stdout, _ = plan("--model", model, "--gpu", "h100", "--num-gpus", 4, "--json")
    assert code == 0
    rows = said(stdout)["layouts"]
    assert not any("unknown" in row for row in rows)
    shared = [row for row in rows if row["ring"] * row["ulysses"] == 4]
    assert {(row["ring"], row["ulysses"]) for row in shared} == {(1, 4), (4, 1), (2, 2)}
    assert {row["decode"] for row in shared} == decodes


def test_what_has_no_name_for_render_is_a_folder_there(plan):
    code, stdout, _ = plan("--model", "open-sora-1.2", "--gpu", "h100")
    assert code == 0
    assert "open-sora-1.2 renders from a folder in diffusers' layout, not by this name" in stdout
    assert " --model FOLDER " in stdout.splitlines()[-1]


@pytest.mark.parametrize("more", [[], ["--num-gpus", "8", "--num-clips", "10"], ["--num-gpus", "16"]])
def test_the_last_line_is_a_command_that_the_command_line_takes(plan, more):
    _, stdout, _ = plan(*HD, *more, "--cache", "dicache(threshold=0.1)")
    name, command, *arguments = shlex.split(stdout.splitlines()[-1])
    assert (name, command) == ("cineray", "submit" if "16" in more else "render")
    render = cineray.commands["render"]
    typed = render.make_context("render", arguments, parent=click.Context(cineray)).params
    assert typed["model"] == "wan2.1-t2v-14b"
    assert typed["num_frames"] == 81
    assert typed["cache"] == "dicache(threshold=0.1)"


def test_a_manifest_is_planned_by_the_kinds_of_its_clips(plan, tmp_path):
    manifest = tmp_path / "m.jsonl"
    rows = [{"prompt": f"clip {i}"} for i in range(30)] + [{"prompt": "long", "steps": 100, "guidance": 1}]
    manifest.write_text("\n".join(map(json.dumps, rows)))
    code, stdout, _ = plan(*EIGHT, "--manifest", manifest)
    assert code == 0
    assert "  30: wan2.1-t2v-14b 1280x720x81, 50 steps" in stdout
    assert "  1: wan2.1-t2v-14b 1280x720x81, 100 steps" in stdout
    assert " cfg2" not in stdout  # one of the clips has one branch
    assert f"--manifest {manifest}" in stdout.splitlines()[-1]


def test_csv_has_every_row(plan):
    _, as_json, _ = plan(*EIGHT, "--json")
    code, stdout, _ = plan(*EIGHT, "--csv")
    rows = list(csv.DictReader(io.StringIO(stdout)))
    assert code == 0
    assert [float(r["clip_s"]) for r in rows] == [r["clip_s"] for r in said(as_json)["layouts"]]
    assert int(rows[0]["memory_bytes.total"]) > 28e9


def test_only_what_fits_is_recommended_and_nothing_where_nothing_fits(plan):
    code, stdout, stderr = plan("--model", "wan2.1-t2v-14b", "--gpu", "rtx4090", "--num-gpus", 4, "--json")
    assert code == 2
    assert said(stdout)["recommended"] is None
    assert not any(row["fits"] for row in said(stdout)["layouts"])
    assert "no layout fits" in stderr


STUDY = {
    "version": 1, "made": "2026-11-26",
    "fits": [{"model": "hunyuan-video", "width": 1280, "height": 720, "frames": 129, "steps": 50, "device": "H100",
              "gpu": "h100", "fixed_s": 1, "work_s": 1}],
}  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ([*WAN[:3], "h999"], "--gpu must be one of h100, h200, a100"),
        ([*WAN, "--num-gpus", "0"], "--num-gpus must be 1 to 10000, got 0"),
        ([*WAN, "--num-gpus", "9", "--nodes", "2"], "--nodes must divide"),
        ([*WAN, "--width", "833"], "width must be a multiple of 16, got 833"),
        ([*WAN, "--frames", "80"], "frames must be 4k+1"),
        ([*WAN, "--num-clips", "0"], "--num-clips must be 1"),
        ([*WAN, "--price", "-1"], "--price must be 0 or more"),
        ([*WAN, "--deadline", "soon"], "such as 8h"),
        ([*WAN, "--json", "--csv"], "not both"),
        ([*WAN, "--cache", "teacache(threshold=0.1)"], "give --computed-share"),
        ([*WAN, "--cache", "dicache", "--computed-share", "2"], "--computed-share must be"),
        ([*WAN, "--cache", "foo"], "unknown policy 'foo'"),
        ([*WAN, "--layout", "ulysses3", "--num-gpus", "3"], "40 attention heads"),
        ([*WAN, "--layout", "ulysses4", "--num-gpus", "2"], "takes 1 x 4 GPUs"),
        ([*WAN[:3], "rtx4090", "--layout", "1"], "--layout 1 does not fit: it needs"),
        (["--model", "tiny-wan", "--gpu", "h100"], "has no forecast here; these have: wan2.1-t2v-1.3b"),
        ([*WAN, "--study", "study.json"], "is of hunyuan-video, not of wan2.1-t2v-14b"),
        ([*WAN, "--study", "no.json"], "--study no.json: No such file"),
        ([*WAN, "--study", "broken.json"], "is not a study file"),
        ([*WAN, "--out", "empty"], "--out empty has no clip whose time"),
        ([*WAN, "--out", "no"], "--out no is no folder"),
        ([*WAN, "--manifest", "no.jsonl"], "cannot be read"),
    ],
)
def test_bad_input_is_one_line_and_nothing_else(plan, tmp_path, monkeypatch, arguments, reason):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "study.json").write_text(json.dumps(STUDY))
    (tmp_path / "broken.json").write_text('{"version": 1, "made": "", "fits": []}')
    code, stdout, stderr = plan(*arguments)
    assert (code, stdout) == (2, "")
    assert len(stderr.splitlines()) == 1
    assert reason in stderr


# -- what earlier runs left


def sidecar(folder, clip_id, **changes):
    mark = "0" * 12
    trace = {"policy": "none", "steps": 50, "computed_steps": 50, "skipped_steps": 0, "cost": 1.0}
    record = {
        "version": 1, "id": clip_id, "fingerprint": mark, "width": 1280, "height": 720, "frames": 81, "steps": 50,
        "guidance": 5.0, "model": {"name": "wan2.1-t2v-14b"}, "cache": "none", "trace": trace,
        "layout": {"gangs": 1, "cfg": 1, "ring": 1, "ulysses": 4}, "device": "cuda",
        "timings": {"encode_s": 1.0, "denoise_s": 400.0, "decode_s": 9.0, "write_s": 2.0},
    }  # fmt: skip
    (folder / f"{clip_id}.{mark}.json").write_text(json.dumps(record | changes))


def test_the_sidecars_of_an_earlier_run_count_before_what_was_published(plan, tmp_path):
    for clip_id in "abc":
        sidecar(tmp_path, clip_id)
    (tmp_path / "run.json").write_text("{}")
    (tmp_path / "junk.json").write_text("[")
    code, stdout, _ = plan(*EIGHT, "--out", tmp_path, "--json")
    rows = said(stdout)["layouts"]
    known = next(r for r in rows if (r["ulysses"], r["ring"], r["cfg"], r["decode"]) == (4, 1, 1, "finisher"))
    assert code == 0
    assert (known["clip_s"], known["step_s"]) == (412.0, 8.0)
    assert known["sources"] == ["3 earlier clips (sidecars), taken to be of this card"]
    other = next(r for r in rows if r["ulysses"] == 8)
    assert "law of 3 earlier clips" in other["sources"][0]


def test_clips_of_a_cpu_and_resumed_ones_say_nothing_of_a_gpu(tmp_path):
    sidecar(tmp_path, "cpu", device="cpu")
    sidecar(tmp_path, "resumed", resumed_at=[20])
    with pytest.raises(InputError, match=r"2 others were rendered on a CPU, or resumed"):
        read_sidecars(tmp_path, 2)
    sidecar(tmp_path, "one", guidance=1.0)
    (found,) = read_sidecars(tmp_path, 2)
    assert (found.num_clips, found.kind.num_branches, found.fixed_s) == (1, 1, 12.0)


def test_a_cache_computes_what_it_computed_before(plan, tmp_path):
    trace = {"policy": "x", "steps": 50, "computed_steps": 15, "skipped_steps": 35, "cost": 0.3}
    policy = "fbcache(threshold=0.1)"
    sidecar(tmp_path, "a", trace=trace, cache=_full(policy), width=832, height=480)
    _, stdout, _ = plan(*EIGHT, "--out", tmp_path, "--cache", policy, "--json")
    assert said(stdout)["assumptions"] == ["fbcache computes 30% of the steps, as it did in the clips of --out"]


@pytest.mark.parametrize(
    ("cache", "said_of_it"),
    [
        ("fitted(speedup=4)", (0.25, "fitted computes one step in 4, as it says")),
        ("fitted", (0.4, "fitted computes one step in 2.5, as it says")),
        ("auto(speedup=2)", (0.5, "auto computes one step in 2, as it says")),
        ("auto(psnr>=30)", (None, "")),
        ("fitted(speedup=0)", (None, "")),
    ],
)
def test_a_speed_that_is_asked_for_is_planned_with(cache, said_of_it):
    assert computed_share_of(cache, "wan2.1-t2v-14b", (), None) == said_of_it


def _full(policy):
    from cineray.pipeline.footprint.published import published_checkpoint

    return published_checkpoint("wan2.1-t2v-14b").plan_cache(policy).text


@pytest.mark.process
def test_a_plan_needs_no_torch():
    script = (
        "import sys; from cineray.jobs.cli.main import main; "
        f"assert main({['plan', *EIGHT]!r}) == 0; "
        "print(*(n for n in ('torch', 'diffusers', 'transformers', 'ray') if n in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == ""
