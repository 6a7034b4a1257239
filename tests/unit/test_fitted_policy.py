"""`fitted`: schedules and forecasts from how residuals move over the steps."""

import json
from dataclasses import replace
from itertools import combinations, pairwise

import numpy as np
import pytest
import torch
from conftest import build_hunyuan, build_wan
from every_model import call
from test_dicache_policy import SEEN

import cineray
from cineray.caching.plan import CachePlan
from cineray.caching.policies.fitted import MAX_SKIPS, NUGGET, FittedConfig, FittedPolicy, forecasts, schedule
from cineray.caching.policy import Decision, Reason
from cineray.caching.profile import FittedProfile, find_profile
from cineray.pipeline.adapters.cache_plan import plan_cache

WAN = {"num_layers": 30, "num_attention_heads": 12, "attention_head_dim": 128, "in_channels": 16}


def curve(num_steps=50, size=40, seed=0):
    """Residuals [T, size] that move smoothly, faster at the end."""
    random, time = np.random.default_rng(seed), np.linspace(0, 1, num_steps)[:, None]
    start, slope, bend = random.normal(size=(3, size))
    return start + slope * time + 2 * bend * time**4


def products_of(residuals):
    return residuals @ residuals.T


def profile(residuals=None, **changes):
    residuals = curve() if residuals is None else residuals
    products = products_of(residuals)
    rows = tuple(tuple(row[: number + 1]) for number, row in enumerate(products))
    values = {"family": "wan", "transformer": {}, "source": "", "products": rows, "weights": (1.0,) * len(rows)}
    return FittedProfile(**(values | changes))


def test_a_forecast_is_the_nearest_point_of_the_line_and_its_error_is_the_distance():
    residuals = curve()
    gammas, errors = forecasts(products_of(residuals))
    for a, g, n in ((10, 1, 1), (20, 3, 2), (40, 5, 8)):
        newest, older, now = residuals[a], residuals[a - g], residuals[a + n]
        span = newest - older
        best = np.linalg.lstsq(span[:, None], now - older, rcond=None)[0][0]
        assert gammas[a, g, n] == pytest.approx(best)
        assert errors[a, g, n] == pytest.approx(np.square(older + best * span - now).sum(), abs=1e-9)


def test_no_other_schedule_of_as_many_steps_has_a_smaller_error():
    residuals = curve(num_steps=12)
    products, weights = products_of(residuals), np.linspace(1, 2, 12)
    _, errors = forecasts(products + np.diag(NUGGET**2 * np.diag(products)))

    def cost(computed):
        total = 0.0
        for (older, newest), (_, following) in pairwise(pairwise(computed)):
            for step in range(newest + 1, following):
                total += weights[step] ** 2 * errors[newest, newest - older, step - newest]
        return total

    found = [step for step in range(12) if step not in schedule(products, weights, 6)]
    assert len(found) == 6
    every = [cost([0, 1, *middle, 11]) for middle in combinations(range(2, 11), 3)]
    assert cost(found) == pytest.approx(min(every))


@pytest.mark.parametrize("speedup", [1.25, 2.0, 2.5, 3.3, 4.0])
@pytest.mark.parametrize("num_steps", [16, 30, 50, 100])
def test_a_speed_up_is_kept_whatever_the_number_of_steps(speedup, num_steps):
    policy = FittedPolicy(speedup, profile())
    computed, longest, run, decision = 0, 0, 0, Decision.compute_because(Reason.EMPTY)
    for step in range(num_steps):
        seen = replace(SEEN, step_index=step, num_steps=num_steps, num_pairs=min(2, computed), num_skips_in_a_row=run)
        decision = policy.decide(seen)
        computed += decision.compute
        run = 0 if decision.compute else run + 1
        longest = max(longest, run)
        assert decision.compute or (decision.gamma is not None and decision.gamma >= 0)
    assert computed == -(-num_steps // speedup)
    assert longest <= MAX_SKIPS
    assert decision.reason == "last"


def test_clips_of_few_steps_and_a_speed_up_of_one_skip_nothing():
    for policy, num_steps in ((FittedPolicy(4.0, profile()), 15), (FittedPolicy(1.0, profile()), 50)):
        seen = [replace(SEEN, step_index=step, num_steps=num_steps, num_pairs=2) for step in range(num_steps)]
        assert {policy.decide(one).reason for one in seen} == {"off"}


def test_residuals_of_another_number_of_steps_lie_on_the_lines_between():
    residuals = curve(num_steps=5)
    products, weights = profile(residuals, weights=(1, 2, 3, 4, 5)).at(9)
    between = np.stack([residuals[i // 2] if i % 2 == 0 else residuals[i // 2 : i // 2 + 2].mean(0) for i in range(9)])
    np.testing.assert_allclose(products, products_of(between), atol=1e-9)
    np.testing.assert_allclose(weights, np.linspace(1, 5, 9))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weights": (1.0,)}, "one row and one number for each"),
        ({"products": ((1.0,), (1.0,)), "weights": (1.0, 1.0)}, "must be a triangle"),
        ({"weights": (-1.0,) * 50}, "0 or more"),
    ],
)
def test_broken_profiles(changes, message):
    with pytest.raises(ValueError, match=message):
        profile(**changes)


@pytest.mark.parametrize("speedup", [0.5, 9, float("nan")])
def test_bad_speed_ups(speedup):
    with pytest.raises(ValueError, match="speedup must be 1 to 8"):
        FittedConfig(speedup=speedup)


def test_a_generic_profile_can_be_asked_for_by_name_and_one_of_another_model_cannot(tmp_path):
    plan = plan_cache("fitted", "WanTransformer3DModel", WAN)
    named = plan_cache("fitted(profile=generic)", "WanTransformer3DModel", WAN)
    assert isinstance(plan, CachePlan)
    assert named is not None
    assert plan.text == named.text
    other = tmp_path / "other.json"
    other.write_text(json.dumps(json.loads(profile(transformer={"num_layers": 7}).model_dump_json(by_alias=True))))
    with pytest.raises(ValueError, match="is for another model: wan with num_layers 7"):
        find_profile(FittedProfile, str(other), "wan", WAN)


@pytest.mark.slow
@pytest.mark.parametrize("builder", [build_wan, build_hunyuan])
def test_no_block_runs_on_a_skipped_step_and_a_speed_up_of_one_changes_nothing(builder):
    pipe = builder()
    blocks = next(
        getattr(pipe.transformer, n) for n in ("blocks", "transformer_blocks") if hasattr(pipe.transformer, n)
    )
    ran = []
    blocks[0].register_forward_hook(lambda *_: ran.append(1))
    bare = call(pipe, steps=20)
    ran.clear()
    with cineray.enable_cache(pipe, "fitted(speedup=2)") as handle:
        call(pipe, steps=20)
    branches = {entry.branch for entry in handle.trace.entries}
    assert len(ran) == 10 * len(branches)
    assert handle.trace.summary()["cost"] == 0.5
    with cineray.enable_cache(pipe, "fitted(speedup=1)"):
        assert torch.equal(call(pipe, steps=20), bare)
