"""Where a clip's denoising stands between two steps, on disk: enough to go on bit for bit without a cache.

One safetensors file; what is not a tensor stands as JSON in its header. Multistep schedulers keep earlier model
outputs and the last sample, so their state is saved too: latents alone give other bits.
"""

import json
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open

from cineray.pipeline.tensor_file import write_tensors

FORMAT = "cineray step state 1"
Plain = None | bool | int | float | str


class StepStateError(ValueError):
    """A step state cannot be taken, or a file is not one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StepState:
    """What follows from the first `step` steps.

    Args:
        latents: [B, C, F, H, W] float32, the whole clip's, on any device.
        num_steps: of the clip.
        scheduler: attributes of the scheduler that its steps have changed: tensors, plain values, lists of these.
        notes: JSON about the steps so far: the cache's trace, seconds, where they ran.
    """

    step: int
    num_steps: int
    latents: torch.Tensor
    scheduler: Mapping[str, Any]
    notes: Mapping[str, Any] = field(default_factory=dict)


class Keeper(Protocol):
    """Keeps step states while a clip is denoised."""

    def begin(self) -> StepState | None:
        """Where to begin; None at the first step. The same on every rank."""
        ...

    def after_step(self, take: Callable[[], StepState]) -> None:
        """Called between steps on every rank; `take` must be called by all ranks or none. May raise to stop."""
        ...


def scheduler_state(scheduler: Any, fresh: Any) -> dict[str, Any]:
    """The attributes that differ from those of a scheduler that has its timesteps and has not stepped yet.

    Raises:
        StepStateError: one of them is neither tensor nor plain value.
    """
    changed = {name: value for name, value in vars(scheduler).items() if not _same(value, vars(fresh).get(name))}
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
        OSError: not writable, or full.
    """
    tensors = {"latents": state.latents}
    plain: dict[str, Any] = {}
    for name, value in state.scheduler.items():
        parts = value if isinstance(value, list) else [value]
        plain[name] = {"list": isinstance(value, list), "values": [None if torch.is_tensor(p) else p for p in parts]}
        tensors |= {f"scheduler.{name}.{i}": part for i, part in enumerate(parts) if torch.is_tensor(part)}
    header = {"step": state.step, "num_steps": state.num_steps, "scheduler": plain, "notes": dict(state.notes)}
    write_tensors(tensors, {"format": FORMAT, "header": json.dumps(header)}, path)


def load_step_state(path: Path) -> StepState | None:
    """Reads a state to the CPU; None where there is none or the file is not whole: then the clip begins anew."""
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                return None
            header = json.loads(metadata["header"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # not a mapping
        return StepState(
            step=header["step"],
            num_steps=header["num_steps"],
            latents=tensors["latents"],
            scheduler={name: _value(name, saved, tensors) for name, saved in header["scheduler"].items()},
            notes=header["notes"],
        )
    except (OSError, SafetensorError, ValueError, KeyError, TypeError):
        return None


def _value(name: str, saved: dict[str, Any], tensors: dict[str, torch.Tensor]) -> Any:
    parts = [tensors.get(f"scheduler.{name}.{i}", plain) for i, plain in enumerate(saved["values"])]
    return parts if saved["list"] else parts[0]


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return a is b or (a.device == b.device and torch.equal(a, b))
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(_same(x, y) for x, y in zip(a, b, strict=True))
    return type(a) is type(b) and bool(a == b)
