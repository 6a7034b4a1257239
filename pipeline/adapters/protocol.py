"""The seam between the denoising loop and a model family.

Letters: B batch (1), C latent channels, F latent frames, H W latent height and width.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ParamSpec, Protocol, TypeVar

from cineray.pipeline.adapters.component import Component
from cineray.pipeline.request import ClipRequest, SizeRule

if TYPE_CHECKING:  # they take seconds to import; a driver on Ray reads what a model can do, and does without them
    import torch
    from diffusers import DiffusionPipeline

P = ParamSpec("P")
R = TypeVar("R")


@dataclass(frozen=True, kw_only=True, slots=True)
class Branch:
    """One call of the transformer per step: "cond", or "uncond" for classifier-free guidance."""

    name: str
    transformer_kwargs: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Conditions:
    """All that a clip's denoising needs beside the latents; replicated on every rank.

    Args:
        branches: the conditional branch first, then the unconditional one if there is guidance.
        guidance_scale: weight of the difference of the branches; not used with one branch.
        channel_condition: [B, C', F, H, W] concatenated to the latents along channels at each step, or None.
    """

    branches: tuple[Branch, ...]
    guidance_scale: float
    channel_condition: torch.Tensor | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Defaults:
    """What a family renders when nothing is asked for: its authors' values."""

    width: int
    height: int
    num_frames: int
    fps: int
    num_inference_steps: int = 50
    guidance_scale: float


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfigs:
    """The configuration files of a checkpoint, read without its weights."""

    index: Mapping[str, Any] = field(repr=False)
    transformer: Mapping[str, Any] = field(repr=False)
    vae: Mapping[str, Any] = field(repr=False)


class Adapter(Protocol):
    """One per model family; holds no state."""

    family: str
    defaults: Defaults
    vae_in_float32: bool
    components: tuple[Component, ...]  # of its pipeline

    def misfit(self, parts: Mapping[str, Any]) -> str | None:
        """Where the configurations of two components (name -> configuration) do not fit together, or None."""
        ...

    def unsupported(self, configs: ModelConfigs) -> str | None:
        """Why this checkpoint of the family cannot be rendered, or None."""
        ...

    def size_rule(self, configs: ModelConfigs) -> SizeRule: ...

    def num_tokens(self, configs: ModelConfigs, request: ClipRequest) -> int:
        """Image tokens of a clip, on all ranks together."""
        ...

    def effective(self, request: ClipRequest) -> ClipRequest:
        """The request less what has no effect on its pixels: equal for requests that differ in nothing else."""
        ...

    def unused(self, request: ClipRequest) -> list[str]:
        """What the request says and the pixels do not show, a sentence for each."""
        ...

    def cut_prompts(self, pipe: DiffusionPipeline, request: ClipRequest) -> list[str]:
        """What of its prompts the text encoders do not read, a sentence for each; takes the pipeline's tokenizers."""
        ...

    def prompt_inputs(self, request: ClipRequest) -> dict[str, Any]:
        """What `pipe.encode_prompt` is called with in `prepare`, but for the device: plain values alone."""
        ...

    def prepare(
        self, pipe: DiffusionPipeline, request: ClipRequest, generator: torch.Generator
    ) -> tuple[torch.Tensor, Conditions]:
        """Encodes the prompt (and image) and draws the noise.

        Returns:
            latents [B, C, F, H, W] float32 on the pipeline's device, from the CPU generator; conditions.
        """
        ...

    def set_timesteps(self, scheduler: Any, num_inference_steps: int, device: torch.device) -> torch.Tensor:
        """Sets up the scheduler; returns its timesteps [num_inference_steps]."""
        ...

    def decode(self, pipe: DiffusionPipeline, latents: torch.Tensor) -> torch.Tensor:
        """Latents [B, C, F, H, W] -> video [B, 3, num_frames, height, width] in [-1, 1]."""
        ...


def without_gradients(function: Callable[P, R]) -> Callable[P, R]:
    """The decorator `torch.no_grad()`, but torch is imported in the call."""

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        import torch

        with torch.no_grad():
            return function(*args, **kwargs)

    return call


MAX_CUT_CHARS = 200  # of a prompt's end, in a message


@dataclass(frozen=True, kw_only=True, slots=True)
class TextLimit:
    """How much of a prompt a text encoder reads.

    Args:
        num_tokens: that it reads of the text, with `num_end` of them behind it.
        before, after: what the text is put between.
        num_before, num_after: tokens that stand before and after the whole text, `before` and `after` among them.
    """

    num_tokens: int
    num_end: int = 0
    before: str = ""
    after: str = ""
    num_before: int = 0
    num_after: int = 0


def cut_message(tokenizer: Any, name: str, text: str, limit: TextLimit) -> list[str]:
    """What is not read of a text, in one sentence; empty if all is."""
    is_fast = bool(getattr(tokenizer, "is_fast", False))
    encoded = tokenizer(f"{limit.before}{text}{limit.after}", return_offsets_mapping=is_fast)
    num_text = len(encoded.input_ids) - limit.num_before - limit.num_after
    num_read = limit.num_tokens - limit.num_end
    if num_text <= num_read:
        return []
    first = limit.num_before + num_read
    if is_fast:
        cut = text[max(0, encoded.offset_mapping[first][0] - len(limit.before)) :]
    else:
        cut = tokenizer.decode(encoded.input_ids[first : len(encoded.input_ids) - limit.num_after])
    cut = cut.strip()
    if len(cut) > MAX_CUT_CHARS:
        half = MAX_CUT_CHARS // 2
        cut = f"{cut[:half]}...({len(cut) - 2 * half} more characters)...{cut[-half:]}"
    num_said = num_text + limit.num_end
    return [f'the text encoder reads {limit.num_tokens} tokens, the {name} has {num_said}; not read: "{cut}"']


def draw_noise(pipe: Any, request: ClipRequest, generator: torch.Generator) -> torch.Tensor:
    """Noise [1, C, F, H, W] float32 on the pipeline's device, for models whose latents are all that they denoise."""
    import torch

    return pipe.prepare_latents(
        1,
        pipe.transformer.config.in_channels,
        request.height,
        request.width,
        request.num_frames,
        torch.float32,
        pipe._execution_device,
        generator,
    )
