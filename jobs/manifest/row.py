"""One row of a manifest: which fields it may have, and what may stand in each, however it is written down."""

import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from cineray.text import shorten

MAX_UNKNOWN = 3  # fields that are named in one message


class Row(NamedTuple):
    """A row as written; None means the run's default. `number` is of its line, or of its place in a list."""

    number: int
    prompt: str
    id: str | None = None
    negative_prompt: str | None = None
    seed: int | None = None
    width: int | None = None
    height: int | None = None
    frames: int | None = None
    steps: int | None = None
    guidance: float | None = None
    fps: int | None = None
    cache: str | None = None
    image: str | None = None
    image_fit: str | None = None
    flow_shift: float | None = None
    guidance_2: float | None = None
    seconds: float | None = None
    reference_images: tuple[str, ...] | None = None
    control_video: str | None = None
    control_mask: str | None = None
    conditioning_scale: float | None = None

    @property
    def clip_id(self) -> str:
        """What the row says, else its number."""
        return str(self.number) if self.id is None else self.id


class NotANumber(NamedTuple):
    """What a JSON reader makes of NaN and Infinity, which Python writes and JSON does not have."""

    text: str


FIELDS = Row._fields[1:]
_RENAMED = {
    "frames": "num_frames",
    "steps": "num_inference_steps",
    "guidance": "guidance_scale",
    "guidance_2": "guidance_scale_2",
}
# fields of a row that a run's defaults fill in, and what `ClipRequest` and `RunDefaults` call them
REQUEST_NAMES = {field: _RENAMED.get(field, field) for field in FIELDS if field not in ("id", "prompt")}


def read_row(number: int, values: Mapping[str, Any]) -> Row | list[str]:
    """The row of what JSON gave for it; or all that is wrong with it, each in one phrase. None is: not given."""
    kept: dict[str, Any] = {}
    reasons: list[str] = []
    unknown: list[str] = []
    for field, value in values.items():
        read = _READERS.get(field)
        if read is None:
            unknown.append(field)
        elif value is not None:
            try:
                kept[field] = read(value)
            except ValueError as error:
                reasons.append(f"{field} must be {error}, got {_shown(value)}")
    if "prompt" not in kept and values.get("prompt") is None:
        reasons.append("prompt is required")
    if unknown:
        reasons.append(unknown_fields("field", unknown))
    return reasons or Row(number, **kept)


def unknown_fields(kind: str, names: list[str]) -> str:
    """What to say of fields, or columns, that there are not."""
    shown = ", ".join(shorten(name) for name in names[:MAX_UNKNOWN])
    more = f" and {len(names) - MAX_UNKNOWN} more" if len(names) > MAX_UNKNOWN else ""
    return f"unknown {kind} {shown}{more}; allowed: {', '.join(FIELDS)}"


def read_cells(number: int, columns: list[str], cells: list[str]) -> Row | list[str]:
    """The same of a row of a table, where numbers are written as text; an empty cell is: not given."""
    values: dict[str, Any] = {}
    for column, cell in zip(columns, cells, strict=True):
        if not cell.strip():
            continue
        if not column:
            return [f"{shorten(cell)} stands in a column that has no name"]
        values[column] = _CELLS.get(column, str)(cell.strip() if column in _BARE else cell)
    return read_row(number, values)


def _text(value: Any) -> str:
    if type(value) is not str:
        raise ValueError("a text")
    return value


def _texts(value: Any) -> tuple[str, ...]:
    """A list of texts, or one by itself, as a table has it."""
    values = value if type(value) is list else [value]
    if any(type(text) is not str for text in values):
        raise ValueError("a text or a list of texts")
    return tuple(values)


def _id(value: Any) -> str:
    return value if type(value) is str else str(_whole(value, "a text or a whole number"))


def _whole(value: Any, allowed: str = "a whole number") -> int:
    if type(value) is int:
        return value
    if type(value) is float and value.is_integer():
        return int(value)  # pandas writes 42.0 where another row of the column is empty
    raise ValueError(allowed)


def _number(value: Any) -> float:
    if type(value) not in (int, float):
        raise ValueError("a number")
    try:
        return float(value) + 0.0  # -0.0 is 0
    except OverflowError:
        return float("inf") if value > 0 else float("-inf")


def _shown(value: Any) -> str:
    if isinstance(value, NotANumber):
        return f"{value.text}, which JSON does not have; write null, or leave the field out"
    if isinstance(value, str):
        return f"the text {shorten(value)}"
    if isinstance(value, dict | list):
        return "a list" if isinstance(value, list) else "an object"  # it may be nested too deeply to be shown
    return shorten({True: "true", False: "false"}.get(value, repr(value)) if type(value) is bool else repr(value))


_WHOLE = ("seed", "width", "height", "frames", "steps", "fps")
_NUMBERS = ("guidance", "flow_shift", "guidance_2", "seconds", "conditioning_scale")
_READERS: dict[str, Callable[[Any], Any]] = {
    **dict.fromkeys(("prompt", "negative_prompt", "cache", "image", "image_fit"), _text),
    **dict.fromkeys(("control_video", "control_mask"), _text),
    **dict.fromkeys(_WHOLE, _whole),
    "id": _id,
    "reference_images": _texts,
    **dict.fromkeys(_NUMBERS, _number),
}
_WHOLE_CELL = re.compile(r"([+-]?[0-9]{1,40})(?:\.0*)?")
_NUMBER_CELL = re.compile(r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?")


def _whole_cell(cell: str) -> int | str:
    found = _WHOLE_CELL.fullmatch(cell)
    return int(found[1]) if found else cell  # a text: `read_row` says what is wrong


def _number_cell(cell: str) -> float | str:
    return float(cell) if _NUMBER_CELL.fullmatch(cell) else cell


_CELLS: dict[str, Callable[[str], Any]] = {
    **dict.fromkeys(_WHOLE, _whole_cell),
    **dict.fromkeys(_NUMBERS, _number_cell),
}
_FILES = ("image", "reference_images", "control_video", "control_mask")
_BARE = {*_CELLS, *_FILES, "id", "cache", "image_fit"}  # blanks around them mean nothing
