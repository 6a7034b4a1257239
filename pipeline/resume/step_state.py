"""Where a clip's denoising stands between two steps, on disk: enough to resume bit for bit without a cache.

One safetensors file; what is not a tensor stands as JSON in its header. Multistep schedulers keep earlier model
outputs and the last sample, so their state is saved too: latents alone give other bits.

A file is believed where its digest is right, it is of this clip, and all that can be foretold of it is so: `Beginning`
says what. Whatever leaves a doubt is not used: the clip begins anew.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Protocol

import torch
from pydantic import BaseModel, Field, TypeAdapter

from cineray.caching.trace import Trace, TraceEntry, entries_from, trace_from
from cineray.files import parse_json, shaped
from cineray.pipeline.finite import is_finite
from cineray.pipeline.resume.tensor_file import MAX_TENSOR_BYTES, TensorFileError, read_tensors, write_tensors

FORMAT = "cineray step state 2"
# a Brownian tree that the next step makes anew from the generator's seed: it gives the noise between two sigmas,
# whatever was asked of it before (diffusers' CosineDPMSolverMultistepScheduler)
_MADE_ANEW = ("noise_sampler",)
Plain = None | bool | int | float | str


class StepStateError(ValueError):
    """A step state cannot be taken, or a file is not one of this clip's."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StepNotes:
    """What a state says of the steps so far.

    Args:
        resumed_at: steps at which the clip went on.
        encode_s, denoise_s: seconds, of all processes that rendered the clip.
        entries: of the cache's trace so far; empty without a cache, and where the trace is finished.
        finished: the whole trace, where all steps are done and there is a cache.
    """

    resumed_at: tuple[int, ...] = ()
    encode_s: float = 0.0
    denoise_s: float = 0.0
    entries: tuple[TraceEntry, ...] = ()
    finished: Trace | None = None

    @property
    def all_entries(self) -> list[TraceEntry]:
        """The trace's entries, whether it is finished or not."""
        return list(self.entries) if self.finished is None else list(self.finished.entries)

    def to_dict(self) -> dict[str, Any]:
        """The notes as JSON can hold them; `notes_from` reads them back."""
        return {
            "resumed_at": list(self.resumed_at),
            "encode_s": self.encode_s,
            "denoise_s": self.denoise_s,
            "trace": [asdict(entry) for entry in self.entries],
            "finished": None if self.finished is None else self.finished.to_dict(),
        }


class _NotesShape(BaseModel):
    """`StepNotes.to_dict`; earlier versions have the entries twice where the trace is finished."""

    resumed_at: list[int]
    encode_s: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    denoise_s: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    trace: Any = []
    finished: Any = None


_NOTES = TypeAdapter(_NotesShape)


