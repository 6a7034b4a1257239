"""Safetensors files that appear whole or not at all, and that are read back only as they were written.

The digest in a file's header covers the names, dtypes, shapes and bytes of all tensors and all else that the header
says: whatever a reader gets is what was written. It is no signature: who can write the file can write another digest.
"""

import errno
import hashlib
import json
import os
import stat
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from cineray.files import parse_json

_DIGEST = "sha256"
_SAID = {errno.ELOOP: "it is a symbolic link", errno.ENXIO: "it is not a regular file"}  # ENXIO: a socket
MAX_HEADER_BYTES = 16 * 2**20  # the notes of 1,000 steps with two branches, twice, have about one
MAX_TENSOR_BYTES = 2**30  # where nothing better is known: ten times the state of an 81-frame clip at 720p


class TensorFileError(ValueError):
    """A file is not what `write_tensors` wrote; says why."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorFile:
    """What was written, on the CPU; `digest` (64 hex digits) is equal for equal content."""

    tensors: dict[str, torch.Tensor]
    metadata: dict[str, str]
    digest: str


def write_tensors(tensors: Mapping[str, torch.Tensor], metadata: dict[str, str], path: Path) -> None:
    """Replaces `path` in one step, with a digest; flushed to disk.

    Raises:
        OSError: not writable, or full; with its errno, which safetensors' own writer would lose.
    """
    # a tensor that stands there twice goes into the file twice: safetensors refuses shared memory
    whole = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}
    content = save(whole, metadata | {_DIGEST: _digest(whole, metadata)})
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with temporary.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def read_tensors(path: Path, max_bytes: int = MAX_TENSOR_BYTES) -> TensorFile:
    """Reads a file of `write_tensors`.

    Args:
        max_bytes: a longer file is not read.

    Raises:
        FileNotFoundError: there is none.
        TensorFileError: a link, no regular file, unreadable, too long, not whole, or changed since it was written.
    """
    try:
        content = _read(path, max_bytes)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise TensorFileError(_SAID.get(error.errno or 0, f"it cannot be read: {error.strerror}")) from None
    try:
        num_header_bytes = int.from_bytes(content[:8], "little")
        if not 8 + num_header_bytes <= len(content) or num_header_bytes > MAX_HEADER_BYTES:
            raise TensorFileError("it is not whole")
        metadata = parse_json(content[8 : 8 + num_header_bytes])["__metadata__"]
        if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
            raise TensorFileError("its header is not ours")
        tensors = load(content)
    except TensorFileError:
        raise
    except (SafetensorError, ValueError, KeyError, TypeError, AttributeError, RuntimeError):
        raise TensorFileError("it is not whole") from None
    digest = metadata.pop(_DIGEST, "")
    if not digest:
        raise TensorFileError("it has no digest: another version wrote it")
    if digest != _digest(tensors, metadata):
        raise TensorFileError("its content is not what its digest says: it was changed or damaged")
    return TensorFile(tensors=tensors, metadata=metadata, digest=digest)


def _read(path: Path, max_bytes: int) -> bytes:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOFOLLOW)
    with os.fdopen(descriptor, "rb") as file:
        about = os.fstat(descriptor)
        if not stat.S_ISREG(about.st_mode):
            raise TensorFileError("it is not a regular file")
        if about.st_size > max_bytes:
            raise TensorFileError(f"it has {about.st_size} bytes, more than {max_bytes}")
        return file.read(about.st_size)


def _digest(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> str:
    names = sorted(tensors)
    about = [[name, str(tensors[name].dtype), list(tensors[name].shape)] for name in names]
    digest = hashlib.sha256(json.dumps([about, sorted(metadata.items())]).encode())
    for name in names:
        digest.update(tensors[name].reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
