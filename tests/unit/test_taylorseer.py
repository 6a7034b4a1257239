"""TaylorSeer: exact on polynomials, the steps it computes, what it costs, and what is refused."""

import pytest
import torch
from conftest import build_flux, build_hunyuan, build_wan

import cineray
from cineray.caching.policies.taylorseer import TaylorSeerConfig, derivatives, extrapolate
from cineray.pipeline.adapters import flux
from cineray.pipeline.adapters.cache_plan import plan_cache

pytestmark = pytest.mark.slow


def call(pipe, steps=12, **kwargs):
    pipe.set_progress_bar_config(disable=True)
    arguments = {"prompt": "a red circle", "width": 32, "height": 32, "num_inference_steps": steps}
    if "Flux" not in type(pipe).__name__:
        arguments["num_frames"] = 5
    generator = torch.Generator("cpu").manual_seed(3)
    return pipe(**(arguments | kwargs), generator=generator, output_type="latent")[0]


def forecasts(config, function, num_steps):
    """(step, forecast, truth) of each skipped step."""
    found, computed, seen = [], None, []
    for step in range(num_steps):
        if not config.computes(step) and computed is not None:
            seen.append((step, extrapolate(found, step - computed).item(), function(step).item()))
            continue
        past = found if config.keeps_derivatives(step) else []
        found = derivatives(function(step), past, step - computed if computed is not None else 0, config.order)
        computed = step
    return seen


def test_a_line_is_forecast_exactly_and_order_0_reuses():
    line = [f for f in forecasts(TaylorSeerConfig(interval=4), lambda s: torch.tensor(3.0 * s - 7), 20) if f[0] > 4]
    assert len(line) > 8
    assert all(forecast == pytest.approx(truth) for _, forecast, truth in line)
    reused = forecasts(TaylorSeerConfig(interval=4, order=0), lambda s: torch.tensor(float(s)), 8)
    assert [(step, forecast) for step, forecast, _ in reused] == [(1, 0), (2, 0), (3, 0), (5, 4), (6, 4), (7, 4)]


def test_a_parabola_leaves_the_error_of_backward_differences():
    """f = s^2 every n steps: f' is (2s - n), f'' is 2; at s + x the series misses n x of (s + x)^2."""
    interval = 3
    seen = list(forecasts(TaylorSeerConfig(interval=interval, order=2), lambda s: torch.tensor(s**2.0), 20))
    assert [step for step, _, _ in seen if step > 6] == [7, 8, 10, 11, 13, 14, 16, 17, 19]
    for step, forecast, truth in seen:
        if step > 2 * interval:
            assert truth - forecast == pytest.approx(interval * (step % interval))


def test_steps_are_counted_from_the_end_of_the_warm_up():
    def computed(**options):
        config = TaylorSeerConfig(**options)
        return [step for step in range(14) if config.computes(step)]

    assert computed() == [0, 5, 10]
    assert computed(interval=6, warmup_steps=3) == [0, 1, 2, 8]
    assert computed(interval=1) == list(range(14))
    assert flux.MODEL.presets["taylorseer"] == TaylorSeerConfig(interval=6, warmup_steps=3)


def test_the_warm_up_keeps_the_differences_of_its_last_step_alone():
    """As the official code does: at order 2 a warm-up of 3 gives one derivative, not two."""
    config = TaylorSeerConfig(interval=4, order=2, warmup_steps=3)
    assert [config.keeps_derivatives(step) for step in range(4)] == [False, False, True, True]


