"""`fitted`: where the computed steps lie, and forecasts of the clean latents between them."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from conftest import build_hunyuan, build_wan
from every_model import call
from test_dicache_policy import SEEN

import cineray
from cineray.caching.forecast import damped_gamma, places_of
from cineray.caching.plan import CachePlan
from cineray.caching.policies.fitted import KNOTS, FittedConfig, FittedPolicy, curve_at, place_steps
from cineray.caching.policy import Decision, Reason
from cineray.caching.profile import FittedProfile, find_profile, generic_profile
from cineray.pipeline.adapters.cache_plan import plan_cache

WAN = {"num_layers": 30, "num_attention_heads": 12, "attention_head_dim": 128, "in_channels": 16}
EVEN = (0.0,) * len(KNOTS)
PLACES = places_of(50, None)


def profile(**changes):
    values = {"family": "wan", "transformer": {}, "source": "", "density": EVEN, "length": 0.25}
    return FittedProfile(**(values | changes))


def test_steps_lie_where_the_curve_is_high():
    early = place_steps((2.0, 2.0, 0.0, 0.0, 0.0, 0.0, 0.0), 20, PLACES)
    assert early[:8] == list(range(8))
    gaps = [after - before for before, after in pairwise(early[10:])]
    assert min(gaps) >= 2
    late = place_steps((0.0, 0.0, 0.0, 0.0, 0.0, 2.0, 2.0), 20, PLACES)
    assert late[-5:] == [45, 46, 47, 48, 49]
    even = place_steps(EVEN, 20, PLACES)
    assert max(after - before for before, after in pairwise(even)) <= 3


@pytest.mark.parametrize("num_steps", [3, 16, 31, 50, 1000])
def test_there_are_as_many_as_asked_for_with_both_ends_among_them(num_steps):
    random = np.random.default_rng(0)
    for density in (EVEN, *random.normal(scale=3, size=(20, len(KNOTS)))):
        for number in (1, 3, num_steps // 4, num_steps // 2, num_steps - 1, num_steps, num_steps + 1):
            steps = place_steps(density, number, places_of(num_steps, None))
            # each of the three that are always computed may stand in for one that would be there anyway
            assert abs(len(steps) - min(max(number, 3), num_steps)) <= 1
            assert {0, 1, num_steps - 1} <= set(steps)
            assert steps == sorted(set(steps))


def shifted(num_steps, shift):
    """Noise levels of evenly falling times."""
    times = [1 - step / num_steps for step in range(num_steps)]
    return tuple(shift * time / (1 + (shift - 1) * time) for time in times)


def test_a_place_is_the_same_noise_in_every_schedule():
    assert places_of(50, shifted(50, 3.0)) == pytest.approx(PLACES)
    ours, theirs = shifted(1000, 3.0), shifted(1000, 12.0)
    places = places_of(1000, theirs)
    for step in (100, 500, 900):
        alike = min(range(1000), key=lambda other: abs(ours[other] - theirs[step]))
        assert places[step] == pytest.approx(places_of(1000, ours)[alike], abs=0.01)
    assert places[500] < 0.3  # a shift of 12 spends most steps where there is much noise
    assert places_of(3, (1.0, 0.5)) == [0, 0.5, 1]  # not of this clip


def test_of_a_schedule_with_more_early_steps_fewer_of_these_are_computed():
    policy = FittedPolicy(2.0, generic_profile(FittedProfile))
    noisy = {
        shift: [s for s in policy.computed(50, shifted(50, shift)) if shifted(50, shift)[s] > 0.9] for shift in (3, 12)
    }
    share = {shift: len(steps) / sum(sigma > 0.9 for sigma in shifted(50, shift)) for shift, steps in noisy.items()}
    assert share[12] < share[3]
    assert len(policy.computed(50, shifted(50, 12.0))) == 25


def test_a_faster_clip_leaves_steps_out_and_moves_few():
    slow, fast = (set(place_steps(generic_profile(FittedProfile).density, n, PLACES)) for n in (25, 17))
    assert set(range(6)) <= fast
    assert set(range(8)) <= slow


def test_curves_hold_each_at_its_own_speed_with_lines_between():
    slow, fast = (2.0, 1.0, 0.0, -1.0, 0.0, 0.0, -2.0), (0.0, -1.0, 0.0, 0.0, 0.0, 0.0, 2.0)
    both = profile(density=fast, density_at_2x=slow)
    assert [curve_at(both, speedup) for speedup in (1.25, 2.0, 2.8, 4.0)] == [slow, slow, fast, fast]
    halfway = curve_at(both, 1 / (0.5 * (1 / 2.0 + 1 / 2.8)))
    assert halfway == pytest.approx([(a + b) / 2 for a, b in zip(slow, fast, strict=True)])
    assert curve_at(profile(density=fast), 1.5) == fast
    slowest = tuple(number + 1 for number in slow)
    three = profile(density=fast, density_at_2x=slow, density_at_1_4x=slowest)
    assert [curve_at(three, speedup) for speedup in (1.1, 1.4, 2.0, 2.8)] == [slowest, slowest, slow, fast]
    assert curve_at(three, 2.4) == curve_at(both, 2.4)
    assert curve_at(three, 1.7)[0] == pytest.approx(2 + (1 / 1.7 - 1 / 2) / (1 / 1.4 - 1 / 2))
    assert FittedPolicy(2.0, both).computed(50) == set(place_steps(slow, 25, PLACES))
    assert FittedPolicy(4.0, both).computed(50) == set(place_steps(fast, 13, PLACES))
    assert both.digest != profile(density=fast).digest


def test_a_forecast_is_the_mean_of_a_gaussian_process_that_goes_through_both_steps():
    """Against the process' own conditional mean, with an unknown level: a constant of a large variance."""
    length, noise, level = 12.0, 2.8e-4, 1e6
    for older, newest, step in ((0, 1, 2), (3, 5, 6), (10, 14, 20), (10, 11, 19)):
        at = np.array([older, newest, step], float)
        covariance = np.exp(-0.5 * ((at[:, None] - at) / length) ** 2) + level + noise * np.eye(3)
        weights = np.linalg.solve(covariance[:2, :2], covariance[:2, 2])
        assert weights.sum() == pytest.approx(1, abs=1e-4)
        assert damped_gamma((step - newest) / length, (newest - older) / length) == pytest.approx(weights[1], abs=1e-3)


