"""A step that is skipped without a probe runs no block, and nothing that only blocks read."""

from dataclasses import replace

import pytest
import torch
from every_model import EVERY_MODEL, build, call, layout_of

import cineray
from cineray.caching.controller import CacheController
from cineray.caching.policies.dicache import DiCacheConfig

SKIPPING = DiCacheConfig(threshold=1e6, look="run", warmup=0.2, branches="joint", max_skips=3, last_step_full=True)


@pytest.mark.parametrize("name", EVERY_MODEL)
def test_what_is_left_out_changes_no_bit(name, monkeypatch):
    pipe = build(name)
    with cineray.enable_cache(pipe, SKIPPING) as handle:
        latents = call(pipe)
    planned = [e for e in handle.trace.entries if e.reason == "run"]
    assert planned
    monkeypatch.setattr(CacheController, "is_planned", lambda *_: False)  # all modules run, and gates hand on
    with cineray.enable_cache(pipe, SKIPPING) as handle:
        assert torch.equal(torch.as_tensor(call(pipe)), torch.as_tensor(latents))
    assert [e for e in handle.trace.entries if e.reason == "run"] == planned


@pytest.mark.parametrize("name", ["wan", "hunyuan", "flux"])
def test_modules_that_blocks_alone_read_run_when_a_block_does(name):
    pipe, ran = build(name), dict.fromkeys(layout_of(build(name).transformer).unread, 0)
    present = {path: module for path, module in pipe.transformer.named_modules() if path in ran}
    assert present

    def count(path):
        def add(*_):
            ran[path] += 1

        return add

    for path, module in present.items():
        module.register_forward_hook(count(path))
    with cineray.enable_cache(pipe, SKIPPING) as handle:
        call(pipe)
    entries = handle.trace.entries
    with_blocks = [e for e in entries if e.reason != "run"]
    assert len(with_blocks) < len(entries)
    branches = {e.branch for e in entries}
    for path in present:  # the first time of each branch it is asked for the shape of what it gives
        assert ran[path] <= len(with_blocks) + len(branches)
    assert {path: pipe.transformer.get_submodule(path) for path in present} == present


def test_a_forward_that_breaks_off_leaves_the_modules_in_their_places(monkeypatch):
    pipe = build("wan")
    before = dict(pipe.transformer.named_modules())

    def fails(*_):
        raise RuntimeError("out of memory")

    with cineray.enable_cache(pipe, replace(SKIPPING, alignment="l1")) as handle:
        monkeypatch.setattr(CacheController, "forecast", fails)
        with pytest.raises(RuntimeError, match="out of memory"):
            call(pipe)
        assert dict(pipe.transformer.named_modules()) == before
        monkeypatch.undo()
        call(pipe)
    assert [e for e in handle.trace.entries if e.reason == "run"]
