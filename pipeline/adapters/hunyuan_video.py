"""HunyuanVideo, text to video with embedded guidance: one branch per step.

Follows diffusers 0.42 pipelines/hunyuan_video/pipeline_hunyuan_video.py step by step, so that the same seed
gives the same bits.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from cineray.caching.policies.dicache import DiCacheConfig
from cineray.caching.policies.magcache import MagCacheConfig
from cineray.caching.policies.taylorseer import TaylorSeerConfig
from cineray.caching.policies.teacache import TeaCacheConfig
from cineray.pipeline.adapters import hunyuan_configs
from cineray.pipeline.adapters.hunyuan_vae import attend_by_frame
from cineray.pipeline.adapters.model import (
    SHIPPED,
    TINY_CLIP,
    BlockLayout,
    KnownCheckpoint,
    Model,
    ModulatedNorm,
    ShardedArguments,
)
from cineray.pipeline.adapters.protocol import (
    Branch,
    Defaults,
    Denoising,
    Expert,
    ModelConfigs,
    TextLimit,
    cut_message,
    draw_noise,
    new_schedule,
    without_gradients,
)
from cineray.pipeline.request import ClipRequest, SizeRule

if TYPE_CHECKING:
    import torch


MAX_SEQUENCE_LENGTH = 256  # text tokens behind the template's; HunyuanVideoPipeline.__call__'s default


class HunyuanVideo:
    # HunyuanVideoPipeline.__call__'s defaults; 24 frames per second as in Tencent's sample_video.py
    defaults = Defaults(width=1280, height=720, num_frames=129, fps=24, guidance_scale=6.0)
    vae_dtype = "float16"  # Tencent's sample_video.py, --vae-precision; diffusers' example too
    tiles_on_gpus = True  # 37 GB at 720p, 2.7 GB a tile (docs/real_size.md); diffusers' example
    components = hunyuan_configs.COMPONENTS
    index_tables = ()

    misfit = staticmethod(hunyuan_configs.misfit)

    def for_checkpoint(self, _configs: ModelConfigs, /) -> HunyuanVideo:
        return self

    def prompt_problem(self, _prompt: str, /) -> str | None:
        return None

    def is_of_kind(self, _configs: ModelConfigs, /) -> bool:
        return True

    def unsupported(self, _configs: ModelConfigs, /) -> str | None:
        return None

    def size_rule(self, configs: ModelConfigs) -> SizeRule:
        return SizeRule(
            frame_step=configs.vae.get("temporal_compression_ratio", 4),
            side_step=configs.vae.get("spatial_compression_ratio", 8) * configs.transformer.get("patch_size", 2),
            takes_image=False,
            takes_negative_prompt=False,
            takes_flow_shift=True,
        )

    def num_tokens(self, configs: ModelConfigs, request: ClipRequest) -> int:
        space = configs.vae.get("spatial_compression_ratio", 8) * configs.transformer.get("patch_size", 2)
        time = configs.vae.get("temporal_compression_ratio", 4) * configs.transformer.get("patch_size_t", 1)
        return ((request.num_frames - 1) // time + 1) * (request.height // space) * (request.width // space)

    def effective(self, request: ClipRequest) -> ClipRequest:
        return request

    def unused(self, _request: ClipRequest, /) -> list[str]:
        return []

    def cut_prompts(self, pipe: Any, request: ClipRequest) -> list[str]:
        """Prompts that `HunyuanVideoPipeline._get_llama_prompt_embeds` cuts; CLIP's pooled embedding sees yet less."""
        from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video import DEFAULT_PROMPT_TEMPLATE

        before, after = DEFAULT_PROMPT_TEMPLATE["template"].split("{}")
        limit = TextLimit(
            num_tokens=MAX_SEQUENCE_LENGTH,
            before=before,
            after=after,
            num_before=DEFAULT_PROMPT_TEMPLATE["crop_start"],
            num_after=1,  # <|eot_id|>
        )
        return cut_message(pipe.tokenizer, "prompt", request.prompt, limit)

    def encode_inputs(self, request: ClipRequest) -> dict[str, Any]:
        return {"prompt": request.prompt}

    @without_gradients
    def encode(self, pipe: Any, request: ClipRequest) -> dict[str, torch.Tensor]:
        """Encodes the prompt: "text" [1, T, D] of the language model and its "mask" [1, T]; "pooled" [1, D] of CLIP."""
        text, pooled, mask = pipe.encode_prompt(prompt=request.prompt, device=pipe._execution_device)
        return {"text": text, "pooled": pooled, "mask": mask}

    def loaded(self, pipe: Any, device: str) -> None:
        if device != "cpu" and pipe.vae is not None:
            attend_by_frame(pipe.vae)

    def schedule(self, pipe: Any, request: ClipRequest) -> tuple[Any, torch.Tensor]:
        sigmas = np.linspace(1.0, 0.0, request.num_inference_steps + 1)[:-1]
        return new_schedule(pipe, flow_shift=request.flow_shift, sigmas=sigmas)

    @without_gradients
    def start(
        self, pipe: Any, request: ClipRequest, encoded: Mapping[str, torch.Tensor], generator: torch.Generator
    ) -> Denoising:
        import torch

        device, dtype = pipe._execution_device, pipe.transformer.dtype
        scheduler, timesteps = self.schedule(pipe, request)
        kwargs, trims = text_arguments(pipe, encoded)
        kwargs["guidance"] = torch.tensor([request.guidance_scale], dtype=dtype, device=device) * 1000.0
        return Denoising(
            latents=draw_noise(pipe, request, pipe.transformer.config.in_channels, generator),
            scheduler=scheduler,
            timesteps=timesteps,
            branches=(Branch(name="cond", transformer_kwargs=kwargs),),
            experts=(Expert(transformer=pipe.transformer),),
            hides_text=not trims,
        )

    @without_gradients
    def decode(
        self, pipe: Any, _request: ClipRequest, latents: torch.Tensor, _generator: torch.Generator, /
    ) -> torch.Tensor:
        latents = latents.to(pipe.vae.dtype) / pipe.vae.config.scaling_factor
        return pipe.vae.decode(latents, return_dict=False)[0]


