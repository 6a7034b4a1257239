"""TeaCache: the rule by hand, where its signal is taken, what is summed over ranks, and what is refused."""

import json
from dataclasses import replace

import pytest
import torch
from conftest import BUILDERS, build_flux, build_hunyuan, build_wan

import cineray
from cineray.caching.call import StepContext
from cineray.caching.consensus import SingleProcess
from cineray.caching.controller import CacheController
from cineray.caching.forecast import Forecasting
from cineray.caching.observation import Observation
from cineray.caching.plan import ModelFacts
from cineray.caching.policies.teacache import TeaCacheConfig, TeaCachePolicy, polynomial
from cineray.caching.token_sums import SignalValues
from cineray.caching.trace import Trace
from cineray.pipeline.adapters.cache_plan import plan_cache

pytestmark = pytest.mark.slow

WAN = ModelFacts(
    family="wan",
    num_blocks=3,
    num_probeable=2,
    layers=(),
    signals=("timestep-embedding", "timestep-projection"),
)

SEEN = Observation(
    step_index=5,
    num_steps=50,
    branch_index=0,
    num_branches=2,
    sample=0,
    change_sum=2.0,
    previous_sum=10.0,
    accumulated=0.0,
    num_skips_in_a_row=0,
    num_pairs=1,
)
POLICY = TeaCachePolicy(
    threshold=0.5, coefficients=(10.0, 1.0, -0.2), signal="timestep-embedding", num_first=1, last_step_full=True
)


def call(pipe, **kwargs):
    pipe.set_progress_bar_config(disable=True)
    arguments = {"prompt": "a red circle", "width": 32, "height": 32, "num_inference_steps": 12}
    if "Flux" not in type(pipe).__name__:
        arguments["num_frames"] = 5
    generator = torch.Generator("cpu").manual_seed(3)
    return pipe(**(arguments | kwargs), generator=generator, output_type="latent")[0]


def test_the_polynomial_is_that_of_numpy():
    assert polynomial((10.0, 1.0, -0.2), 0.2) == pytest.approx(10 * 0.04 + 0.2 - 0.2)
    assert polynomial((), 3.0) == 0


def test_rescaled_changes_add_up_to_the_threshold():
    # 0.4 a step for a change of 0.2: one skip, then 0.8 is over 0.5
    first = POLICY.decide(SEEN)
    assert (first.compute, first.accumulated) == (False, pytest.approx(0.4))
    second = POLICY.decide(replace(SEEN, accumulated=first.accumulated))
    assert (second.compute, second.accumulated, second.reason) == (True, 0.0, "threshold")
    # a polynomial may be negative and takes back what had been accumulated
    assert POLICY.decide(replace(SEEN, change_sum=0.0, accumulated=0.6)).accumulated == pytest.approx(0.4)
    identity = replace(POLICY, coefficients=(1.0, 0.0))
    assert identity.decide(replace(SEEN, change_sum=5.0)).compute  # 0.5 is not below 0.5


def test_the_ends_are_computed_and_doubt_computes():
    def reason(policy=POLICY, **changes):
        decision = policy.decide(replace(SEEN, change_sum=0.0, **changes))
        return decision.reason

    assert reason(step_index=0) == "warmup"
    assert reason(step_index=1) == "skip"
    assert reason(step_index=49) == "last"
    assert reason(num_pairs=0) == "empty"
    assert POLICY.decide(replace(SEEN, change_sum=None)).reason == "unknown"
    assert POLICY.decide(replace(SEEN, change_sum=float("nan"))).reason == "unknown"
    assert reason(replace(POLICY, threshold=0.0)) == "off"  # though the polynomial is negative
    kept = TeaCacheConfig(threshold=0.5, coefficients=(1.0, 0.0), ret_steps=True).policy(WAN)
    assert [reason(kept, step_index=s) for s in (4, 5, 49)] == ["warmup", "skip", "skip"]


