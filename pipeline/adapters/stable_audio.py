"""Stable Audio Open, sound from text. Guidance doubles the batch of one call, unconditional rows first:
`torch.cat([negative_prompt_embeds, prompt_embeds])` in pipelines/stable_audio/pipeline_stable_audio.py.

Follows diffusers 0.42 pipelines/stable_audio/pipeline_stable_audio.py step by step, so that the same seed gives the
same bits. Letters: B batch (1), C channels of the latents, F latents of a clip, T text tokens.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from cineray.pipeline.adapters import stable_audio_configs
from cineray.pipeline.adapters.model import SHIPPED, BlockLayout, KnownCheckpoint, Model, ShardedArguments
from cineray.pipeline.adapters.protocol import (
    Branch,
    Defaults,
    Denoising,
    Expert,
    ModelConfigs,
    TextLimit,
    cut_message,
    new_schedule,
    without_gradients,
)
from cineray.pipeline.media.output import SOUND
from cineray.pipeline.request import ClipRequest, SizeRule

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class StableAudio:
    """StableAudioPipeline.

    Args:
        sampling_rate: samples a second.
        max_seconds: of one clip; all that is shorter is cut from a clip of this length.
    """

    sampling_rate: int = 44100
    max_seconds: float = 2097152 / 44100
    vae_dtype = "float16"  # stable-audio-tools, run_gradio.py --model-half; diffusers' example too
    tiles_on_gpus = False
    components = stable_audio_configs.COMPONENTS
    index_tables = ()

    misfit = staticmethod(stable_audio_configs.misfit)

    @property
    def defaults(self) -> Defaults:
        # StableAudioPipeline.__call__'s defaults (the example of diffusers' page has 200 steps), and as long as the
        # model can
        return Defaults(
            fps=self.sampling_rate, num_inference_steps=100, guidance_scale=7.0, seconds=round(self.max_seconds, 2)
        )

    def for_checkpoint(self, configs: ModelConfigs, /) -> StableAudio:
        vae, hop = configs.vae, 1
        for ratio in vae.get("downsampling_ratios", stable_audio_configs.DOWNSAMPLING):
            hop *= ratio
        rate = vae.get("sampling_rate", 44100)
        return replace(self, sampling_rate=rate, max_seconds=_num_latents(configs) * hop / rate)

    def is_of_kind(self, _configs: ModelConfigs, /) -> bool:
        return True

    def unsupported(self, configs: ModelConfigs, /) -> str | None:
        is_cosine = configs.index.get("scheduler") == ["diffusers", "CosineDPMSolverMultistepScheduler"]
        if is_cosine and importlib.util.find_spec("torchsde") is None:
            return "its scheduler draws noise with torchsde, which is not installed: pip install torchsde"
        return None

    def prompt_problem(self, _prompt: str, /) -> str | None:
        return None

    def size_rule(self, _configs: ModelConfigs) -> SizeRule:
        return SizeRule(
            frame_step=None,
            side_step=None,
            frame_rate=self.sampling_rate,
            max_seconds=self.max_seconds,
            takes_image=False,
            takes_negative_prompt=True,
        )

    def num_tokens(self, configs: ModelConfigs, _request: ClipRequest) -> int:
        return _num_latents(configs) + 1  # the token in front tells of the time and the seconds

    def effective(self, request: ClipRequest) -> ClipRequest:
        """Without guidance its scale and the negative prompt do nothing."""
        if request.guidance_scale <= 1.0:
            return replace(request, guidance_scale=1.0, negative_prompt=None)
        return request

    def unused(self, request: ClipRequest, /) -> list[str]:
        if request.guidance_scale <= 1.0 and request.negative_prompt is not None:
            return ["the negative prompt has no effect: guidance of 1 or less is off"]
        return []

    def cut_prompts(self, pipe: Any, request: ClipRequest) -> list[str]:
        """Prompts that T5 cuts."""
        limit, found = TextLimit(num_tokens=pipe.tokenizer.model_max_length, num_end=1, num_after=1), []
        for name, text in (("prompt", request.prompt), ("negative prompt", self.effective(request).negative_prompt)):
            if text:
                found += cut_message(pipe.tokenizer, name, text, limit)
        return found

    def encode_inputs(self, request: ClipRequest) -> dict[str, Any]:
        request = self.effective(request)
        return {
            "prompt": request.prompt,
            "negative_prompt": request.negative_prompt,
            "do_classifier_free_guidance": request.guidance_scale > 1.0,
            "seconds": request.seconds,
        }

    @without_gradients
    def encode(self, pipe: Any, request: ClipRequest) -> dict[str, torch.Tensor]:
        """Encodes prompts and length: "text" [B, T + 2, D] and "seconds" [B, 1, 2 D].

        B is 2 with guidance, the unconditional row first. A negative prompt is not quite the conditional row's
        opposite: without one that row is all zeros.
        """
        import torch

        inputs, device = self.encode_inputs(request), pipe._execution_device
        is_guided, negative = inputs["do_classifier_free_guidance"], inputs["negative_prompt"]
        prompts = pipe.encode_prompt(inputs["prompt"], device, is_guided, negative)
        start, end = pipe.encode_duration(0.0, inputs["seconds"], device, is_guided and negative is not None, 1)
        text, seconds = torch.cat([prompts, start, end], dim=1), torch.cat([start, end], dim=2)
        if is_guided and negative is None:
            text, seconds = torch.cat([torch.zeros_like(text), text]), torch.cat([seconds, seconds])
        return {"text": text, "seconds": seconds}

    def loaded(self, pipe: Any, device: str) -> None:
        """Nothing: its VAE decodes a clip as it is."""

    def schedule(self, pipe: Any, request: ClipRequest) -> tuple[Any, torch.Tensor]:
        return new_schedule(pipe, request.num_inference_steps)

    @without_gradients
    def start(
        self, pipe: Any, request: ClipRequest, encoded: Mapping[str, torch.Tensor], generator: torch.Generator
    ) -> Denoising:
        import torch
        from diffusers.models.embeddings import get_1d_rotary_pos_embed

        device, transformer = pipe._execution_device, pipe.transformer
        config, is_guided = transformer.config, request.guidance_scale > 1.0
        scheduler, timesteps = self.schedule(pipe, request)
        latents = pipe.prepare_latents(1, config.in_channels, int(config.sample_size), torch.float32, device, generator)
        rotary = get_1d_rotary_pos_embed(
            pipe.rotary_embed_dim,
            latents.shape[2] + encoded["seconds"].shape[1],
            use_real=True,
            repeat_interleave_real=False,
        )
        kwargs = {
            "encoder_hidden_states": encoded["text"].to(device, transformer.dtype),
            "global_hidden_states": encoded["seconds"].to(device, transformer.dtype),
            "rotary_embedding": rotary,
        }
        return Denoising(
            latents=latents,  # [B, C, F]
            scheduler=scheduler,
            timesteps=timesteps,
            branches=(Branch(name="cond", transformer_kwargs=kwargs),),
            experts=(Expert(transformer=transformer, guidance_scale=request.guidance_scale),),
            model_input=partial(_model_input, 2 if is_guided else 1),
            combine=_guided,
            advance=partial(_advance, **pipe.prepare_extra_step_kwargs(generator, 0.0)),
        )

    @without_gradients
    def decode(
        self, pipe: Any, request: ClipRequest, latents: torch.Tensor, _generator: torch.Generator, /
    ) -> torch.Tensor:
        samples = pipe.vae.decode(latents.to(pipe.vae.dtype), return_dict=False)[0]
        return samples[:, :, : SOUND.num_frames(request)]


def _num_latents(configs: ModelConfigs) -> int:
    return int(configs.transformer.get("sample_size", 1024))  # as the pipeline does: it may be a fraction


def _model_input(
    num_rows: int, latents: torch.Tensor, timestep: torch.Tensor, scheduler: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    import torch

    rows = torch.cat([latents] * num_rows)
    return scheduler.scale_model_input(rows, timestep), timestep.unsqueeze(0)


def _guided(outputs: Sequence[torch.Tensor], guidance_scale: float) -> torch.Tensor:
    """Classifier-free guidance within one batch.

    Args:
        outputs: one, [2 B, C, F] with guidance, else [B, C, F].
    """
    (output,) = outputs
    if guidance_scale <= 1.0:
        return output
    uncond, cond = output.chunk(2)
    return uncond + guidance_scale * (cond - uncond)


def _advance(
    scheduler: Any, output: torch.Tensor, timestep: torch.Tensor, latents: torch.Tensor, **extra: Any
) -> torch.Tensor:
    return scheduler.step(output, timestep, latents, **extra, return_dict=False)[0]


MODEL = Model(
    transformer="StableAudioDiTModel",
    family="stable-audio",
    layout=BlockLayout(
        lists=("transformer_blocks",),
        counts=("num_layers",),
        shared=("rotary_embedding",),
        layers=("attn1", "attn2", "ff"),
    ),
    branches=("uncond", "cond"),
    stacked=True,
    sharded=ShardedArguments(attention="attn1", rotary="rotary_embedding"),  # the token in front is one as the others
    output=SOUND,
    takes_lora=False,
    can_tile=False,
    pipelines={"StableAudioPipeline": StableAudio()},
    encoder_parts=("text_encoder", "projection_model"),
    read_parts=("transformer",),
    checkpoints={
        "tiny-audio": KnownCheckpoint(
            source=str(SHIPPED / "tiny-audio"),
            note="shipped; tones, runs on a CPU",
            defaults={"num_inference_steps": 50, "guidance_scale": 3.0},
        ),
        "stable-audio-open-1.0": KnownCheckpoint(source="stabilityai/stable-audio-open-1.0", note="sound from text"),
    },
)
