"""The setting of the clips to come, by what audited clips kept: the rule alone."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cineray.caching.policies.adapting import FASTER_AFTER, UNCACHED, AuditedClip, next_speedup, policy_at
from cineray.caching.policies.auto import FloorPlan
from cineray.caching.profile import QualityPoint, QualityProfile

SPEEDUPS = (1.5, 2.0, 2.5, 3.0)
MEANS = (60.0, 55.0, 50.0, 45.0)


def profile(family="any", spread=2.0, num_clips=3):
    offsets = [(number - (num_clips - 1) / 2) * spread for number in range(num_clips)]
    points = [
        QualityPoint(
            speedup=speedup, psnr_db=tuple(mean + o for o in offsets), vmaf=tuple(mean + 35 + o / 10 for o in offsets)
        )
        for speedup, mean in zip(SPEEDUPS, MEANS, strict=True)
    ]
    return QualityProfile(family=family, transformer={}, source="", fitted="mine.json", points=tuple(points))


def plan(floor=40.0, **changes):
    return FloorPlan(floors={"psnr": floor}, profile=profile(**changes), speedup=2.5)


def kept(speedup, psnr):
    return AuditedClip(speedup=speedup, scores={"psnr": psnr})


def at_mean(speedup, above=0.0):
    return kept(speedup, MEANS[SPEEDUPS.index(speedup)] + above)


def test_nothing_known_changes_nothing():
    assert next_speedup(plan(), 2.5, (), 0) == 2.5
    assert next_speedup(plan(), 2.5, (AuditedClip(speedup=2.5, scores={}),), 1) == 2.5
    assert next_speedup(plan(), 2.5, (kept(7.7, 1.0),), 1) == 2.5  # a setting that the profile has not


def test_a_clip_below_its_floor_makes_the_next_ones_slower_at_once():
    assert next_speedup(plan(), 2.5, [at_mean(2.5)], 1) == 2.5
    below = [*[at_mean(2.5, 5)] * 200, kept(2.5, 39.9)]  # 1 of 200, though 5 % may be below
    assert next_speedup(plan(), 2.5, below, 1) == 2.0
    assert next_speedup(plan(), 2.0, [*below, *[at_mean(2.0, 5)] * 3], 3) == 2.5


def test_what_clips_kept_is_carried_over_to_other_settings_in_spreads():
    # 8 spreads below the mean: at 2x it would keep 39 dB
    assert next_speedup(plan(40), 2.5, [at_mean(2.5, -16)], 1) == 1.5
    assert next_speedup(plan(40), 2.5, [at_mean(2.5, -9)], 1) == 2.0


def test_faster_goes_by_one_setting_and_after_several_clips():
    good = [at_mean(1.5, 10)]
    assert next_speedup(plan(), 1.5, good * (FASTER_AFTER - 1), 1) == 1.5
    assert next_speedup(plan(), 1.5, good * FASTER_AFTER, 1) == 2.0
    assert next_speedup(plan(), 2.0, good * FASTER_AFTER, 1) == 2.0  # none of them was rendered at 2x
    assert next_speedup(plan(), 3.0, [at_mean(3.0, 10)] * 9, 1) == 3.0  # there is nothing faster


def test_the_slowest_is_tried_before_clips_are_rendered_uncached():
    far_below = [kept(3.0, 5.0)]
    assert next_speedup(plan(), 3.0, far_below, 1) == 1.5
    assert next_speedup(plan(), 1.5, [*far_below, at_mean(1.5, 3)], 1) == UNCACHED
    assert next_speedup(plan(), UNCACHED, [*far_below, at_mean(1.5, 3)], 0) == UNCACHED


def test_a_models_own_profile_weighs_as_much_as_its_clips():
    audited = [at_mean(2.5, -5.0)] * 2
    others, own = (plan(38.0, family=family, num_clips=16, spread=0.5) for family in ("any", "wan"))
    assert next_speedup(others, 3.0, audited, 2) < next_speedup(own, 3.0, audited, 2)


def test_each_floor_is_kept():
    both = FloorPlan(floors={"psnr": 30.0, "vmaf": 82.0}, profile=profile(), speedup=2.5)
    good, bad = ({"psnr": 52.0, "vmaf": vmaf} for vmaf in (85.0, 81.0))
    assert next_speedup(both, 2.5, [AuditedClip(speedup=2.5, scores=good)], 1) == 2.5
    assert next_speedup(both, 2.5, [AuditedClip(speedup=2.5, scores=bad)], 1) == 2.0
    # no VMAF: nothing says that a faster setting keeps it
    assert next_speedup(both, 1.5, [AuditedClip(speedup=1.5, scores={"psnr": 90.0})] * 9, 1) == 1.5


def test_a_setting_has_a_cache():
    assert policy_at(plan(), UNCACHED) == "none"
    assert policy_at(plan(), 2.25) == "fitted(speedup=2.25,profile=mine.json)"


SCORES = st.floats(0, 100)
AUDITED = st.lists(st.tuples(st.sampled_from(SPEEDUPS), SCORES), max_size=60)


@given(
    audited=AUDITED,
    losses=st.lists(st.floats(0, 100), min_size=60, max_size=60),
    now=st.sampled_from((UNCACHED, *SPEEDUPS)),
    floor=st.floats(1, 90),
    num_new=st.integers(0, 5),
    family=st.sampled_from(("any", "wan")),
)
def test_a_worse_audit_never_gives_a_faster_setting(audited, losses, now, floor, num_new, family):
    asked = plan(floor, family=family)
    better = [kept(speedup, score) for speedup, score in audited]
    worse = [kept(speedup, score - loss) for (speedup, score), loss in zip(audited, losses, strict=False)]
    num_new = min(num_new, len(audited))
    chosen = next_speedup(asked, now, better, num_new)
    assert next_speedup(asked, now, worse, num_new) <= chosen
    assert next_speedup(plan(floor + 5, family=family), now, better, num_new) <= chosen


@given(audited=AUDITED, now=st.sampled_from((UNCACHED, *SPEEDUPS)), floor=st.floats(1, 90), num_new=st.integers(0, 60))
def test_it_gives_a_known_setting_at_most_one_faster(audited, now, floor, num_new):
    clips = [kept(speedup, score) for speedup, score in audited]
    num_new = min(num_new, len(clips))
    chosen = next_speedup(plan(floor), now, clips, num_new)
    assert chosen == next_speedup(plan(floor), now, clips, num_new)
    assert chosen in (UNCACHED, *SPEEDUPS)
    allowed = SPEEDUPS if now == UNCACHED else (*SPEEDUPS, 99.0)
    assert now != UNCACHED or chosen == UNCACHED
    if now != UNCACHED:
        assert chosen <= allowed[allowed.index(now) + 1]
    fell = [clip.speedup for clip in clips[len(clips) - num_new :] if clip.scores["psnr"] < floor]
    if fell and now != UNCACHED:
        assert chosen < min(fell) or chosen == SPEEDUPS[0]
    assert math.isfinite(chosen)


@pytest.mark.parametrize("num_clips", [2, 3, 16])
def test_equal_scores_of_a_profile_give_no_infinite_distance(num_clips):
    asked = plan(40, spread=0.0, num_clips=num_clips)
    assert next_speedup(asked, 2.5, [at_mean(2.5, -3)], 1) in SPEEDUPS
