"""A cache on real pipelines: what it changes, what it never changes, what it says about itself."""

import json
from dataclasses import replace

import pytest
import torch
from conftest import build_hunyuan, build_wan
from every_model import EVERY_MODEL, build, call, in_double

import cineray
from cineray.caching.trace import load_trace

pytestmark = pytest.mark.slow

OFTEN = cineray.DiCacheConfig(threshold=0.5, warmup=0.2, max_skips=3)


@pytest.mark.parametrize("name", EVERY_MODEL)
def test_off_threshold_zero_and_disabled_equal_the_plain_pipeline_bit_for_bit(name):
    pipe = build(name)
    keys, blocks = list(pipe.transformer.state_dict()), dict(pipe.transformer.named_children())
    plain = call(pipe)
    handle = cineray.enable_cache(pipe, "dicache(threshold=0)")
    assert torch.equal(call(pipe), plain)
    assert handle.trace.summary()["skipped_steps"] == 0
    assert list(pipe.transformer.state_dict()) == keys
    handle.disable()
    with cineray.enable_cache(pipe, OFTEN) as handle:
        cached = call(pipe)
        assert not torch.equal(cached, plain)
        assert torch.equal(call(pipe), cached)  # a second clip does not see the first
        summary = handle.trace.summary()
    assert summary["steps"] == 12
    assert 0 < summary["skipped_steps"] < 12
    assert summary["computed_steps"] + summary["skipped_steps"] == 12
    assert 0 < summary["cost"] < 1
    assert torch.equal(call(pipe), plain)
    assert dict(pipe.transformer.named_children()) == blocks
    assert pipe.transformer.forward.__func__ is type(pipe.transformer).forward


def test_probe_blocks_run_once_a_step_and_deep_blocks_only_when_computed():
    pipe = build_wan()
    counts = [0] * len(pipe.transformer.blocks)
    for index, block in enumerate(pipe.transformer.blocks):
        block.register_forward_hook(lambda *_, index=index: counts.__setitem__(index, counts[index] + 1))
    with cineray.enable_cache(pipe, OFTEN) as handle:
        call(pipe, guidance_scale=4.0)
    computed = sum(entry.compute for entry in handle.trace.entries)
    assert counts == [24, computed, computed]
    assert handle.trace.summary()["cost"] == pytest.approx(sum(counts) / (24 * 3))


def test_joint_branches_follow_the_first():
    pipe = build_wan()
    pipe.set_progress_bar_config(disable=True)

    def decisions(branches):
        policy = f"dicache-paper(threshold=0.06,branches={branches})"
        with cineray.enable_cache(pipe, policy) as handle:
            call(pipe, guidance_scale=4.0, num_inference_steps=50)
        by_branch = {b: [e.compute for e in handle.trace.entries if e.branch == b] for b in ("cond", "uncond")}
        return by_branch["cond"], by_branch["uncond"]

    cond, uncond = decisions("joint")
    assert cond == uncond
    assert 0 < sum(cond) < 50
    cond, uncond = decisions("separate")
    assert len(cond) == len(uncond) == 50


