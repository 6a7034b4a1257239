"""MagCache against diffusers' own hook: the same skips, the same latents."""

import json

import pytest
import torch
from conftest import build_hunyuan, build_wan
from every_model import in_double

import cineray

STEPS = 20
# both branches alike, as diffusers has one list; products of these wander around 1
RATIOS = [
    1.0,
    1.2,
    1.1,
    1.05,
    1.02,
    0.97,
    1.04,
    0.99,
    0.98,
    1.03,
    0.96,
    1.0,
    0.95,
    0.97,
    0.99,
    0.9,
    0.94,
    0.96,
    0.9,
    0.8,
]


def call(pipe):
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator("cpu").manual_seed(3)
    sizes = {"width": 32, "height": 32, "num_frames": 5, "num_inference_steps": STEPS}
    return pipe("a red circle", **sizes, generator=generator, output_type="latent")[0]


@pytest.mark.parametrize("build", [build_wan, build_hunyuan])
@pytest.mark.parametrize(("threshold", "max_skips", "num_ratios"), [(0.06, 3, 20), (0.3, 5, 20), (0.1, 2, 12)])
def test_the_loop_equals_diffusers_own_magcache(build, threshold, max_skips, num_ratios, tmp_path):
    from diffusers import MagCacheConfig

    pipe = in_double(build())
    ratios = RATIOS[:num_ratios]
    transformer = {"num_layers": pipe.transformer.config.num_layers}
    profile = {
        "family": "wan" if build is build_wan else "hunyuan-video",
        "transformer": transformer,
        "source": "a test",
        "ratios": {"cond": ratios, "uncond": ratios},
        "threshold": threshold,
        "max_skips": max_skips,
        "retention": 0.2,
    }
    (tmp_path / "profile.json").write_text(json.dumps(profile))
    with cineray.enable_cache(pipe, f"magcache(profile={tmp_path / 'profile.json'})") as handle:
        ours = call(pipe)
    skips = sum(not entry.compute for entry in handle.trace.entries)
    assert 0.2 * len(handle.trace.entries) < skips < 0.8 * len(handle.trace.entries)
    counts = []
    last = (pipe.transformer.blocks if build is build_wan else pipe.transformer.single_transformer_blocks)[-1]
    (last.attn1 if build is build_wan else last.attn).register_forward_hook(lambda *_: counts.append(1))
    config = MagCacheConfig(
        threshold=threshold, max_skip_steps=max_skips, num_inference_steps=STEPS, mag_ratios=torch.tensor(ratios)
    )
    pipe.transformer.enable_cache(config)
    theirs = call(pipe)
    assert len(counts) == len(handle.trace.entries) - skips
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
