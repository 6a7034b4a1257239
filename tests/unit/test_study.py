"""A throughput study's rows, laws, tables and files, without any process."""

import csv
import io
import json
from dataclasses import asdict, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cineray.distributed.layout import Layout, parse_layout
from cineray.jobs.cli.main import main
from cineray.jobs.measure.study import Sample, StudyPlan, cache_of, visits, wanted_places
from cineray.jobs.measure.study_law import StudiedClips, fit_law, heldout_errors, study_of
from cineray.jobs.measure.study_log import append_line, append_row, begin_log, read_rows
from cineray.jobs.measure.study_plots import draw_all
from cineray.jobs.measure.study_rows import (
    STAGES,
    TimedClip,
    cache_gain,
    cells_of,
    csv_text,
    efficiency,
    full_cells,
    step_times,
    weak_scaling,
)
from cineray.jobs.measure.study_tables import Measured, markdown
from cineray.jobs.planning.anchors import published
from cineray.jobs.planning.evidence import ClipKind, Evidence
from cineray.jobs.planning.exchange import Shape, WorkOf
from cineray.jobs.planning.gpus import find_gpu, gpu_name
from cineray.jobs.planning.study_file import read_study
from cineray.pipeline.footprint.forecast import forecast
from cineray.pipeline.loading.checkpoint import open_checkpoint
from cineray.pipeline.loading.options import LoadOptions
from cineray.pipeline.request import ClipRequest, InputError

pytestmark = pytest.mark.slow

WAN = "wan2.1-t2v-14b"
FIXED_S, WORK_S, EXCHANGE_S = 40.0, 1600.0, 3.0
CLIPS = StudiedClips(
    model=WAN, width=1280, height=720, frames=81, steps=50, guided=True, device="NVIDIA H100", gpu="h100", num_units=8
)


def row(layout="1", cache="none", repeat=0, steps=50, factor=1.0, gang=0, **changes):
    """A clip that keeps the law to the letter."""
    ranks = parse_layout(layout).ranks_per_gang
    denoise_s = factor * (steps / 50 * WORK_S / ranks + (EXCHANGE_S if ranks > 1 else 0))
    text_s, decode_s, write_s = FIXED_S / 4, FIXED_S / 2, FIXED_S / 4
    made = TimedClip(
        model=WAN, cache=cache, layout=layout, steps=steps, clip="a", repeat=repeat, gang=gang,
        clip_s=FIXED_S + denoise_s, text_s=text_s, denoise_s=denoise_s, exchange_s=EXCHANGE_S if ranks > 1 else 0.0,
        decode_s=decode_s, write_s=write_s, idle_s=FIXED_S * (1 - 1 / ranks), computed_share=factor,
    )  # fmt: skip
    return replace(made, **changes)


def rows_of(*layouts, **changes):
    return [row(parse_layout(layout).text, **changes) for layout in layouts]


# -- the law


def test_the_law_comes_back_from_clips_that_keep_it():
    law = fit_law(cells_of(rows_of("1", "2", "4", "8")), num_units=8)
    assert (law.fixed_s, law.work_s, law.exchange_s) == pytest.approx((FIXED_S, WORK_S, EXCHANGE_S))
    assert set(heldout_errors(cells_of(rows_of("1", "2", "4", "8")), 8)) == {"1", "ulysses2", "ulysses4", "ulysses8"}


def test_a_layout_that_was_left_out_is_told_and_by_how_much_the_law_misses_it():
    exact = heldout_errors(cells_of(rows_of("1", "2", "4")), 8)
    assert exact == pytest.approx({"1": 0, "ulysses2": 0, "ulysses4": 0}, abs=1e-9)
    slow = [*rows_of("1", "2"), *rows_of("4", factor=2.0)]
    true_s = slow[-1].clip_s
    assert heldout_errors(cells_of(slow), 8)["ulysses4"] == pytest.approx(row("ulysses4").clip_s / true_s - 1)


def test_two_layouts_are_a_law_without_a_proof():
    assert heldout_errors(cells_of(rows_of("1", "2")), 8) == {}
    fit = study_of(cells_of(rows_of("1", "2")), {WAN: CLIPS}, "now").fits[0]
    assert fit.heldout_error is None


