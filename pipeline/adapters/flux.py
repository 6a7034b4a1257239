"""FLUX.1 (dev and schnell), pictures from text. One branch per step: guidance is embedded, or distilled away.

Follows diffusers 0.42 pipelines/flux/pipeline_flux.py step by step, so that the same seed gives the same bits.
Letters: B batch (1), S tokens of 2 x 2 latents, C channels of a token, h w the packed latents' height and width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from cineray.caching.policies.dicache import DiCacheConfig
from cineray.caching.policies.magcache import MagCacheConfig
from cineray.caching.policies.taylorseer import TaylorSeerConfig
from cineray.caching.policies.teacache import TeaCacheConfig
from cineray.pipeline.adapters import flux_configs
from cineray.pipeline.adapters.model import BlockLayout, KnownCheckpoint, Model, ModulatedNorm, ShardedArguments
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
from cineray.pipeline.media.output import PICTURE
from cineray.pipeline.request import ClipRequest, SizeRule

if TYPE_CHECKING:
    import torch

DEV_TOKENS, SCHNELL_TOKENS = 512, 256  # of T5; src/flux/cli.py of black-forest-labs/flux
# Steps from the same file (FluxPipeline.__call__ has 28); guidance from diffusers' page of FLUX.1: 3.5 for dev, and 0,
# which "it needs to be", for schnell
_DEV = Defaults(width=1024, height=1024, num_inference_steps=50, guidance_scale=3.5)
_SCHNELL = Defaults(width=1024, height=1024, num_inference_steps=4, guidance_scale=0.0)


@dataclass(frozen=True, slots=True)
class Flux:
    """FluxPipeline.

    Args:
        is_guided: the transformer takes a guidance scale (dev); else it was distilled without one (schnell).
    """

    is_guided: bool = True
    vae_dtype = "bfloat16"  # black-forest-labs' flux/cli.py decodes under autocast to bfloat16; diffusers' example too
    tiles_on_gpus = False
    components = flux_configs.COMPONENTS
    index_tables = ()

    misfit = staticmethod(flux_configs.misfit)

    @property
    def defaults(self) -> Defaults:
        return _DEV if self.is_guided else _SCHNELL

    @property
    def _text_tokens(self) -> int:
        return DEV_TOKENS if self.is_guided else SCHNELL_TOKENS

    def for_checkpoint(self, configs: ModelConfigs, /) -> Flux:
        return replace(self, is_guided=configs.transformer.get("guidance_embeds") is True)

    def is_of_kind(self, _configs: ModelConfigs, /) -> bool:
        return True

    def unsupported(self, _configs: ModelConfigs, /) -> str | None:
        return None

    def prompt_problem(self, _prompt: str, /) -> str | None:
        return None

    def size_rule(self, configs: ModelConfigs) -> SizeRule:
        side_step = _token_side(configs)
        return SizeRule(frame_step=None, side_step=side_step, takes_image=False, takes_negative_prompt=False)

    def num_tokens(self, configs: ModelConfigs, request: ClipRequest) -> int:
        side = _token_side(configs)
        return (request.height // side) * (request.width // side)

    def effective(self, request: ClipRequest) -> ClipRequest:
        return request if self.is_guided else replace(request, guidance_scale=0.0)

    def unused(self, request: ClipRequest, /) -> list[str]:
        if self.is_guided or request.guidance_scale == 0:
            return []
        return ["the guidance has no effect: this checkpoint was distilled without it"]

    def cut_prompts(self, pipe: Any, request: ClipRequest) -> list[str]:
        """Prompts that T5 cuts; CLIP's pooled embedding sees yet less."""
        limit = TextLimit(num_tokens=self._text_tokens, num_end=1, num_after=1)
        return cut_message(pipe.tokenizer_2, "prompt", request.prompt, limit)

    def encode_inputs(self, request: ClipRequest) -> dict[str, Any]:
        return {"prompt": request.prompt, "max_sequence_length": self._text_tokens}

    @without_gradients
    def encode(self, pipe: Any, request: ClipRequest) -> dict[str, torch.Tensor]:
        """Encodes the prompt: "text" [1, T, D] of T5 and "pooled" [1, D] of CLIP."""
        text, pooled, _ = pipe.encode_prompt(**self.encode_inputs(request), device=pipe._execution_device)
        return {"text": text, "pooled": pooled}

    def loaded(self, pipe: Any, device: str) -> None:
        """Nothing: its VAE decodes a picture as it is."""

    def schedule(self, pipe: Any, request: ClipRequest) -> tuple[Any, torch.Tensor]:
        from diffusers.pipelines.flux.pipeline_flux import calculate_shift

        num_steps, side, config = request.num_inference_steps, 2 * pipe.vae_scale_factor, pipe.scheduler.config
        mu = calculate_shift(
            (request.height // side) * (request.width // side),
            config.get("base_image_seq_len", 256),
            config.get("max_image_seq_len", 4096),
            config.get("base_shift", 0.5),
            config.get("max_shift", 1.15),
        )
        return new_schedule(pipe, sigmas=np.linspace(1.0, 1 / num_steps, num_steps), mu=mu)

    @without_gradients
    def start(
        self, pipe: Any, request: ClipRequest, encoded: Mapping[str, torch.Tensor], generator: torch.Generator
    ) -> Denoising:
        import torch

        device, transformer = pipe._execution_device, pipe.transformer
        scheduler, timesteps = self.schedule(pipe, request)
        latents, image_ids = pipe.prepare_latents(
            1,
            transformer.config.in_channels // 4,
            request.height,
            request.width,
            torch.float32,
            device,
            generator,
        )
        text = encoded["text"].to(device, transformer.dtype)
        kwargs = {
            "encoder_hidden_states": text,
            "pooled_projections": encoded["pooled"].to(device, transformer.dtype),
            "txt_ids": torch.zeros(text.shape[1], 3, device=device),
            "img_ids": image_ids,
            "guidance": torch.full([1], request.guidance_scale, device=device) if self.is_guided else None,
        }
        return Denoising(
            latents=latents,  # [B, S, C]
            scheduler=scheduler,
            timesteps=timesteps,
            branches=(Branch(name="cond", transformer_kwargs=kwargs),),
            experts=(Expert(transformer=transformer),),
            model_input=_model_input,
        )

    @without_gradients
    def decode(
        self, pipe: Any, request: ClipRequest, latents: torch.Tensor, _generator: torch.Generator, /
    ) -> torch.Tensor:
        vae = pipe.vae
        latents = pipe._unpack_latents(latents, request.height, request.width, pipe.vae_scale_factor)
        latents = (latents / vae.config.scaling_factor) + vae.config.shift_factor
        return vae.decode(latents.to(vae.dtype), return_dict=False)[0].unsqueeze(2)


def _token_side(configs: ModelConfigs) -> int:
    """Pixels along a side of a token."""
    return 2 * 2 ** (len(configs.vae.get("block_out_channels", (64,))) - 1)


def _model_input(latents: torch.Tensor, timestep: torch.Tensor, _scheduler: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return latents, timestep.expand(latents.shape[0]).to(latents.dtype) / 1000


MODEL = Model(
    transformer="FluxTransformer2DModel",
    family="flux",
    layout=BlockLayout(
        lists=("transformer_blocks", "single_transformer_blocks"),
        counts=("num_layers", "num_single_layers"),
        output="text, hidden",
        shared=("image_rotary_emb", "joint_attention_kwargs"),
        layers=("attn", "ff", "ff_context", "proj_mlp"),
        unread=("context_embedder", "pos_embed"),
    ),
    branches=("cond",),
    sharded=ShardedArguments(attention="attn", rotary="image_rotary_emb", rotary_dim=0, text_first=True),
    output=PICTURE,
    pipelines={"FluxPipeline": Flux()},
    encoder_parts=("text_encoder", "text_encoder_2"),
    presets={
        # the threshold from section 4.1, all else from FLUX/run_flux_dicache.py
        "dicache-paper": DiCacheConfig(
            threshold=0.4, gamma_clip=(1.0, 1.5), last_step_full=True, compute_first_after_warmup=True
        ),
        "teacache": TeaCacheConfig(),
        "magcache": MagCacheConfig(skip_at_threshold=True, round_retention=True),  # MagCache4FLUX/magcache_flux.py
        "taylorseer": TaylorSeerConfig(interval=6, warmup_steps=3),  # TaylorSeer-FLUX, cache_functions/cache_init.py
    },
    signals={"modulated-input": ModulatedNorm("norm1")},
    checkpoints={
        "flux.1-dev": KnownCheckpoint(source="black-forest-labs/FLUX.1-dev", note="picture from text"),
        "flux.1-schnell": KnownCheckpoint(
            source="black-forest-labs/FLUX.1-schnell", note="picture from text, in 4 steps"
        ),
    },
)
