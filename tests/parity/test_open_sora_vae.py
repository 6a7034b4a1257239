"""Open-Sora's VAE against the published checkpoint's names and shapes, and against a transcription of upstream's."""

import json

import pytest
import torch
from accelerate import init_empty_weights
from oracle_open_sora import temporal_shapes, whole_decode, whole_encode
from safetensors.torch import save_file

from cineray.pipeline.adapters.open_sora_vae import OpenSoraVAE

TINY = {
    "block_out_channels": (8, 8),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "filters": 8,
    "num_res_blocks": 1,
    "channel_multipliers": (1, 2, 2, 2),
    "temporal_norm_num_groups": 4,
}
GROUPS = 4


def tiny(**changes) -> OpenSoraVAE:
    torch.manual_seed(0)
    model = OpenSoraVAE(**{**TINY, **changes}).to(torch.float64).eval()
    for module in model.modules():  # norms of ones would hide a norm that is not applied
        if isinstance(module, torch.nn.GroupNorm):
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
            torch.nn.init.uniform_(module.bias, -0.5, 0.5)
    return model


def test_names_and_shapes_are_those_of_the_published_checkpoint():
    from diffusers import AutoencoderKL

    with init_empty_weights(include_buffers=True):
        model = OpenSoraVAE()  # its defaults are the published configuration
        # PixArt-alpha/pixart_sigma_sdxlvae_T5_diffusers, vae/config.json
        picture = AutoencoderKL(
            down_block_types=["DownEncoderBlock2D"] * 4,
            up_block_types=["UpDecoderBlock2D"] * 4,
            block_out_channels=[128, 256, 512, 512],
            layers_per_block=2,
        )
    wanted = {f"temporal_vae.{name}": shape for name, shape in temporal_shapes().items()}
    wanted |= {f"spatial_vae.module.{name}": tuple(t.shape) for name, t in picture.state_dict().items()}
    wanted |= {"scale": (1, 4, 1, 1, 1), "shift": (1, 4, 1, 1, 1)}
    assert {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()} == wanted


@pytest.mark.parametrize(("num_frames", "num_latents"), [(1, 1), (17, 5), (34, 10), (20, 6)])
@torch.no_grad()
def test_both_ways_are_upstreams(num_frames, num_latents):
    model = tiny()
    weights, picture = model.state_dict(), model.spatial_vae.module
    pixels = torch.rand(1, 3, num_frames, 8, 12, dtype=torch.float64) * 2 - 1
    latents = model.encode(pixels)
    assert latents.shape == (1, 4, num_latents, 4, 6)
    theirs = whole_encode(weights, lambda frame: picture.encode(frame).latent_dist.mode(), pixels, GROUPS)
    torch.testing.assert_close(latents, theirs, atol=1e-10, rtol=1e-10)
    shown = model.decode(latents, num_frames)
    assert shown.shape == pixels.shape
    assert shown.std() > 1e-3
    theirs = whole_decode(weights, lambda z: picture.decode(z).sample, latents, num_frames, GROUPS)
    torch.testing.assert_close(shown, theirs, atol=1e-10, rtol=1e-10)


@torch.no_grad()
def test_groups_of_frames_know_nothing_of_each_other_and_few_frames_at_once_change_nothing():
    model, one_by_one = tiny(), tiny(micro_batch_size=1)
    latents = torch.randn(1, 4, 10, 2, 2, dtype=torch.float64)
    whole = model.decode(latents, 34)
    torch.testing.assert_close(model.decode(latents[:, :, 5:], 17), whole[:, :, 17:], atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(one_by_one.decode(latents, 34), whole, atol=1e-12, rtol=1e-12)
    with pytest.raises(ValueError, match="34 frames have 10 latent frames, got 9"):
        model.decode(latents[:, :, :9], 34)


@torch.no_grad()
def test_a_draw_is_from_the_posterior_and_repeats_with_its_seed():
    model = tiny()
    pixels = torch.rand(1, 3, 17, 4, 4, dtype=torch.float64) * 2 - 1
    draws = [model.encode(pixels, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


def test_a_folder_as_published_loads_and_a_wrong_one_is_refused(tmp_path):
    model = tiny(latents_scale=(1.0, 2.0, 3.0, 4.0)).to(torch.float32)
    config = {**TINY, "model_type": "VideoAutoencoderPipeline", "vae_2d": {}, "scale": [1.0, 2.0, 3.0, 4.0]}
    with pytest.raises(ValueError, match=r"must hold config.json and \*.safetensors"):
        OpenSoraVAE.from_open_sora(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    loaded = OpenSoraVAE.from_open_sora(tmp_path)
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_res_blocks": 2}))
    with pytest.raises(ValueError, match="do not fit its config"):
        OpenSoraVAE.from_open_sora(tmp_path)