class OtherRank(SingleProcess):
    """Two ranks: the other one's signal moved by half as much where it has tokens of its own, else by as much."""

    is_sharded: bool

    def __init__(self, is_sharded):
        super().__init__(num_ranks=2)
        object.__setattr__(self, "is_sharded", is_sharded)

    def sum_over_ranks(self, change, rest):
        others = change * torch.tensor([[0.5], [1.0]], dtype=change.dtype) if self.is_sharded else change
        return change + others, rest * 2


@pytest.mark.parametrize("is_sharded", [True, False])
def test_sharded_signals_are_summed_over_ranks_and_replicated_ones_are_not(is_sharded):
    trace = Trace(policy="", forecasting=Forecasting(), num_blocks=3, probe_depth=0)
    controller = CacheController(policy=POLICY, forecasting=Forecasting(), trace=trace, consensus=OtherRank(is_sharded))
    tokens = torch.zeros(1, 4, 8)
    for step, value in enumerate((2.0, 3.0)):
        context = StepContext(branch="cond", step_index=step, num_steps=10, num_branches=1)
        signal = SignalValues(torch.full((1, 6, 2), value), is_sharded=is_sharded)
        assert controller.begin_call(context, tokens) == [0]
        plan = controller.decide(context, tokens, tokens, signal)
        controller.remember(plan, tokens, tokens)
    assert trace.entries[1].statistic == pytest.approx((12 + 6) / 48 if is_sharded else 12 / 24)


@pytest.mark.parametrize("name", [*BUILDERS, "flux"])
def test_off_equals_the_plain_pipeline_and_a_threshold_skips_whole_steps(name):
    pipe = {**BUILDERS, "flux": build_flux}[name]()
    extra = {}
    if name == "wan_i2v":
        from PIL import Image

        extra["image"] = Image.new("RGB", (32, 32), "green")
    plain = call(pipe, **extra)
    hooks = [len(m._forward_hooks) for m in pipe.transformer.modules()]
    with cineray.enable_cache(pipe, "teacache(threshold=0,coefficients=1:0)") as handle:
        assert torch.equal(call(pipe, **extra), plain)
        assert handle.trace.summary()["skipped_steps"] == 0
    with cineray.enable_cache(pipe, "teacache(threshold=0.9,coefficients=1:0)") as handle:
        cached = call(pipe, **extra)
        assert torch.equal(call(pipe, **extra), cached)  # a second clip does not see the first
        summary = handle.trace.summary()
    assert 0 < summary["skipped_steps"] < 12
    assert summary["cost"] == pytest.approx(summary["computed_steps"] / 12, abs=1e-6)  # no block runs on a skipped step
    assert torch.equal(call(pipe, **extra), plain)
    assert [len(m._forward_hooks) for m in pipe.transformer.modules()] == hooks


def test_a_skipped_step_adds_the_last_residual_again():
    """Latents that stand still get the same output, whatever the timestep does to the blocks."""
    transformer = build_wan().transformer
    text = torch.randn(1, 512, 64)
    latents = torch.randn(1, 4, 2, 4, 4)
    blocks_input, blocks_output = [], []
    transformer.patch_embedding.register_forward_hook(lambda m, a, out: blocks_input.append(out.flatten(2).mT.clone()))
    transformer.norm_out.register_forward_hook(lambda m, a, out: blocks_output.append(a[0].clone()))
    with (
        cineray.enable_cache(transformer, "teacache(threshold=100,coefficients=1:0)", num_branches=1) as handle,
        torch.no_grad(),
    ):
        for step in range(4):
            with transformer.cache_context("cond", step_index=step, num_inference_steps=4):
                latents = latents - 0.1 * transformer(latents, torch.tensor([900 - 100 * step]), text)[0]
    assert [e.reason for e in handle.trace.entries] == ["warmup", "skip", "skip", "last"]
    for step in (1, 2):
        torch.testing.assert_close(blocks_output[step] - blocks_input[step], blocks_output[0] - blocks_input[0])


def write_profile(path, **changes):
    content = {
        "policy": "teacache",
        "family": "wan",
        "transformer": {"num_layers": 3},
        "source": "a test",
        "signals": {"timestep-embedding": {"coefficients": [1.0, 0.5], "threshold": 0.3}},
    }
    path.write_text(json.dumps(content | changes))
    return f"profile={path}"


