"""`--layout auto`: what is chosen for which clips on which machines, in which order, and what it says."""

import json
from collections import Counter
from dataclasses import replace
from itertools import pairwise

import pytest

from cineray.distributed.layout import Layout, parse_layout
from cineray.jobs.cli import settle as settling
from cineray.jobs.cli.main import main
from cineray.jobs.cli.settle import settle
from cineray.jobs.manifest.order import MAX_PASSES, longest_first
from cineray.jobs.planning.anchors import published
from cineray.jobs.planning.choice import StudySeconds, all_layouts, choose, larger_gangs
from cineray.jobs.planning.evidence import ClipKind, Evidence
from cineray.jobs.planning.exchange import Shape, WorkOf
from cineray.jobs.planning.gpus import find_gpu
from cineray.jobs.planning.machines import Machines
from cineray.jobs.planning.study_file import read_study
from cineray.jobs.run import RunPlan
from cineray.jobs.run_options import RunOptions
from cineray.pipeline.footprint.forecast import forecast
from cineray.pipeline.footprint.published import published_checkpoint
from cineray.pipeline.loading.options import LoadOptions
from cineray.pipeline.request import InputError

WAN = "wan2.1-t2v-14b"
HD = ClipKind(shape=Shape(WAN, 1280, 720, 81), steps=50, num_branches=2)
EIGHT = Machines(device="cuda", card="NVIDIA H100 80GB HBM3", places=(8,))
SMALL = ["--width", "32", "--height", "32", "--frames", "5", "--steps", "1", "--fps", "8"]


@pytest.fixture(scope="module")
def h100():
    return Evidence(find_gpu("h100"), WorkOf(forecast), published().tables)


def chosen(machines, kinds, seconds):
    layouts = all_layouts(machines, num_heads=40, num_branches=2, num_tokens=10**5)
    return choose(machines, kinds, layouts, seconds)


@pytest.mark.parametrize(
    ("num_clips", "gangs", "ranks", "seconds"),
    [(10, 2, 4, 2485), (20, 4, 2, 4726), (160, 8, 1, 36_500), (1, 1, 8, 288)],
)
def test_the_best_layout_depends_on_how_many_clips_there_are(h100, num_clips, gangs, ranks, seconds):
    """The published seconds of Wan 14B at 720p."""
    choice = chosen(EIGHT, {HD: num_clips}, h100)
    assert (choice.layout.gangs, choice.layout.ranks_per_gang) == (gangs, ranks)
    assert choice.makespan_s == pytest.approx(seconds, rel=0.02)
    assert "Wan2.1 T2V-14B 720p" in choice.text


def test_no_more_gangs_stand_up_than_there_are_clips_and_none_over_two_nodes(h100):
    assert chosen(EIGHT, {HD: 3}, h100).layout.gangs <= 3
    two = chosen(replace(EIGHT, places=(8, 4)), {HD: 1000}, h100)
    assert two.layout == Layout(gangs=12)
    assert replace(EIGHT, places=(8, 4)).gangs_of(8) == 1


def test_the_speed_up_of_larger_gangs_is_that_of_steps_and_grows(h100):
    larger = larger_gangs(Layout(), EIGHT, {HD: 10}, all_layouts(EIGHT, 40, 2, 10**5), h100)
    assert [gang.num_gangs for gang in larger] == [2, 4, 8]
    assert [gang.layout.ranks_per_gang for gang in larger] == [2, 4, 8]
    assert 1.8 < larger[0].speedup < 2.05
    assert larger[0].speedup < larger[1].speedup < larger[2].speedup <= 8
    of_two = larger_gangs(Layout(ulysses=2), EIGHT, {HD: 10}, all_layouts(EIGHT, 40, 2, 10**5), h100)
    assert [gang.num_gangs for gang in of_two] == [2, 4]


def study_file(path, rows, model="tiny-wan", gpu="cpu"):
    fit = {"model": model, "width": 32, "height": 32, "frames": 5, "steps": 10, "guided": True, "device": "a CPU"}
    fit |= {"gpu": gpu, "fixed_s": 1.0, "work_s": 9.0, "rows": [r | {"clip_s": r["denoise_s"] + 1.0} for r in rows]}
    path.write_text(json.dumps({"version": 1, "made": "2026-11-26", "fits": [fit]}))
    return path


ROWS = [{"denoise_s": 9.0}, {"cfg": 2, "denoise_s": 5.0}, {"ulysses": 2, "denoise_s": 20.0}]


