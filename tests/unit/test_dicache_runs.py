"""DiCache with one look per run of skips, and with skip costs of the steps."""

import json
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from conftest import build_hunyuan, build_wan
from every_model import in_double
from test_dicache_policy import SEEN

import cineray
from cineray.caching.plan import CachePlan
from cineray.caching.policies.dicache import DiCacheConfig, DiCachePolicy, expected_cost
from cineray.caching.profile import DiCacheProfile
from cineray.pipeline.adapters.cache_plan import plan_cache

pytestmark = pytest.mark.slow

LOOK = replace(SEEN, change_sum=4.0, accumulated=0.0, num_skips_in_a_row=0)  # 0.04 of change, at step 20 of 50
RUN = DiCacheConfig(threshold=0.095, look="run")
WAN = {"num_layers": 30, "num_attention_heads": 12, "attention_head_dim": 128, "in_channels": 16}


def profile(skip_costs=(1.0,) * 50, expected=(0.02,) * 50, **changes):
    values = {"family": "wan", "transformer": {}, "source": "", "gamma_clip": (1, 1.5), "threshold": 0.1}
    return DiCacheProfile(skip_costs=skip_costs, expected_change=expected, **(values | changes))


def decide(config=RUN, known=None, **changes):
    return DiCachePolicy(config, known).decide(replace(LOOK, **changes))


def test_a_look_decides_for_as_many_steps_as_stay_below_the_threshold():
    decision = decide()
    assert (decision.compute, decision.num_steps) == (False, 2)  # 0.04, 0.08; a third would be 0.12
    assert decision.accumulated == pytest.approx(0.08)
    assert decide(change_sum=1.0).num_steps == 9  # 0.09; ten would be 0.1
    assert decide(change_sum=10.0).reason == "threshold"


def test_a_run_ends_at_the_cap_at_the_last_step_and_at_the_end():
    still = {"change_sum": 0.001, "step_index": 45}
    assert decide(**still).num_steps == 5
    assert decide(replace(RUN, last_step_full=True), **still).num_steps == 4
    assert decide(replace(RUN, max_skips=3), **still).num_steps == 3


def test_the_step_after_a_run_is_computed_and_a_run_needs_two_pairs():
    assert decide(num_skips_in_a_row=2).compute
    assert decide(num_pairs=1).reason == "empty"
    assert decide(replace(RUN, look="step"), num_pairs=1).reason == "skip"


def test_heavy_steps_are_computed_and_light_ones_skipped():
    skip_costs = [1.0] * 50
    skip_costs[22] = 3.0
    assert decide(known=profile(skip_costs), change_sum=2.0).num_steps == 2  # 0.02 a step until step 22 costs 0.06
    assert decide(known=profile(skip_costs), change_sum=2.0, step_index=22).num_steps == 2  # 0.06, 0.08
    assert decide(known=profile([0.1] * 50), change_sum=2.0).num_steps == 30  # 0.002 a step, to the end


def test_a_clip_that_moves_faster_than_expected_is_computed_more_often():
    fast = {"known": profile(), "change_sum": 8.0}  # four times what is expected
    assert decide(**fast).num_steps == 1
    assert decide(replace(RUN, adaptivity=0.0), **fast).num_steps == 4
    assert decide(replace(RUN, adaptivity=0.5), **fast).num_steps == 2


def test_skip_costs_serve_another_number_of_steps():
    skip_costs, expected = profile(skip_costs=(4.0, 1.0, 4.0), expected=(0.1, 0.2, 0.3)).at(5)
    assert skip_costs == pytest.approx([4.0, 2.0, 1.0, 2.0, 4.0])
    assert expected == pytest.approx([0.06, 0.09, 0.12, 0.15, 0.18])  # shorter steps change less


def test_expected_cost_is_the_cost_of_an_expected_clip():
    # steps 0 and 1 give two pairs; then skip 2 to 5, compute 6, skip 7 to 10, ...
    policy = DiCachePolicy(replace(RUN, warmup=0.0), profile())
    computed = [0, 1, *range(6, 50, 5)]
    probes = len(range(2, 50, 5))
    assert expected_cost(policy, 50, 1 / 30) == pytest.approx((len(computed) + probes / 30) / 50)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"look": "never"}, "look must be step or run"),
        ({"look": "run", "base": "probe"}, "look must be step where base is probe"),
        ({"adaptivity": 2}, "adaptivity must be 0 to 1"),
    ],
)
def test_bad_options(bad, message):
    with pytest.raises(ValueError, match=message):
        DiCacheConfig(threshold=0.1, **bad)


def test_profiles_of_other_models_and_broken_ones(tmp_path):
    def plan(path):
        return plan_cache(f"dicache(profile={path})", "WanTransformer3DModel", WAN)

    path = tmp_path / "profile.json"
    with pytest.raises(ValueError, match=r"dicache profile .* is neither a shipped profile"):
        plan(path)
    path.write_text(profile(transformer={"num_layers": 40}).model_dump_json())
    with pytest.raises(ValueError, match="is for another model: wan with num_layers 40; this one is wan with num_lay"):
        plan(path)
    content = json.loads(profile().model_dump_json())
    path.write_text(json.dumps(content | {"skip_costs": [1.0, 0.0], "expected_change": [1.0, 1.0]}))
    with pytest.raises(ValueError, match="skip_costs and expected_change must be above 0"):
        plan(path)
    path.write_text(json.dumps(content | {"skip_costs": [1.0, 1.0]}))
    with pytest.raises(ValueError, match="must have one number for each"):
        plan(path)


