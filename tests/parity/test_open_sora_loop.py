"""Open-Sora's loop against a transcription of upstream's: same noise, same velocities, float64."""

from dataclasses import replace

import pytest
import torch
from oracle_open_sora import sample, timesteps
from oracle_stdit3 import stdit3

from cineray.pipeline.adapters.open_sora import OpenSora
from cineray.pipeline.adapters.open_sora_pipeline import OpenSoraPipeline
from cineray.pipeline.adapters.open_sora_transformer import STDiT3
from cineray.pipeline.adapters.open_sora_vae import OpenSoraVAE
from cineray.pipeline.denoise import denoise

SIZES = {"hidden_size": 48, "depth": 2, "num_heads": 4, "caption_channels": 8, "model_max_length": 40}
VAE = {
    "block_out_channels": (8, 8),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "filters": 8,
    "num_res_blocks": 1,
    "channel_multipliers": (1, 1, 1),
    "temporal_downsample": (True, True),
    "temporal_norm_num_groups": 4,
}


@pytest.fixture(scope="module")
def pipe():
    from diffusers import FlowMatchEulerDiscreteScheduler
    from tiny.text import new_umt5
    from transformers import T5Config, T5EncoderModel

    torch.manual_seed(0)
    tokenizer, _ = new_umt5()
    t5 = T5Config(vocab_size=len(tokenizer), d_model=8, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
    return OpenSoraPipeline(
        tokenizer=tokenizer,
        text_encoder=T5EncoderModel(t5).eval(),
        vae=OpenSoraVAE(**VAE).eval(),
        transformer=STDiT3(**SIZES, input_sq_size=64).eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(),
    )


@pytest.mark.parametrize("num_frames", [1, 34])
def test_the_timesteps_are_upstreams(pipe, new_request, num_frames):
    request = new_request(width=32, height=48, num_frames=num_frames, num_inference_steps=7)
    _, ours = OpenSora().schedule(pipe, request)
    wanted = torch.tensor(timesteps(7, 48, 32, num_frames))
    torch.testing.assert_close(ours, wanted, atol=1e-3, rtol=1e-6)  # of 1000, in float32


@pytest.mark.parametrize(("guidance", "num_given"), [(7.0, 0), (1.0, 0), (7.0, 1), (7.0, 5)])
@torch.no_grad()
def test_the_latents_are_upstreams(pipe, new_request, guidance, num_given):
    """With 5 given: a turn of upstream's loop, where a clip begins with the last 5 latent frames of the one before."""
    request = new_request(
        width=16, height=12, num_frames=17, fps=8, num_inference_steps=4, guidance_scale=guidance, prompt="a red circle"
    )
    encoded = OpenSora().encode(pipe, request)
    if num_given:
        encoded["given"] = torch.randn(1, 4, num_given, 6, 8)
    num_made = 17
    if num_given == 5:
        request, num_made = replace(request, control_video="before.mp4"), 34
    clip = OpenSora().start(pipe, request, encoded, torch.Generator().manual_seed(3))
    ours = denoise(clip, lambda done, total: None)
    weights = pipe.transformer.state_dict()
    text = torch.cat([encoded["text"], weights["y_embedder.y_embedding"][None]])
    mask, fps = encoded["mask"].repeat(2, 1), torch.tensor([8.0, 8.0])
    assert 1 < encoded["mask"].sum() < 40  # some of the text is padding

    def velocity(z, t, noisy):
        made = stdit3(
            weights,
            torch.cat([z, z]),
            torch.full((2,), t),
            text,
            mask,
            fps,
            12,
            16,
            4,
            64,
            x_mask=None if noisy is None else noisy.expand(2, -1),
        )
        return made[:, :4].chunk(2)

    given = torch.arange(num_made // 17 * 5) < num_given if num_given else None
    theirs = sample(velocity, clip.latents, timesteps(4, 12, 16, num_made), guidance, given)
    assert given is None or torch.equal(ours[:, :, given], encoded["given"])
    assert (ours - clip.latents).abs().max() > 0.1  # a loop that did nothing would agree too
    torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=1e-3)  # float32, sums in another order, guidance of 7
