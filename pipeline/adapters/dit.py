"""DiT-XL/2, pictures by class. Guidance doubles the batch of one call, conditional rows first:
`torch.cat([class_labels, class_null])` in pipelines/dit/pipeline_dit.py.

Follows diffusers 0.42 pipelines/dit/pipeline_dit.py step by step, so that the same seed gives the same bits.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from cineray.pipeline.adapters.component import (
    AutoencoderKLConfig,
    Channels,
    ComponentConfig,
    Epsilon,
    Heads,
    Layers,
    Positive,
    Rate,
    Small,
    diffusers_model,
    scheduler,
)
from cineray.pipeline.adapters.model import SHIPPED, BlockLayout, KnownCheckpoint, Model, ShardedArguments
from cineray.pipeline.adapters.protocol import (
    Branch,
    Defaults,
    Denoising,
    Expert,
    ModelConfigs,
    new_schedule,
    without_gradients,
)
from cineray.pipeline.media.output import PICTURE
from cineray.pipeline.request import ClipRequest, SizeRule
from cineray.text import shorten

if TYPE_CHECKING:
    import torch

NUM_CLASSES = 1000  # of ImageNet; DiTPipeline.__call__ takes 1000 for the null class


class DiTTransformerConfig(ComponentConfig):
    """DiTTransformer2DModel."""

    num_attention_heads: Heads = 16
    attention_head_dim: Annotated[int, Field(ge=1, le=4096)] = 72
    in_channels: Channels = 4
    out_channels: Channels | None = None
    num_layers: Layers = 28
    dropout: Rate = 0.0
    sample_size: Annotated[int, Field(ge=1, le=1024)] = 32
    patch_size: Small = 2
    num_embeds_ada_norm: Literal[1000] = NUM_CLASSES
    norm_type: Literal["ada_norm_zero"] = "ada_norm_zero"
    norm_eps: Epsilon = 1e-5


class DDIMConfig(ComponentConfig):
    """DDIMScheduler."""

    num_train_timesteps: Annotated[int, Field(ge=1000, le=100_000)] = 1000  # as many steps as can be asked for
    beta_start: Annotated[float, Field(gt=0, lt=1)] = 0.0001
    beta_end: Annotated[float, Field(gt=0, lt=1)] = 0.02
    beta_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2"] = "linear"
    trained_betas: None = None
    clip_sample: bool = True
    set_alpha_to_one: bool = True
    steps_offset: Annotated[int, Field(ge=0, le=1000)] = 0
    prediction_type: Literal["epsilon", "sample", "v_prediction"] = "epsilon"
    thresholding: bool = False
    dynamic_thresholding_ratio: Annotated[float, Field(gt=0, le=1)] = 0.995
    clip_sample_range: Positive = 1.0
    sample_max_value: Positive = 1.0
    timestep_spacing: Literal["leading", "trailing", "linspace"] = "leading"
    rescale_betas_zero_snr: bool = False


COMPONENTS = (
    diffusers_model("vae", "AutoencoderKL", AutoencoderKLConfig),
    diffusers_model(
        "transformer",
        "DiTTransformer2DModel",
        DiTTransformerConfig,
        (("num_layers", r"transformer_blocks\.(\d{1,9})\."),),
    ),
    scheduler(DDIMScheduler=DDIMConfig),
)


def misfit(parts: Mapping[str, Any]) -> str | None:
    """Where two parts of a checkpoint do not fit, in one phrase; None if all do."""
    transformer, channels = parts["transformer"], parts["vae"].latent_channels
    if transformer.in_channels != channels:
        return (
            f"transformer/config.json: in_channels must be {channels}, as the VAE's latent_channels, "
            f"got {transformer.in_channels}"
        )
    made = transformer.out_channels or transformer.in_channels
    if made not in (channels, 2 * channels):  # twice as many with a learned variance
        return f"transformer/config.json: out_channels must be {channels} or {2 * channels}, got {made}"
    if transformer.sample_size % transformer.patch_size:
        return (
            f"transformer/config.json: sample_size must be a multiple of patch_size {transformer.patch_size}, "
            f"got {transformer.sample_size}"
        )
    return None


@dataclass(frozen=True, slots=True)
class DiT:
    """DiTPipeline.

    Args:
        side: of a picture, in pixels.
        labels: name of a class -> its number; empty where the checkpoint has no names.
    """

    side: int = 256
    labels: Mapping[str, int] = field(default_factory=dict)
    vae_dtype = "float32"  # facebookresearch/DiT, sample.py
    tiles_on_gpus = False
    components = COMPONENTS
    index_tables = ("id2label",)

    misfit = staticmethod(misfit)

    @property
    def defaults(self) -> Defaults:
        # DiTPipeline.__call__'s defaults
        return Defaults(width=self.side, height=self.side, num_inference_steps=50, guidance_scale=4.0)

    def for_checkpoint(self, configs: ModelConfigs, /) -> DiT:
        shrinks = 2 ** (len(configs.vae.get("block_out_channels", (64,))) - 1)
        side = configs.transformer.get("sample_size", 32) * shrinks
        return replace(self, side=side, labels=_labels(configs.index.get("id2label")))

    def is_of_kind(self, _configs: ModelConfigs, /) -> bool:
        return True

    def unsupported(self, _configs: ModelConfigs, /) -> str | None:
        return None

    def size_rule(self, _configs: ModelConfigs) -> SizeRule:
        return SizeRule(
            frame_step=None,
            side_step=self.side,
            fixed_side=self.side,
            takes_image=False,
            takes_negative_prompt=False,
            no_negative="the other branch of this model's guidance is no class at all",
        )

    def prompt_problem(self, prompt: str, /) -> str | None:
        if self._class_of(prompt) is not None:
            return None
        near = difflib.get_close_matches(prompt.strip(), self.labels, n=1)
        named = f" or the name of a class, such as {shorten(next(iter(self.labels)))}" if self.labels else ""
        meant = f"; did you mean {shorten(near[0])}?" if near else ""
        return f"prompt must be a class: a number from 0 to {NUM_CLASSES - 1}{named}, got {shorten(prompt)}{meant}"

    def _class_of(self, prompt: str) -> int | None:
        """The class that a prompt names, or None."""
        text = prompt.strip()
        if text.isascii() and text.isdecimal() and len(text) <= 3:
            return int(text)
        return self.labels.get(text)

    def _class(self, request: ClipRequest) -> int:
        number = self._class_of(request.prompt)
        if number is None:
            raise ValueError(f"clip {request.id}: {self.prompt_problem(request.prompt)}")
        return number

    def num_tokens(self, configs: ModelConfigs, _request: ClipRequest) -> int:
        config = configs.transformer
        return (config.get("sample_size", 32) // config.get("patch_size", 2)) ** 2

    def effective(self, request: ClipRequest) -> ClipRequest:
        """A class is the same by number and by each of its names; guidance of 1 or less is off."""
        number = self._class_of(request.prompt)
        prompt = request.prompt if number is None else str(number)
        return replace(request, prompt=prompt, guidance_scale=max(request.guidance_scale, 1.0))

    def unused(self, _request: ClipRequest, /) -> list[str]:
        return []

    def cut_prompts(self, _pipe: Any, _request: ClipRequest) -> list[str]:
        return []

    def encode_inputs(self, request: ClipRequest) -> dict[str, Any]:
        return {"class": self._class(request)}

    def encode(self, _pipe: Any, request: ClipRequest) -> dict[str, torch.Tensor]:
        """The number of the class, "class" [1]."""
        import torch

        return {"class": torch.tensor([self._class(request)])}

    def loaded(self, pipe: Any, device: str) -> None:
        """Nothing: its VAE decodes a picture as it is."""

    def schedule(self, pipe: Any, request: ClipRequest) -> tuple[Any, torch.Tensor]:
        return new_schedule(pipe, request.num_inference_steps)

    @without_gradients
    def start(
        self, pipe: Any, request: ClipRequest, encoded: Mapping[str, torch.Tensor], generator: torch.Generator
    ) -> Denoising:
        import torch
        from diffusers.utils.torch_utils import randn_tensor

        device, transformer = pipe._execution_device, pipe.transformer
        channels, size = transformer.config.in_channels, transformer.config.sample_size
        scheduler, timesteps = self.schedule(pipe, request)
        classes = encoded["class"].to(device)
        if request.guidance_scale > 1:
            classes = torch.cat([classes, torch.tensor([NUM_CLASSES], device=device)])
        return Denoising(
            latents=randn_tensor((1, channels, size, size), generator=generator, device=device, dtype=torch.float32),
            scheduler=scheduler,
            timesteps=timesteps,
            branches=(Branch(name="cond", transformer_kwargs={"class_labels": classes}),),
            experts=(Expert(transformer=transformer, guidance_scale=request.guidance_scale),),
            model_input=_both_branches if request.guidance_scale > 1 else _one_branch,
            combine=partial(_guided, channels),
        )

    @without_gradients
    def decode(
        self, pipe: Any, _request: ClipRequest, latents: torch.Tensor, _generator: torch.Generator, /
    ) -> torch.Tensor:
        latents = 1 / pipe.vae.config.scaling_factor * latents
        return pipe.vae.decode(latents.to(pipe.vae.dtype), return_dict=False)[0].unsqueeze(2)


def _labels(id2label: Any) -> dict[str, int]:
    """Name -> number, as DiTPipeline reads them: a class may have several names, with commas between.

    Raises:
        ValueError: it is no such table.
    """
    if id2label is None:
        return {}
    if not isinstance(id2label, Mapping) or not all(
        isinstance(names, str) and number.isascii() and number.isdecimal() and int(number[:9]) < NUM_CLASSES
        for number, names in id2label.items()
    ):
        raise ValueError(
            f"model_index.json: id2label must hold names by the numbers of classes, 0 to {NUM_CLASSES - 1}, each a text"
        )
    return {name.strip(): int(number) for number, names in id2label.items() for name in names.split(",")}


def _both_branches(latents: torch.Tensor, timestep: torch.Tensor, scheduler: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """The same latents twice, [2 B, C, H, W]: with the class, and with none."""
    import torch

    doubled = scheduler.scale_model_input(torch.cat([latents, latents]), timestep)
    return doubled, timestep.expand(len(doubled))


def _one_branch(latents: torch.Tensor, timestep: torch.Tensor, scheduler: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return scheduler.scale_model_input(latents, timestep), timestep.expand(len(latents))


def _guided(channels: int, outputs: Sequence[torch.Tensor], guidance_scale: float) -> torch.Tensor:
    """Classifier-free guidance within one batch; the learned variance behind the channels has no part in the steps.

    Args:
        outputs: one, [2 B, C or 2 C, H, W] with guidance, else [B, ...].
    """
    output = outputs[0][:, :channels]
    if guidance_scale <= 1:
        return output
    cond, uncond = output.chunk(2)
    return uncond + guidance_scale * (cond - uncond)


MODEL = Model(
    transformer="DiTTransformer2DModel",
    family="dit",
    layout=BlockLayout(
        lists=("transformer_blocks",),
        counts=("num_layers",),
        shared=("cross_attention_kwargs",),
        layers=("attn1", "ff"),
        layer_names={"attn": "attn1", "mlp": "ff"},  # of facebookresearch/DiT, for which most official schedules are
        called_apart="norm1.emb",  # the output layer is modulated by the first block's embedding
    ),
    branches=("cond", "uncond"),
    stacked=True,
    sharded=ShardedArguments(attention="attn1", gathered="proj_out_2"),
    output=PICTURE,
    takes_lora=False,
    pipelines={"DiTPipeline": DiT()},
    encoder_parts=(),
    checkpoints={
        "tiny-dit": KnownCheckpoint(
            source=str(SHIPPED / "tiny-dit"), note="shipped; pictures of shapes by class, runs on a CPU"
        )
    },
)
