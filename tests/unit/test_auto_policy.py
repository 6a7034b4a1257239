"""`auto`: the setting that a quality profile promises a floor of."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cineray.caching.plan import CachePlan
from cineray.caching.policies.auto import CLIFF_DB, fastest, fastest_between, lower_bound
from cineray.caching.policies.fitted import FittedConfig, FittedPolicy, num_computed_at
from cineray.caching.profile import QualityPoint, QualityProfile
from cineray.pipeline.adapters.cache_plan import plan_cache
from cineray.pipeline.loading.checkpoint import open_checkpoint

TINY = {"num_layers": 16, "num_attention_heads": 4, "attention_head_dim": 32, "in_channels": 16}


def point(speedup, mean, spread=1.0):
    return QualityPoint(speedup=speedup, psnr_db=(mean - spread, mean, mean + spread))


POINTS = (point(1.5, 60), point(2.0, 55), point(2.5, 50), point(3.0, 45))


def test_a_bound_is_below_the_worst_of_few_clips_and_nears_a_quantile_of_many():
    assert lower_bound((50.0, 51.0, 52.0)) == pytest.approx(51 - 2.92 * math.sqrt(4 / 3), abs=0.01)  # t of 2 degrees
    many = tuple(50 + 2 * math.sin(n) for n in range(5000))  # deviation sqrt(2)
    assert lower_bound(many) == pytest.approx(50 - 1.645 * math.sqrt(2), abs=0.02)
    assert lower_bound((50.0,)) == -math.inf


def test_the_fastest_setting_that_keeps_the_floor():
    assert fastest(POINTS, 46) == 2.5  # a clip keeps 50 - 3.4
    assert fastest(POINTS, 41) == 3.0
    assert fastest(POINTS, 59) is None


@pytest.mark.parametrize(("num_clips", "fastest_at"), [(18, 3.0), (19, 2.0), (38, 2.0), (39, 3.0)])
def test_no_more_is_promised_than_the_worst_clips_kept(num_clips, fastest_at):
    """VMAF of clips that lose nothing, but for one: 99 and 94, with a normal bound above 95.

    A further clip is below the lowest of 19 with 5 %, of 38 with 2.6 %, and below the second of 39 with 5 %.
    """
    alike = (99.0,) * (num_clips - 1)
    rows = [
        QualityPoint(speedup=s, psnr_db=(50.0,) * num_clips, vmaf=(*alike, worst))
        for s, worst in ((2.0, 98.5), (3.0, 94.0))
    ]
    assert lower_bound(rows[1].vmaf) > 95
    assert [fastest(rows, floor, lambda row: row.vmaf) for floor in (90, 95)] == [3.0, fastest_at]


def test_a_setting_beyond_one_that_breaks_the_floor_is_not_taken():
    assert fastest((*POINTS, point(3.5, 58)), 46) == 2.5


@pytest.mark.parametrize(
    ("falls_at", "fastest_at_46", "fastest_at_52"),
    [
        ((), 2.5, 2.0),
        ((2.0,), 2.5, 1.5),  # not at 2x, whose own clips did not all keep it; but nothing against 2.5x
        ((1.5,), None, None),  # the slowest has no slower neighbour that says otherwise
        ((2.0, 2.5), 1.5, 1.5),
        ((2.5,), 2.0, 2.0),
    ],
)
def test_a_clip_that_falls_at_one_slower_setting_alone_speaks_against_that_setting(
    falls_at, fastest_at_46, fastest_at_52
):
    rows = [
        QualityPoint(speedup=s, psnr_db=(20.0 if s in falls_at else db, *[db] * 19))
        for s, db in ((1.5, 60.0), (2.0, 55.0), (2.5, 50.0), (3.0, 45.0))
    ]
    assert fastest(rows, 46) == fastest_at_46
    assert fastest(rows, 52) == fastest_at_52


def test_two_of_twenty_clips_that_fall_at_a_setting_alone_are_a_trend():
    rows = [
        QualityPoint(speedup=s, psnr_db=(*[35.0 if s == 2.0 else db] * num_falling, *[db] * (20 - num_falling)))
        for num_falling in (1, 2)
        for s, db in ((1.5, 60.0), (2.0, 55.0), (2.5, 50.0))
    ]
    assert fastest(rows[:3], 46) == 2.5
    assert fastest(rows[3:], 46) == 1.5


def test_clips_that_a_neighbour_was_not_measured_on_are_not_lifted():
    rows = [QualityPoint(speedup=s, psnr_db=(db, *[55.0] * 19)) for s, db in ((1.5, 60.0), (2.0, 20.0), (2.5, 50.0))]
    assert fastest(rows, 46) == 2.5
    rows[0] = QualityPoint(speedup=1.5, psnr_db=(60.0, 60.0))
    assert fastest(rows, 46) == 1.5


def test_the_edge_of_a_cliff_is_stayed_off():
    cliff = (point(1.5, 60), point(2.0, 55), point(2.5, 54), point(3.0, 54 - CLIFF_DB - 1))
    assert fastest(cliff, 48) == 2.0
    assert fastest(cliff, 30) == 3.0  # all keep it, and there is nothing beyond


@pytest.mark.parametrize(
    ("floor", "computed"),
    [  # of 50 steps the points compute 34, 25, 20 and 17; clips keep 56.6, 51.6, 46.6 and 41.6 dB
        (46.7, 21),  # almost all of the way from 25 to 20, and a whole step more than the line has
        (49, 23),  # 2.6 / 5 of the way from 2x to 2.5x: 2.26x
        (51.7, 26),
        (51.5, 25),  # on the line 2.009x, which takes 25 steps as 2x does
        (41, 17),  # all keep it
        (59, None),
    ],
)
def test_between_two_settings_a_line_says_what_is_kept(floor, computed):
    found = fastest_between(POINTS, floor, 50)
    assert (found and num_computed_at(50, found)) == computed


def test_between_settings_each_clip_keeps_the_floor_by_its_own_line():
    """25 and 20 of 50 steps, where 15 clips have 55 and 49 dB and one 51 and 45."""
    rows = [QualityPoint(speedup=s, psnr_db=(*[db] * 15, db - 4)) for s, db in ((2.0, 55.0), (2.5, 49.0))]
    assert lower_bound(rows[0].psnr_db) > 52.9  # so that the bounds' line is above that of the worst clip
    assert lower_bound(rows[1].psnr_db) < 47.01
    computed = {floor: num_computed_at(50, fastest_between(rows, floor, 50) or 1) for floor in (47.5, 49.8, 51.5)}
    assert computed == {47.5: 22, 49.8: 24, 51.5: 25}
    uneven = [rows[0], rows[1].model_copy(update={"psnr_db": (49.0, 49.0)})]
    assert fastest_between(uneven, 50.0, 50) == 2.0  # other clips


@given(
    st.lists(st.tuples(st.floats(1, 8), st.floats(20, 90), st.floats(0.01, 5)), min_size=1, max_size=6),
    st.floats(1, 100),
    st.integers(8, 100),
)
def test_between_settings_is_never_slower_than_the_measured_one_nor_as_fast_as_the_next(rows, floor, num_steps):
    points = [point(*row) for row in rows]
    measured, found = fastest(points, floor), fastest_between(points, floor, num_steps)
    if measured is None or found is None:
        assert measured is found
        return
    assert found >= measured
    faster = [num_computed_at(num_steps, p.speedup) for p in points if p.speedup > measured]
    if found > measured:
        assert max(faster) < num_computed_at(num_steps, found) < num_computed_at(num_steps, measured)


def speedup_of(policy):
    plan = plan_cache(policy, "WanTransformer3DModel", TINY)
    assert isinstance(plan, CachePlan)
    assert isinstance(plan.policy, FittedPolicy)
    return plan.policy.speedup, plan.text


def test_a_floor_and_a_speed_become_a_setting_with_a_text_of_its_own(tmp_path):
    profile = QualityProfile(family="wan", transformer=TINY, source="", points=POINTS)
    path = tmp_path / "quality.json"
    path.write_text(profile.model_dump_json())
    speedup, text = speedup_of(f"auto(psnr>=46,profile={path})")
    assert speedup == 2.5
    assert text.startswith("fitted(speedup=2.5,profile=sha256=")
    path.write_text(profile.model_copy(update={"num_steps": 50}).model_dump_json())
    assert speedup_of(f"auto(psnr>=49,profile={path})")[0] == 2.174  # 23 of 50 steps
    assert speedup_of("auto(speedup=3)")[0] == 3
    assert speedup_of("auto") == speedup_of("fitted")


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        ("auto(psnr>=30,speedup=2)", "takes a floor or a speed"),
        ("auto(ssim>=0.9)", "unknown option 'ssim>=0.9' of auto; valid: psnr, vmaf, speedup"),
        ("auto(vmaf>=101)", "vmaf must be a number above 0 and up to 100"),
        ("auto(vmaf>=90,speedup=2)", "takes a floor or a speed"),
        ("auto(psnr>=high)", "option psnr of auto"),
        ("auto(psnr>=-1)", "psnr must be a number of dB above 0"),
        ("auto(speedup=20)", "speedup must be 1 to 8"),
        ("auto(psnr>=30,profile=nowhere.json)", "nor a file"),
    ],
)
def test_what_cannot_be_asked_for(policy, message):
    with pytest.raises(ValueError, match=message):
        plan_cache(policy, "WanTransformer3DModel", TINY)


def test_a_floor_out_of_reach_says_what_can_be_kept(tmp_path):
    path = tmp_path / "quality.json"
    path.write_text(QualityProfile(family="wan", transformer={}, source="", points=POINTS).model_dump_json())
    with pytest.raises(ValueError, match=r"auto\(psnr>=90\) cannot be kept: .* keeps 56.6 dB"):
        plan_cache(f"auto(psnr>=90,profile={path})", "WanTransformer3DModel", TINY)


def test_floors_of_vmaf_and_both_at_once(tmp_path):
    points = [
        QualityPoint(speedup=speedup, psnr_db=(db - 1, db, db + 1), vmaf=(seen - 1, seen, seen + 1))
        for speedup, db, seen in ((1.5, 60, 99), (2.0, 55, 95), (2.5, 50, 90), (3.0, 45, 70))
    ]
    path = tmp_path / "quality.json"
    profile = QualityProfile(family="wan", transformer=TINY, source="", points=points, num_steps=50)
    path.write_text(profile.model_dump_json())
    assert speedup_of(f"auto(vmaf>=86,profile={path})")[0] == 2.5
    assert speedup_of(f"auto(vmaf>=86,psnr>=56,profile={path})")[0] == 1.5
    assert speedup_of(f"auto(psnr>=40,vmaf>=91,profile={path})")[0] == 2.0
    with pytest.raises(ValueError, match=r"auto\(vmaf>=99\) cannot be kept: .* keeps 95.6;"):
        plan_cache(f"auto(vmaf>=99,psnr>=30,profile={path})", "WanTransformer3DModel", TINY)
    path.write_text(QualityProfile(family="wan", transformer=TINY, source="", points=POINTS).model_dump_json())
    with pytest.raises(ValueError, match="was measured without VMAF"):
        plan_cache(f"auto(vmaf>=90,profile={path})", "WanTransformer3DModel", TINY)


@pytest.mark.parametrize("name", ["tiny-wan", "tiny-hunyuan"])
def test_shipped_models_have_floors(name):
    checkpoint = open_checkpoint(name)
    slow, fast = (checkpoint.plan_cache(f"auto(psnr>={floor})") for floor in (50, 35))
    assert isinstance(slow, CachePlan)
    assert isinstance(fast, CachePlan)
    assert isinstance(slow.policy, FittedPolicy)
    assert isinstance(fast.policy, FittedPolicy)
    assert 1 < slow.policy.speedup < fast.policy.speedup
    with pytest.raises(ValueError, match="cannot be kept"):
        checkpoint.plan_cache("auto(vmaf>=99.5)")


def test_points_of_another_fitted_profile_promise_nothing(tmp_path):
    path = tmp_path / "quality.json"
    values = {"family": "wan", "transformer": TINY, "source": "", "points": POINTS}
    path.write_text(QualityProfile(**values, fitted_digest="sha256=0123456789abcdef").model_dump_json())
    with pytest.raises(ValueError, match=r"measured with another profile of fitted \(sha256=0123456789abcdef\)"):
        plan_cache(f"auto(psnr>=46,profile={path})", "WanTransformer3DModel", TINY)
    now = FittedConfig().find("wan", TINY).digest
    path.write_text(QualityProfile(**values, fitted_digest=now).model_dump_json())
    assert speedup_of(f"auto(psnr>=46,profile={path})")[0] == 2.5


def test_a_model_without_a_profile_is_told_how_to_make_one():
    with pytest.raises(ValueError, match="make one with `cineray calibrate quality"):
        plan_cache("auto(psnr>=30)", "WanTransformer3DModel", TINY | {"num_layers": 99})
