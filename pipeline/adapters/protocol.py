"""The seam between the denoising loop and a model: `Adapter` says what is particular to it, `Denoising` is what the
loop gets.

Letters: B batch (1), C latent channels, F latent frames, H W latent height and width. FLUX.1's latents are packed,
[B, S, C]; a picture's have no frames, [B, C, H, W]; a sound's [B, C, F].
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
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
class Expert:
    """A transformer that denoises from one step on, until the next expert's first step.

    Args:
        first_step: from 0.
        guidance_scale: of its steps, for `Denoising.combine`.
    """

    transformer: Any
    first_step: int = 0
    guidance_scale: float = 1.0


# (latents, the step's timestep [], the clip's own scheduler) -> (hidden states and timestep that a transformer takes)
ModelInput = Callable[["torch.Tensor", "torch.Tensor", Any], tuple["torch.Tensor", "torch.Tensor"]]
# (step) -> further arguments of the transformer at that step, the same for all branches
StepArguments = Callable[[int], Mapping[str, Any]]
# (the scheduler, the step's model output, its timestep [], latents) -> the next latents
Advance = Callable[[Any, "torch.Tensor", "torch.Tensor", "torch.Tensor"], "torch.Tensor"]
# (each branch's output, as the latents, in the order of the branches, guidance scale) -> the step's model output
Combine = Callable[[Sequence["torch.Tensor"], float], "torch.Tensor"]


def classifier_free(outputs: Sequence[torch.Tensor], guidance_scale: float) -> torch.Tensor:
    """Classifier-free guidance (arXiv 2207.12598); one branch alone is the output as it is."""
    cond, *uncond = outputs
    return uncond[0] + guidance_scale * (cond - uncond[0]) if uncond else cond


def scheduler_step(scheduler: Any, output: torch.Tensor, timestep: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
    """The scheduler's own step."""
    return scheduler.step(output, timestep, latents, return_dict=False)[0]


@dataclass(frozen=True, kw_only=True, slots=True)
class Denoising:
    """One clip before its first step: all that the loop needs; replicated on every rank. The loop changes none of it.

    Args:
        latents: noise [B, ...] float32, in whatever shape the model's loop has them, such as [B, C, F, H, W].
        scheduler: the clip's own, with its timesteps; has not stepped.
        timesteps: [number of steps].
        branches: the conditional branch first, then the unconditional one if there is guidance; one alone where both
            stand in the batch of one call.
        experts: by first step, the first one from step 0; of two with the same first step the later one denoises.
        channel_condition: [B, C', F, H, W] concatenated to the latents along channels at each step, or None.
        model_input: what the transformer takes; None: latents and `channel_condition`, and a timestep for each row.
        step_arguments: what the transformer is told at a step beside that and the branch's own; None: nothing.
        combine: makes one output of those of the branches.
        advance: the scheduler's step.
        finish: what becomes of the latents of the last step.
        hides_text: some text tokens are padding, which the blocks' attention must not see; else they get no mask.
    """

    latents: torch.Tensor
    scheduler: Any
    timesteps: torch.Tensor
    branches: tuple[Branch, ...]
    experts: tuple[Expert, ...]
    channel_condition: torch.Tensor | None = None
    model_input: ModelInput | None = None
    step_arguments: StepArguments | None = None
    combine: Combine = classifier_free
    advance: Advance = scheduler_step
    finish: Callable[[torch.Tensor], torch.Tensor] | None = None
    hides_text: bool = True

    def __post_init__(self) -> None:
        steps = [expert.first_step for expert in self.experts]
        if not steps or steps[0] != 0 or steps != sorted(steps):
            raise ValueError(f"experts must begin at step 0 and then at later ones in turn, got {steps}")

    @property
    def num_steps(self) -> int:
        return len(self.timesteps)

    @property
    def transformers(self) -> tuple[Any, ...]:
        """The experts' transformers, each once."""
        return tuple({id(expert.transformer): expert.transformer for expert in self.experts}.values())

    def expert_at(self, step: int) -> Expert:
        """The expert that denoises this step."""
        return [expert for expert in self.experts if expert.first_step <= step][-1]