def text_arguments(pipe: Any, encoded: Mapping[str, torch.Tensor]) -> tuple[dict[str, Any], bool]:
    """(what the transformer is told of the text, whether its padding was left out)."""
    device, dtype = pipe._execution_device, pipe.transformer.dtype
    text, mask = encoded["text"], encoded["mask"]
    trims = device.type != "cpu"  # on a CPU clips equal those of diffusers' pipeline bit for bit
    if trims:
        text, mask = without_padding(text, mask)
    arguments = {
        "encoder_hidden_states": text.to(device, dtype),
        "encoder_attention_mask": mask.to(device, dtype),
        "pooled_projections": encoded["pooled"].to(device, dtype),
    }
    return arguments, trims


def without_padding(text: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Text [1, T, D] and its mask [1, T] less what the mask hides, which is padding behind the text.

    No attention over it then needs a mask, so that flash kernels can be used: they take none. A hidden key counts
    nothing in a softmax; only the last bits of its sums change.
    """
    num_tokens = int(mask.sum())
    return text[:, :num_tokens], mask[:, :num_tokens]


MODEL = Model(
    transformer="HunyuanVideoTransformer3DModel",
    family="hunyuan-video",
    layout=BlockLayout(
        lists=("transformer_blocks", "single_transformer_blocks"),
        counts=("num_layers", "num_single_layers"),
        output="hidden, text",
        shared=(4, 6),
        mask=3,
        layers=("attn", "ff", "ff_context", "proj_mlp"),
        unread=("rope", "context_embedder"),
    ),
    branches=("cond",),
    sharded=ShardedArguments(attention="attn", rotary=4, rotary_dim=0, first_frame=6),
    pipelines={"HunyuanVideoPipeline": HunyuanVideo()},
    encoder_parts=("text_encoder", "text_encoder_2"),
    presets={
        # the threshold from section 4.1, clip and comparison from HunyuanVideo/run_hunyuanvideo_dicache.py
        "dicache-paper": DiCacheConfig(threshold=0.1, gamma_clip=(1.0, 1.5), skip_at_threshold=True),
        "teacache": TeaCacheConfig(),
        "magcache": MagCacheConfig(skip_at_threshold=True),  # MagCache4HunyuanVideo/magcache_sample_video.py
        "taylorseer": TaylorSeerConfig(),  # TaylorSeer-HunyuanVideo, cache_functions/cache_init.py
    },
    signals={"modulated-input": ModulatedNorm("norm1")},
    row_convolutions=("HunyuanVideoCausalConv3d",),  # of AutoencoderKLHunyuanVideo
    checkpoints={
        "tiny-hunyuan": KnownCheckpoint(
            source=str(SHIPPED / "tiny-hunyuan"),
            note="shipped; moving shapes, runs on a CPU",
            # at the family's 6 it obeys less: colour 46 of 48 and shape 38 of 48 in scripts/check_obedience.py
            defaults={**TINY_CLIP, "guidance_scale": 3.0},
        ),
        "hunyuan-video": KnownCheckpoint(source="hunyuanvideo-community/HunyuanVideo", note="text to video, 720p"),
    },
)