def test_a_study_alone_is_enough_for_a_model_or_machine_that_nobody_has_published(tmp_path):
    study = read_study(study_file(tmp_path / "s.json", ROWS), "tiny-wan")
    seconds, kind = StudySeconds([study], "cpu"), ClipKind(Shape("tiny-wan", 32, 32, 5), steps=20, num_branches=2)
    here = Machines(device="cpu", card="", places=(2,))
    assert seconds.estimate(kind, Layout(), "finisher").clip_s == pytest.approx(19.0)  # twice the steps of the study
    one = choose(here, {kind: 1}, seconds.layouts([kind]), seconds)
    assert (one.layout, one.makespan_s) == (Layout(cfg=2), pytest.approx(11.0))
    assert choose(here, {kind: 8}, seconds.layouts([kind]), seconds).layout == Layout(gangs=2)
    (larger,) = larger_gangs(Layout(), here, {kind: 1}, seconds.layouts([kind]), seconds)
    assert (larger.num_gangs, larger.layout, larger.speedup) == (2, Layout(cfg=2), pytest.approx(1.8))
    with pytest.raises(InputError, match="no source says how long clips of tiny-wan 64x32x5"):
        seconds.estimate(replace(kind, shape=Shape("tiny-wan", 64, 32, 5)), Layout(), "finisher")
    with pytest.raises(InputError, match="no study has timed layout ring2"):
        seconds.estimate(kind, Layout(ring=2), "finisher")


# ---- order


def test_clips_go_longest_first_and_equal_ones_as_they_came(new_request):
    steps = [3, 9, 3, 50, 9, 3]
    clips = [new_request(id=str(i), num_inference_steps=n) for i, n in enumerate(steps)]
    ordered = longest_first(clips, lambda clip: clip.num_inference_steps, steps)
    assert [clip.id for clip in ordered] == ["3", "1", "4", "0", "2", "5"]


def test_many_lengths_take_few_passes_and_lose_no_clip(new_request):
    num_passes = 0

    class Clips(list):
        def __iter__(self):
            nonlocal num_passes
            num_passes += 1
            return super().__iter__()

    clips = Clips([new_request(id=str(i), num_inference_steps=1 + i * 37 % 100) for i in range(100)])
    lengths = [1 + i for i in range(100)]
    ordered = list(longest_first(clips, lambda clip: clip.num_inference_steps, lengths))
    assert num_passes <= MAX_PASSES
    assert Counter(clip.id for clip in ordered) == Counter(str(i) for i in range(100))
    found = [clip.num_inference_steps for clip in ordered]
    assert all(later <= earlier + 100 / MAX_PASSES + 1 for earlier, later in pairwise(found))


# ---- a run


@pytest.fixture
def eight_h100s(monkeypatch):
    monkeypatch.setattr("cineray.jobs.planning.machines.cuda_devices", lambda: [EIGHT.card] * 8)


def run_of(tmp_path, **options):
    return RunPlan(
        checkpoint=published_checkpoint(WAN),
        load_options=LoadOptions(device="cuda"),
        options=RunOptions(**options),
        out=tmp_path / "out",
        lossless=False,
    )


def hd_clips(new_request, number, **changes):
    hd = {"width": 1280, "height": 720, "num_frames": 81, "num_inference_steps": 50, "cache": "none"} | changes
    return [new_request(id=str(i), **hd) for i in range(number)]


@pytest.mark.usefixtures("eight_h100s")
def test_a_run_takes_the_layout_of_the_plan_says_so_in_a_line_and_writes_it_down(new_request, tmp_path, capsys):
    clips = hd_clips(new_request, 10)
    found = settle(run_of(tmp_path, layout_name="auto"), clips, ())
    assert found.options.num_gangs == 2
    assert found.options.layout == parse_layout("cfg2xulysses2")
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("--layout auto: 10 clips on 8 x NVIDIA H100 80GB HBM3 on 1 node: 2 x cfg2xulysses2: 2,448 s")
    assert "8 x 1 rank 3,6" in line
    assert found.about["layout_chosen"]["layout"] == "gangs2xcfg2xulysses2"
    assert list(found.requests) == clips
    assert found.larger == ()


@pytest.mark.usefixtures("eight_h100s")
def test_unequal_clips_go_longest_first(new_request, tmp_path):
    clips = [
        *hd_clips(new_request, 9),
        *(replace(c, id="long") for c in hd_clips(new_request, 1, num_inference_steps=99)),
    ]
    found = settle(run_of(tmp_path, layout_name="auto"), clips, ())
    assert next(iter(found.requests)).id == "long"


