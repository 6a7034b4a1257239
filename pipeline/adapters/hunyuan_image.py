"""HunyuanVideo, image to video, of both kinds: the first frame's latents beside the noise ("latent_concat"), or in the
place of the clip's first latent frame ("token_replace").

Follows diffusers 0.42 pipelines/hunyuan_video/pipeline_hunyuan_video_image2video.py step by step, so that the same seed
gives the same bits.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from cineray.pipeline.adapters import hunyuan_configs, hunyuan_video
from cineray.pipeline.adapters.hunyuan_video import HunyuanVideo
from cineray.pipeline.adapters.model import KnownCheckpoint
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
    scheduler_step,
    without_gradients,
)
from cineray.pipeline.media.picture import first_frame
from cineray.pipeline.request import ClipRequest, SizeRule, picture_inputs

if TYPE_CHECKING:
    import torch

CONCAT, REPLACE = "latent_concat", "token_replace"
NOISE_SHARE = 0.999  # of the first latents; the rest is the picture's: `t` in HunyuanVideoImageToVideoPipeline
DROPPED_FRAMES = 4  # that a latent_concat clip has in front, and the pipeline cuts off
# tokens of the picture in the language model that are left out: one of two, one of four; from the same pipeline
INTERLEAVE = {CONCAT: 2, REPLACE: 4}


_720P = Defaults(width=1280, height=720, num_frames=129, fps=24, guidance_scale=6.0)


@dataclass(frozen=True)
class HunyuanImageToVideo(HunyuanVideo):
    """HunyuanVideoImageToVideoPipeline.

    Args:
        condition: the transformer's image_condition_type.
        is_guided: it takes a guidance scale.
        defaults: Tencent's, in README.md of HunyuanVideo-I2V: 50 steps, embedded guidance 6; 24 frames per second as in
            its sample_image2video.py. The first latents hold a share of the picture, which is its --i2v-stability, and
            that goes with the checkpoint's shift of 7. Without it (shift 17, more motion) is not rendered.
    """

    condition: str = REPLACE
    is_guided: bool = True
    defaults: Defaults = _720P
    components = hunyuan_configs.IMAGE_TO_VIDEO

    misfit = staticmethod(hunyuan_configs.image_misfit)

    def for_checkpoint(self, configs: ModelConfigs, /) -> HunyuanImageToVideo:
        condition = configs.transformer.get("image_condition_type", REPLACE)
        is_guided = configs.transformer.get("guidance_embeds", True)
        defaults = replace(
            self.defaults,
            num_frames=129 - (DROPPED_FRAMES if condition == CONCAT else 0),
            guidance_scale=6.0 if is_guided else 1.0,
        )
        return replace(self, condition=condition, is_guided=is_guided, defaults=defaults)

    def size_rule(self, configs: ModelConfigs) -> SizeRule:
        # the pipeline asks for 16
        side_step = max(16, super().size_rule(configs).side_step or 16)
        return replace(super().size_rule(configs), side_step=side_step, takes_image=True)

    def num_tokens(self, configs: ModelConfigs, request: ClipRequest) -> int:
        return super().num_tokens(configs, self._whole(request))

    def _whole(self, request: ClipRequest) -> ClipRequest:
        """The request with the frames that are cut off at the end."""
        more = DROPPED_FRAMES if self.condition == CONCAT else 0
        return replace(request, num_frames=request.num_frames + more)

    def effective(self, request: ClipRequest) -> ClipRequest:
        return request if self.is_guided else replace(request, guidance_scale=1.0)

    def unused(self, request: ClipRequest, /) -> list[str]:
        if self.is_guided or request.guidance_scale == 1.0:
            return []
        return ["the guidance has no effect: this checkpoint takes none"]

    def cut_prompts(self, pipe: Any, request: ClipRequest) -> list[str]:
        from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video_image2video import DEFAULT_PROMPT_TEMPLATE

        before, after = DEFAULT_PROMPT_TEMPLATE["template"].split("{}")
        limit = TextLimit(
            num_tokens=hunyuan_video.MAX_SEQUENCE_LENGTH,
            num_end=4,  # up to <|end_header_id|>, which the pipeline looks for
            before=before,
            after=after,
            num_before=DEFAULT_PROMPT_TEMPLATE["crop_start"],
            num_after=5,  # <|eot_id|>, the assistant's header and two line ends in one
        )
        return cut_message(pipe.tokenizer, "prompt", request.prompt, limit)

    def encode_inputs(self, request: ClipRequest) -> dict[str, Any]:
        """The picture, and the size in which the VAE sees it, beside the prompt."""
        return super().encode_inputs(request) | picture_inputs(request)

    @without_gradients
    def encode(self, pipe: Any, request: ClipRequest) -> dict[str, torch.Tensor]:
        """The table of text to video, the language model having seen the picture, and "image" [1, C, 1, H, W]."""
        device, picture = pipe._execution_device, first_frame(request)
        image = encode_picture(pipe, request, self.condition)
        text, pooled, mask = pipe.encode_prompt(
            image=picture, prompt=request.prompt, device=device, image_embed_interleave=INTERLEAVE[self.condition]
        )
        return {"text": text, "pooled": pooled, "mask": mask, "image": image}

    @without_gradients
    def start(
        self, pipe: Any, request: ClipRequest, encoded: Mapping[str, torch.Tensor], generator: torch.Generator
    ) -> Denoising:
        import torch

        transformer = pipe.transformer
        scheduler, timesteps = self.schedule(pipe, request)
        noise = draw_noise(pipe, self._whole(request), transformer.config.out_channels, generator)
        image = encoded["image"].to(noise.device)
        share = torch.tensor([NOISE_SHARE], device=noise.device)
        latents = noise * share + image.expand_as(noise) * (1 - share)
        kwargs, trims = hunyuan_video.text_arguments(pipe, encoded)
        guidance = [request.guidance_scale] if self.is_guided else None
        kwargs["guidance"] = guidance and torch.tensor(guidance, dtype=transformer.dtype, device=noise.device) * 1000.0
        clip = Denoising(
            latents=latents,
            scheduler=scheduler,
            timesteps=timesteps,
            branches=(Branch(name="cond", transformer_kwargs=kwargs),),
            experts=(Expert(transformer=transformer),),
            hides_text=not trims,
        )
        if self.condition == REPLACE:
            return replace(clip, model_input=partial(_with_first, image), advance=partial(_behind_first, image))
        return replace(clip, channel_condition=beside_noise(noise, image))

    @without_gradients
    def decode(
        self, pipe: Any, request: ClipRequest, latents: torch.Tensor, generator: torch.Generator, /
    ) -> torch.Tensor:
        video = super().decode(pipe, request, latents, generator)
        return video[:, :, DROPPED_FRAMES:] if self.condition == CONCAT else video


def encode_picture(pipe: Any, request: ClipRequest, condition: str) -> torch.Tensor:
    """The first frame's latents [1, C, 1, H, W].

    Args:
        condition: the transformer's image_condition_type.
    """
    import torch

    device = pipe._execution_device
    pixels = pipe.video_processor.preprocess(first_frame(request), request.height, request.width)
    _, image = pipe.prepare_latents(
        pixels.to(device, pipe.vae.dtype),
        1,
        1,
        request.height,
        request.width,
        1,
        torch.float32,
        device,
        latents=torch.zeros((), device=device),  # else it would draw the noise
        image_condition_type=condition,
    )
    return image


def _with_first(
    image: torch.Tensor, latents: torch.Tensor, timestep: torch.Tensor, _scheduler: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """The picture's latents [B, C, 1, H, W] in the place of the clip's first."""
    import torch

    return torch.cat([image, latents[:, :, 1:]], dim=2), timestep.expand(latents.shape[0])


def _behind_first(
    image: torch.Tensor, scheduler: Any, output: torch.Tensor, timestep: torch.Tensor, latents: torch.Tensor
) -> torch.Tensor:
    """A step of all latent frames but the first, which stays the picture's."""
    import torch

    return torch.cat([image, scheduler_step(scheduler, output[:, :, 1:], timestep, latents[:, :, 1:])], dim=2)


MODEL = replace(
    hunyuan_video.MODEL,
    family="hunyuan-video-i2v",
    pipelines={"HunyuanVideoImageToVideoPipeline": HunyuanImageToVideo()},
    checkpoints={
        "hunyuan-video-i2v": KnownCheckpoint(
            source="hunyuanvideo-community/HunyuanVideo-I2V", note="image to video, 720p"
        ),
        "hunyuan-video-i2v-33ch": KnownCheckpoint(
            source="hunyuanvideo-community/HunyuanVideo-I2V-33ch", note="image to video, 720p, the first kind"
        ),
    },
)
