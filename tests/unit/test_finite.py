"""What is not finite is never taken for a clip."""

from contextlib import contextmanager

import pytest
import torch

from cineray.pipeline.finite import NotFiniteError, check_finite, is_finite
from cineray.pipeline.render import render_clip


@contextmanager
def broken(parameter):
    """One value of a module's parameter is NaN."""
    value = parameter.data.flatten()[0].item()
    parameter.data.view(-1)[0] = float("nan")
    try:
        yield
    finally:
        parameter.data.view(-1)[0] = value


@pytest.mark.parametrize("cache", ["none", "interval"])
def test_latents_with_nan_end_the_clip_before_it_is_decoded(loaded, new_request, cache):
    model = loaded("wan")
    request = new_request(width=16, height=16, num_frames=1, num_inference_steps=3, cache=cache)
    with broken(model.pipe.transformer.proj_out.bias), pytest.raises(NotFiniteError) as error:
        render_clip(model, request, lambda done, total: None)
    said = str(error.value)
    assert said.startswith("clip 1: ")
    assert "of its latents are not finite after denoising; likely causes: weights that are not finite, a dtype" in said
    assert ("--cache none" in said) == (cache != "none")
    assert "\n" not in said


def test_frames_with_nan_end_the_clip(loaded, new_request):
    model, request = loaded("wan"), new_request(width=16, height=16, num_frames=1, num_inference_steps=2)
    with (
        broken(model.pipe.vae.decoder.conv_out.bias),
        pytest.raises(NotFiniteError, match="of its frames are not finite after decoding"),
    ):
        render_clip(model, request, lambda done, total: None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_one_value_is_enough(dtype, value):
    values = torch.zeros(2, 3, 4, dtype=dtype)
    assert is_finite(values)
    values[1, 2, 3] = value
    assert not is_finite(values)
    with pytest.raises(NotFiniteError, match="clip a: 1 of 24 values of its latents"):
        check_finite(values, "latents", "denoising", "a")


def test_nothing_is_finite():
    assert is_finite(torch.zeros(0))