def test_ranks_beyond_the_cores_do_not_share_the_work_further():
    two_cores = [row("1"), row("ulysses2"), row("ulysses4", clip_s=843.0, denoise_s=803.0)]
    law = fit_law(cells_of(two_cores), num_units=2)
    assert law.clip_s(4) == pytest.approx(law.clip_s(2)) == pytest.approx(843)
    assert set(heldout_errors(cells_of(two_cores), 2)) == {"ulysses2", "ulysses4"}  # 2 and 4 alone tell no law
    with pytest.raises(ValueError, match="two different numbers"):
        fit_law(cells_of(two_cores[1:]), num_units=2)


def test_ranks_that_only_slow_it_down_leave_the_work_above_zero():
    slower = cells_of([row("ulysses2"), row("ulysses4", factor=4.0)])
    law = fit_law(slower, num_units=8)
    assert law.work_s == pytest.approx(2 * slower[0].denoise_s)
    assert law.exchange_s == 0


@given(st.lists(st.floats(0.1, 10), min_size=3, max_size=3))
def test_neither_work_nor_exchange_is_ever_below_zero(factors):
    cells = cells_of([row(layout, factor=f) for layout, f in zip(("1", "ulysses2", "ulysses4"), factors, strict=True)])
    law = fit_law(cells, 8)
    assert law.work_s > 0
    assert law.exchange_s >= 0
    fit = study_of(cells, {WAN: CLIPS}, "now").fits[0]
    assert all(exchange.exchange_s >= 0 for exchange in fit.exchanges)


@pytest.mark.parametrize(
    ("device", "name"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA GeForce RTX 4090", "rtx4090"),
        ("NVIDIA L40S", "l40s"),
        ("X", "other"),
    ],
)
def test_a_card_is_known_by_its_makers_name(device, name):
    assert gpu_name(device) == name


def test_a_plan_takes_the_seconds_of_a_study(tmp_path):
    cells = cells_of([*rows_of("1", "8"), *rows_of("1", "8", cache="dicache", factor=0.5)])
    written = study_of(cells, {WAN: CLIPS}, "2026-11-26T12:00:00Z")
    (tmp_path / "study.json").write_text(written.model_dump_json())
    study = read_study(tmp_path / "study.json", WAN)
    assert study == written
    evidence = Evidence(find_gpu("h100"), WorkOf(forecast), published().tables, [study])
    for cache, factor in (("none", 1.0), ("dicache", 0.5)):
        kind = ClipKind(Shape(WAN, 1280, 720, 81), steps=50, num_branches=2, cache=cache, policy=cache)
        timed = evidence.estimate(kind, Layout(ulysses=8), "finisher")
        assert timed.clip_s == pytest.approx(FIXED_S + factor * (WORK_S / 8 + EXCHANGE_S))
        assert timed.source == "measured on NVIDIA H100"
        half = evidence.estimate(replace(kind, steps=25), Layout(ulysses=8), "finisher")
        assert half.clip_s == pytest.approx(FIXED_S + factor * (WORK_S / 8 + EXCHANGE_S) / 2)
        assert half.source.startswith("fitted to measured clips on NVIDIA H100")


# -- cells and tables


def test_a_cell_is_the_median_of_its_rows_and_its_stages_add_up():
    rows = [row("ulysses2", repeat=r, clip_s=s) for r, s in enumerate((900.0, 800.0, 830.0))]
    (cell,) = cells_of(rows)
    assert (cell.clip_s, cell.num_rows, cell.ranks) == (830, 3, 2)
    assert cell.spread == pytest.approx(100 / 830)
    assert set(cell.stages) == set(STAGES)
    assert sum(cell.stages.values()) == pytest.approx(830)
    (unseen,) = cells_of([replace(r, exchange_s=None) for r in rows])
    assert (unseen.has_exchange, unseen.stages["exchange"]) == (False, 0)
    assert unseen.stages["denoise"] > cell.stages["denoise"]


