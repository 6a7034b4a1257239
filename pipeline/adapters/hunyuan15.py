"""HunyuanVideo 1.5, text and image to video: two text streams, classifier-free guidance, latents of 16 x 16 pixels.

Follows diffusers 0.42 pipelines/hunyuan_video1_5 step by step, so that the same seed gives the same bits.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from cineray.pipeline.adapters import hunyuan15_configs
from cineray.pipeline.adapters.model import BlockLayout, KnownCheckpoint, Model, ModulatedNorm, ShardedArguments
from cineray.pipeline.adapters.protocol import (
    Branch,
    Defaults,
    Denoising,
    Expert,
    ModelConfigs,
    TextLimit,
    beside_noise,
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
# what `encode` makes of each branch's prompt -> what the transformer calls it
TEXTS = {
    "text": "encoder_hidden_states",
    "mask": "encoder_attention_mask",
    "glyphs": "encoder_hidden_states_2",
    "glyph_mask": "encoder_attention_mask_2",
}
# 16:9 in diffusers' sizes (calculate_default_height_width) for the target_size of 480p and 720p
_SIZES = {640: (848, 480), 960: (1280, 720)}
_480P = Defaults(width=848, height=480, num_frames=121, fps=24, guidance_scale=6.0)


@dataclass(frozen=True)
class HunyuanVideo15:
    """HunyuanVideo15Pipeline.

    Args:
        defaults: of HunyuanVideo15Pipeline.__call__; 24 frames per second as in the example of image to video; size
            and guidance as the checkpoint's transformer and guider say (6, or 1 where guidance was distilled away).
    """

    defaults: Defaults = _480P

    vae_dtype = "float16"  # diffusers' example
    tiles_on_gpus = True  # the same; untiled, the VAE's attention makes a mask of all latents by all latents
    components = hunyuan15_configs.TEXT_TO_VIDEO
    index_tables = ()

    misfit = staticmethod(hunyuan15_configs.misfit)

    def for_checkpoint(self, configs: ModelConfigs, /) -> HunyuanVideo15:
        width, height = _SIZES.get(configs.transformer.get("target_size", 640), _SIZES[640])
        guidance = configs.guider.get("guidance_scale", 7.5)  # ClassifierFreeGuidance's own default
        is_number = isinstance(guidance, int | float) and not isinstance(guidance, bool)  # else its check will say
        guidance = float(guidance) if is_number else self.defaults.guidance_scale
        return replace(self, defaults=replace(self.defaults, width=width, height=height, guidance_scale=guidance))

    def prompt_problem(self, _prompt: str, /) -> str | None:
        return None

    def is_of_kind(self, _configs: ModelConfigs, /) -> bool:
        return True

    def unsupported(self, _configs: ModelConfigs, /) -> str | None:
        return None

    def size_rule(self, configs: ModelConfigs) -> SizeRule:
        return SizeRule(
            frame_step=configs.vae.get("temporal_compression_ratio", 4),
            side_step=configs.vae.get("spatial_compression_ratio", 16) * configs.transformer.get("patch_size", 1),
            takes_image=False,
            takes_negative_prompt=True,
            takes_flow_shift=True,
        )

    def num_tokens(self, configs: ModelConfigs, request: ClipRequest) -> int:
        space = configs.vae.get("spatial_compression_ratio", 16) * configs.transformer.get("patch_size", 1)
        time = configs.vae.get("temporal_compression_ratio", 4)
        return ((request.num_frames - 1) // time + 1) * (request.height // space) * (request.width // space)

    def effective(self, request: ClipRequest) -> ClipRequest:
        """Without guidance its scale and the negative prompt do nothing; an empty negative prompt is none."""
        if request.guidance_scale <= 1.0:
            return replace(request, guidance_scale=1.0, negative_prompt=None)
        return request if request.negative_prompt else replace(request, negative_prompt=None)

    def unused(self, request: ClipRequest, /) -> list[str]:
        if request.guidance_scale <= 1.0 and (request.negative_prompt or "").strip():
            return ["the negative prompt has no effect: guidance of 1 or less is off"]
        return []

    def cut_prompts(self, pipe: Any, request: ClipRequest) -> list[str]:
        """What of the prompts, and of the text in quotes that is to be seen, their encoders do not read."""
        from diffusers.pipelines.hunyuan_video1_5.pipeline_hunyuan_video1_5 import extract_glyph_texts

        found = []
        for name, text in (("prompt", request.prompt), ("negative prompt", self.effective(request).negative_prompt)):
            if text:
                found += cut_message(pipe.tokenizer, name, text, _chat_limit(pipe))
                shown: Any = extract_glyph_texts(text)  # annotated as a list
                if shown:
                    limit = TextLimit(num_tokens=pipe.tokenizer_2_max_length, num_end=1, num_after=1)  # ByT5's end
                    found += cut_message(pipe.tokenizer_2, f"text in quotes of the {name}", shown, limit)
        return found

    def encode_inputs(self, request: ClipRequest) -> dict[str, Any]:
        request = self.effective(request)
        return {
            "prompt": request.prompt,
            "negative_prompt": request.negative_prompt,
            "has_guidance": request.guidance_scale > 1.0,
        }

    @without_gradients
    def encode(self, pipe: Any, request: ClipRequest) -> dict[str, torch.Tensor]:
        """Encodes the prompts.

        Returns:
            by branch ("cond", and "uncond" with guidance), such as "cond_text" [1, T, D] of the language model and
            "cond_mask" [1, T]; "cond_glyphs" [1, G, D'] of ByT5, which reads what stands in quotes, and
            "cond_glyph_mask" [1, G], all 0 where nothing does.
        """
        request = self.effective(request)
        prompts = {"cond": request.prompt, "uncond": request.negative_prompt or ""}
        if request.guidance_scale <= 1.0:
            del prompts["uncond"]
        device = pipe._execution_device
        return {
            f"{branch}_{name}": values
            for branch, prompt in prompts.items()
            for name, values in zip(TEXTS, pipe.encode_prompt(prompt=prompt, device=device), strict=True)
        }

    def loaded(self, pipe: Any, device: str) -> None:
        if device != "cpu" and pipe.transformer is not None:
            from cineray.pipeline.adapters.hunyuan15_attention import attend_without_mask

            attend_without_mask(pipe.transformer)

    def schedule(self, pipe: Any, request: ClipRequest) -> tuple[Any, torch.Tensor]:
        sigmas = np.linspace(1.0, 0.0, request.num_inference_steps + 1)[:-1]
        return new_schedule(pipe, flow_shift=request.flow_shift, sigmas=sigmas)

    @without_gradients
    def start(
        self, pipe: Any, request: ClipRequest, encoded: Mapping[str, torch.Tensor], generator: torch.Generator
    ) -> Denoising:
        import torch

        transformer, device = pipe.transformer, pipe._execution_device
        noise = draw_noise(pipe, request, transformer.config.out_channels, generator)
        scheduler, timesteps = self.schedule(pipe, request)
        trims = device.type != "cpu"  # on a CPU clips equal those of diffusers' pipeline bit for bit
        if "seen" in encoded:
            seen = encoded["seen"].to(device, transformer.dtype)
        else:  # diffusers takes zeros for no picture, and hides them; none at all are as many that are seen
            num_tokens = 0 if trims else pipe.vision_num_semantic_tokens
            size = (1, num_tokens, transformer.config.image_embed_dim)
            seen = torch.zeros(size, dtype=transformer.dtype, device=device)
        return Denoising(
            latents=noise,
            scheduler=scheduler,
            timesteps=timesteps,
            branches=tuple(
                Branch(
                    name=branch,
                    transformer_kwargs={
                        **_text_arguments(encoded, branch, device, transformer.dtype, trims),
                        "image_embeds": seen,
                    },
                )
                for branch in BRANCHES
                if f"{branch}_text" in encoded
            ),
            experts=(Expert(transformer=transformer, guidance_scale=request.guidance_scale),),
            channel_condition=beside_noise(noise, encoded.get("image")),
            model_input=partial(_model_input, transformer.dtype),
            hides_text=not trims,
        )

    @without_gradients
    def decode(
        self, pipe: Any, _request: ClipRequest, latents: torch.Tensor, _generator: torch.Generator, /
    ) -> torch.Tensor:
        latents = latents.to(pipe.vae.dtype) / pipe.vae.config.scaling_factor
        return pipe.vae.decode(latents, return_dict=False)[0]


class HunyuanImageToVideo15(HunyuanVideo15):
    """HunyuanVideo15ImageToVideoPipeline, in the size that is asked for instead of the picture's own shape."""

    components = hunyuan15_configs.IMAGE_TO_VIDEO

    def size_rule(self, configs: ModelConfigs) -> SizeRule:
        return replace(super().size_rule(configs), takes_image=True)

    def loaded(self, pipe: Any, device: str) -> None:
        """SigLIP's pooling head is not run: nobody reads its output, and where layers are moved onto a GPU one by one
        its MultiheadAttention uses a projection without calling it, so that it would not be there."""
        super().loaded(pipe, device)
        if pipe.image_encoder is not None:
            for module in pipe.image_encoder.modules():
                if hasattr(module, "use_head"):  # of its vision transformer, which transformers 5 has no module for
                    module.use_head = False

    def encode_inputs(self, request: ClipRequest) -> dict[str, Any]:
        """The picture, and the size in which its encoders see it, beside the prompts."""
        return super().encode_inputs(request) | picture_inputs(request)

    @without_gradients
    def encode(self, pipe: Any, request: ClipRequest) -> dict[str, torch.Tensor]:
        """The table of text to video, and of the picture "image" [1, C, 1, H, W], its latents, and "seen" [1, S, D]."""
        picture, image = _fitted_picture(pipe, request), encode_picture(pipe, request)
        seen = pipe._get_image_embeds(pipe.image_encoder, pipe.feature_extractor, picture, pipe._execution_device)
        return {**super().encode(pipe, request), "image": image, "seen": seen}

    @without_gradients
    def start(
        self, pipe: Any, request: ClipRequest, encoded: Mapping[str, torch.Tensor], generator: torch.Generator
    ) -> Denoising:
        clip = super().start(pipe, request, encoded, generator)
        if not pipe.transformer.config.use_meanflow:
            return clip
        return replace(clip, step_arguments=partial(_next_timestep, clip.timesteps, pipe.transformer.dtype))


def encode_picture(pipe: Any, request: ClipRequest) -> torch.Tensor:
    """The first frame's latents [1, C, 1, H, W]."""
    picture, device = _fitted_picture(pipe, request), pipe._execution_device
    return pipe._get_image_latents(pipe.vae, pipe.video_processor, picture, request.height, request.width, device)


def _fitted_picture(pipe: Any, request: ClipRequest) -> Any:
    """The first frame in the clip's size."""
    return pipe.video_processor.resize(first_frame(request), height=request.height, width=request.width)


def _chat_limit(pipe: Any) -> TextLimit:
    """How much the language model reads of a prompt within the pipeline's template."""
    from diffusers.pipelines.hunyuan_video1_5.pipeline_hunyuan_video1_5 import format_text_input

    mark = "\N{SNOWMAN}"
    chat = format_text_input([mark], pipe.system_message)
    written = pipe.tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)[0]
    before, _, after = written.partition(mark)
    return TextLimit(
        num_tokens=pipe.tokenizer_max_length,
        before=before,
        after=after,
        num_before=pipe.prompt_template_encode_start_idx,
        num_after=len(pipe.tokenizer(after, add_special_tokens=False).input_ids),
    )