@dataclass(frozen=True, kw_only=True, slots=True)
class Defaults:
    """What a family renders when nothing is asked for: its authors' values; 1 for what it does not know."""

    width: int = 1
    height: int = 1
    num_frames: int = 1
    fps: int = 1
    num_inference_steps: int = 50
    guidance_scale: float
    guidance_scale_2: float | None = None
    flow_shift: float | None = None
    seconds: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfigs:
    """The configuration files of a checkpoint, read without its weights; `guider` is empty where there is none."""

    index: Mapping[str, Any] = field(repr=False)
    transformer: Mapping[str, Any] = field(repr=False)
    vae: Mapping[str, Any] = field(repr=False)
    guider: Mapping[str, Any] = field(default_factory=dict, repr=False)

    @classmethod
    def of(cls, index: Mapping[str, Any], read: Callable[[str], Mapping[str, Any]]) -> ModelConfigs:
        """Of a folder or repository.

        Args:
            index: what model_index.json holds.
            read: gives what another JSON file holds, by its path.
        """
        has_guider = index.get("guider") not in (None, [None, None])
        return cls(
            index=index,
            transformer=read("transformer/config.json"),
            vae=read("vae/config.json"),
            guider=read("guider/guider_config.json") if has_guider else {},
        )


class Adapter(Protocol):
    """One per pipeline class; holds nothing but what a checkpoint's configuration says (`for_checkpoint`)."""

    @property
    def defaults(self) -> Defaults: ...

    @property
    def index_tables(self) -> tuple[str, ...]:
        """Entries of model_index.json that hold tables of settings, no components."""
        ...

    tiles_on_gpus: bool  # its VAE decodes in tiles on a GPU unless told not to: whole clips do not fit beside the rest
    vae_dtype: str  # in which its authors decode: "float32" or "float16"
    components: tuple[Component, ...]  # of its pipeline

    def is_of_kind(self, configs: ModelConfigs, /) -> bool:
        """Whether a checkpoint is one of those that this adapter is for; other models may have its pipeline class."""
        ...

    def for_checkpoint(self, configs: ModelConfigs, /) -> Adapter:
        """This adapter as it is for one checkpoint: where those of one pipeline class differ, by their configuration.

        Raises:
            ValueError: the configuration cannot be used.
        """
        ...

    def misfit(self, parts: Mapping[str, Any]) -> str | None:
        """Where the configurations of two components (name -> configuration) do not fit together, or None."""
        ...

    def unsupported(self, configs: ModelConfigs, /) -> str | None:
        """Why this checkpoint of its kind cannot be rendered, or None."""
        ...

    def size_rule(self, configs: ModelConfigs, /) -> SizeRule: ...

    def prompt_problem(self, prompt: str, /) -> str | None:
        """Why a prompt cannot be rendered, in one phrase, or None."""
        ...

    def num_tokens(self, configs: ModelConfigs, request: ClipRequest, /) -> int:
        """Tokens of a clip, on all ranks together."""
        ...

    def effective(self, request: ClipRequest) -> ClipRequest:
        """The request less what has no effect on its pixels: equal for requests that differ in nothing else."""
        ...

    def unused(self, request: ClipRequest, /) -> list[str]:
        """What the request says and the pixels do not show, a sentence for each."""
        ...

    def cut_prompts(self, pipe: DiffusionPipeline, request: ClipRequest, /) -> list[str]:
        """What of its prompts the text encoders do not read, a sentence for each; takes the pipeline's tokenizers."""
        ...

    def encode_inputs(self, request: ClipRequest) -> dict[str, Any]:
        """All of the request that `encode` makes its table of, as plain values: equal ones, equal tables."""
        ...

    def encode(self, pipe: DiffusionPipeline, request: ClipRequest, /) -> dict[str, torch.Tensor]:
        """What the encoders make of the request: a flat table that can be written and read elsewhere.

        Needs no transformer; it may run in another process than `start`. In float32 or the encoders' own type.
        """
        ...

    def loaded(self, pipe: DiffusionPipeline, device: str) -> None:
        """Called once the weights are in memory: changes of this pipeline's own modules that spare a GPU memory."""
        ...

    def schedule(self, pipe: DiffusionPipeline, request: ClipRequest) -> tuple[Any, torch.Tensor]:
        """A scheduler of the clip's own, which has not stepped, and its timesteps [num_inference_steps]."""
        ...

    def start(
        self,
        pipe: DiffusionPipeline,
        request: ClipRequest,
        encoded: Mapping[str, torch.Tensor],
        generator: torch.Generator,
    ) -> Denoising:
        """Draws the noise and puts together what the loop needs. Needs neither encoders nor VAE.

        Args:
            encoded: the table of `encode`, on any device.
            generator: on the CPU, with the clip's seed.
        """
        ...

    def decode(
        self, pipe: DiffusionPipeline, request: ClipRequest, latents: torch.Tensor, generator: torch.Generator, /
    ) -> torch.Tensor:
        """Latents -> video [B, 3, num_frames, height, width] in [-1, 1], of a picture with one frame, or sound
        [B, channels, number of samples] in [-1, 1]. Needs no transformer.

        Args:
            generator: on the CPU, with the clip's seed; a new one, whatever `start` has drawn.
        """
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


