"""STDiT3 against the published checkpoint's names and shapes, and against a transcription of upstream's forward."""

import json

import pytest
import torch
from accelerate import init_empty_weights
from oracle_stdit3 import published_shapes, stdit3
from safetensors.torch import save_file

from cineray.pipeline.adapters.open_sora_transformer import STDiT3

TINY = {"hidden_size": 48, "depth": 2, "num_heads": 4, "caption_channels": 32, "model_max_length": 7}


def tiny() -> STDiT3:
    torch.manual_seed(0)
    model = STDiT3(**TINY, input_sq_size=64).eval()
    for module in model.modules():  # norms of ones would hide a norm that is not applied
        if isinstance(module, torch.nn.RMSNorm):
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
    return model


def test_names_and_shapes_are_those_of_the_published_checkpoint():
    with init_empty_weights(include_buffers=True):
        model = STDiT3()  # its defaults are the published configuration
    assert {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()} == published_shapes()


@pytest.mark.parametrize(("rows", "columns"), [(4, 6), (5, 3)])  # an odd side is padded to whole patches
@torch.no_grad()
def test_forward_is_upstreams(rows, columns):
    model = tiny()
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(2, 4, 3, rows, columns, generator=generator)
    text = torch.randn(2, 7, 32, generator=generator)
    mask = torch.tensor([[1, 1, 1, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1, 0]])
    timestep, fps = torch.tensor([900.0, 31.25]), torch.tensor([24.0, 8.0])
    ours = model(latents, timestep, text, mask, fps=fps, height=144, width=80).sample
    theirs = stdit3(model.state_dict(), latents, timestep, text, mask, fps, 144, 80, heads=4, input_sq_size=64)
    assert ours.shape == (2, 8, 3, rows, columns)
    assert ours.abs().max() > 0.1
    torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-4)  # float32, sums in another order


@torch.no_grad()
def test_frames_that_are_given_have_timestep_zero():
    model = tiny()
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(2, 4, 3, 4, 6, generator=generator)
    text = torch.randn(2, 7, 32, generator=generator)
    mask = torch.tensor([[1, 1, 1, 0, 0, 0, 0]] * 2)
    timestep, fps = torch.tensor([900.0, 31.25]), torch.tensor([24.0, 8.0])
    noisy = torch.tensor([[False, True, True], [True, False, True]])
    sizes = {"fps": fps, "height": 144, "width": 80}
    ours = model(latents, timestep, text, mask, **sizes, noisy_frames=noisy).sample
    theirs = stdit3(model.state_dict(), latents, timestep, text, mask, fps, 144, 80, 4, 64, x_mask=noisy)
    torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-4)  # float32, sums in another order
    plain = model(latents, timestep, text, mask, **sizes).sample
    assert (ours - plain).abs().amax((1, 3, 4)).min() > 1e-3  # attention carries it to every frame
    every = model(latents, timestep, text, mask, **sizes, noisy_frames=torch.ones(2, 3, dtype=torch.bool)).sample
    torch.testing.assert_close(every, plain, atol=2e-5, rtol=1e-4)


@torch.no_grad()
def test_masked_text_counts_for_nothing_and_no_mask_means_all_of_it():
    model = tiny()
    latents, text = torch.randn(1, 4, 2, 4, 4), torch.randn(1, 7, 32)
    sizes = {"fps": torch.tensor([24.0]), "height": 64, "width": 64}
    half = torch.tensor([[1, 1, 1, 0, 0, 0, 0]])
    step = torch.tensor([500.0])
    first = model(latents, step, text, half, **sizes).sample
    text[:, 3:] += 100
    assert torch.equal(model(latents, step, text, half, **sizes).sample, first)
    every = model(latents, step, text, torch.ones(1, 7), **sizes).sample
    torch.testing.assert_close(model(latents, step, text, **sizes).sample, every, atol=1e-6, rtol=1e-5)
    assert not torch.allclose(every, first)


def test_a_folder_as_published_loads_and_a_wrong_one_is_refused(tmp_path):
    model = tiny()
    config = {**TINY, "input_sq_size": 64, "architectures": ["STDiT3"], "drop_path": 0.0, "patch_size": [1, 2, 2]}
    with pytest.raises(ValueError, match=r"must hold config.json and \*.safetensors"):
        STDiT3.from_open_sora(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    loaded = STDiT3.from_open_sora(tmp_path)
    assert loaded.config["input_sq_size"] == 64
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)
    (tmp_path / "config.json").write_text(json.dumps({**config, "depth": 3}))
    with pytest.raises(ValueError, match="do not fit its config"):
        STDiT3.from_open_sora(tmp_path)


def test_diffusers_own_folder_form_round_trips(tmp_path):
    model = tiny()
    model.save_pretrained(tmp_path)
    again = STDiT3.from_pretrained(tmp_path)
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor)
