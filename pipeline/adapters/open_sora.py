"""Open-Sora 1.2, text to video, from a first frame, and on from the end of a video.

Guidance doubles the batch: `torch.cat([model_args["y"], y_null])` in opensora/schedulers/rf/__init__.py puts the
conditional rows first.

Follows github.com/hpcaitech/Open-Sora at v1.2.0, scripts/inference.py and opensora/schedulers/rf. diffusers has no
class for it: transformer, VAE and pipeline are ours, in the files beside this one. One deep block of STDiT3 is a
spatial block and the temporal block after it. Letters: B batch, C latent channels, T latent frames, L text tokens.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from cineray.pipeline.adapters import open_sora_configs
from cineray.pipeline.adapters.model import (
    SHIPPED,
    TINY_CLIP,
    BlockLayout,
    KnownCheckpoint,
    Model,
    ShardedArguments,
)
from cineray.pipeline.adapters.open_sora_configs import CHANNELS, GROUP_FRAMES, GROUP_LATENTS, num_latent_frames
from cineray.pipeline.adapters.protocol import (
    Branch,
    Defaults,
    Denoising,
    Expert,
    ModelConfigs,
    TextLimit,
    cut_message,
    new_schedule,
    scheduler_step,
    without_gradients,
)
from cineray.pipeline.media.control import last_frames
from cineray.pipeline.media.picture import first_frame
from cineray.pipeline.request import ClipRequest, SizeRule, control_inputs, picture_inputs

if TYPE_CHECKING:
    import torch

BASE_PIXELS = 512 * 512  # base_resolution of timestep_transform in rectified_flow.py
PICTURE_FPS = 120  # IMG_FPS in opensora/datasets/read_video: the frame rate of a single frame
SCORE = " aesthetic score: 6.5."  # `aes` of configs/opensora-v1-2/inference/sample.py, behind each prompt without one
SCORE_MARK = "aesthetic score:"


class OpenSora:
    """OpenSoraPipeline."""

    # configs/opensora-v1-2/inference/sample.py: 240p at 9:16, whose 426 columns the VAE makes 424 of
    defaults = Defaults(width=424, height=240, num_frames=51, fps=24, num_inference_steps=30, guidance_scale=7.0)
    vae_dtype = "bfloat16"  # sample.py: dtype "bf16" for all parts
    tiles_on_gpus = False
    components = open_sora_configs.COMPONENTS
    index_tables = ()

    misfit = staticmethod(open_sora_configs.misfit)

    def for_checkpoint(self, _configs: ModelConfigs, /) -> OpenSora:
        return self

    def is_of_kind(self, _configs: ModelConfigs, /) -> bool:
        return True

    def unsupported(self, _configs: ModelConfigs, /) -> str | None:
        if importlib.util.find_spec("bs4") is None:
            return "its prompts are cleaned with beautifulsoup4, which is not installed: pip install beautifulsoup4"
        return None

    def prompt_problem(self, _prompt: str, /) -> str | None:
        return None

    def size_rule(self, configs: ModelConfigs) -> SizeRule:
        return SizeRule(
            frame_step=GROUP_FRAMES,
            frame_offset=0,
            side_step=_shrinks(configs),
            takes_image=True,
            needs_image=False,
            goes_on_from=GROUP_FRAMES,
            takes_negative_prompt=False,
            takes_flow_shift=True,
            no_negative="the other branch of this model's guidance is its learned empty caption",
        )

    def num_tokens(self, configs: ModelConfigs, request: ClipRequest) -> int:
        rows, columns = (
            -(-side // (_shrinks(configs) * patch))
            for side, patch in zip(
                (request.height, request.width), configs.transformer.get("patch_size", (1, 2, 2))[1:], strict=True
            )
        )
        return num_latent_frames(made(request).num_frames) * rows * columns

    def effective(self, request: ClipRequest) -> ClipRequest:
        """Guidance of 1 or less is off; a single frame has the frame rate of pictures."""
        fps = PICTURE_FPS if request.num_frames == 1 else request.fps
        return replace(request, guidance_scale=max(request.guidance_scale, 1.0), fps=fps)

    def unused(self, _request: ClipRequest, /) -> list[str]:
        return []

    def cut_prompts(self, pipe: Any, request: ClipRequest) -> list[str]:
        limit = TextLimit(num_tokens=pipe.max_text_tokens, num_end=1, num_after=1)
        return cut_message(pipe.tokenizer, "prompt", prompt_text(request.prompt), limit)

    def encode_inputs(self, request: ClipRequest) -> dict[str, Any]:
        inputs: dict[str, Any] = {"prompt": prompt_text(request.prompt)}
        if request.image is not None:
            inputs |= picture_inputs(request)
        if request.control_video is not None:
            inputs |= {**control_inputs(request), "size": [request.width, request.height]}
        return inputs

    @without_gradients
    def encode(self, pipe: Any, request: ClipRequest) -> dict[str, torch.Tensor]:
        """The prompt, "text" [1, L, D] and "mask" [1, L].

        Of a first frame, or of the end of a video, its mean: "given" [1, C, 1 or GROUP_LATENTS, H, W].
        """
        device = pipe._execution_device
        tokens = pipe.tokenizer(
            [prompt_text(request.prompt)],
            max_length=pipe.max_text_tokens,
            padding="max_length",
            truncation=True,
            return_tensors="pt",
        ).to(device)
        text = pipe.text_encoder(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask).last_hidden_state
        encoded = {"text": text, "mask": tokens.attention_mask}
        if request.image is not None:
            pixels = pipe.video_processor.preprocess(first_frame(request), request.height, request.width)
            encoded["given"] = pipe.vae.encode(pixels.unsqueeze(2).to(device, pipe.vae.dtype)).float()
        if request.control_video is not None:
            frames = last_frames(request, GROUP_FRAMES)
            pixels = pipe.video_processor.preprocess_video(frames, request.height, request.width)
            encoded["given"] = pipe.vae.encode(pixels.to(device, pipe.vae.dtype)).float()
        return encoded

    def loaded(self, pipe: Any, device: str) -> None:
        """Nothing: its VAE decodes four frames at a time by itself."""

    def schedule(self, pipe: Any, request: ClipRequest) -> tuple[Any, torch.Tensor]:
        num_steps = request.num_inference_steps
        shift = time_shift(made(request)) if request.flow_shift is None else request.flow_shift
        return new_schedule(pipe, flow_shift=shift, sigmas=np.linspace(1.0, 1 / num_steps, num_steps))

    @without_gradients
    def start(
        self, pipe: Any, request: ClipRequest, encoded: Mapping[str, torch.Tensor], generator: torch.Generator
    ) -> Denoising:
        import torch
        from diffusers.utils.torch_utils import randn_tensor

        device, transformer, is_guided = pipe._execution_device, pipe.transformer, request.guidance_scale > 1
        side, num_latents = pipe.vae_scale_factor_spatial, num_latent_frames(made(request).num_frames)
        shape = (1, CHANNELS, num_latents, request.height // side, request.width // side)
        latents = randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
        scheduler, timesteps = self.schedule(pipe, request)
        text, mask = encoded["text"].to(device, transformer.dtype), encoded["mask"].to(device)
        if is_guided:  # upstream hides the same places of the empty caption as of the prompt
            text = torch.cat([text, transformer.null_embeds[None].to(device, transformer.dtype)])
            mask = torch.cat([mask, mask])
        fps = PICTURE_FPS if request.num_frames == 1 else request.fps
        kwargs = {
            "encoder_hidden_states": text,
            "encoder_attention_mask": mask,
            "fps": torch.tensor([float(fps)], device=device),
            "height": request.height,
            "width": request.width,
        }
        advance = _advance
        if "given" in encoded:  # upstream's mask strategy, edit ratio 0: the first latent frames are given, and stay
            num_given = encoded["given"].shape[2]
            latents[:, :, :num_given] = encoded["given"].to(device)
            noisy = torch.arange(shape[2], device=device)[None] >= num_given  # [1, T]
            kwargs["noisy_frames"] = noisy
            advance = partial(_behind_first, noisy)
        return Denoising(
            latents=latents,
            scheduler=scheduler,
            timesteps=timesteps,
            branches=(Branch(name="cond", transformer_kwargs=kwargs),),
            experts=(Expert(transformer=transformer, guidance_scale=request.guidance_scale),),
            model_input=partial(_model_input, 2 if is_guided else 1),
            combine=_guided,
            advance=advance,
        )

    @without_gradients
    def decode(
        self, pipe: Any, request: ClipRequest, latents: torch.Tensor, _generator: torch.Generator, /
    ) -> torch.Tensor:
        # groups of frames are decoded each by itself
        shown = latents if request.control_video is None else latents[:, :, GROUP_LATENTS:]
        return pipe.vae.decode(shown.to(pipe.vae.dtype), request.num_frames)


def _shrinks(configs: ModelConfigs) -> int:
    """Pixels along a side of a latent."""
    return 2 ** (len(configs.vae.get("block_out_channels", (128, 256, 512, 512))) - 1)


def made(request: ClipRequest) -> ClipRequest:
    """The request with the frames that it goes on from, in front of those that are shown: one group, as upstream's
    condition_frame_length of 5 latent frames."""
    if request.control_video is None:
        return request
    return replace(request, num_frames=request.num_frames + GROUP_FRAMES)


def prompt_text(prompt: str) -> str:
    """The text that is encoded: with a score, which the model's captions had, and cleaned as they were."""
    from cineray.pipeline.adapters.open_sora_pipeline import clean_prompt

    return clean_prompt(prompt if SCORE_MARK in prompt else prompt + SCORE)


