"""What the encoders made of a clip's prompts and picture: written once, read by every rank that renders it."""

from dataclasses import dataclass
from pathlib import Path

import torch

from cineray.pipeline.loading.model import LoadedModel
from cineray.pipeline.request import ClipRequest
from cineray.pipeline.resume.tensor_file import TensorFile, TensorFileError, read_tensors, write_tensors

FORMAT = "cineray encoded prompt 2"  # 1 held the outputs of `encode_prompt` by their places
# 64 times the texts of the largest encoders; a picture's condition for 81 frames at 720p has 24 MB
MAX_PROMPT_BYTES = 2**28


@dataclass(frozen=True, kw_only=True, slots=True)
class EncodedPrompt:
    """The table of `Adapter.encode`, on the CPU; `digest` is equal for equal content."""

    tensors: dict[str, torch.Tensor]
    digest: str


def encode_prompt(model: LoadedModel, request: ClipRequest, path: Path) -> None:
    """Writes what the model's encoders make of the request, in one step.

    Args:
        path: its name says which prompts; a file under another name is not read.

    Raises:
        OSError: not writable, or full.
    """
    write_tensors(model.adapter.encode(model.pipe, request), {"format": FORMAT, "prompt": path.stem}, path)


def is_encoded(path: Path) -> bool:
    """Whether prompts lie there that can be read."""
    try:
        read_encoded(path)
    except (FileNotFoundError, TensorFileError):
        return False
    return True


def read_encoded(path: Path) -> EncodedPrompt:
    """Reads what `encode_prompt` wrote.

    Raises:
        FileNotFoundError: nothing was encoded there.
        TensorFileError: the file is not what was written, of other prompts, or of another version.
    """
    file: TensorFile = read_tensors(path, MAX_PROMPT_BYTES)
    if file.metadata.get("format") != FORMAT:
        raise TensorFileError("another version wrote it")
    if file.metadata.get("prompt") != path.stem:
        raise TensorFileError("it is of other prompts")
    return EncodedPrompt(tensors=file.tensors, digest=file.digest)
