"""SmoothCache against a transcription of its authors' helper, on models whose guidance stands in the batch."""

import json
from functools import cache

import pytest
import torch
from every_model import STACKED, build, call, layout_of

import cineray
from cineray.pipeline.caches.layers import layers_of

pytestmark = pytest.mark.slow

STEPS = 6
# as the helper takes them: names of attributes of a block, or of one block's with its number
SCHEDULES = {
    "dit": {"attn1": [1, 0, 0, 1, 0, 1], "ff": [1, 0, 1, 0, 0, 1], "ff-1": [1, 1, 1, 1, 0, 1]},
    "stable_audio": {"attn1": [1, 0, 0, 1, 0, 1], "attn2": [1, 0, 0, 0, 1, 1], "ff-2": [1, 1, 0, 1, 0, 1]},
    "open_sora": {"attn": [1, 0, 0, 1, 0, 1], "cross_attn": [1, 0, 0, 0, 1, 1], "mlp-2": [1, 1, 0, 1, 0, 1]},
}


class Helper:
    """SmoothCacheHelper of github.com/Roblox/SmoothCache at edeb4ed (smooth_cache_helper.py), told in fewer words.

    A layer counts its own calls; its output is kept whole, with the rows of all branches, and given back where the
    row of its block's layer, or else of its layer's name, has a 0.
    """

    def __init__(self, transformer, schedule):
        self.num_skipped = 0
        for name, module in list(transformer.named_modules()):
            *_, block, layer = ("", "", *name.split("."))
            if block.isdigit() and any(key.split("-")[0] == layer for key in schedule):
                row = schedule.get(f"{layer}-{block}", schedule.get(layer))
                self._wrap(module, row)

    def _wrap(self, module, row):
        if row is None:
            return
        original, step, kept = module.forward, [0], [None]

        def forward(*args, **kwargs):
            computes = row[step[0]] == 1
            step[0] += 1
            self.num_skipped += not computes
            if computes:
                kept[0] = original(*args, **kwargs)
            return kept[0]

        module.forward = forward


@cache
def uncached(name):
    return call(build(name), steps=STEPS)


@pytest.mark.parametrize("name", STACKED)
def test_a_schedule_in_the_official_form_does_what_their_helper_does(name, tmp_path):
    path = tmp_path / "schedule.json"
    path.write_text(json.dumps(SCHEDULES[name]))
    theirs = build(name)
    helper = Helper(theirs.transformer, SCHEDULES[name])
    expected = call(theirs, steps=STEPS)
    assert not torch.equal(expected, uncached(name))
    ours = build(name)
    with cineray.enable_cache(ours, f"smoothcache:{path}") as handle:
        assert torch.equal(call(ours, steps=STEPS), expected)
        cond = [entry for entry in handle.trace.entries if entry.branch == "cond"]
    num_layers = len(list(layers_of(ours.transformer, layout_of(ours.transformer))))
    assert sum(1 - entry.cost for entry in cond) * num_layers == pytest.approx(helper.num_skipped)
    assert helper.num_skipped > 10


def test_branches_in_one_batch_reuse_what_branches_in_calls_of_their_own_do(tmp_path):
    """Open-Sora's rows of a stacked batch against two calls a step, each with outputs of its own."""
    path = tmp_path / "schedule.json"
    path.write_text(json.dumps(SCHEDULES["open_sora"]))
    found = []
    for stacked in (True, False):
        pipe = build("open_sora")
        pipe.transformer.double()
        with cineray.enable_cache(pipe, f"smoothcache:{path}", num_branches=None if stacked else 2):
            found.append(call(pipe, steps=STEPS, stacked=stacked))
    torch.testing.assert_close(*found, atol=1e-5, rtol=1e-5)