def time_shift(request: ClipRequest) -> float:
    """How far the steps are moved towards the noise: by size and length, as timestep_transform does."""
    frames = 1 if request.num_frames == 1 else num_latent_frames(request.num_frames)
    return math.sqrt(request.height * request.width / BASE_PIXELS) * math.sqrt(frames)


def _model_input(
    num_rows: int, latents: torch.Tensor, timestep: torch.Tensor, _scheduler: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    import torch

    return torch.cat([latents] * num_rows), timestep.expand(num_rows)


def _guided(outputs: Sequence[torch.Tensor], guidance_scale: float) -> torch.Tensor:
    """Classifier-free guidance within one batch; the learned variance behind the channels has no part in the steps.

    Args:
        outputs: one, [2 B, C or 2 C, T, H, W] with guidance, else [B, ...].

    Returns:
        The velocity [B, C, T, H, W] from noise to data, as upstream has it.
    """
    output = outputs[0][:, :CHANNELS]
    if guidance_scale <= 1:
        return output
    cond, uncond = output.chunk(2)
    return uncond + guidance_scale * (cond - uncond)


def _advance(scheduler: Any, output: torch.Tensor, timestep: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
    """An Euler step; diffusers' velocities point from data to noise."""
    return scheduler_step(scheduler, -output, timestep, latents)


def _behind_first(
    noisy: torch.Tensor, scheduler: Any, output: torch.Tensor, timestep: torch.Tensor, latents: torch.Tensor
) -> torch.Tensor:
    """A step of the noisy frames [1, T]; the others stay as they are."""
    import torch

    made = _advance(scheduler, output, timestep, latents)
    return torch.where(noisy[:, None, :, None, None], made, latents)


MODEL = Model(
    transformer="STDiT3",
    family="open-sora",
    layout=BlockLayout(
        lists=("spatial_blocks", "temporal_blocks"),
        counts=("depth",),
        interleaved=True,
        layers=tuple(
            f"{blocks}.{layer}"
            for blocks in ("spatial_blocks", "temporal_blocks")
            for layer in ("attn", "cross_attn", "mlp")
        ),
    ),
    branches=("cond", "uncond"),
    stacked=True,
    # a rank's places are its own in all frames, so that temporal blocks need no other rank
    sharded=ShardedArguments(
        attention="spatial_blocks.attn",
        gathered="final_layer",
        frames=4,
        num_frames=lambda request: num_latent_frames(made(request).num_frames),
    ),
    pipelines={open_sora_configs.PIPELINE: OpenSora()},
    pipelines_from=f"{open_sora_configs.MODULES}.open_sora_pipeline",
    pixel_fields=("fps",),
    read_parts=("transformer", "vae"),
    checkpoints={
        "tiny-open-sora": KnownCheckpoint(
            source=str(SHIPPED / "tiny-open-sora"), note="shipped; moving shapes, runs on a CPU", defaults=TINY_CLIP
        ),
    },
)