@pytest.mark.parametrize("build", [build_wan, build_hunyuan, build_flux])
def test_interval_1_changes_nothing_and_skipped_steps_run_no_layer(build):
    pipe = build()
    plain = call(pipe)
    with cineray.enable_cache(pipe, "taylorseer(interval=1,order=2)") as handle:
        assert torch.equal(call(pipe), plain)
        assert handle.trace.summary()["cost"] == 1
    lists = ("blocks", "transformer_blocks", "single_transformer_blocks")
    modules = pipe.transformer.named_modules()
    linears = [m for n, m in modules if n.split(".")[0] in lists and isinstance(m, torch.nn.Linear)]
    linears = [m for m in linears if m.out_features == m.in_features]  # in attention; modulations stay
    counts = []
    hooks = [m.register_forward_hook(lambda *_: counts.append(1)) for m in linears]
    call(pipe)
    uncached = len(counts)
    counts.clear()
    with cineray.enable_cache(pipe, "taylorseer(interval=3,order=1,warmup_steps=1)") as handle:
        cached = call(pipe)
        assert len(counts) == uncached / 3
        assert torch.equal(call(pipe), cached)  # a second clip does not see the first
        summary = handle.trace.summary()
    for hook in hooks:
        hook.remove()
    assert (summary["computed_steps"], summary["skipped_steps"]) == (4, 8)
    assert summary["cost"] == pytest.approx(1 / 3, abs=1e-6)
    assert not torch.equal(cached, plain)
    assert torch.equal(call(pipe), plain)


def test_each_order_holds_one_more_tensor_per_layer():
    pipe = build_wan()
    one_tensor = 2 * 2 * 2 * 48 * 4
    for order in (0, 1, 2):
        with cineray.enable_cache(pipe, f"taylorseer(interval=2,order={order})") as handle:
            call(pipe, guidance_scale=4.0)
        assert handle.trace.summary()["held_bytes"] == 2 * 3 * 3 * (order + 1) * one_tensor


def test_what_nobody_extrapolates_is_not_held():
    """In a single-stream block only the output projection's series is kept: attention and the MLP feed nothing else."""
    pipe = build_hunyuan()
    extrapolated = (
        ("transformer_blocks.", (".attn", ".ff", ".ff_context")),
        ("single_transformer_blocks.", (".proj_out",)),
    )
    seen = {}

    def keep(name):
        return lambda m, a, out: seen.update({name: out if isinstance(out, tuple) else (out,)})

    for name, module in pipe.transformer.named_modules():
        if any(name.startswith(start) and name.count(".") == 2 and name.endswith(ends) for start, ends in extrapolated):
            module.register_forward_hook(keep(name))
    with cineray.enable_cache(pipe, "taylorseer(interval=2,order=0)") as handle:
        call(pipe)
    expected = sum(t.numel() * t.element_size() for outputs in seen.values() for t in outputs)
    assert len(seen) == 2 * 3 + 2
    assert handle.trace.summary()["held_bytes"] == expected


def test_a_clip_that_begins_in_the_middle_is_computed_first():
    transformer = build_wan().transformer
    text, latents = torch.randn(1, 512, 64), torch.randn(1, 4, 2, 4, 4)
    with cineray.enable_cache(transformer, "taylorseer(interval=4)") as handle, torch.no_grad():
        for step in (6, 7, 9):  # 7 follows 6; 9 follows nothing
            with transformer.cache_context("cond", step_index=step, num_inference_steps=10):
                transformer(latents, torch.tensor([900 - step]), text)
    assert [entry.compute for entry in handle.trace.entries] == [True, False, True]


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("taylorseer(interval=0)", "interval must be 1 or more, got 0"),
        ("taylorseer(order=-1)", "order must be 0 or more, got -1"),
        ("taylorseer(warmup_steps=0)", "warmup_steps must be 1 or more, got 0"),
        ("taylorseer(order=x)", "option order of taylorseer"),
        ("taylorseer(threshold=1)", "unknown option 'threshold=1' of taylorseer; valid: interval, order, warmup_steps"),
    ],
)
def test_bad_options_are_one_clear_error(spec, said):
    with pytest.raises(ValueError, match=said):
        plan_cache(spec, "WanTransformer3DModel", {"num_layers": 3})