def test_close_by_it_goes_on_at_nearly_the_pace_and_far_away_it_is_the_mean():
    assert damped_gamma(0.2, 0.2) == pytest.approx(2, abs=0.1)
    ahead = [damped_gamma(n / 12, 2 / 12) - 1 for n in range(1, 12)]
    paces = [gain / n for n, gain in enumerate(ahead, 1)]
    assert paces == sorted(paces, reverse=True)
    assert damped_gamma(200, 0.2) == pytest.approx(0.5)


@pytest.mark.parametrize("speedup", [1.25, 2.0, 2.5, 3.3, 4.0])
@pytest.mark.parametrize("num_steps", [16, 30, 50, 100])
def test_a_speed_up_is_kept_whatever_the_number_of_steps(speedup, num_steps):
    policy = FittedPolicy(speedup, generic_profile(FittedProfile))
    computed, decision = 0, Decision.compute_because(Reason.EMPTY)
    for step in range(num_steps):
        decision = policy.decide(replace(SEEN, step_index=step, num_steps=num_steps, num_pairs=min(2, computed)))
        computed += decision.compute
    assert abs(computed - -(-num_steps // speedup)) <= 1
    assert decision.reason == "last"


def test_clips_of_few_steps_and_a_speed_up_of_one_skip_nothing():
    for policy, num_steps in ((FittedPolicy(4.0, profile()), 15), (FittedPolicy(1.0, profile()), 50)):
        seen = [replace(SEEN, step_index=step, num_steps=num_steps, num_pairs=2) for step in range(num_steps)]
        assert {policy.decide(one).reason for one in seen} == {"off"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"density": (0.0,) * 6}, "at least 7 items"),
        ({"density": (0.0,) * 6 + (float("nan"),)}, "finite number"),
        ({"density": (0.0,) * 6 + (30.0,)}, "less than or equal to 20"),
        ({"length": 0.0}, "greater than 0"),
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
    other.write_text(profile(transformer={"num_layers": 7}).model_dump_json())
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