def notes_from(content: Any, step: int) -> StepNotes:
    """The inverse of `StepNotes.to_dict`, for a state of so many steps.

    Raises:
        ValueError: it is not such a content, or tells of steps that have not been done.
    """
    shape = shaped(content, _NOTES)
    steps = shape.resumed_at
    if steps != sorted(set(steps)) or not all(0 < resumed <= step for resumed in steps):
        raise ValueError("resumed_at: not steps of the clip")
    entries = entries_from(shape.trace)
    finished = None if shape.finished is None else trace_from(shape.finished)
    told = entries if finished is None else entries + finished.entries
    if any(entry.step >= step for entry in told):
        raise ValueError("trace: not steps of the clip")
    return StepNotes(
        resumed_at=tuple(steps),
        encode_s=shape.encode_s,
        denoise_s=shape.denoise_s,
        entries=tuple(entries) if finished is None else (),
        finished=finished,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class StepState:
    """What follows from the first `step` steps.

    Args:
        latents: float32, the whole clip's, in the shape of its noise, on any device.
        num_steps: of the clip.
        scheduler: attributes of the scheduler that its steps have changed: tensors, plain values, lists of these.
        clip: fingerprint of the clip; empty where a state has no clip of an output folder.
        digest: of the file that it was read from, 64 hex digits.
    """

    step: int
    num_steps: int
    latents: torch.Tensor
    scheduler: Mapping[str, Any]
    notes: StepNotes = field(default_factory=StepNotes)
    clip: str = ""
    digest: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Beginning:
    """A clip before its first step: what its states must agree with.

    Args:
        latents: noise [B, ...] float32.
        scheduler: with its timesteps; has not stepped yet, and is not stepped.
        timesteps: [num_steps].
        output_dtype: of the transformer.
    """

    latents: torch.Tensor
    scheduler: Any
    timesteps: torch.Tensor
    output_dtype: torch.dtype

    def misfit(self, state: StepState) -> str | None:
        """Why a state cannot be one of this clip's, or None.

        A finished clip's latents need no scheduler any more.
        """
        num_steps = len(self.timesteps)
        if state.num_steps != num_steps:
            return f"it is of a clip of {state.num_steps} steps; this one has {num_steps}"
        if (state.latents.shape, state.latents.dtype) != (self.latents.shape, self.latents.dtype):
            return f"its latents are {_kind(state.latents)}; this clip's are {_kind(self.latents)}"
        if state.step == num_steps:
            return None
        odd = self._odd_attribute(state)
        return None if odd is None else f"its scheduler's {odd} is not that of step {state.step}"

    def _odd_attribute(self, state: StepState) -> str | None:
        """The first attribute of the scheduler that differs in kind from one that takes the same steps of zeros.

        Numbers that do not depend on the clip must be equal.
        """
        zeros = torch.zeros((1,) * self.latents.ndim, dtype=self.latents.dtype, device=self.latents.device)
        model = deepcopy(self.scheduler)
        for timestep in self.timesteps[: state.step]:
            if hasattr(model, "scale_model_input"):  # some remember that it was called
                model.scale_model_input(zeros, timestep)
            zeros = model.step(zeros.to(self.output_dtype), timestep, zeros, return_dict=False)[0]
        expected = scheduler_state(model, self.scheduler)
        for name in sorted(expected.keys() | state.scheduler.keys()):
            if name not in expected or name not in state.scheduler:
                return name
            if not self._fits(state.scheduler[name], expected[name], zeros.shape):
                return name
        return None

    def _fits(self, value: Any, like: Any, like_shape: torch.Size) -> bool:
        if isinstance(like, list):
            same_length = isinstance(value, list) and len(value) == len(like)
            return same_length and all(self._fits(v, w, like_shape) for v, w in zip(value, like, strict=True))
        if isinstance(like, torch.Tensor) and like.shape == like_shape:
            return (
                isinstance(value, torch.Tensor)
                and value.shape == self.latents.shape
                and value.dtype in (like.dtype, self.latents.dtype)
                and is_finite(value)
            )
        if isinstance(like, torch.Tensor):
            return isinstance(value, torch.Tensor) and value.dtype == like.dtype and torch.equal(value, like.cpu())
        return _same(value, like)


class Keeper(Protocol):
    """Keeps step states while a clip is denoised."""

    def begin(self, beginning: Beginning) -> StepState | None:
        """Where to begin; None at the first step. The same on every rank; it fits the beginning."""
        ...

    def after_step(self, take: Callable[[], StepState]) -> None:
        """Called between steps on every rank; `take` must be called by all ranks or none. May raise to stop."""
        ...


def scheduler_state(scheduler: Any, fresh: Any) -> dict[str, Any]:
    """The attributes that differ from those of a scheduler that has its timesteps and has not stepped yet.

    Raises:
        StepStateError: one of them is neither tensor nor plain value.
    """
    values = {name: value for name, value in vars(scheduler).items() if name not in _MADE_ANEW}
    changed = {name: value for name, value in values.items() if not _same(value, vars(fresh).get(name))}
    for name, value in changed.items():
        if not all(isinstance(part, torch.Tensor | Plain) for part in (value if isinstance(value, list) else [value])):
            raise StepStateError(f"{type(scheduler).__name__}.{name} holds {type(value).__name__}; it cannot be saved")
    return deepcopy(changed)


def restore_scheduler(scheduler: Any, state: Mapping[str, Any], device: torch.device) -> None:
    """Sets a scheduler with its timesteps to where another one was."""
    for name, value in state.items():
        if isinstance(value, list):
            value = [part.to(device) if isinstance(part, torch.Tensor) else part for part in value]
        setattr(scheduler, name, value.to(device) if isinstance(value, torch.Tensor) else value)


def save_step_state(state: StepState, path: Path) -> None:
    """Replaces `path` in one step; flushed to disk.

    Raises:
        StepStateError: its latents are not finite: whoever went on from there would do so for nothing.
        OSError: not writable, or full.
    """
    if not is_finite(state.latents):
        raise StepStateError(f"its latents are not finite after step {state.step}")
    tensors = {"latents": state.latents}
    plain: dict[str, Any] = {}
    for name, value in state.scheduler.items():
        parts = value if isinstance(value, list) else [value]
        plain[name] = {"list": isinstance(value, list), "values": [None if torch.is_tensor(p) else p for p in parts]}
        tensors |= {f"scheduler.{name}.{i}": part for i, part in enumerate(parts) if torch.is_tensor(part)}
    header = {
        "clip": state.clip,
        "step": state.step,
        "num_steps": state.num_steps,
        "scheduler": plain,
        "notes": state.notes.to_dict(),
    }
    write_tensors(tensors, {"format": FORMAT, "header": json.dumps(header)}, path)


def read_step_state(path: Path, clip: str = "", max_bytes: int = MAX_TENSOR_BYTES) -> StepState | None:
    """Reads a state to the CPU; None where there is none.

    Args:
        clip: fingerprint of the clip that it must be of.
        max_bytes: a longer file is not read.

    Raises:
        StepStateError: something lies there that is not a whole state of this clip; says why.
    """
    try:
        file = read_tensors(path, max_bytes)
        if file.metadata.get("format") != FORMAT:
            raise StepStateError("another version wrote it")
        header = parse_json(file.metadata["header"])
        notes = header["notes"]
        state = StepState(
            step=header["step"],
            num_steps=header["num_steps"],
            latents=file.tensors["latents"],
            scheduler={name: _value(name, saved, file.tensors) for name, saved in header["scheduler"].items()},
            clip=header["clip"],
            digest=file.digest,
        )
    except FileNotFoundError:
        return None
    except TensorFileError as error:
        raise StepStateError(str(error)) from None
    except (KeyError, TypeError, AttributeError, IndexError, ValueError) as error:
        raise error if isinstance(error, StepStateError) else StepStateError("its header is not ours") from None
    if state.clip != clip:
        raise StepStateError("it is another clip's")
    if not (type(state.step) is int and type(state.num_steps) is int and 1 <= state.step <= state.num_steps):
        raise StepStateError("its step is none of the clip's")
    if not 3 <= state.latents.ndim <= 5 or state.latents.dtype != torch.float32 or not is_finite(state.latents):
        raise StepStateError("its latents are not finite float32 numbers in three to five dimensions")
    try:
        return replace(state, notes=notes_from(notes, state.step))
    except ValueError as error:
        raise StepStateError(f"its notes are not ours: {error}") from None


def load_step_state(path: Path, clip: str = "") -> StepState | None:
    """Reads as `read_step_state` does; None too where the file is no whole state of this clip: it begins anew."""
    try:
        return read_step_state(path, clip)
    except StepStateError:
        return None


def _value(name: str, saved: dict[str, Any], tensors: dict[str, torch.Tensor]) -> Any:
    values: Sequence[Any] = saved["values"]
    parts = [tensors.get(f"scheduler.{name}.{i}", plain) for i, plain in enumerate(values)]
    return parts if saved["list"] else parts[0]


def _kind(tensor: torch.Tensor) -> str:
    return f"{'x'.join(map(str, tensor.shape))} {str(tensor.dtype).removeprefix('torch.')}"


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return a is b or (a.device == b.device and torch.equal(a, b))
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(_same(x, y) for x, y in zip(a, b, strict=True))
    return type(a) is type(b) and bool(a == b)
