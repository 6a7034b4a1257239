"""Every model that can be cached, at toy size with random weights, and one call of each."""

from dataclasses import dataclass
from typing import Any

import torch
from conftest import BUILDERS, build_flux
from PIL import Image


def build_dit(seed: int = 0):
    """DiTPipeline with 3 blocks; 1000 classes, because the pipeline's null class is number 1000."""
    from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel

    torch.manual_seed(seed)
    return DiTPipeline(
        transformer=DiTTransformer2DModel(
            num_attention_heads=4, attention_head_dim=12, out_channels=8, num_layers=3, sample_size=8
        ).eval(),
        vae=AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4).eval(),
        scheduler=DDIMScheduler(beta_schedule="linear", clip_sample=False),
    )


def build_short_hunyuan15(seed: int = 6) -> Any:
    """HunyuanVideo15Pipeline as `more_models` has it, with fewer tokens of text and of the picture that it has not."""
    from more_models import build_hunyuan15

    pipe = build_hunyuan15(seed=seed)
    pipe.tokenizer_max_length, pipe.tokenizer_2_max_length, pipe.vision_num_semantic_tokens = 16, 8, 4
    return pipe


def build_small_vace(seed: int = 0) -> Any:
    """WanVACEPipeline as `more_models` has it."""
    from more_models import build_vace

    return build_vace(seed)


def build_stable_audio(seed: int = 0):
    """StableAudioPipeline with 3 blocks.

    The published checkpoint's CosineDPMSolverMultistepScheduler draws its noise with torchsde, which is not installed;
    EDMDPMSolverMultistepScheduler, which the pipeline declares, has the same steps and timesteps of the same kind.
    """
    from diffusers import (
        AutoencoderOobleck,
        EDMDPMSolverMultistepScheduler,
        StableAudioDiTModel,
        StableAudioPipeline,
        StableAudioProjectionModel,
    )
    from tiny.text import TEXT_DIM, new_umt5
    from transformers import T5Config, T5EncoderModel

    torch.manual_seed(seed)
    tokenizer, _ = new_umt5()
    tokenizer.model_max_length = 16
    t5 = T5Config(vocab_size=len(tokenizer), d_model=TEXT_DIM, d_kv=16, d_ff=64, num_layers=1, num_heads=4)
    return StableAudioPipeline(
        vae=AutoencoderOobleck(
            encoder_hidden_size=8,
            downsampling_ratios=[2, 4],
            channel_multiples=[1, 2],
            decoder_channels=8,
            decoder_input_channels=4,
            sampling_rate=64,
        ).eval(),
        text_encoder=T5EncoderModel(t5).eval(),
        projection_model=StableAudioProjectionModel(TEXT_DIM, TEXT_DIM, 0, 512).eval(),
        tokenizer=tokenizer,
        transformer=StableAudioDiTModel(
            sample_size=16,
            in_channels=4,
            out_channels=4,
            num_layers=3,
            attention_head_dim=16,
            num_attention_heads=4,
            num_key_value_attention_heads=2,
            cross_attention_dim=32,
            cross_attention_input_dim=TEXT_DIM,
            global_states_input_dim=2 * TEXT_DIM,
            time_proj_dim=32,
        ).eval(),
        scheduler=EDMDPMSolverMultistepScheduler(prediction_type="v_prediction", sigma_min=0.3, sigma_max=500),
    )


