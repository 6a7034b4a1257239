"""TaylorSeer against diffusers' own hook on the same layers, where both compute the same steps."""

from functools import cache

import pytest
import torch
from conftest import build_flux, build_hunyuan, build_wan
from every_model import in_double

import cineray

# what the official code extrapolates: what feeds a residual add, before its gate
JOINT = r"transformer_blocks\.\d+\.(attn|ff|ff_context)"
LAYERS = {
    build_wan: ([r"blocks\.\d+\.(attn1|attn2|ffn)"], None),
    build_hunyuan: (
        [JOINT, r"single_transformer_blocks\.\d+\.proj_out"],
        [r"single_transformer_blocks\.\d+\.(attn|proj_mlp)"],
    ),
}
LAYERS[build_flux] = LAYERS[build_hunyuan]


def call(pipe):
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator("cpu").manual_seed(3)
    sizes = {"width": 32, "height": 32, "num_inference_steps": 20, "output_type": "latent"}
    frames = {} if "Flux" in type(pipe).__name__ else {"num_frames": 5}
    return pipe("a red circle", **sizes, **frames, generator=generator)[0]


@pytest.fixture(scope="module")
def uncached():
    """Factory: what a builder's pipeline gives without a cache, computed once."""
    return cache(lambda build: call(in_double(build())))


# diffusers computes step w + 1 + k n after a warm-up of w, the official code w - 1 + k n: the same for n = 2.
# At order 2 the warm-ups differ too (diffusers takes differences from the first step on), except for w = 1.
@pytest.mark.parametrize(("order", "warmup_steps"), [(0, 4), (1, 1), (1, 4), (2, 1)])
@pytest.mark.parametrize("build", list(LAYERS))
def test_the_loop_equals_diffusers_own_taylorseer(uncached, build, order, warmup_steps):
    from diffusers import TaylorSeerCacheConfig

    pipe = in_double(build())
    with cineray.enable_cache(pipe, f"taylorseer(interval=2,order={order},warmup_steps={warmup_steps})") as handle:
        ours = call(pipe)
    assert handle.trace.summary()["skipped_steps"] > 7
    active, inactive = LAYERS[build]
    pipe.transformer.enable_cache(
        TaylorSeerCacheConfig(
            cache_interval=2,
            disable_cache_before_step=warmup_steps,
            max_order=order,
            taylor_factors_dtype=torch.float64,
            cache_identifiers=active,
            skip_predict_identifiers=inactive,
        )
    )
    assert (ours - uncached(build)).abs().max() > 1e-4
    torch.testing.assert_close(ours, call(pipe), atol=1e-5, rtol=1e-5)