def test_efficiency_gain_and_cost_are_those_of_the_seconds():
    cells = cells_of([*rows_of("1", "2"), *rows_of("1", "2", cache="dicache", factor=0.5)])
    two, cached = cells[1], cells[3]
    assert efficiency(two, cells) == pytest.approx(1640 / (2 * 843))
    assert cache_gain(cached, cells) == pytest.approx(843 / (40 + 401.5))
    assert cache_gain(two, cells) is None
    assert two.cost(3600.0) == pytest.approx(2 * 843)
    assert efficiency(two, [two]) is None


def test_a_steps_time_is_the_slope_over_two_numbers_of_steps():
    cells = cells_of([row(), row(steps=25), row(cache="dicache"), row(cache="dicache", steps=25)])
    (found,) = step_times(cells)
    assert (found.step_s, found.fixed_s) == pytest.approx((WORK_S / 50, FIXED_S))
    assert [cell.steps for cell in full_cells(cells)] == [50, 50]


def test_gangs_side_by_side_are_measured_or_else_reckoned_up_to_the_cores():
    (reckoned,) = weak_scaling(cells_of(rows_of("1", "4")), num_units=2)
    assert not reckoned.is_measured
    assert reckoned.apart == pytest.approx(2 * 3600 / 1640)
    gangs = [row("gangs4", gang=g, clip_s=2000.0) for g in range(4)]
    (measured,) = weak_scaling(cells_of([*rows_of("1", "4"), *gangs]), num_units=2)
    assert measured.is_measured
    assert measured.apart == pytest.approx(4 * 3600 / 2000)


def test_the_csv_has_a_line_per_measurement():
    rows = [row(), row("cfg2", exchange_s=None)]
    lines = list(csv.DictReader(io.StringIO(csv_text(rows))))
    assert [line["layout"] for line in lines] == ["1", "cfg2"]
    assert lines[1]["exchange_s"] == ""
    assert float(lines[0]["clip_s"]) == 1640


@pytest.fixture
def measured():
    cells = cells_of(
        [*rows_of("1", "2", "4"), *rows_of("1", "2", "4", cache="dicache", factor=0.5), *rows_of("1", "2", steps=25)]
    )
    study = study_of(full_cells(cells), {WAN: CLIPS}, "now")
    return Measured(cells=cells, where="8 x NVIDIA H100", num_units=8, sizes={WAN: "720p"}, study=study, price=2.5)


def test_the_tables_tell_everything_once(measured):
    text = markdown(measured)
    assert "Measured on 8 x NVIDIA H100" in text
    assert f"| {WAN} | none | ulysses2 | 2 | 843.0 | 4.27 | 97% | 0% | 1 | 1.171 |" in text
    assert f"| {WAN} | dicache | ulysses4 |" in text
    assert "reckoned" in text
    assert "ulysses2 +0.0%" in text
    lines = [line for line in text.splitlines() if line.startswith("|")]
    heads = {line.count("|") for line in lines}
    assert min(heads) > 5
    assert "USD" not in markdown(replace(measured, price=None))


def test_pictures_are_the_same_for_the_same_study(measured):
    pictures = draw_all(measured)
    assert set(pictures) == {
        f"{n}.{k}" for n in ("latency", "throughput", "stages", "cache_gain") for k in ("png", "svg")
    }
    assert pictures == draw_all(measured)
    assert pictures["latency.png"].startswith(b"\x89PNG")
    assert b"NVIDIA H100" in pictures["stages.svg"] or b"<svg" in pictures["stages.svg"]
    uncached = replace(measured, cells=[cell for cell in measured.cells if cell.cache == "none"])
    assert "cache_gain.png" not in draw_all(uncached)


# -- the log


def test_rows_come_back_and_torn_lines_are_measured_again(tmp_path):
    log = tmp_path / "rows.jsonl"
    begin_log(log, {WAN: {"weights": "a"}})
    append_row(log, row())
    with log.open("a") as file:
        file.write('\n{"row": {"model": "wan2.1-t2v')
    append_row(log, row("ulysses2"))
    append_line(log, {"row": asdict(row("ulysses4")) | {"clip_s": "soon"}})
    assert list(read_rows(log).values()) == [row(), row("ulysses2")]
    begin_log(log, {WAN: {"weights": "a"}, "tiny-wan": {"weights": "b"}})  # a further model may come
    assert log.read_text().count('"setup"') == 2


