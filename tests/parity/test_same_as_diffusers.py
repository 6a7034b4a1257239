"""cineray's own loop against the pipelines' `__call__`: the same seed gives the same bits (float32, CPU)."""

import numpy as np
import pytest
import torch
from PIL import Image

from cineray.pipeline.denoise import denoise
from cineray.pipeline.render import prepare_clip, render_clip, to_frames


def ours(model, request):
    """(latents, video) of cineray."""
    steps = []
    latents = denoise(prepare_clip(model, request).denoising, lambda i, n: steps.append((i, n)))
    assert steps == [(i, request.num_inference_steps) for i in range(1, request.num_inference_steps + 1)]
    generator = torch.Generator("cpu").manual_seed(request.seed)
    return latents, model.adapter.decode(model.pipe, request, latents, generator)


def theirs(model, request, **kwargs):
    """(latents, video in [0, 1]) of the diffusers pipeline."""
    kwargs = {
        "prompt": request.prompt,
        "width": request.width,
        "height": request.height,
        "num_frames": request.num_frames,
        "num_inference_steps": request.num_inference_steps,
        "guidance_scale": request.guidance_scale,
    } | kwargs

    def call(output_type):
        generator = torch.Generator("cpu").manual_seed(request.seed)
        return model.pipe(**kwargs, generator=generator, output_type=output_type).frames

    return call("latent"), call("np")


def assert_same(model, request, **kwargs):
    latents, video = ours(model, request)
    their_latents, their_video = theirs(model, request, **kwargs)
    assert torch.equal(latents, their_latents)
    assert latents.abs().max() > 0.1  # a loop that did nothing would agree too
    frames = (np.clip(their_video[0], 0, 1) * 255).round().astype(np.uint8)
    assert np.array_equal(to_frames(video), frames)
    assert np.array_equal(render_clip(model, request, lambda i, n: None).frames, frames)


@pytest.mark.parametrize("guidance_scale", [4.0, 1.0])
@pytest.mark.parametrize("steps", [1, 7])
def test_wan_text_to_video(loaded, new_request, guidance_scale, steps):
    request = new_request(guidance_scale=guidance_scale, num_inference_steps=steps, seed=11)
    assert_same(loaded("wan"), request)


def test_wan_negative_prompt_and_other_size(loaded, new_request):
    request = new_request(negative_prompt="gray", width=48, height=32, num_frames=9, seed=3)
    assert_same(loaded("wan"), request, negative_prompt="gray")


def test_wan_image_to_video(loaded, new_request, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 255, (40, 56, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "first.png")
    request = new_request(image=str(tmp_path / "first.png"), seed=5)
    assert_same(loaded("wan_i2v"), request, image=Image.open(tmp_path / "first.png").convert("RGB"))


@pytest.mark.parametrize("steps", [1, 7])
def test_hunyuan_video(loaded, new_request, steps):
    request = new_request(guidance_scale=6.0, num_inference_steps=steps, seed=2**62)
    assert_same(loaded("hunyuan"), request)


def test_guidance_matters_in_both_models(loaded, new_request):
    for name in ("wan", "hunyuan"):
        low, high = (ours(loaded(name), new_request(guidance_scale=g))[0] for g in (2.0, 6.0))
        assert not torch.equal(low, high)


def test_a_clip_leaves_the_pipelines_own_scheduler_alone(loaded, new_request):
    """Schedulers have state (UniPC keeps past outputs): each clip has its own."""
    model = loaded("wan")
    model.pipe.scheduler.set_timesteps(3)
    first, _ = ours(model, new_request(seed=1, num_inference_steps=6))
    assert len(model.pipe.scheduler.timesteps) == 3
    assert model.pipe.scheduler.model_outputs == [None] * len(model.pipe.scheduler.model_outputs)
    ours(model, new_request(seed=2, num_inference_steps=5))
    again, _ = ours(model, new_request(seed=1, num_inference_steps=6))
    assert torch.equal(first, again)
