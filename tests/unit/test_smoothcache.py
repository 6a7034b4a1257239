"""SmoothCache: schedules from errors, the official JSON form, and what a schedule does to a real transformer."""

import json
from functools import partial

import numpy as np
import pytest
import torch
from every_model import EVERY_MODEL, STACKED, build, call, layout_of
from more_models import build_wan22

import cineray
from cineray.caching.policies.smoothcache import LayerSchedule, dump_schedule, load_schedule, schedule_row
from cineray.pipeline.caches.layers import layers_of
from cineray.pipeline.calibrate.smoothcache import measure_layer_errors, smooth_schedule
from cineray.pipeline.render import render_clip

pytestmark = pytest.mark.slow


def test_the_longest_skip_that_is_good_enough_is_taken():
    nan = float("nan")
    errors = [
        [0.1, 0.1, 0.1, 0.3, 0.1, nan],  # lag 1
        [0.1, 0.3, 0.1, 0.1, nan, nan],  # lag 2
    ]
    # 0 skips 1 and 2; 3 skips 4 and 5 by lag 2 at an error of 0.1 (its lag 1 is bad: the largest lag is tried first)
    assert schedule_row(errors, 6, alpha=0.2) == (True, False, False, True, False, True)
    assert schedule_row(errors, 6, alpha=0.0) == (True,) * 6
    assert schedule_row(errors, 6, alpha=nan) == (True,) * 6


def test_schedules_are_stored_in_the_official_form(tmp_path):
    path = tmp_path / "schedule.json"
    path.write_text('{"attn1": [1, 0, 1, 1], "ffn-2": [1, 1, 0, 1]}')
    schedule = load_schedule(path, ("attn1", "attn2", "ffn"), 3)
    assert [schedule.computes("attn1", 0, s) for s in range(4)] == [True, False, True, True]
    assert [schedule.computes("ffn", 2, s) for s in range(4)] == [True, True, False, True]
    assert all(schedule.computes(layer, 0, s) for layer in ("ffn", "attn2") for s in range(4))
    assert json.loads(dump_schedule(schedule)) == json.loads(path.read_text())


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "is not JSON"),
        ("[]", "must be an object such as"),
        ("{}", "must be an object such as"),
        ('{"attn3": [1]}', "layer 'attn3' is not in this model; it has attn1, ffn in 3 blocks"),
        ('{"attn1-3": [1]}', "layer 'attn1-3' is not in this model"),
        ('{"attn1": [1, 2]}', "must be a list of 0 and 1"),
        ('{"attn1": []}', "must be a list of 0 and 1"),
        ('{"attn1": [0, 1]}', "must begin with 1"),
        ('{"attn1": [1, 1], "ffn": [1]}', r"rows must have one length, got \[1, 2\] steps"),
    ],
)
def test_bad_schedules_are_one_clear_error(tmp_path, content, said):
    path = tmp_path / "schedule.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=said):
        load_schedule(path, ("attn1", "ffn"), 3)


@pytest.mark.parametrize("name", EVERY_MODEL)
def test_a_schedule_skips_just_its_layers_and_all_ones_change_nothing(name, tmp_path):
    pipe = build(name)
    plain = call(pipe, steps=4)
    layers = list(layers_of(pipe.transformer, layout_of(pipe.transformer)))
    kinds = list(dict.fromkeys(layer for layer, _, _ in layers))
    path = tmp_path / "schedule.json"
    path.write_text(json.dumps({kind: [1, 1, 1, 1] for kind in kinds}))
    with cineray.enable_cache(pipe, f"smoothcache:{path}") as handle:
        assert torch.equal(call(pipe, steps=4), plain)
        assert handle.trace.summary()["cost"] == 1.0
    path.write_text(json.dumps({kinds[0]: [1, 0, 1, 1]}))
    with cineray.enable_cache(pipe, f"smoothcache:{path}") as handle:
        cached = call(pipe, steps=4)
        assert torch.equal(call(pipe, steps=4), cached)  # a second clip does not see the first
        summary = handle.trace.summary()
    assert not torch.equal(cached, plain)
    share = sum(layer == kinds[0] for layer, _, _ in layers) / len(layers)
    assert summary["cost"] == pytest.approx(1 - share / 4, abs=1e-6)
    assert (summary["steps"], summary["skipped_steps"]) == (4, 1)
    assert torch.equal(call(pipe, steps=4), plain)