def test_rows_of_another_setup_are_refused_by_name(tmp_path):
    log = tmp_path / "rows.jsonl"
    begin_log(log, {WAN: {"weights": "a", "cores": 2}})
    with pytest.raises(InputError, match="measured with other cores; choose another --out"):
        begin_log(log, {WAN: {"weights": "a", "cores": 4}})


# -- what is measured


def test_layouts_are_visited_there_and_back():
    a, b = Layout(), Layout(ulysses=2)
    assert list(visits([a, b], 3)) == [(0, a), (0, b), (1, b), (1, a), (2, a), (2, b)]


def test_every_gang_and_the_halved_steps_are_wanted():
    clip = ClipRequest(
        id="a", prompt="p", width=64, height=64, num_frames=5, num_inference_steps=8, guidance_scale=5.0, fps=8
    )
    sample = Sample(checkpoint=open_checkpoint("tiny-wan"), options=LoadOptions(), clips=(clip,))
    plan = StudyPlan(samples=(sample,), layouts=(Layout(), Layout(gangs=2)), caches=("none", "dicache"), repeats=2)
    places = list(wanted_places(plan))
    assert len(places) == len(set(places)) == 2 * 3 * (1 + 2)
    assert {(place.cache, place.steps) for place in places} == {("none", 8), ("dicache", 8), ("none", 4)}


def test_a_policy_that_is_of_one_model_is_named_by_it():
    clip = ClipRequest(
        id="a", prompt="p", width=64, height=64, num_frames=5, num_inference_steps=8, guidance_scale=5.0, fps=8
    )
    samples = tuple(
        Sample(checkpoint=open_checkpoint(name), options=LoadOptions(), clips=(clip,))
        for name in ("tiny-wan", "tiny-hunyuan")
    )
    plan = StudyPlan(samples=samples, layouts=(Layout(),), caches=("smoothcache:s/{model}.json",), repeats=1)
    assert [place.cache for place in wanted_places(plan)] == [
        "smoothcache:s/tiny-wan.json",
        "smoothcache:s/tiny-hunyuan.json",
    ]
    assert cache_of("smoothcache:{model}.json", "/models/mine") == "smoothcache:mine.json"


PROMPT = "a red circle moving left on a navy background"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([PROMPT, "--layouts", "3"], "tiny-wan: layout ulysses3: ulysses must divide the model's"),
        ([PROMPT, "--layouts", "two"], "--layouts: layout 'two' is not of the form"),
        ([PROMPT, "--layouts", "2,ulysses2"], "--layouts ulysses2 is given twice"),
        ([PROMPT, "--model", "tiny-hunyuan", "--layouts", "cfg2"], "cfg 2 needs two guidance branches"),
        ([PROMPT, "--cache", "dicash"], "dicash"),
        ([PROMPT, "--repeats", "0"], "--repeats must be 1 to 100, got 0"),
        ([PROMPT, "--num-clips", "0"], "--num-clips must be 1 to 100, got 0"),
        ([PROMPT, "--price", "-1"], "--price must be 0 to"),
        (["--manifest", "none.jsonl"], "none.jsonl"),
        (["--manifest", "sizes.jsonl", "--num-clips", "2"], "must have one num_frames, got 5, 9"),
        (["--manifest", "-", "--model", "tiny-wan", "--model", "tiny-hunyuan"], "standard input can be read for one"),
        ([], "prompt"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line_and_leaves_nothing(tmp_path, monkeypatch, capsys, words, said):
    monkeypatch.chdir(tmp_path)
    lines = [{"prompt": PROMPT, "frames": frames} for frames in (5, 9)]
    (tmp_path / "sizes.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    assert main(["study", *words, "--device", "cpu", "--steps", "2", "--out", "out"]) == 2
    errors = capsys.readouterr().err.strip().splitlines()
    assert said in errors[-1]
    assert errors[-1].startswith("cineray")
    assert not (tmp_path / "out").exists()


def test_a_file_is_no_folder(tmp_path, capsys):
    (tmp_path / "out").write_text("mine")
    assert main(["study", PROMPT, "--device", "cpu", "--steps", "2", "--out", str(tmp_path / "out")]) == 2
    assert "is a file; give a folder" in capsys.readouterr().err
    assert (tmp_path / "out").read_text() == "mine"
