"""Prompts that another process has encoded: written once, read by every rank that renders them."""

from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from cineray.pipeline.loading import LoadedModel
from cineray.pipeline.request import ClipRequest
from cineray.pipeline.tensor_file import write_tensors


@torch.no_grad()
def encode_prompt(model: LoadedModel, request: ClipRequest, path: Path) -> None:
    """Writes what the pipeline's text encoders make of the request's prompts, in one step.

    Raises:
        OSError: not writable, or full.
    """
    inputs = model.adapter.prompt_inputs(request)
    outputs = model.pipe.encode_prompt(**inputs, device=model.pipe._execution_device)
    tensors = {str(i): output for i, output in enumerate(outputs) if output is not None}
    write_tensors(tensors, {"num_outputs": str(len(outputs))}, path)


class EncodedPipe:
    """A pipeline without text encoders: answers `encode_prompt` from a file, and is the pipeline in all else.

    Raises:
        FileNotFoundError: nothing was encoded there.
        SafetensorError: the file is not whole.
    """

    def __init__(self, pipe: Any, path: Path) -> None:
        self._pipe = pipe
        device = pipe._execution_device
        with safe_open(path, "pt") as file:
            names = set(file.keys())
            count = int(file.metadata()["num_outputs"])
            self._outputs = tuple(file.get_tensor(str(i)).to(device) if str(i) in names else None for i in range(count))

    def encode_prompt(self, **_: Any) -> tuple[torch.Tensor | None, ...]:
        return self._outputs

    def __getattr__(self, name: str) -> Any:
        return getattr(self._pipe, name)
