"""The caches of diffusers as rivals in the bench, and the tables."""

import csv
import math
import sys
from dataclasses import replace

import pytest

from cineray.jobs.measure.clip_scores import interval_of_mean
from cineray.jobs.measure.equal_cost import parse_sweep
from cineray.jobs.measure.peers import PEERS, option_types, parse_peer
from cineray.jobs.measure.quality import QualityMeter, QualityRow
from cineray.jobs.measure.quality_tables import _family, best_rows, files_of, markdown
from cineray.pipeline.request import InputError

ROW = QualityRow(
    policy="dicache",
    text="dicache(threshold=0.1)",
    num_clips=3,
    cost=0.5,
    speedup=2.0,
    psnr_db=40.0,
    worst_psnr_db=30.0,
    ssim=0.99,
    denoise_s=1.0,
    psnr_ci95=(38.0, 42.0),
    clips_psnr_db=(38.0, 40.0, 42.0),
)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("policy", "cost"),
    [
        ("diffusers:taylorseer-lite(interval=3,before=4,after=11)", 7 / 12),  # 0 to 3, 4, 7, 10 of 12: see below
        ("diffusers:taylorseer(interval=3,before=4)", None),
        ("diffusers:seacache(threshold=1000,max_skips=1)", None),
        ("diffusers:fbcache(threshold=1000)", None),
        ("diffusers:pab(spatial=2)", None),
        ("diffusers:fastercache(spatial=2)", None),
    ],
)
def test_a_rival_renders_counts_what_ran_and_leaves_the_model_as_it_was(loaded, new_request, policy, cost):
    model = loaded("wan")
    meter = QualityMeter(model, [new_request(num_inference_steps=12)], lambda *_: None)
    before = {name: type(module) for name, module in model.pipe.transformer.named_modules()}
    row = meter.measure(policy)
    assert 0 < row.cost < 1
    assert row.psnr_db < 100
    assert row.num_timed == 1
    if cost is not None:
        assert row.cost == pytest.approx(cost, abs=1 / 12)
    assert {name: type(module) for name, module in model.pipe.transformer.named_modules()} == before
    assert meter.measure("none").psnr_db == 100  # nothing of the rival is left


@pytest.mark.slow
@pytest.mark.parametrize(
    "policy", ["cache-dit:dbcache(threshold=1000,warmup=4)", "cache-dit:dbcache(mask=fast,taylor=1)"]
)
@pytest.mark.parametrize("name", ["wan", "hunyuan"])
def test_cache_dit_renders_and_leaves_the_model_as_it_was(loaded, new_request, name, policy):
    model = loaded(name)
    before = {name: type(module) for name, module in model.pipe.transformer.named_modules()}
    meter = QualityMeter(model, [new_request(num_inference_steps=20)], lambda *_: None)
    row = meter.measure(policy)
    assert 0 < row.cost < 1
    assert row.psnr_db < 100
    assert {name: type(module) for name, module in model.pipe.transformer.named_modules()} == before
    assert meter.measure("none").psnr_db == 100


@pytest.mark.slow
def test_cache_dit_that_is_not_installed_says_what_to_install(loaded, new_request, monkeypatch):
    monkeypatch.setitem(sys.modules, "cache_dit", None)
    meter = QualityMeter(loaded("wan"), [new_request(num_inference_steps=4)], lambda *_: None)
    with pytest.raises(InputError, match=r'not installed: pip install "cineray\[bench\]"'):
        meter.measure("cache-dit:dbcache")


@pytest.mark.slow
def test_a_rival_that_never_skips_costs_what_the_uncached_clip_does(loaded, new_request):
    row = QualityMeter(loaded("wan"), [new_request(num_inference_steps=4)], lambda *_: None).measure(
        "diffusers:fbcache(threshold=0)"
    )
    assert (row.cost, row.psnr_db) == (1.0, 100.0)


def test_rivals_are_written_as_policies_are():
    assert parse_peer("diffusers:taylorseer-lite(interval=4,after=47)").interval == 4
    assert parse_peer("diffusers:seacache").max_skips == 2
    assert parse_sweep("cache-dit:dbcache(threshold=?,taylor=1)") is not None
    sweep = parse_sweep("diffusers:seacache(threshold=?,max_skips=3)")
    assert sweep is not None
    assert not sweep.is_integer
    assert sweep.at(0.5) == "diffusers:seacache(threshold=0.5,max_skips=3)"
    whole = parse_sweep("diffusers:taylorseer-lite(interval=?)")
    assert whole is not None
    assert whole.is_integer


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("diffusers:dicash", "no rival that is known; known: diffusers:taylorseer-lite"),
        ("diffusers:fbcache(level=1)", "unknown or repeated option 'level'; valid: threshold"),
        ("diffusers:taylorseer(interval=fast)", "interval: Input should be a valid integer"),
        ("cache-dit:dbcache(mask=some)", "mask must be one of slow, medium, fast, ultra, got 'some'"),
        ("cache-dit:dbprune", "no rival that is known"),
    ],
)
def test_bad_rivals(text, message):
    with pytest.raises(InputError, match=message):
        parse_peer(text)


def test_every_rival_has_numbers_for_options():
    for name in PEERS:
        assert set(option_types(name).values()) <= {int, float, str}


def test_an_interval_covers_the_mean_and_needs_two_clips():
    low, high = interval_of_mean([30.0, 40.0, 50.0, 60.0]) or (math.nan, math.nan)
    assert 30 <= low < 45 < high <= 60
    assert interval_of_mean([30.0]) is None


def test_the_front_is_what_no_other_row_beats_and_tables_say_it():
    rival = replace(ROW, policy="diffusers:seacache", psnr_db=39.0)  # as fast and worse
    slow = replace(ROW, policy="fewer-steps(40)", speedup=1.25, cost=0.8, psnr_db=45.0)
    rows = [ROW, rival, slow]
    assert best_rows(rows) == {"dicache", "fewer-steps(40)"}
    lines = markdown(rows, "tiny-wan").splitlines()
    assert [line.split(" | ")[0].strip("| *") for line in lines[4:]] == [
        "fewer-steps(40)",
        "diffusers:seacache",
        "dicache",
    ]
    assert "| **dicache** | 3 | 2.00x |" in lines[-1]
    files = files_of(rows, "tiny-wan")
    assert set(files) == {"quality.csv", "quality.md", "quality.png", "quality.svg"}
    table = list(csv.DictReader(files["quality.csv"].decode().splitlines()))
    assert [row["best"] for row in table] == ["True", "False", "True"]
    assert files["quality.png"].startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("policy", "line"),
    [
        ("fitted(speedup=2.5)", "fitted"),
        ("fitted(profile=other.json,speedup=2.5)", "fitted(profile=other.json)"),
        ("fewer-steps(25)", "fewer-steps"),
        ("fewer-steps(25,profile=auto)", "fewer-steps(profile=auto)"),
        ("diffusers:seacache(threshold=1e-05,max_skips=3)", "diffusers:seacache"),
        ("dicache", "dicache"),
    ],
)
def test_rows_that_differ_in_numbers_alone_make_one_line(policy, line):
    assert _family(policy) == line