def test_a_schedule_of_another_length_is_refused(tmp_path):
    path = tmp_path / "schedule.json"
    path.write_text('{"attn1": [1, 0, 1]}')
    pipe = build("wan")
    with (
        cineray.enable_cache(pipe, f"smoothcache:{path}"),
        pytest.raises(ValueError, match="the schedule is for 3 steps, this clip has 4"),
    ):
        call(pipe, steps=4)


@pytest.mark.parametrize("name", EVERY_MODEL)
def test_calibration_measures_every_layer_type_of_every_model(name):
    pipe = build(name)
    plain = call(pipe, steps=5)
    errors = measure_layer_errors(pipe, [lambda: call(pipe, steps=5), lambda: call(pipe, 5, seed=4)], 5, max_lag=2)
    assert set(errors) == {layer for layer, _, _ in layers_of(pipe.transformer, layout_of(pipe.transformer))}
    assert len(errors) >= {"dit": 2, "open_sora": 6}.get(name, 3)
    for by_lag in errors.values():
        assert np.isfinite(by_lag[0][:4]).all()
        assert np.isfinite(by_lag[1][:3]).all()
        assert min(by_lag[0][:4]) > 0
    assert torch.equal(call(pipe, steps=5), plain)  # the recorders are gone
    with pytest.raises(ValueError, match="a clip has 5 steps; num_steps is 6"):
        measure_layer_errors(pipe, [lambda: call(pipe, steps=5)], 6, max_lag=2)


def test_an_official_schedule_for_dit_loads_and_does_what_it_says(tmp_path):
    """smoothcache_schedules/diffuser_schedule.json of github.com/Roblox/SmoothCache at edeb4ed."""
    row = [1, 0, 1, 0, 0, 1, 0, 1, 0, 1, 1, 1, 0, 1, 0, 1, 0, 1, 0, 1, 0, 1, 0, 1, 0]
    row += [1, 0, 1, 0, 1, 0, 1, 0, 0, 1, 0, 0, 1, 0, 0, 1, 0, 0, 1, 0, 0, 1, 0, 1, 1]
    path = tmp_path / "diffuser_schedule.json"
    path.write_text(json.dumps({"attn1": row}))
    pipe = build("dit")
    calls = []
    for block in pipe.transformer.transformer_blocks:
        original = block.attn1.to_q.forward
        block.attn1.to_q.forward = lambda x, original=original: calls.append(1) or original(x)
    with cineray.enable_cache(pipe, f"smoothcache:{path}") as handle:
        call(pipe, steps=50)
    assert len(calls) == 3 * sum(row)
    cond = [entry for entry in handle.trace.entries if entry.branch == "cond"]
    assert [int(entry.compute) for entry in cond] == row
    assert handle.trace.summary()["cost"] == pytest.approx(1 - 26 / 50 / 2, abs=1e-6)  # attn1 of attn1 and ff


def test_an_official_schedule_for_facebookresearch_dit_loads_by_its_own_names(tmp_path):
    """smoothcache_schedules/50-N-3-threshold-0.18.json of github.com/Roblox/SmoothCache at edeb4ed."""
    row = [1, 0, 0, 0, 1, 0, 0, 1, 0, 0, *[1, 0] * 19, 1, 1]
    path = tmp_path / "50-N-3-threshold-0.18.json"
    path.write_text(json.dumps({"attn": row, "mlp": row}))
    pipe = build("dit")
    with cineray.enable_cache(pipe, f"smoothcache:{path}") as handle:
        call(pipe, steps=50)
    cond = [entry for entry in handle.trace.entries if entry.branch == "cond"]
    assert [int(entry.compute) for entry in cond] == row
    assert handle.trace.summary()["cost"] == pytest.approx(24 / 50, abs=1e-6)
    path.write_text(json.dumps({"attn": row, "attn2": row}))
    with pytest.raises(ValueError, match="layer 'attn2' is not in this model; it has attn1, ff in 3 blocks"):
        cineray.enable_cache(pipe, f"smoothcache:{path}")


def test_a_name_without_its_list_is_of_all_lists_and_gives_way_to_one_with_it(tmp_path):
    path = tmp_path / "schedule.json"
    rows = {"attn": [1, 0, 0, 1], "attn-1": [1, 0, 1, 1], "b.attn": [1, 1, 0, 1], "mlp": [1, 1, 1, 0]}
    path.write_text(json.dumps(rows))
    schedule = load_schedule(path, ("a.attn", "b.attn", "a.ff"), 2, {"mlp": "ff"})
    found = {
        f"{layer}-{block}": [int(schedule.computes(layer, block, step)) for step in range(4)]
        for layer in ("a.attn", "b.attn", "a.ff")
        for block in (0, 1)
    }
    assert found == {
        **{"a.attn-0": rows["attn"], "a.attn-1": rows["attn-1"]},
        **{"b.attn-0": rows["b.attn"], "b.attn-1": rows["attn-1"]},
        **{"a.ff-0": rows["mlp"], "a.ff-1": rows["mlp"]},
    }


