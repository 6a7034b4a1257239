"""The trainer's shortcuts give the numbers that the published pipelines compute (float32, tolerance 1e-5)."""

from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, StableAudioPipeline
from tiny import oobleck
from tiny import vae as tiny_vae
from tiny.audio import NUM_LATENTS, SECONDS, AudioDenoiser, denoising_loss, new_scheduler
from tiny.denoiser import HunyuanDenoiser, WanDenoiser
from tiny.open_sora import FPS, OpenSoraDenoiser, new_vae
from tiny.shapes import NUM_FRAMES, SIZE, all_captions, draw_batch
from tiny.tones import RATE, all_tones, draw_tones

from cineray.pipeline.adapters.open_sora import OpenSora
from cineray.pipeline.adapters.open_sora_pipeline import OpenSoraPipeline
from cineray.pipeline.adapters.stable_audio import StableAudio

CAPTIONS = [str(all_captions()[i]) for i in (0, 100)] + [""]


def clips(num_frames: int) -> torch.Tensor:
    return draw_batch(2, torch.Generator().manual_seed(0), num_frames)


@pytest.mark.parametrize("num_frames", [1, 5, 17])
@torch.no_grad()
def test_wan_vae_over_all_frames_at_once_equals_its_chunks(num_frames):
    torch.manual_seed(0)
    vae: Any = tiny_vae.new_wan_vae()
    mean = vae.encode(clips(num_frames)).latent_dist.mode()
    torch.testing.assert_close(tiny_vae.encode(vae, clips(num_frames)), mean, atol=1e-5, rtol=1e-5)
    video = vae.decode(mean).sample
    torch.testing.assert_close(tiny_vae.decode(vae, mean).clamp(-1, 1), video, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("new_vae", [tiny_vae.new_wan_vae, tiny_vae.new_hunyuan_vae])
@torch.no_grad()
def test_recalling_the_past_keeps_single_frames_and_normalizing_keeps_the_video(new_vae):
    torch.manual_seed(0)
    vae = new_vae()
    tiny_vae.forget_the_past(vae)
    before = tiny_vae.decode(vae, tiny_vae.encode(vae, clips(1)))
    tiny_vae.recall_the_past(vae)
    after = tiny_vae.decode(vae, tiny_vae.encode(vae, clips(1)))
    torch.testing.assert_close(before, after, atol=1e-4, rtol=1e-4)
    video = tiny_vae.decode(vae, tiny_vae.encode(vae, clips(5)))
    tiny_vae.normalize_latents(vae, seed=3, num_clips=8)
    latents = tiny_vae.encode(vae, draw_batch(4, torch.Generator().manual_seed(9)))
    assert 0.5 < latents.std() < 2
    torch.testing.assert_close(tiny_vae.decode(vae, tiny_vae.encode(vae, clips(5))), video, atol=2e-4, rtol=1e-3)


@torch.no_grad()
def test_wan_denoiser_sees_what_the_pipeline_shows(loaded):
    """Text padded to 512 zeros by the pipeline; one weighted zero token in the trainer."""
    torch.manual_seed(1)
    denoiser: Any = WanDenoiser().eval()
    model = loaded("wan")
    latents, timestep = torch.randn(3, 16, 2, 4, 4), torch.tensor([900.0, 500.0, 20.0])
    ours = denoiser(latents, timestep, CAPTIONS, torch.ones(3))
    from diffusers import WanPipeline
    from diffusers.models.transformers.transformer_wan import WanAttnProcessor

    for block in denoiser.transformer.blocks:
        block.attn2.set_processor(WanAttnProcessor())
    pipe = WanPipeline(
        tokenizer=denoiser.tokenizer,
        text_encoder=denoiser.text_encoder,
        transformer=denoiser.transformer,
        vae=model.pipe.vae,
        scheduler=model.pipe.scheduler,
    )
    embeds, _ = pipe.encode_prompt(CAPTIONS, do_classifier_free_guidance=False, max_sequence_length=512)
    theirs = denoiser.transformer(latents, timestep, embeds, return_dict=False)[0]
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_hunyuan_denoiser_sees_what_the_pipeline_shows(loaded):
    """The template's 95 tokens cut off, text padded to 256 by the pipeline and masked."""
    from diffusers import HunyuanVideoPipeline

    torch.manual_seed(1)
    denoiser: Any = HunyuanDenoiser().eval()
    latents, timestep = torch.randn(3, 16, 2, 4, 4), torch.tensor([900.0, 500.0, 20.0])
    guidance = torch.tensor([1.0, 6.0, 3.0])
    ours = denoiser(latents, timestep, CAPTIONS, guidance)
    parts = {"tokenizer": denoiser.tokenizer, "tokenizer_2": denoiser.tokenizer_2} | denoiser.parts()
    other = loaded("hunyuan").pipe
    pipe = HunyuanVideoPipeline(**parts, vae=other.vae, scheduler=other.scheduler)
    embeds, pooled, mask = pipe.encode_prompt(CAPTIONS)
    assert mask is not None
    assert mask.sum(dim=1).tolist() == [10, 10, 1]  # 9 words of the caption and <|eot_id|>
    theirs = denoiser.transformer(latents, timestep, embeds, mask, pooled, guidance * 1000.0, return_dict=False)[0]
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("num_frames", [1, 3])
@torch.no_grad()
def test_picture_vae_on_clips_equals_its_frames_one_by_one(num_frames):
    torch.manual_seed(0)
    vae: Any = tiny_vae.new_picture_vae()
    clip = clips(num_frames)
    frames = [vae.encode(clip[:, :, i]).latent_dist.mode() for i in range(num_frames)]
    latents = tiny_vae.encode(vae, clip)
    torch.testing.assert_close(latents, torch.stack(frames, dim=2), atol=1e-5, rtol=1e-5)
    video = torch.stack([vae.decode(frame).sample for frame in frames], dim=2)
    torch.testing.assert_close(tiny_vae.decode(vae, latents), video, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_normalized_picture_latents_have_std_1_as_the_pipeline_scales_them():
    torch.manual_seed(0)
    vae: Any = tiny_vae.new_picture_vae()
    before = tiny_vae.decode(vae, tiny_vae.encode(vae, clips(1)))
    tiny_vae.normalize_latents(vae, seed=3, num_clips=8)
    latents = tiny_vae.encode(vae, draw_batch(8, torch.Generator().manual_seed(9)))
    std = (latents * vae.config.scaling_factor).std(dim=(0, 2, 3, 4))
    assert ((std > 0.5) & (std < 2)).all()
    torch.testing.assert_close(tiny_vae.decode(vae, tiny_vae.encode(vae, clips(1))), before, atol=2e-4, rtol=1e-3)


@torch.no_grad()
def test_open_sora_denoiser_sees_what_the_pipeline_shows(new_request):
    """Prompts with their score, cleaned and padded by the pipeline; the other branch is the empty caption."""
    torch.manual_seed(1)
    denoiser: Any = OpenSoraDenoiser().eval()
    torch.nn.init.normal_(denoiser.transformer.final_layer.linear.weight)
    pipe = OpenSoraPipeline(
        tokenizer=denoiser.tokenizer,
        text_encoder=denoiser.text_encoder,
        vae=new_vae(),
        transformer=denoiser.transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(),
    )
    sizes = {"width": SIZE, "height": SIZE, "num_frames": NUM_FRAMES, "fps": FPS, "guidance_scale": 7.0}
    request = new_request(prompt=CAPTIONS[0], num_inference_steps=4, **sizes)
    adapter = OpenSora()
    clip = adapter.start(pipe, request, adapter.encode(pipe, request), torch.Generator().manual_seed(0))
    hidden_states, timestep = clip.model_input(clip.latents, clip.timesteps[1], clip.scheduler)
    theirs = denoiser.transformer(hidden_states, timestep, **clip.branches[0].transformer_kwargs).sample
    ours = denoiser(hidden_states, timestep, [CAPTIONS[0], ""], torch.ones(2))
    torch.testing.assert_close(ours, -theirs[:, :4], atol=1e-5, rtol=1e-4)  # the pipeline turns it, too


@pytest.mark.parametrize("negative_prompt", [None, ""])
@torch.no_grad()
def test_audio_denoiser_sees_what_the_pipeline_shows(negative_prompt, new_request):
    """Text padded to 8 tokens by the pipeline, and zeros on the other branch, unless there is a negative prompt."""
    torch.manual_seed(1)
    denoiser: Any = AudioDenoiser().eval()
    torch.nn.init.normal_(denoiser.transformer.proj_out.weight)
    pipe = StableAudioPipeline(
        tokenizer=denoiser.tokenizer,
        text_encoder=denoiser.text_encoder,
        projection_model=denoiser.projection_model,
        vae=oobleck.new_oobleck(),
        transformer=denoiser.transformer,
        scheduler=new_scheduler(),
    )
    caption = str(all_tones()[20])
    request = new_request(
        prompt=caption,
        negative_prompt=negative_prompt,
        num_inference_steps=4,
        guidance_scale=3.0,
        fps=RATE,
        seconds=0.7,
    )
    adapter = StableAudio(sampling_rate=RATE, max_seconds=SECONDS)
    clip = adapter.start(pipe, request, adapter.encode(pipe, request), torch.Generator().manual_seed(0))
    hidden_states, timestep = clip.model_input(clip.latents, clip.timesteps[1], clip.scheduler)
    theirs = denoiser.transformer(hidden_states, timestep, **clip.branches[0].transformer_kwargs).sample
    ours = denoiser(hidden_states, timestep.expand(2), ["", caption], torch.tensor([0.7, 0.7]))
    torch.testing.assert_close(ours[1], theirs[1], atol=1e-5, rtol=1e-4)
    assert torch.allclose(ours[0], theirs[0], atol=1e-5, rtol=1e-4) is (negative_prompt is None)


def test_the_loss_of_tones_is_zero_for_a_model_that_knows_the_sound():
    """v = (noise - sigma x clean) / sqrt(1 + sigma^2), of latents that are (clean + sigma x noise) over the same."""
    clean = torch.randn(1, oobleck.CHANNELS, NUM_LATENTS, generator=torch.Generator().manual_seed(0))

    def knows(latents, timestep, captions, seconds):
        sigma = torch.exp(4 * timestep).view(-1, 1, 1)
        assert captions == ["a low tone"] * 8 or "" in captions
        assert 0 < seconds.min() <= seconds.max() <= SECONDS
        whole = (1 + sigma**2).sqrt()
        noise = (latents * whole - clean) / sigma
        return (noise - sigma * clean) / whole

    loss = denoising_loss(clean, ["a low tone"], new_scheduler(), 8, knows, None, 0)
    assert loss < 1e-4
    assert denoising_loss(clean + 0.1, ["a low tone"], new_scheduler(), 8, knows, None, 0) > 1e-3


@torch.no_grad()
def test_folding_the_scale_of_latents_shows_the_decoder_what_it_learned_from():
    torch.manual_seed(0)
    vae: Any = oobleck.new_oobleck()
    sounds = draw_tones(3, torch.Generator().manual_seed(9))
    before = oobleck.means(vae, sounds)
    scale = oobleck.means(vae, draw_tones(16, torch.Generator().manual_seed(3))).square().mean().sqrt()
    oobleck.fold_scale(vae, seed=3, num_sounds=16)
    posterior = vae.encode(sounds).latent_dist
    torch.testing.assert_close(posterior.mode(), before / scale, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(posterior.std, torch.full_like(posterior.std, 0.1), atol=2e-4, rtol=0)
    decoded = vae.decode(posterior.mode()).sample
    torch.testing.assert_close(decoded, vae.decoder(before / scale), atol=1e-5, rtol=1e-4)
