"""HunyuanVideo, text to video with embedded guidance: one branch per step.

Follows diffusers 0.42 pipelines/hunyuan_video/pipeline_hunyuan_video.py step by step, so that the same seed
gives the same bits.
"""

from typing import Any

import numpy as np
import torch

from cineray.pipeline.adapters.protocol import Branch, Conditions, Defaults, ModelConfigs, draw_noise
from cineray.pipeline.request import ClipRequest, SizeRule


class HunyuanVideo:
    family = "hunyuan-video"
    # HunyuanVideoPipeline.__call__'s defaults; 24 frames per second as in Tencent's sample_video.py
    defaults = Defaults(width=1280, height=720, num_frames=129, fps=24, guidance_scale=6.0)
    vae_in_float32 = False

    def unsupported(self, configs: ModelConfigs) -> str | None:
        return None

    def size_rule(self, configs: ModelConfigs) -> SizeRule:
        return SizeRule(
            frame_step=configs.vae.get("temporal_compression_ratio", 4),
            side_step=configs.vae.get("spatial_compression_ratio", 8) * configs.transformer.get("patch_size", 2),
            takes_image=False,
            takes_negative_prompt=False,
        )

    @torch.no_grad()
    def prepare(self, pipe: Any, request: ClipRequest, generator: torch.Generator) -> tuple[torch.Tensor, Conditions]:
        device, dtype = pipe._execution_device, pipe.transformer.dtype
        embeds, pooled, mask = pipe.encode_prompt(prompt=request.prompt, device=device)
        latents = draw_noise(pipe, request, generator)
        kwargs = {
            "encoder_hidden_states": embeds.to(dtype),
            "encoder_attention_mask": mask.to(dtype),
            "pooled_projections": pooled.to(dtype),
            "guidance": torch.tensor([request.guidance_scale], dtype=dtype, device=device) * 1000.0,
        }
        branch = Branch(name="cond", transformer_kwargs=kwargs)
        return latents, Conditions(branches=(branch,), guidance_scale=1.0)

    def set_timesteps(self, scheduler: Any, num_inference_steps: int, device: torch.device) -> torch.Tensor:
        sigmas = np.linspace(1.0, 0.0, num_inference_steps + 1)[:-1]
        scheduler.set_timesteps(sigmas=sigmas, device=device)
        return scheduler.timesteps

    @torch.no_grad()
    def decode(self, pipe: Any, latents: torch.Tensor) -> torch.Tensor:
        latents = latents.to(pipe.vae.dtype) / pipe.vae.config.scaling_factor
        return pipe.vae.decode(latents, return_dict=False)[0]