def _text_arguments(
    encoded: Mapping[str, torch.Tensor], branch: str, device: torch.device, dtype: torch.dtype, trims: bool
) -> dict[str, torch.Tensor]:
    """What the transformer is told of a branch's texts.

    Args:
        trims: without padding. No attention then needs a mask, so that flash kernels can be used: they take none.
    """
    found = {name: encoded[f"{branch}_{name}"] for name in TEXTS}
    for text, mask in (("text", "mask"), ("glyphs", "glyph_mask")) if trims else ():
        kept = found[mask][0] != 0
        found[text], found[mask] = found[text][:, kept], found[mask][:, kept]
    return {argument: found[name].to(device, dtype) for name, argument in TEXTS.items()}


def _model_input(
    dtype: torch.dtype, latents: torch.Tensor, timestep: torch.Tensor, _scheduler: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """Timesteps in the transformer's own type, which its embedding does not change."""
    return latents, timestep.expand(latents.shape[0]).to(dtype)


def _next_timestep(timesteps: torch.Tensor, dtype: torch.dtype, step: int) -> dict[str, torch.Tensor]:
    """Where this step goes: what a transformer that was distilled to mean flows is told too."""
    is_last = step == len(timesteps) - 1
    following = timesteps.new_zeros(()) if is_last else timesteps[step + 1]
    return {"timestep_r": following.expand(1).to(dtype)}


def _published(kind: str, size: str, note: str) -> KnownCheckpoint:
    return KnownCheckpoint(source=f"hunyuanvideo-community/HunyuanVideo-1.5-Diffusers-{size}_{kind}", note=note)


MODEL = Model(
    transformer="HunyuanVideo15Transformer3DModel",
    family="hunyuan-video-1.5",
    layout=BlockLayout(
        lists=("transformer_blocks",),
        counts=("num_layers",),
        output="hidden, text",
        shared=(4,),
        mask=3,
        layers=("attn", "ff", "ff_context"),
        unread=("rope", "context_embedder", "context_embedder_2", "image_embedder"),
    ),
    branches=BRANCHES,
    sharded=ShardedArguments(attention="attn", rotary=4, rotary_dim=0, masks_tokens_here=True),
    pipelines={
        "HunyuanVideo15Pipeline": HunyuanVideo15(),
        "HunyuanVideo15ImageToVideoPipeline": HunyuanImageToVideo15(),
    },
    encoder_parts=("text_encoder", "text_encoder_2", "image_encoder"),
    signals={"modulated-input": ModulatedNorm("norm1")},
    takes_lora=False,
    checkpoints={
        "hunyuan-video-1.5-t2v-480p": _published("t2v", "480p", "text to video, 480p"),
        "hunyuan-video-1.5-t2v-720p": _published("t2v", "720p", "text to video, 720p"),
        "hunyuan-video-1.5-i2v-480p": _published("i2v", "480p", "image to video, 480p"),
        "hunyuan-video-1.5-i2v-720p": _published("i2v", "720p", "image to video, 720p"),
    },
)
