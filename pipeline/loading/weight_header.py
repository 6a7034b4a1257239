"""What a safetensors file says of its tensors, read without PyTorch and without a tensor.

The format: eight bytes with the header's length, little-endian; the header, a JSON object; the tensors, without gaps.
Source: https://huggingface.co/docs/safetensors
"""

import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from cineray.files import open_regular, parse_json, read_json
from cineray.text import shorten

MAX_HEADER_BYTES = 16 * 2**20  # one shard of a 14B model names about 1,100 tensors in 0.15 MB
# name in the file -> bytes of an element
_FLOATS = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
_WHOLE = {"I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
# places and counts, which some versions of transformers kept as buffers
_COUNTS = re.compile(r"(?:.*\.)?(?:position_ids|num_batches_tracked)")


@dataclass(frozen=True, slots=True)
class TensorHeader:
    dtype: str
    shape: tuple[int, ...]


def read_headers(folder: Path, stem: str, prefers_index: bool) -> dict[str, TensorHeader]:
    """The tensors of a component, from its one safetensors file or from all that its index names.

    Args:
        stem: of the file, `diffusion_pytorch_model` or `model`.
        prefers_index: which of the two counts where both are there: diffusers takes the index, transformers the file.

    Raises:
        ValueError: what is wrong, beginning with the file's name.
    """
    single, index = folder / f"{stem}.safetensors", folder / f"{stem}.safetensors.index.json"
    if index.is_file() and (prefers_index or not single.is_file()):
        return _read_shards(index)
    if not os.path.lexists(single):
        raise ValueError(f"{single.name} is missing; weights are read from safetensors files alone")
    return read_header(single)


def tensor_files(folder: Path, stem: str) -> dict[str, Path]:
    """The file that holds each tensor of a component whose weights diffusers would load.

    Raises:
        ValueError: as `read_headers`.
    """
    single, index = folder / f"{stem}.safetensors", folder / f"{stem}.safetensors.index.json"
    if index.is_file():
        return {name: folder / shard for name, shard in _places(index).items()}
    return dict.fromkeys(read_header(single), single)


def _read_shards(index: Path) -> dict[str, TensorHeader]:
    places = _places(index)
    tensors: dict[str, TensorHeader] = {}
    for shard in sorted(set(places.values())):
        found = read_header(index.with_name(shard))
        elsewhere = next((name for name in found if places.get(name) != shard), None)
        if elsewhere is not None:
            raise ValueError(f"{index.name} does not say that {shorten(elsewhere)} is in {shorten(shard)}")
        tensors |= found
    absent = next((name for name in places if name not in tensors), None)
    if absent is not None:
        raise ValueError(f"{index.name}: {shorten(absent)} is not in {shorten(places[absent])}")
    return tensors


def _places(index: Path) -> dict[str, str]:
    """Tensor -> its file beside the index."""
    try:
        content = read_json(index, MAX_HEADER_BYTES)
    except (OSError, ValueError) as error:
        raise ValueError(f"{index.name} cannot be read: {reason_of(error)}") from None
    places = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(places, dict) or not places:
        raise ValueError(f'{index.name} must be an object with "weight_map": {{TENSOR: FILE}}')
    for shard in places.values():
        if not isinstance(shard, str) or not shard.endswith(".safetensors") or set(shard) & set("/\\\0"):
            raise ValueError(
                f"{index.name}: each shard must be a .safetensors file beside it, got {shorten(repr(shard))}"
            )
    return places


def read_header(path: Path) -> dict[str, TensorHeader]:
    """The tensors of one file.

    Raises:
        ValueError: it is not there, not a regular file, cut, or not of the format; or a tensor is of a type that is
            not a weight's.
    """
    name = shorten(path.name, 100)[1:-1]
    try:
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > size - 8:
                raise ValueError(f"it is cut: {size} bytes, of which the header alone would take {length}")
            if length > MAX_HEADER_BYTES:
                raise ValueError(f"its header must have at most {MAX_HEADER_BYTES} bytes, got {length}")
            content = parse_json(file.read(length))
        return _tensors(content, size - 8 - length)
    except (OSError, ValueError) as error:
        raise ValueError(f"{name}: {reason_of(error)}") from None


def _tensors(content: Any, num_bytes: int) -> dict[str, TensorHeader]:
    if not isinstance(content, dict):
        raise ValueError("its header must be a JSON object")
    spans: list[tuple[int, int]] = []
    tensors = {}
    for name, entry in content.items():
        if name == "__metadata__":
            continue
        tensor, span = _tensor(entry, name)
        tensors[name] = tensor
        spans.append(span)
    end = 0
    for begin, next_end in sorted(spans):
        if begin != end:
            raise ValueError("its tensors overlap or leave gaps")
        end = next_end
    if end != num_bytes:
        raise ValueError(f"its tensors must take {end} bytes, got {num_bytes}")
    if not tensors:
        raise ValueError("it holds no tensors")
    return tensors


def _tensor(entry: Any, name: str) -> tuple[TensorHeader, tuple[int, int]]:
    fields = entry if isinstance(entry, Mapping) else {}
    kind, shape, offsets = fields.get("dtype"), fields.get("shape"), fields.get("data_offsets")
    if not _are_whole_numbers(shape, 8) or not _are_whole_numbers(offsets, 2) or len(offsets) != 2:
        raise ValueError(f"tensor {shorten(name)} must have a shape and two data_offsets")
    if not isinstance(kind, str) or not (kind in _FLOATS or (kind in _WHOLE and _COUNTS.fullmatch(name))):
        raise ValueError(f"tensor {shorten(name)} must be one of {', '.join(_FLOATS)}, got {shorten(str(kind))}")
    begin, end = offsets
    if math.prod(shape) * (_FLOATS | _WHOLE)[kind] != end - begin:
        raise ValueError(f"tensor {shorten(name)} has other data_offsets than its shape")
    return TensorHeader(dtype=kind, shape=tuple(shape)), (begin, end)


def _are_whole_numbers(values: Any, most: int) -> TypeGuard[list[int]]:
    return isinstance(values, list) and len(values) <= most and all(type(v) is int and 0 <= v < 2**63 for v in values)


def reason_of(error: Exception) -> str:
    """Why a file could not be read, in a few words."""
    return (error.strerror if isinstance(error, OSError) else None) or shorten(str(error), 200)[1:-1]