def test_a_profile_fills_in_what_was_left_open(tmp_path):
    option = write_profile(tmp_path / "profile.json")

    def text(spec):
        plan = plan_cache(spec, "WanTransformer3DModel", {"num_layers": 3})
        assert plan is not None
        return plan.text

    assert text(f"teacache({option})") == "teacache(threshold=0.3,ret_steps=False,coefficients=1.0:0.5)"
    assert text(f"teacache({option},threshold=0.7)").startswith("teacache(threshold=0.7,")
    # the text is a policy itself
    assert text(text(f"teacache({option})")) == text(f"teacache({option})")


def test_published_and_shipped_models_have_a_profile():
    real = {"num_layers": 30, "num_attention_heads": 12, "in_channels": 16}
    plan = plan_cache("teacache", "WanTransformer3DModel", real)
    assert plan is not None
    assert plan.text.startswith("teacache(threshold=0.08,ret_steps=False,coefficients=2396.76752:-1311.10545:")
    ret = plan_cache("teacache(ret_steps=true)", "WanTransformer3DModel", real)
    assert ret is not None
    assert ret.text.startswith("teacache(threshold=0.1,ret_steps=True,coefficients=-52186.2437:")
    for model in ("tiny-wan", "tiny-hunyuan"):
        from cineray.pipeline.loading.checkpoint import open_checkpoint

        assert open_checkpoint(model).plan_cache("teacache") is not None


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("teacache", "teacache has no profile of this model; make one with `cineray calibrate teacache --out"),
        ("teacache(threshold=-1)", "threshold must be 0 or more, got -1.0"),
        ("teacache(threshold=nan)", "threshold must be 0 or more, got nan"),
        ("teacache(coefficients=1:x)", "option coefficients of teacache"),
        ("teacache(coefficients=1:inf)", "coefficients must be finite numbers"),
        ("teacache(coefficients=1:2)", "teacache with coefficients needs a threshold too"),
        ("teacache(profile=/no/such.json)", "profile /no/such.json is neither a shipped profile"),
        ("teacache(profile=wan2.1-t2v-14b)", "is for another model: wan with num_layers 40"),
        ("teacache(probe_depth=1)", "unknown option 'probe_depth=1' of teacache; valid: threshold, ret_steps,"),
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
        ({"policy": "magcache"}, "is not a teacache profile: policy"),
        ({"signals": {}}, "has no coefficients for the timestep-embedding"),
        ({"signals": {"timestep-embedding": {"coefficients": [1]}}}, "signals.timestep-embedding.threshold: Field"),
        ({"extra": 1}, "is not a teacache profile: extra"),
        ({"family": "flux"}, "is for another model: flux with num_layers 3; this one is wan with num_layers 3"),
    ],
)
def test_bad_profiles_are_one_clear_error(tmp_path, changes, said):
    option = write_profile(tmp_path / "profile.json", **changes)
    with pytest.raises(ValueError, match=said):
        plan_cache(f"teacache({option})", "WanTransformer3DModel", {"num_layers": 3})
    (tmp_path / "profile.json").write_text("{")
    with pytest.raises(ValueError, match="is not a teacache profile"):
        plan_cache(f"teacache({option})", "WanTransformer3DModel", {"num_layers": 3})


def test_profiles_that_several_fit_must_be_named():
    config = {"num_layers": 40, "num_attention_heads": 40, "in_channels": 36}
    with pytest.raises(
        ValueError, match=r"several teacache profiles fit this model: wan2.1-i2v-14b-480p, wan2.1-i2v-14"
    ):
        plan_cache("teacache", "WanTransformer3DModel", config)
    assert plan_cache("teacache(profile=wan2.1-i2v-14b-720p)", "WanTransformer3DModel", config) is not None


def test_only_wan_has_ret_steps():
    with pytest.raises(ValueError, match="teacache has no ret_steps for hunyuan-video"):
        cineray.enable_cache(build_hunyuan(), "teacache(threshold=1,coefficients=1:0,ret_steps=true)")
