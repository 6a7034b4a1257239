"""Prompts that another process has encoded: written once, read by every rank that renders them."""

from pathlib import Path
from typing import Any

import torch

from cineray.pipeline.loading.model import LoadedModel
from cineray.pipeline.request import ClipRequest
from cineray.pipeline.resume.tensor_file import TensorFile, TensorFileError, read_tensors, write_tensors

MAX_PROMPT_BYTES = 2**28  # 64 times those of the largest text encoders


@torch.no_grad()
def encode_prompt(model: LoadedModel, request: ClipRequest, path: Path) -> None:
    """Writes what the pipeline's text encoders make of the request's prompts, in one step.

    Args:
        path: its name says which prompts; a file under another name is not read.

    Raises:
        OSError: not writable, or full.
    """
    inputs = model.adapter.prompt_inputs(request)
    outputs = model.pipe.encode_prompt(**inputs, device=model.pipe._execution_device)
    tensors = {str(i): output for i, output in enumerate(outputs) if output is not None}
    write_tensors(tensors, {"num_outputs": str(len(outputs)), "prompt": path.stem}, path)


def is_encoded(path: Path) -> bool:
    """Whether prompts lie there that can be read."""
    try:
        _read(path)
    except (FileNotFoundError, TensorFileError):
        return False
    return True


class EncodedPipe:
    """A pipeline without text encoders: answers `encode_prompt` from a file, and is the pipeline in all else.

    Raises:
        FileNotFoundError: nothing was encoded there.
        TensorFileError: the file is not what was written, or of other prompts.
    """

    def __init__(self, pipe: Any, path: Path) -> None:
        self._pipe = pipe
        device = pipe._execution_device
        file = _read(path)
        names = (str(i) for i in range(int(file.metadata["num_outputs"])))
        self._outputs = tuple(file.tensors[name].to(device) if name in file.tensors else None for name in names)
        self.digest = file.digest

    def encode_prompt(self, **_: Any) -> tuple[torch.Tensor | None, ...]:
        return self._outputs

    def __getattr__(self, name: str) -> Any:
        return getattr(self._pipe, name)


def _read(path: Path) -> TensorFile:
    file = read_tensors(path, MAX_PROMPT_BYTES)
    if file.metadata.get("prompt") != path.stem:
        raise TensorFileError("it is of other prompts")
    return file