@pytest.mark.parametrize("builder", [build_wan, build_hunyuan])
def test_each_sample_of_a_batch_has_its_own_schedule_and_pixels(builder):
    """A batch of two gives what two batches of one give, whatever the other sample does."""
    pipe = in_double(builder())
    pipe.set_progress_bar_config(disable=True)
    policy = "dicache(threshold=0.05,warmup=0.1,branches=separate)"
    prompts, alone, schedules = ["a red circle", "white square black"], [], []
    steps = 24
    noise = [torch.randn(1, 4, 2, 4, 4, generator=torch.Generator().manual_seed(s)) for s in (1, 2)]
    noise[1] = noise[1] * 3  # another pace of change
    for prompt, latents in zip(prompts, noise, strict=True):
        with cineray.enable_cache(pipe, policy) as handle:
            alone.append(call(pipe, prompt=prompt, latents=latents, num_inference_steps=steps))
        schedules.append([(e.step, e.branch, e.compute) for e in handle.trace.entries])
    assert schedules[0] != schedules[1]
    with cineray.enable_cache(pipe, policy) as handle:
        together = call(pipe, prompt=prompts, latents=torch.cat(noise), num_inference_steps=steps)
    for sample in range(2):
        ours = [(e.step, e.branch, e.compute) for e in handle.trace.entries if e.sample == sample]
        assert ours == schedules[sample]
        torch.testing.assert_close(together[sample], alone[sample][0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("branches", ["separate", "joint"])
def test_a_trace_replays_the_same_clip_and_any_other_one(tmp_path, branches):
    pipe = build_wan()
    pipe.set_progress_bar_config(disable=True)
    with cineray.enable_cache(pipe, replace(OFTEN, branches=branches)) as handle:
        first = call(pipe, guidance_scale=4.0)
    path = tmp_path / "trace.json"
    path.write_text(json.dumps(handle.trace.to_dict()))
    assert load_trace(path).entries == handle.trace.entries
    with cineray.enable_cache(pipe, f"replay:{path}") as replayed:
        assert torch.equal(call(pipe, guidance_scale=4.0), first)
        assert [e.gamma for e in replayed.trace.entries] == [e.gamma for e in handle.trace.entries]
        call(pipe, guidance_scale=4.0, seed=9)
        assert [e.compute for e in replayed.trace.entries] == [e.compute for e in handle.trace.entries]
    with pytest.raises(ValueError, match="is of a model with 3 blocks; this one has 4"):
        cineray.enable_cache(build_hunyuan(), f"replay:{path}")
    path.write_text("{}")
    with pytest.raises(ValueError, match="is not a cineray trace"):
        cineray.enable_cache(build_wan(), f"replay:{path}")


def test_five_token_tensors_a_branch_at_most():
    pipe = build_wan()
    pipe.set_progress_bar_config(disable=True)
    with cineray.enable_cache(pipe, OFTEN) as handle:
        call(pipe, guidance_scale=4.0)
    one_tensor = 2 * 2 * 2 * 48 * 4  # 8 tokens of 48 float32
    assert handle.trace.summary()["held_bytes"] == 2 * 5 * one_tensor


def test_guidance_that_switches_off_midway_and_none_at_all():
    pipe = build_wan()
    pipe.set_progress_bar_config(disable=True)

    def switch_off(pipe, step, _timestep, kwargs):
        if step == 5:
            pipe._guidance_scale = 1.0
        return kwargs

    with cineray.enable_cache(pipe, "dicache(threshold=0.5)") as handle:
        call(pipe, guidance_scale=4.0, callback_on_step_end=switch_off)
        assert [e.step for e in handle.trace.entries if e.branch == "uncond"] == list(range(6))
        assert len([e for e in handle.trace.entries if e.branch == "cond"]) == 12
        call(pipe, guidance_scale=1.0)
        assert {e.branch for e in handle.trace.entries} == {"cond"}


def test_a_loop_of_ones_own_says_where_it_is():
    transformer = build_wan().transformer
    text = torch.randn(1, 512, 64)
    with cineray.enable_cache(transformer, OFTEN) as handle, torch.no_grad():
        latents = torch.randn(1, 4, 2, 4, 4)
        with pytest.raises(ValueError, match="does not say which step it is"):
            transformer(latents, torch.tensor([900]), text)
        with transformer.cache_context("cond"), pytest.raises(ValueError, match="gives no step"):
            transformer(latents, torch.tensor([900]), text)
        for index in range(10):
            with transformer.cache_context("cond", step_index=index, num_inference_steps=10):
                latents = latents - 0.1 * transformer(latents, torch.tensor([900 - index]), text)[0]
        assert handle.trace.summary()["steps"] == 10
        # a resumed clip begins in the middle: nothing is known of the step before
        with transformer.cache_context("cond", step_index=5, num_inference_steps=10):
            transformer(latents, torch.tensor([895]), text)
        assert handle.trace.entries[-1].compute


def test_what_cannot_be_cached_is_refused():
    pipe = build_wan()
    with pytest.raises(ValueError, match="Linear is not supported; supported: WanTransformer3DModel"):
        cineray.enable_cache(torch.nn.Linear(1, 1), "dicache")
    with pytest.raises(ValueError, match="leave the call out"):
        cineray.enable_cache(pipe, "none")
    handle = cineray.enable_cache(pipe, "dicache")
    with pytest.raises(ValueError, match="has a cache already"):
        cineray.enable_cache(pipe, "dicache")
    handle.disable()
    cineray.enable_cache(pipe, "dicache").disable()
