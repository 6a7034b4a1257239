"""The DiCache rule as a pure function, and the text forms of policies."""

import math
from dataclasses import replace

import pytest

from cineray.caching.forecast import gamma, streak_gamma
from cineray.caching.observation import AlignmentSums, Observation
from cineray.caching.policies.dicache import DiCacheConfig, DiCachePolicy
from cineray.caching.spec import parse_spec
from cineray.pipeline.adapters import flux
from cineray.pipeline.adapters.cache_plan import plan_cache

SEEN = Observation(
    step_index=20,
    num_steps=50,
    branch_index=0,
    num_branches=2,
    sample=0,
    change_sum=3.0,
    previous_sum=100.0,
    accumulated=0.05,
    num_skips_in_a_row=1,
    num_pairs=2,
)


USUAL = DiCacheConfig(threshold=0.1)


def decide(config=USUAL, **changes):
    return DiCachePolicy(config).decide(replace(SEEN, **changes))


def test_change_is_accumulated_until_the_threshold():
    skip = decide()
    assert (skip.compute, skip.reason) == (False, "skip")
    assert skip.accumulated == pytest.approx(0.08)
    compute = decide(change_sum=5.0)
    assert (compute.compute, compute.accumulated, compute.reason) == (True, 0.0, "threshold")


def test_a_change_that_equals_the_threshold():
    exact = {"accumulated": 0.0, "change_sum": 25.0, "previous_sum": 100.0}
    config = DiCacheConfig(threshold=0.25)
    assert decide(config, **exact).compute
    assert not decide(replace(config, skip_at_threshold=True), **exact).compute


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_doubt_computes_and_forgets_what_was_accumulated(bad):
    for name in ("change_sum", "previous_sum"):
        decision = decide(DiCacheConfig(threshold=1e9), **{name: bad})
        if name == "previous_sum" and bad == math.inf:
            continue  # 3 / inf is 0: a probe that is infinite shows in change_sum
        assert decision.compute
        assert decision.accumulated == 0.0
    assert decide(previous_sum=0.0).compute
    assert decide(change_sum=None).compute
    assert decide(num_pairs=0).reason == "empty"


def test_warmup_counts_calls_as_the_official_code_does():
    thirteen = {"num_steps": 13, "change_sum": 0.0, "accumulated": 0.0}  # int(26 * 0.2) = 5 calls
    assert decide(**thirteen, step_index=2, branch_index=0).compute  # call 4
    assert not decide(**thirteen, step_index=2, branch_index=1).compute  # call 5
    of_flux = replace(flux.MODEL.presets["dicache-paper"], threshold=1.0)
    single = {"num_branches": 1, "num_steps": 30}
    assert decide(of_flux, **single, step_index=6).reason == "warmup"
    assert not decide(of_flux, **single, step_index=7).compute
    assert decide(of_flux, **single, step_index=29).reason == "last"


def test_a_cap_on_skips_and_threshold_zero():
    assert decide(DiCacheConfig(threshold=1.0, max_skips=2), num_skips_in_a_row=2).reason == "cap"
    assert not decide(DiCacheConfig(threshold=1.0, max_skips=2), num_skips_in_a_row=1).compute
    still = {"change_sum": 0.0, "accumulated": 0.0}
    assert decide(DiCacheConfig(threshold=0, skip_at_threshold=True), **still).reason == "off"


@pytest.mark.parametrize(
    ("field", "bad"),
    [
        ("threshold", -0.1),
        ("threshold", math.nan),
        ("threshold", math.inf),
        ("probe_depth", 0),
        ("warmup", 1.5),
        ("alignment", "l3"),
        ("gamma_clip", (2.0, 1.0)),
        ("branches", "both"),
        ("base", "output"),
        ("max_skips", -1),
    ],
)
def test_bad_configurations_are_named(field, bad):
    with pytest.raises(ValueError, match=f"DiCacheConfig: {field} must be"):
        DiCacheConfig(**({"threshold": 0.1} | {field: bad}))


def test_gamma_by_distance_and_by_projection():
    # p - b = -1 * (a - b): the projection has a sign, the distance has not
    sums = AlignmentSums(l1_now=4.0, l1_span=4.0, dot=-8.0, square_span=8.0)
    assert gamma(sums, "l1") == 1.0
    assert gamma(sums, "lsq") == -1.0
    assert streak_gamma(-1.0, 0, (0, 2)) == 0.0
    assert streak_gamma(4.0, 0, (1, 2)) == 2.0
    for broken in (replace(sums, l1_span=0.0), replace(sums, l1_now=math.nan), replace(sums, l1_span=math.nan)):
        assert gamma(broken, "l1") is None


def test_a_policy_is_named_with_its_options():
    plan = plan_cache("dicache-paper(threshold=0.15,gamma_clip=1:1.5)", "WanTransformer3DModel", {"num_layers": 30})
    assert plan is not None
    assert plan.text.startswith("dicache-paper(threshold=0.15,probe_depth=1,warmup=0.2,")
    assert "gamma_clip=1.0:1.5" in plan.text
    assert plan_cache("none", "AnyModel", {}) is None


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("dicash", "unknown policy 'dicash'; valid: none, dicache, dicache-paper, fitted, auto, fbcache, interval,"),
        ("dicache(treshold=1)", "unknown option 'treshold=1' of dicache; valid: threshold, probe_depth,"),
        ("dicache(threshold)", "unknown option 'threshold' of dicache"),
        ("dicache(threshold=x)", "option threshold of dicache: Input should be a valid number"),
        ("dicache(threshold=-1)", "threshold must be 0 or more, got -1.0"),
        ("dicache(threshold=nan)", "threshold must be 0 or more, got nan"),
        ("dicache(probe_depth=30)", "probe_depth must be at most 29 for this model, got 30"),
        ("dicache(gamma_clip=1)", "option gamma_clip of dicache"),
        ("dicache:file.json", "dicache takes no file"),
        ("smoothcache:/no/such.json", "schedule /no/such.json cannot be read: No such file"),
        ("smoothcache", "smoothcache takes a file, as smoothcache:SCHEDULE.json"),
        ("replay", "replay takes a file, as replay:TRACE.json"),
        ("replay:/no/such.json", "trace /no/such.json cannot be read: No such file"),
        ("none(x=1)", "unknown option 'x=1' of none; valid: it has none"),
        ("dicache(", "is not of the form"),
        ("interval(interval=0)", "interval must be 1 or more steps, got 0"),
    ],
)
def test_bad_texts_are_one_clear_error(text, said):
    with pytest.raises(ValueError) as caught:  # noqa: PT011 (the text is compared below)
        plan_cache(text, "WanTransformer3DModel", {"num_layers": 30})
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


HUNYUAN = {"num_layers": 20, "num_single_layers": 40}


def test_the_probe_may_take_all_dual_stream_blocks_but_no_more():
    assert plan_cache("dicache(probe_depth=20)", "HunyuanVideoTransformer3DModel", HUNYUAN) is not None
    with pytest.raises(ValueError, match="at most 20"):
        plan_cache("dicache(probe_depth=21)", "HunyuanVideoTransformer3DModel", HUNYUAN)


def test_parsing_keeps_options_as_written():
    assert parse_spec(" dicache( threshold = 0.2 , warmup=0 ) ").options == {"threshold": "0.2", "warmup": "0"}
