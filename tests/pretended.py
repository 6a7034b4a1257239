"""Two models that nobody publishes, each one class and one line for a registry: what the seam must hold beyond today's.

Both are Wan at toy size: the first hands over from one transformer to another in the middle of the steps, as Wan 2.2
does; the second's scheduler, latents and decoder look at the request, frame rate and all, as LTX-Video's do.
"""

from dataclasses import replace

import torch
from conftest import _wan_parts, build_wan

from cineray.pipeline.adapters import Expert, by_transformer, wan
from cineray.pipeline.adapters.component import diffusers_model
from cineray.pipeline.adapters.wan import WanTextToVideo
from cineray.pipeline.adapters.wan_configs import WanTransformerConfig


class TwoExperts(WanTextToVideo):
    components = (
        *WanTextToVideo.components,
        diffusers_model(
            "transformer_2", "WanTransformer3DModel", WanTransformerConfig, (("num_layers", r"blocks\.(\d{1,9})\."),)
        ),
    )

    def unsupported(self, configs):
        return None if configs.index.get("boundary_ratio") is not None else "it has no boundary_ratio"

    def start(self, pipe, request, encoded, generator):
        clip = super().start(pipe, request, encoded, generator)
        boundary = pipe.config.boundary_ratio * pipe.scheduler.config.num_train_timesteps
        first_low = int((clip.timesteps >= boundary).sum())
        low = Expert(
            transformer=pipe.transformer_2, first_step=first_low, guidance_scale=request.guidance_scale - LESS_GUIDANCE
        )
        return replace(clip, experts=(*clip.experts, low))


LESS_GUIDANCE = 1.0
EXPERTS = by_transformer(
    replace(wan.MODEL, pipelines={"WanPipeline": TwoExperts()}, denoiser_parts=("transformer", "transformer_2"))
)


class Paced(WanTextToVideo):
    def schedule(self, pipe, request):
        """The shift of the timesteps follows the number of tokens."""
        num_tokens = request.width * request.height * request.num_frames
        scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, flow_shift=1 + num_tokens / 2**13)
        scheduler.set_timesteps(request.num_inference_steps, device=pipe._execution_device)
        scheduler.set_begin_index(0)
        return scheduler, scheduler.timesteps

    def start(self, pipe, request, encoded, generator):
        clip = super().start(pipe, request, encoded, generator)
        return replace(clip, latents=clip.latents * (1 + request.fps / 100))

    @torch.no_grad()
    def decode(self, pipe, request, latents, generator):
        noise = torch.randn(latents.shape, generator=generator).to(latents)
        return WanTextToVideo.decode(pipe, request, latents + noise / request.fps, generator)


PACED = by_transformer(replace(wan.MODEL, pipelines={"WanPipeline": Paced()}, pixel_fields=("fps",)))


def build_two_experts():
    from diffusers import WanPipeline

    return WanPipeline(**_wan_parts(0), transformer_2=_wan_parts(1)["transformer"], boundary_ratio=0.85)


PRETENDED = {"experts": (build_two_experts, EXPERTS), "paced": (build_wan, PACED)}
