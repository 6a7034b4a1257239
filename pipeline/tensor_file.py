"""Safetensors files that appear whole or not at all."""

import os
import uuid
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save


def write_tensors(tensors: Mapping[str, torch.Tensor], metadata: dict[str, str], path: Path) -> None:
    """Replaces `path` in one step; flushed to disk.

    Raises:
        OSError: not writable, or full; with its errno, which safetensors' own writer would lose.
    """
    # a tensor that stands there twice goes into the file twice: safetensors refuses shared memory
    content = save({name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}, metadata)
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
