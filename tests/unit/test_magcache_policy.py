"""MagCache: the rule by hand, the schedules of the published ratios, and what is refused."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import build_wan

import cineray
from cineray.caching.observation import Observation
from cineray.caching.plan import CachePlan
from cineray.caching.policies.magcache import MagCachePolicy, nearest_step
from cineray.pipeline.adapters.cache_plan import plan_cache

pytestmark = pytest.mark.slow

SEEN = Observation(
    step_index=2,
    num_steps=10,
    branch_index=0,
    num_branches=1,
    sample=0,
    change_sum=None,
    previous_sum=None,
    accumulated=0.0,
    num_skips_in_a_row=0,
    num_pairs=1,
)
POLICY = MagCachePolicy(
    threshold=0.5,
    max_skips=3,
    retention=0.2,
    skip_at_threshold=False,
    round_retention=False,
    ratios=((1.0, 1.0, 0.9, 0.9, 0.9, 0.9, 1.0, 1.0, 1.0, 1.0),),
    never_skip=(),
)


def test_the_error_is_the_sum_of_distances_from_one_of_the_products():
    # ratios 0.9: 0.1, then 0.1 + 0.19, then 0.29 + 0.271 = 0.561
    first = POLICY.decide(SEEN)
    assert (first.compute, first.accumulated) == (False, pytest.approx(0.1))
    second = POLICY.decide(replace(SEEN, step_index=3, num_skips_in_a_row=1))
    assert (second.compute, second.accumulated) == (False, pytest.approx(0.29))
    third = POLICY.decide(replace(SEEN, step_index=4, num_skips_in_a_row=2))
    assert (third.compute, third.reason, third.accumulated) == (True, "threshold", 0.0)
    assert POLICY.decide(replace(SEEN, step_index=9, num_skips_in_a_row=3)).reason == "cap"


def test_the_warm_up_counts_calls_and_doubt_computes():
    def reason(policy=POLICY, **changes):
        return policy.decide(replace(SEEN, **changes)).reason

    assert [reason(step_index=s) for s in (0, 1, 2)] == ["warmup", "warmup", "skip"]
    # 13 steps of two calls: int(26 * 0.2) = 5 calls, so that the branches leave the warm-up at different steps
    two = {"num_steps": 13, "num_branches": 2, "step_index": 2}
    assert [reason(branch_index=b, **two) for b in (0, 1)] == ["warmup", "skip"]
    assert reason(num_pairs=0) == "empty"
    assert reason(replace(POLICY, threshold=0.0)) == "off"
    assert reason(replace(POLICY, never_skip=(2,))) == "never"
    assert reason(replace(POLICY, retention=0.28, round_retention=True)) == "warmup"  # 2.8 calls are 3
    equal = replace(POLICY, ratios=((0.5,) * 10,))
    assert reason(equal) == "threshold"
    assert reason(replace(equal, skip_at_threshold=True)) == "skip"


@pytest.mark.parametrize(("num_steps", "num_ratios"), [(1, 50), (25, 50), (50, 50), (28, 50), (40, 28), (7, 100)])
def test_other_numbers_of_steps_take_the_nearest_ratio(num_steps, num_ratios):
    def nearest_interp(source, length):  # MagCache4Wan2.1/magcache_generate.py, lines 27-34
        if length == 1:
            return np.array([source[-1]])
        return source[np.round(np.arange(length) * ((len(source) - 1) / (length - 1))).astype(int)]

    ours = [nearest_step(step, num_steps, num_ratios) for step in range(num_steps)]
    assert ours == list(nearest_interp(np.arange(num_ratios), num_steps))


WAN_1_3B = {"num_layers": 30, "num_attention_heads": 12, "in_channels": 16}
WAN_14B = {"num_layers": 40, "num_attention_heads": 40, "in_channels": 16}


@pytest.mark.parametrize(
    ("config", "policy", "computed_after_warmup"),
    [
        (WAN_1_3B, "magcache(max_skips=2)", [12, 15, 18, 21, 24, 27, 30, 33, 36, 39, 42, 44, 46, 48, 49]),
        (WAN_1_3B, "magcache", [14, 19, 24, 29, 34, 38, 41, 44, 46, 48, 49]),
        (WAN_14B, "magcache", [16, 23, 30, 36, 41, 44, 47, 49]),
    ],
)
def test_the_schedules_of_the_published_ratios(config, policy, computed_after_warmup):
    """Recomputed by hand from the official lists with the official rule: E 0.12 K 2 or 4, E 0.24 K 6, 50 steps."""
    plan = plan_cache(policy, "WanTransformer3DModel", config)
    assert isinstance(plan, CachePlan)
    for branch in (0, 1):
        skips, computed = 0, []
        for step in range(50):
            seen = replace(
                SEEN, step_index=step, num_steps=50, branch_index=branch, num_branches=2, num_skips_in_a_row=skips
            )
            compute = plan.policy.decide(seen).compute
            skips = 0 if compute else skips + 1
            computed += [step] if compute else []
        assert computed == [*range(10), *computed_after_warmup]


def write_profile(path, **changes):
    content = {
        "policy": "magcache",
        "family": "wan",
        "transformer": {"num_layers": 3},
        "source": "a test",
        "threshold": 0.3,
        "max_skips": 2,
        "ratios": {"cond": [1.0, 1.0, 0.9, 0.9, 0.9], "uncond": [1.0, 1.0, 0.5, 0.5, 0.5]},
    }
    path.write_text(json.dumps(content | changes))
    return f"magcache(profile={path})"


def test_each_branch_has_its_ratios_and_off_equals_the_plain_pipeline(tmp_path):
    policy = write_profile(tmp_path / "profile.json")
    pipe = build_wan()
    pipe.set_progress_bar_config(disable=True)

    def call():
        generator = torch.Generator("cpu").manual_seed(3)
        sizes = {"width": 32, "height": 32, "num_frames": 5, "num_inference_steps": 5, "guidance_scale": 4.0}
        return pipe("a red circle", **sizes, generator=generator, output_type="latent")[0]

    plain = call()
    with cineray.enable_cache(pipe, policy.replace(")", ",threshold=0)")) as handle:
        assert torch.equal(call(), plain)
    with cineray.enable_cache(pipe, policy) as handle:
        assert not torch.equal(call(), plain)
        summary = handle.trace.summary()
    computed = {b: [e.step for e in handle.trace.entries if e.branch == b and e.compute] for b in ("cond", "uncond")}
    # warm-up int(10 * 0.2) = 2 calls; cond: errors 0, 0.1, then the cap of 2; uncond: 0, then 0.5 is too much
    assert computed == {"cond": [0, 3], "uncond": [0, 2, 3, 4]}
    one_tensor = 2 * 2 * 2 * 48 * 4
    assert summary["held_bytes"] == 2 * 2 * one_tensor  # per branch the residual and what entered the blocks


def test_the_policys_text_tells_its_ratios_apart(tmp_path):
    def text(**changes):
        plan = plan_cache(
            write_profile(tmp_path / "profile.json", **changes), "WanTransformer3DModel", {"num_layers": 3}
        )
        assert plan is not None
        return plan.text

    assert text().startswith("magcache(threshold=0.3,max_skips=2,retention=0.2,")
    assert text(source="elsewhere") == text()
    assert text(ratios={"cond": [1.0, 0.9]}) != text()


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        (
            "magcache",
            "magcache has no profile of this model; make one with `cineray calibrate magcache --out FILE.json`",
        ),
        ("magcache(threshold=-1)", "threshold must be 0 or more, got -1.0"),
        ("magcache(max_skips=-1)", "max_skips must be 0 or more steps, got -1"),
        ("magcache(max_skips=1.5)", "option max_skips of magcache"),
        ("magcache(retention=2)", "retention must be a fraction of the steps, 0 to 1, got 2.0"),
        ("magcache(profile=hunyuan-video-544p)", "is for another model: hunyuan-video"),
    ],
)
def test_bad_options_are_one_clear_error(spec, said):
    with pytest.raises(ValueError) as caught:  # noqa: PT011 (the text is compared below)
        plan_cache(spec, "WanTransformer3DModel", {"num_layers": 3})
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"ratios": {}}, "ratios: must have a row for cond"),
        ({"ratios": {"cond": []}}, "ratios: each row must have one ratio per step"),
        ({"ratios": {"cond": [1.0], "uncond": [1.0, 1.0]}}, "ratios: each row must have one ratio per step"),
        ({"ratios": {"cond": [1.0, "x"]}}, "ratios.cond.1: Input should be a valid number"),
        ({"ratios": {"other": [1.0]}}, "ratios.other"),
        ({"max_skips": None}, "max_skips: Input should be a valid integer"),
    ],
)
def test_bad_profiles_are_one_clear_error(tmp_path, changes, said):
    policy = write_profile(tmp_path / "profile.json", **changes)
    with pytest.raises(ValueError, match=said):
        plan_cache(policy, "WanTransformer3DModel", {"num_layers": 3})
