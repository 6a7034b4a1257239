"""Teacher forcing: a clip on one rank leaves each step's latents and output; others step from the same latents.

Free runs in bfloat16 drift apart by themselves: a last bit of the first step is another clip after fifty. Fed with the
same latents at each step they cannot, and what is left is the error of one step.
"""

import json
from pathlib import Path
from typing import Any

import torch

from cineray.caching.plan import CachePlan
from cineray.caching.trace import Trace
from cineray.pipeline.adapters.protocol import Advance
from cineray.pipeline.loading.checkpoint import Checkpoint
from cineray.pipeline.request import ClipRequest
from cineray.pipeline.resume.tensor_file import read_tensors, write_tensors


class Recording:
    """A clip's `advance` that leaves each step's output, and the latents that follow, in a folder."""

    def __init__(self, advance: Advance, folder: Path) -> None:
        self._advance = advance
        self._folder = folder
        self._num_steps = 0

    def __call__(
        self, scheduler: Any, output: torch.Tensor, timestep: torch.Tensor, latents: torch.Tensor
    ) -> torch.Tensor:
        following = self._advance(scheduler, output, timestep, latents)
        write_tensors({"output": output, "latents": following}, {}, _step_path(self._folder, self._num_steps))
        self._num_steps += 1
        return following


class Teacher:
    """A clip's `advance` that goes on with the recorded latents, whatever the step's output is.

    Attributes:
        errors: of each step's output, its distance from the recorded one relative to that one's norm.
    """

    def __init__(self, folder: Path) -> None:
        self.errors: list[float] = []
        self._folder = folder

    def __call__(
        self, _scheduler: Any, output: torch.Tensor, _timestep: torch.Tensor, latents: torch.Tensor
    ) -> torch.Tensor:
        recorded = read_tensors(_step_path(self._folder, len(self.errors))).tensors
        expected = recorded["output"].double()
        distance = (output.detach().cpu().double() - expected).norm() / expected.norm()
        self.errors.append(distance.item())
        return recorded["latents"].to(latents.device)


def keep_decisions(trace: Trace | None, folder: Path) -> None:
    """Leaves the decisions of the recorded clip for `with_decisions`."""
    if trace is not None:
        _trace_path(folder).write_text(json.dumps(trace.to_dict()))


def with_decisions(request: ClipRequest, checkpoint: Checkpoint, folder: Path) -> str:
    """The cache that decides as the recorded clip did: a statistic at the threshold would fall to either side.

    What a policy by layers or intervals does is fixed, and stays.
    """
    decides = isinstance(checkpoint.plan_cache(request.cache), CachePlan)
    return f"replay:{_trace_path(folder)}" if decides else request.cache


def _step_path(folder: Path, step: int) -> Path:
    return folder / f"step-{step}.safetensors"


def _trace_path(folder: Path) -> Path:
    return folder / "trace.json"