def new_schedule(
    pipe: Any, num_inference_steps: int | None = None, flow_shift: float | None = None, **how: Any
) -> tuple[Any, torch.Tensor]:
    """A copy of the pipeline's scheduler with its timesteps, and these; its steps have state: one for each clip.

    Args:
        flow_shift: in the place of the scheduler's own; of a scheduler that calls it `flow_shift` or `shift`.
        how: further arguments of its `set_timesteps`, such as `sigmas` or `mu`.
    """
    scheduler = deepcopy(pipe.scheduler)
    if flow_shift is not None:
        name = "flow_shift" if "flow_shift" in scheduler.config else "shift"
        scheduler = type(scheduler).from_config(scheduler.config, **{name: flow_shift})
    if num_inference_steps is not None:
        how["num_inference_steps"] = num_inference_steps
    scheduler.set_timesteps(device=pipe._execution_device, **how)
    if hasattr(scheduler, "set_begin_index"):  # DDIM's step needs none
        scheduler.set_begin_index(0)
    return scheduler, scheduler.timesteps


def draw_noise(pipe: Any, request: ClipRequest, num_channels: int, generator: torch.Generator) -> torch.Tensor:
    """Noise [1, C, F, H, W] float32 on the pipeline's device; its VAE may be elsewhere."""
    import torch
    from diffusers.utils.torch_utils import randn_tensor

    shape = (
        1,
        num_channels,
        (request.num_frames - 1) // pipe.vae_scale_factor_temporal + 1,
        request.height // pipe.vae_scale_factor_spatial,
        request.width // pipe.vae_scale_factor_spatial,
    )
    return randn_tensor(shape, generator=generator, device=pipe._execution_device, dtype=torch.float32)


def beside_noise(noise: torch.Tensor, image: torch.Tensor | None) -> torch.Tensor:
    """HunyuanVideo's condition of image to video, float32 on the noise's device [1, C + 1, F, H, W]: latents of the
    frames that are given [1, C, 1, H, W], which is the first or none, and a mask of these."""
    import torch

    beside = torch.zeros(1, noise.shape[1] + 1, *noise.shape[2:], device=noise.device)
    if image is not None:
        beside[:, :-1, :1] = image.to(beside.device, beside.dtype)
        beside[:, -1:, :1] = 1
    return beside