def test_a_block_of_open_sora_is_named_by_its_list_and_its_place_there(tmp_path):
    path = tmp_path / "schedule.json"
    path.write_text('{"temporal_blocks.attn-2": [1, 0, 1]}')
    pipe = build("open_sora")
    calls = []
    for kind in ("spatial_blocks", "temporal_blocks"):
        for number, block in enumerate(getattr(pipe.transformer, kind)):
            block.attn.qkv.register_forward_hook(lambda *_, place=(kind, number): calls.append(place))
    with cineray.enable_cache(pipe, f"smoothcache:{path}"):
        call(pipe, steps=3)
    assert {calls.count((kind, n)) for kind in ("spatial_blocks", "temporal_blocks") for n in range(2)} == {3}
    assert (calls.count(("spatial_blocks", 2)), calls.count(("temporal_blocks", 2))) == (3, 2)
    path.write_text('{"temporal_blocks.attn-3": [1, 0, 1]}')
    with pytest.raises(ValueError, match="in 3 blocks, numbered from 0"):
        cineray.enable_cache(pipe, f"smoothcache:{path}")


@pytest.mark.parametrize("name", STACKED)
def test_a_stacked_batch_is_recorded_row_by_row(name, tmp_path):
    pipe = build(name)
    path = tmp_path / "schedule.json"
    path.write_text(json.dumps({next(layers_of(pipe.transformer, layout_of(pipe.transformer)))[0]: [1, 0, 1]}))
    two = {"class_labels": [7, 8]} if name == "dit" else {"prompt": [1, 2] if name == "open_sora" else ["a", "b"]}
    with cineray.enable_cache(pipe, f"smoothcache:{path}") as handle:
        call(pipe, steps=3, **two)
    places = {(entry.branch, entry.sample) for entry in handle.trace.entries if entry.step == 1}
    assert places == {(branch, sample) for branch in ("cond", "uncond") for sample in (0, 1)}
    assert len(handle.trace.entries) == 3 * 4


def test_calibration_averages_over_blocks_and_clips(loaded, new_request):
    """The errors of the feed-forward layers, measured by plain hooks beside the calibration's own."""
    model = loaded("wan")
    requests = [new_request(num_inference_steps=5, seed=s, guidance_scale=1.0) for s in (1, 2)]
    blocks = model.pipe.transformer.blocks
    outputs = [[] for _ in blocks]
    taps = [
        block.ffn.register_forward_hook(lambda m, a, out, seen=seen: seen.append(out.clone()))
        for block, seen in zip(blocks, outputs, strict=True)
    ]
    clips = [partial(render_clip, model, request, lambda done, total: None) for request in requests]
    errors = measure_layer_errors(model.pipe, clips, num_steps=5, max_lag=2)
    for tap in taps:
        tap.remove()
    assert set(errors) == {"attn1", "attn2", "ffn"}
    for lag in (1, 2):
        for step in range(5 - lag):
            pairs = [(seen[clip + step], seen[clip + step + lag]) for seen in outputs for clip in (0, 5)]
            expected = np.mean([((then - now).abs().sum() / now.abs().sum()).item() for then, now in pairs])
            assert errors["ffn"][lag - 1][step] == pytest.approx(expected, rel=1e-5)
        assert np.isnan(errors["ffn"][lag - 1][5 - lag :]).all()
    assert smooth_schedule(errors, alpha=1e9) == LayerSchedule(dict.fromkeys(errors, (True, False, False, True, True)))
    assert smooth_schedule(errors, alpha=0.0).rows["attn1"] == (True,) * 5


def test_each_expert_is_measured_at_its_own_steps():
    """UniPC's steps of this clip: the first expert's are those at 875 and above."""
    pipe = build_wan22()
    pipe.scheduler.set_timesteps(6)
    first = int((pipe.scheduler.timesteps >= 875).sum())
    assert 1 < first < 5
    errors = measure_layer_errors(pipe, [lambda: call(pipe, steps=6)], 6, max_lag=1)
    for by_lag in errors.values():
        measured = [step for step in range(6) if np.isfinite(by_lag[0][step])]
        assert measured == [step for step in range(5) if step != first - 1]
    assert [row[first] for row in smooth_schedule(errors, alpha=1e9).rows.values()] == [True] * 3