@pytest.mark.usefixtures("eight_h100s")
def test_an_elastic_tail_knows_how_much_faster_larger_gangs_are(new_request, tmp_path, capsys):
    found = settle(run_of(tmp_path, num_gangs=8, elastic_tail=True), hd_clips(new_request, 10), ())
    assert [gang.num_gangs for gang in found.larger] == [2, 4, 8]
    assert "--elastic-tail: gangs may grow at the end, by the plan: cfg2 1.9" in capsys.readouterr().err
    of_three = settle(run_of(tmp_path, num_gangs=3, elastic_tail=True), hd_clips(new_request, 10), ())
    assert [gang.num_gangs for gang in of_three.larger] == [2]
    assert settle(run_of(tmp_path, elastic_tail=True), hd_clips(new_request, 10), ()).larger == ()
    assert "there is one gang, which has nobody's room to take" in capsys.readouterr().err


@pytest.mark.usefixtures("eight_h100s")
def test_without_numbers_it_falls_back_and_says_why(new_request, tmp_path, capsys):
    plan = run_of(tmp_path, layout_name="auto", elastic_tail=True)
    unknown = replace(plan, checkpoint=replace(plan.checkpoint, name="/models/mine"))
    found = settle(unknown, hd_clips(new_request, 3), ())
    assert (found.options.num_gangs, found.options.layout, found.larger) == (3, Layout(), ())
    first, second = capsys.readouterr().err.splitlines()
    assert "3 x 1 rank, as the plan has no numbers: no source says how long clips of /models/mine" in first
    assert second.startswith("--elastic-tail: gangs stay as they are: no source says")


@pytest.mark.usefixtures("eight_h100s")
def test_what_does_not_fit_is_refused_before_anything_loads(new_request, tmp_path, monkeypatch):
    monkeypatch.setattr("cineray.jobs.planning.machines.cuda_devices", lambda: ["NVIDIA GeForce RTX 4090"] * 2)
    with pytest.raises(InputError, match="--layout auto: no layout fits by the forecast: the smallest needs"):
        settle(run_of(tmp_path, layout_name="auto"), hd_clips(new_request, 3), ())


def test_gangs_are_not_to_be_given_with_it():
    with pytest.raises(InputError, match="--layout auto chooses the number of gangs, too; leave --gangs out"):
        RunOptions(layout_name="auto", num_gangs=2)


@pytest.mark.process
def test_on_a_cpu_without_a_study_it_renders_as_ever_and_says_so(checkpoint_folder, tmp_path, capsys):
    out, model = tmp_path / "out", str(checkpoint_folder("wan"))
    assert (
        main(["render", "a", "--model", model, *SMALL, "--layout", "auto", "--device", "cpu", "--out", str(out)]) == 0
    )
    assert "1 x 1 rank, as the plan has no numbers" in capsys.readouterr().err
    assert json.loads((out / "run.json").read_text())["layout_chosen"]["layout"] == "1"
    assert (
        main(["render", "a", "--model", model, *SMALL, "--layout", "auto", "--device", "cpu", "--out", str(out)]) == 0
    )
    assert "--layout auto" not in capsys.readouterr().err  # nothing is left to render


@pytest.mark.process
def test_a_dry_run_forecasts_by_the_plan(checkpoint_folder, tmp_path, capsys, monkeypatch):
    model = str(checkpoint_folder("wan"))
    study = study_file(tmp_path / "s.json", ROWS, model)
    here = Machines(device="cpu", card="", places=(2,))
    monkeypatch.setattr(settling, "_machines", lambda *_: here)
    command = ["render", "a", "--model", model, *SMALL, "--layout", "auto", "--device", "cpu", "--study", str(study)]
    assert main([*command, "--out", str(tmp_path / "out"), "--dry-run", "--json"]) == 0
    content = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert content["forecast"]["wall_s"] == pytest.approx(1.5)  # one step on cfg2, and 1 s beside it
    assert "forecast by the plan for cfg2; measured on a CPU (study)" in content["forecast"]["source"]


def test_a_study_of_another_model_is_refused(new_request, tmp_path):
    study = study_file(tmp_path / "s.json", ROWS)
    with pytest.raises(InputError, match="is of tiny-wan, not of wan2"):
        settle(run_of(tmp_path, layout_name="auto"), hd_clips(new_request, 1), (study,))
