"""SmoothCache (arXiv 2411.10510): a schedule per layer type, calibrated once, the same for every clip.

Section 3.2 and equation 4; schedule generation as in github.com/Roblox/SmoothCache at edeb4ed,
SmoothCache/smooth_cache_helper and calibration_helper. Schedules are stored in its JSON form:
`{"attn1": [1, 0, 0, 1], "ffn-3": [...]}`, 1 computes, 0 reuses the layer's last output; a key names a layer type, or
one block's layer as type-number. Where two block lists have layers of their own types, the type is list.layer; without
the list, as the official helper has it, a key is of the layers of that name in all lists.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from cineray.files import parse_json, read_regular
from cineray.text import printable, shorten

MAX_SCHEDULE_BYTES = 16 * 2**20  # 1,000 steps of 3 layers in 1,000 blocks are 9 MB
_NO_NAMES: Mapping[str, str] = {}
_KEY = re.compile(r"(?P<layer>[A-Za-z_][A-Za-z0-9_.]*)(?:-(?P<block>0|[1-9][0-9]{0,5}))?")


@dataclass(frozen=True, slots=True)
class LayerSchedule:
    """When each layer is computed; layers without a row always are."""

    rows: Mapping[str, tuple[bool, ...]]

    def computes(self, layer: str, block: int, step_index: int) -> bool:
        """A block's own row goes before its layer type's."""
        row = self.rows.get(f"{layer}-{block}", self.rows.get(layer))
        return True if row is None else row[step_index]

    @property
    def num_steps(self) -> int:
        return len(next(iter(self.rows.values())))


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerPlan:
    """A schedule of layers for a model, and its whole text."""

    text: str
    schedule: LayerSchedule
    num_blocks: int


def schedule_row(errors: Sequence[Sequence[float]], num_steps: int, alpha: float) -> tuple[bool, ...]:
    """One layer type's schedule from its calibrated errors.

    From left to right, each computed step is followed by as many skipped ones as the error allows, longest first. The
    first and the last step are computed.

    Args:
        errors: errors[lag - 1][step]: relative L1 change of the layer's output from `step` to `step + lag`.
        alpha: largest error that is accepted.
    """
    row = [True] * num_steps
    step = 0
    while step < num_steps - 1:
        skip = 0
        for lag in range(len(errors), 0, -1):
            if step + lag < num_steps and errors[lag - 1][step] <= alpha:
                skip = lag
                break
        for skipped in range(step + 1, min(step + skip + 1, num_steps)):
            row[skipped] = False
        step += skip + 1
    row[-1] = True
    return tuple(row)


def dump_schedule(schedule: LayerSchedule) -> str:
    """The official JSON form."""
    return json.dumps({key: [int(v) for v in row] for key, row in schedule.rows.items()}) + "\n"


def load_schedule(
    path: Path, layers: Sequence[str], num_blocks: int, other_names: Mapping[str, str] = _NO_NAMES
) -> LayerSchedule:
    """Reads a schedule for a model with these layer types and that many blocks.

    Raises:
        ValueError: no such file, or as `parse_schedule`.
    """
    return parse_schedule(read_schedule(path), path, layers, num_blocks, other_names)


def read_schedule(path: Path) -> bytes:
    """The bytes of a schedule's file.

    Raises:
        ValueError: it cannot be read.
    """
    try:
        return read_regular(path, MAX_SCHEDULE_BYTES)
    except (OSError, ValueError) as error:  # ValueError: a null character in the name
        reason = error.strerror if isinstance(error, OSError) else error
        raise ValueError(f"schedule {printable(path, 200)} cannot be read: {reason}") from None


def parse_schedule(
    content: bytes, path: Path, layers: Sequence[str], num_blocks: int, other_names: Mapping[str, str] = _NO_NAMES
) -> LayerSchedule:
    """The schedule that a file's bytes stand for.

    Args:
        path: of the file, for messages.
        other_names: what the authors' code calls a layer type -> what it is called here.

    Raises:
        ValueError: not a schedule, rows of different lengths, or layers that the model does not have.
    """
    name = f"schedule {printable(path, 200)}"
    try:
        found = parse_json(content)
    except ValueError as error:
        raise ValueError(f"{name} is not JSON: {printable(error, 200)}") from None
    if not isinstance(found, dict) or not found:
        raise ValueError(f'{name} must be an object such as {{"attn1": [1, 0, 1]}}')
    rows: dict[str, tuple[bool, ...]] = {}
    from_afar: dict[str, tuple[bool, ...]] = {}
    for key, row in cast("dict[str, object]", found).items():
        match = _KEY.fullmatch(key)
        named = [] if match is None else _layers_named(match["layer"], layers, other_names)
        if match is None or not named or int(match["block"] or 0) >= num_blocks:
            raise ValueError(
                f"{name}: layer {shorten(key)} is not in this model; it has {', '.join(layers)} in {num_blocks} "
                "blocks, numbered from 0"
            )
        values = _row(row, f"{name}: row {key!r}")
        block = "" if match["block"] is None else f"-{match['block']}"
        (rows if named == [match["layer"]] else from_afar).update({f"{layer}{block}": values for layer in named})
    lengths = sorted({len(row) for row in (*rows.values(), *from_afar.values())})
    if len(lengths) != 1:
        raise ValueError(f"{name}: rows must have one length, got {shorten(str(lengths))[1:-1]} steps")
    return LayerSchedule(from_afar | rows)  # a layer's own name goes before one that it shares


def _layers_named(key: str, layers: Sequence[str], other_names: Mapping[str, str]) -> list[str]:
    """The layer types that a key is of: that of this name, else those of this name in any list."""
    key = other_names.get(key, key)
    return [key] if key in layers else [layer for layer in layers if layer.rpartition(".")[2] == key]


def _row(row: object, name: str) -> tuple[bool, ...]:
    values = cast("list[object]", row) if isinstance(row, list) else []
    if not values or any(v not in (0, 1) for v in values):
        raise ValueError(f"{name} must be a list of 0 and 1")
    if values[0] != 1:
        raise ValueError(f"{name} must begin with 1: there is nothing to reuse yet")
    return tuple(bool(v) for v in values)
