"""Wan 2.1, text to video and image to video.

Follows diffusers 0.42 pipelines/wan/pipeline_wan.py and pipeline_wan_i2v.py step by step, so that the same seed
gives the same bits.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from cineray.caching.policies.dicache import DiCacheConfig
from cineray.caching.policies.magcache import MagCacheConfig
from cineray.caching.policies.taylorseer import TaylorSeerConfig
from cineray.caching.policies.teacache import TeaCacheConfig
from cineray.pipeline.adapters import wan_configs
from cineray.pipeline.adapters.model import (
    SHIPPED,
    TINY_CLIP,
    BlockLayout,
    KnownCheckpoint,
    Model,
    ModuleOutput,
    ShardedArguments,
    TimestepArgument,
)
from cineray.pipeline.adapters.protocol import (
    Adapter,
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
from cineray.pipeline.media.picture import first_frame
from cineray.pipeline.request import ClipRequest, SizeRule, picture_inputs

if TYPE_CHECKING:
    import torch

BRANCHES = ("cond", "uncond")
MAX_SEQUENCE_LENGTH = 512  # text tokens; WanPipeline.__call__'s default


TEXT_LIMIT = TextLimit(num_tokens=MAX_SEQUENCE_LENGTH, num_end=1, num_after=1)  # T5's end token is kept


def _size_rule(configs: ModelConfigs, takes_image: bool) -> SizeRule:
    patch = configs.transformer.get("patch_size", (1, 2, 2))
    frame_step = configs.vae.get("scale_factor_temporal", 4)
    return SizeRule(
        frame_step=frame_step,
        # the pipelines themselves ask for 16; AutoencoderKLWan shrinks by scale_factor_spatial
        side_step=max(16, configs.vae.get("scale_factor_spatial", 8) * patch[-1]),
        takes_image=takes_image,
        takes_negative_prompt=True,
        takes_flow_shift=True,
    )


def _num_tokens(configs: ModelConfigs, request: ClipRequest) -> int:
    patch = configs.transformer.get("patch_size", (1, 2, 2))
    time = configs.vae.get("scale_factor_temporal", 4) * patch[0]
    space = configs.vae.get("scale_factor_spatial", 8) * patch[1]
    return ((request.num_frames - 1) // time + 1) * (request.height // space) * (request.width // space)


def _unsupported(configs: ModelConfigs, /) -> str | None:
    if configs.index.get("boundary_ratio") is not None or configs.index.get("expand_timesteps"):
        return "it is a Wan 2.2 checkpoint (two transformers or per-token timesteps)"
    return None


def _is_of_kind(configs: ModelConfigs, /) -> bool:
    return _unsupported(configs) is None


def _loaded(pipe: Any, device: str) -> None:
    """Nothing: its VAE decodes frame by frame as it is."""


# Wan 2.1's authors' choice by size, as diffusers' example says it (pipeline_wan.py: "5.0 for 720P, 3.0 for 480P")
_SHIFT_BY_PIXELS = ((1280 * 720, 5.0), (832 * 480, 3.0))


def _flow_shift(request: ClipRequest) -> float | None:
    """The shift that was asked for, else the authors' for 480p and for 720p and above; None: the scheduler's."""
    if request.flow_shift is not None:
        return request.flow_shift
    pixels = request.width * request.height
    return next((shift for least, shift in _SHIFT_BY_PIXELS if pixels >= least), None)


def _schedule(pipe: Any, request: ClipRequest) -> tuple[Any, torch.Tensor]:
    return new_schedule(pipe, request.num_inference_steps, _flow_shift(request))


@without_gradients
def _decode(pipe: Any, _request: ClipRequest, latents: torch.Tensor, _generator: torch.Generator, /) -> torch.Tensor:
    import torch

    vae = pipe.vae
    latents = latents.to(vae.dtype)
    shape = (1, vae.config.z_dim, 1, 1, 1)
    mean = torch.tensor(vae.config.latents_mean).view(shape).to(latents.device, latents.dtype)
    inverse_std = 1.0 / torch.tensor(vae.config.latents_std).view(shape).to(latents.device, latents.dtype)
    return vae.decode(latents / inverse_std + mean, return_dict=False)[0]


def effective(request: ClipRequest) -> ClipRequest:
    """Without guidance its scale and the negative prompt do nothing; an empty negative prompt is none."""
    request = replace(request, flow_shift=_flow_shift(request))
    if request.guidance_scale <= 1.0:
        return replace(request, guidance_scale=1.0, negative_prompt=None)
    if request.negative_prompt is not None and not request.negative_prompt.strip():
        return replace(request, negative_prompt=None)
    return request


def _unused(request: ClipRequest) -> list[str]:
    if request.guidance_scale <= 1.0 and (request.negative_prompt or "").strip():
        return ["the negative prompt has no effect: guidance of 1 or less is off"]
    return []


def _cut_prompts(pipe: Any, request: ClipRequest) -> list[str]:
    """Prompts that are cut, as `WanPipeline._get_t5_prompt_embeds` cuts."""
    from diffusers.pipelines.wan.pipeline_wan import prompt_clean

    found = []
    for name, text in (("prompt", request.prompt), ("negative prompt", effective(request).negative_prompt)):
        if text:
            found += cut_message(pipe.tokenizer, name, prompt_clean(text), TEXT_LIMIT)
    return found


def _prompt_inputs(request: ClipRequest) -> dict[str, Any]:
    """What `encode_prompt` is called with, but for the device."""
    request = effective(request)
    return {
        "prompt": request.prompt,
        "negative_prompt": request.negative_prompt,
        "do_classifier_free_guidance": request.guidance_scale > 1.0,
        "max_sequence_length": MAX_SEQUENCE_LENGTH,
    }


@without_gradients
def _encode_prompts(pipe: Any, request: ClipRequest) -> dict[str, torch.Tensor]:
    """Text embeddings [1, 512, D] by branch name; "uncond" only with guidance above 1."""
    cond, uncond = pipe.encode_prompt(**_prompt_inputs(request), device=pipe._execution_device)
    return {"cond": cond} if uncond is None else {"cond": cond, "uncond": uncond}


def denoising(
    pipe: Any,
    request: ClipRequest,
    encoded: Mapping[str, torch.Tensor],
    latents: torch.Tensor,
    extra: Mapping[str, Any],
    channel_condition: torch.Tensor | None = None,
) -> Denoising:
    """A clip's beginning.

    Args:
        extra: arguments of the transformer that all branches share.
    """
    transformer = pipe.transformer
    scheduler, timesteps = _schedule(pipe, request)
    texts = {name: encoded[name] for name in BRANCHES if name in encoded}
    return Denoising(
        latents=latents,
        scheduler=scheduler,
        timesteps=timesteps,
        branches=tuple(
            Branch(
                name=name,
                transformer_kwargs={"encoder_hidden_states": text.to(latents.device, transformer.dtype), **extra},
            )
            for name, text in texts.items()
        ),
        experts=(Expert(transformer=transformer, guidance_scale=request.guidance_scale),),
        channel_condition=channel_condition,
    )


@without_gradients
def encode_picture(pipe: Any, request: ClipRequest) -> dict[str, torch.Tensor]:
    """Encodes the first frame.

    Returns:
        "condition" [1, C', F, H, W], its latents behind a mask of frames; "image" [1, S, D] of the image encoder, where
        there is one.
    """
    import torch

    device = pipe._execution_device
    image = first_frame(request)
    encoded = {}
    if pipe.image_encoder is not None and pipe.image_processor is not None:
        encoded["image"] = pipe.encode_image(image, device)
    pixels = pipe.video_processor.preprocess(image, height=request.height, width=request.width)
    made = pipe.prepare_latents(
        pixels.to(device, dtype=torch.float32),
        1,
        pipe.vae.config.z_dim,
        request.height,
        request.width,
        request.num_frames,
        torch.float32,
        device,
        latents=torch.zeros(()),  # else it would draw the noise
    )
    encoded["condition"] = made[1]  # behind the latents; before a mask, where timesteps stand per token
    return encoded


class WanTextToVideo:
    # generate.py of Wan 2.1: 480p for the 1.3B model, 81 frames at 16 per second, 50 steps, guidance 5
    defaults = Defaults(width=832, height=480, num_frames=81, fps=16, guidance_scale=5.0)
    vae_dtype = "float32"  # diffusers 0.42, pipeline_wan.py, the example
    tiles_on_gpus = False
    components = wan_configs.TEXT_TO_VIDEO
    index_tables = ()

    misfit = staticmethod(partial(wan_configs.misfit, takes_image=False))
    is_of_kind = staticmethod(_is_of_kind)
    unsupported = staticmethod(_unsupported)
    num_tokens = staticmethod(_num_tokens)
    effective = staticmethod(effective)
    unused = staticmethod(_unused)
    cut_prompts = staticmethod(_cut_prompts)
    loaded = staticmethod(_loaded)
    schedule = staticmethod(_schedule)
    decode = staticmethod(_decode)

    def for_checkpoint(self, _configs: ModelConfigs, /) -> Adapter:
        return self

    def prompt_problem(self, _prompt: str, /) -> str | None:
        return None

    def size_rule(self, configs: ModelConfigs) -> SizeRule:
        return _size_rule(configs, takes_image=False)

    def encode_inputs(self, request: ClipRequest) -> dict[str, Any]:
        return _prompt_inputs(request)

    def encode(self, pipe: Any, request: ClipRequest) -> dict[str, torch.Tensor]:
        return _encode_prompts(pipe, request)

    @without_gradients
    def start(
        self, pipe: Any, request: ClipRequest, encoded: Mapping[str, torch.Tensor], generator: torch.Generator
    ) -> Denoising:
        latents = draw_noise(pipe, request, pipe.transformer.config.in_channels, generator)
        return denoising(pipe, request, encoded, latents, {})


class WanImageToVideo(WanTextToVideo):
    components = wan_configs.IMAGE_TO_VIDEO
    misfit = staticmethod(partial(wan_configs.misfit, takes_image=True))

    def size_rule(self, configs: ModelConfigs) -> SizeRule:
        return _size_rule(configs, takes_image=True)

    def encode_inputs(self, request: ClipRequest) -> dict[str, Any]:
        """The picture, and the size in which the VAE sees it, beside the prompts."""
        size = [request.width, request.height, request.num_frames]
        return _prompt_inputs(request) | picture_inputs(request) | {"size": size}

    def encode(self, pipe: Any, request: ClipRequest) -> dict[str, torch.Tensor]:
        """Text embeddings by branch, and the picture."""
        return _encode_prompts(pipe, request) | encode_picture(pipe, request)

    @without_gradients
    def start(
        self, pipe: Any, request: ClipRequest, encoded: Mapping[str, torch.Tensor], generator: torch.Generator
    ) -> Denoising:
        transformer = pipe.transformer
        latents = draw_noise(pipe, request, transformer.config.out_channels, generator)
        image = encoded.get("image") if transformer.config.image_dim is not None else None
        extra = {"encoder_hidden_states_image": image if image is None else image.to(latents.device, transformer.dtype)}
        condition = encoded["condition"].to(latents.device)
        return denoising(pipe, request, encoded, latents, extra, condition)


MODEL = Model(
    transformer="WanTransformer3DModel",
    family="wan",
    layout=BlockLayout(
        lists=("blocks",),
        counts=("num_layers",),
        shared=(3,),
        layers=("attn1", "attn2", "ffn"),
        unread=("rope", *(f"condition_embedder.{name}" for name in ("time_proj", "text_embedder", "image_embedder"))),
    ),
    branches=BRANCHES,
    sharded=ShardedArguments(attention="attn1", rotary=3, rotary_dim=1, timesteps="condition_embedder.time_embedder"),
    pipelines={"WanPipeline": WanTextToVideo(), "WanImageToVideoPipeline": WanImageToVideo()},
    encoder_parts=("text_encoder", "image_encoder"),
    presets={
        "dicache-paper": DiCacheConfig(threshold=0.2),  # section 4.1; the code's default is 0.08
        "teacache": TeaCacheConfig(),
        "magcache": MagCacheConfig(),
        "taylorseer": TaylorSeerConfig(),  # TaylorSeer-Wan2.1, cache_functions/cache_init.py
    },
    # e, the embedder's output [B, D], and e0, its projection to modulations [B, 6, D]; with timesteps per token
    # [B, S, 6, D]. The block is called with e0 alone.
    signals={
        "timestep-embedding": ModuleOutput("condition_embedder.time_embedder"),
        "timestep-projection": TimestepArgument(num_token_dims=4),
    },
    row_convolutions=("Conv2d", "Conv3d"),  # AutoencoderKLWan's WanCausalConv3d is a Conv3d
    checkpoints={
        "tiny-wan": KnownCheckpoint(
            source=str(SHIPPED / "tiny-wan"), note="shipped; moving shapes, runs on a CPU", defaults=TINY_CLIP
        ),
        "wan2.1-t2v-1.3b": KnownCheckpoint(source="Wan-AI/Wan2.1-T2V-1.3B-Diffusers", note="text to video, 480p"),
        "wan2.1-t2v-14b": KnownCheckpoint(
            source="Wan-AI/Wan2.1-T2V-14B-Diffusers", note="text to video, 480p and 720p"
        ),
        "wan2.1-i2v-14b-480p": KnownCheckpoint(
            source="Wan-AI/Wan2.1-I2V-14B-480P-Diffusers", note="image to video, 480p"
        ),
        "wan2.1-i2v-14b-720p": KnownCheckpoint(
            source="Wan-AI/Wan2.1-I2V-14B-720P-Diffusers",
            note="image to video, 720p",
            defaults={"width": 1280, "height": 720},
        ),
    },
)