@dataclass
class OpenSoraLoop:
    """Open-Sora's rectified flow as a loop of one's own: guidance in the batch, conditional rows first."""

    transformer: Any
    seed: int = 0

    def set_progress_bar_config(self, **_: Any) -> None:
        """As a pipeline has it; this one shows none."""

    @torch.no_grad()
    def __call__(
        self,
        num_inference_steps: int,
        generator: torch.Generator,
        prompt: int | list[int] = 0,
        guidance_scale: float = 4.0,
        latents: torch.Tensor | None = None,
        stacked: bool = True,
        **_: Any,
    ) -> tuple[torch.Tensor]:
        """One clip for each number of `prompt`, whose text is drawn from it."""
        model = self.transformer
        prompts = [prompt] if isinstance(prompt, int) else prompt
        drawn = [torch.randn(7, 32, generator=torch.Generator().manual_seed(p)) for p in prompts]
        texts = {"cond": torch.stack(drawn), "uncond": model.null_embeds.expand(len(prompts), -1, -1)}
        if guidance_scale <= 1:
            del texts["uncond"]
        z = torch.randn(len(prompts), 4, 2, 4, 4, generator=generator) if latents is None else latents
        calls = [(("cond", torch.cat(list(texts.values()))))] if stacked else list(texts.items())
        for index in range(num_inference_steps):
            timestep = (1 - index / num_inference_steps) * 1000
            velocities = []
            for branch, text in calls:
                rows = z.repeat(len(text) // len(z), 1, 1, 1, 1)
                with model.cache_context(branch, step_index=index, num_inference_steps=num_inference_steps):
                    out = model(
                        rows.to(model.dtype),
                        torch.full((len(rows),), timestep),
                        text,
                        torch.ones(text.shape[:2]),
                        fps=torch.tensor([24.0]),
                        height=64,
                        width=64,
                    )
                velocities += out.sample.chunk(2, dim=1)[0].split(len(z))
            cond, uncond = velocities if len(velocities) == 2 else velocities * 2
            z = z + (uncond + guidance_scale * (cond - uncond)) / num_inference_steps
        return (z,)


def build_open_sora(seed: int = 0) -> OpenSoraLoop:
    """3 spatial and 3 temporal blocks."""
    from cineray.pipeline.adapters.open_sora_transformer import STDiT3

    torch.manual_seed(seed)
    sizes = {"hidden_size": 48, "depth": 3, "num_heads": 4, "caption_channels": 32, "model_max_length": 7}
    return OpenSoraLoop(STDiT3(**sizes, input_sq_size=64).eval())


EVERY_MODEL = {
    **BUILDERS,
    "hunyuan15": build_short_hunyuan15,
    "vace": build_small_vace,
    "flux": build_flux,
    "dit": build_dit,
    "stable_audio": build_stable_audio,
    "open_sora": build_open_sora,
}
STACKED = ("dit", "stable_audio", "open_sora")


def build(name: str) -> Any:
    pipe = EVERY_MODEL[name]()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def in_double(pipe: Any) -> Any:
    """The same pipeline in float64.

    Two right computations differ by their rounding, which a chain of steps makes larger, and how much that is depends
    on the processor's kernels. In float64 it stays far below any bound, and no decision hangs on it.
    """
    (pipe.transformer if isinstance(pipe, OpenSoraLoop) else pipe).to(torch.float64)
    return pipe


def call(pipe: Any, steps: int = 12, seed: int = 3, **changes: Any) -> torch.Tensor:
    """Latents (DiT, which has no such output: images), the same for the same arguments."""
    kind = type(pipe).__name__
    arguments: dict[str, Any] = {
        "num_inference_steps": steps,
        "output_type": "latent",
        "generator": torch.Generator("cpu").manual_seed(seed),
    }
    if kind == "DiTPipeline":
        arguments |= {"class_labels": [7], "output_type": "pt", "return_dict": False}
    elif kind != "OpenSoraLoop":
        arguments["prompt"] = "a red circle"
    if kind in (
        "WanPipeline",
        "WanImageToVideoPipeline",
        "HunyuanVideoPipeline",
        "HunyuanVideo15Pipeline",
        "WanVACEPipeline",
        "FluxPipeline",
    ):
        arguments |= {"width": 32, "height": 32}
        arguments |= {} if kind == "FluxPipeline" else {"num_frames": 5}
    if kind == "WanVACEPipeline":
        arguments["reference_images"] = [Image.new("RGB", (32, 24), "red")]
    if kind == "WanImageToVideoPipeline":
        arguments["image"] = Image.new("RGB", (32, 32), "green")
    return pipe(**(arguments | changes))[0]


def layout_of(transformer: Any) -> Any:
    """The `BlockLayout` of its model."""
    from cineray.pipeline.adapters import MODELS

    return MODELS[type(transformer).__name__].layout


def hint_blocks_of(transformer: Any) -> list[torch.nn.Module]:
    """Those that make hints for the others."""
    hints = layout_of(transformer).hints
    return [] if hints is None else list(getattr(transformer, hints).children())


def blocks_of(transformer: Any) -> list[torch.nn.Module]:
    """All blocks, in the order of their lists."""
    return [block for name in layout_of(transformer).lists for block in getattr(transformer, name).children()]