def test_a_model_that_nobody_calibrated_gets_the_generic_skip_costs():
    plan = plan_cache("dicache", "WanTransformer3DModel", WAN)
    assert isinstance(plan, CachePlan)
    assert isinstance(plan.policy, DiCachePolicy)
    assert plan.policy.profile is not None
    assert plan.policy.profile.family == "any"
    tiny = {"num_layers": 16, "num_attention_heads": 4, "attention_head_dim": 32, "in_channels": 16}
    of_tiny: Any = plan_cache("dicache", "WanTransformer3DModel", tiny)
    assert of_tiny.policy.profile.family == "wan"
    assert "profile=none" not in plan.text


def call(pipe, **changes):
    pipe.set_progress_bar_config(disable=True)
    values = {"prompt": "a red circle", "width": 32, "height": 32, "num_frames": 5, "num_inference_steps": 16}
    generator = torch.Generator("cpu").manual_seed(3)
    return pipe(**(values | changes), output_type="latent", generator=generator)[0]


SKIPPING = DiCacheConfig(threshold=0.2, look="run", warmup=0.2, branches="joint", max_skips=3, last_step_full=True)


@pytest.mark.parametrize("builder", [build_wan, build_hunyuan])
def test_probe_blocks_run_once_per_run_of_skips_and_the_trace_says_so(builder):
    pipe = builder()
    lists = [getattr(pipe.transformer, n) for n in ("blocks", "transformer_blocks") if hasattr(pipe.transformer, n)]
    ran = []
    for number, block in enumerate(lists[0]):
        block.register_forward_hook(lambda module, inputs, output, number=number: ran.append(number))
    with cineray.enable_cache(pipe, SKIPPING) as handle:
        call(pipe)
    entries = handle.trace.entries
    looked = [e for e in entries if e.reason != "run"]
    assert ran.count(0) == len(looked) < len(entries)
    assert ran.count(1) == sum(e.compute for e in entries)
    assert {e.cost for e in entries if e.reason == "run"} == {0.0}
    assert all(e.gamma is not None and e.statistic is None for e in entries if e.reason == "run")


def test_a_branch_that_follows_is_not_judged_itself():
    with cineray.enable_cache(pipe := build_wan(), SKIPPING) as handle:
        call(pipe)
    of = {name: [e for e in handle.trace.entries if e.branch == name] for name in ("cond", "uncond")}
    assert [e.compute for e in of["cond"]] == [e.compute for e in of["uncond"]]
    assert all(e.statistic for e in of["cond"] if e.step and e.reason != "run")
    assert {e.statistic for e in of["uncond"]} == {None}
    assert all(e.gamma is not None for e in of["uncond"] if not e.compute)


def test_a_run_goes_on_at_the_pace_of_its_first_step_within_the_clip():
    with cineray.enable_cache(pipe := build_wan(), replace(SKIPPING, gamma_clip=(-100.0, 100.0))) as handle:
        call(pipe)
    cond = [e for e in handle.trace.entries if e.branch == "cond"]
    runs = [(a, b) for a, b in pairwise(cond) if a.reason == "skip" and b.reason == "run"]
    assert runs
    for first, second in runs:
        assert second.gamma == pytest.approx(first.gamma + (first.gamma - 1))


@pytest.mark.parametrize(("builder", "threshold"), [(build_wan, 0.1), (build_hunyuan, 0.03)])
@pytest.mark.parametrize("branches", ["joint", "separate"])
def test_samples_that_are_in_different_runs_do_not_disturb_each_other(builder, threshold, branches):
    pipe, policy = in_double(builder()), replace(SKIPPING, threshold=threshold, branches=branches)
    noise = [torch.randn(1, 4, 2, 4, 4, generator=torch.Generator().manual_seed(s)) for s in (1, 2)]
    noise[1] = noise[1] * 3  # another pace of change
    prompts, alone = ["a red circle", "white square black"], []
    for prompt, latents in zip(prompts, noise, strict=True):
        with cineray.enable_cache(pipe, policy) as handle:
            alone.append(call(pipe, prompt=prompt, latents=latents))
        alone.append([(e.step, e.branch, e.compute, e.reason, e.cost) for e in handle.trace.entries])
    assert alone[1] != alone[3]
    with cineray.enable_cache(pipe, policy) as handle:
        together = call(pipe, prompt=prompts, latents=torch.cat(noise))
    for sample in range(2):
        ours = [(e.step, e.branch, e.compute, e.reason, e.cost) for e in handle.trace.entries if e.sample == sample]
        assert ours == alone[2 * sample + 1]
        torch.testing.assert_close(together[sample], alone[2 * sample][0], atol=1e-4, rtol=1e-4)


def test_a_trace_of_runs_replays_the_same_clip(tmp_path):
    pipe, path = build_wan(), tmp_path / "trace.json"
    with cineray.enable_cache(pipe, SKIPPING) as handle:
        first = call(pipe)
    path.write_text(json.dumps(handle.trace.to_dict()))
    with cineray.enable_cache(pipe, f"replay:{path}"):
        assert torch.equal(call(pipe), first)


def test_every_fourth_token_of_a_probe_holds_less_and_decides_nearly_the_same():
    pipe = build_wan()

    def seen(keep_every):
        with cineray.enable_cache(pipe, replace(SKIPPING, keep_every=keep_every)) as handle:
            call(pipe, height=64, width=64)
        return handle.trace

    whole, part = seen(1), seen(4)
    one_tensor = 2 * 4 * 4 * 48 * 4  # 32 tokens of 48 float32
    assert whole.held_bytes == 2 * 5 * one_tensor
    assert part.held_bytes == 2 * 2.75 * one_tensor
    pairs = [
        (a.statistic, b.statistic) for a, b in zip(whole.entries, part.entries, strict=True) if a.reason == "warmup"
    ]
    assert all(a == pytest.approx(b, rel=0.3) for a, b in pairs if a is not None)
    assert whole.entries != part.entries
