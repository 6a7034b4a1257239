"""Judges the parts of a checkpoint by their configuration files and by the headers of their weights.

Nothing is loaded, imported or executed, and no special file is opened: a diffusers folder is data that anybody may
have written.
"""

import os
import re
import stat
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from cineray.files import read_json
from cineray.pipeline.adapters import Adapter
from cineray.pipeline.adapters.component import Component
from cineray.pipeline.loading.weight_header import TensorHeader, read_headers, reason_of
from cineray.text import printable, shorten

MAX_CONFIG_BYTES = 2**20  # the largest published one has 10 kB
MAX_SIDE_FILE_BYTES = 256 * 2**20  # a tokenizer's: UMT5's has 17 MB
_MAX_NESTING = 32
# Code of the checkpoint's own, code from the hub, and weights in forms that need another library's code.
_CODE_KEYS = (
    *("auto_map", "custom_pipeline", "custom_pipelines", "trust_remote_code", "quantization_config"),
    *("use_kernels", "kernel_config", "base_model_name_or_path"),
)
_ATTENTION = ("eager", "sdpa", "flex_attention")  # transformers' own; of other names it asks the hub for a kernel
_SIDE_CONFIGS = ("tokenizer_config.json", "preprocessor_config.json", "processor_config.json", "generation_config.json")


def check_configs(
    adapter: Adapter, index: Mapping[str, Any], read: Callable[[str], dict[str, Any]]
) -> dict[str, BaseModel | None]:
    """The configurations of the components that are there, by name; None for one whose file is not looked at.

    Args:
        index: what model_index.json holds.
        read: gives what a JSON file of the folder holds.

    Raises:
        ValueError: the file, what it must say, and what it says.
    """
    refuse_code("model_index.json", index)
    known = {component.name for component in adapter.components}
    for name, value in index.items():
        is_absent = value is None or (isinstance(value, list) and all(v is None for v in value))
        is_component = isinstance(value, list | dict) and name not in adapter.index_tables
        if is_component and name not in known and not name.startswith("_") and not is_absent:
            raise ValueError(f"model_index.json: {shorten(name)} is not a component of this pipeline")
    parts: dict[str, BaseModel | None] = {}
    for component in adapter.components:
        kind = _class_of(component, index.get(component.name))
        if kind is None:
            continue
        config, file = component.classes[kind], f"{component.name}/{component.file}"
        parts[component.name] = config and _checked(file, config, read(file), kind, component.nested)
    misfit = adapter.misfit(parts)
    if misfit is not None:
        raise ValueError(misfit)
    return parts


def _class_of(component: Component, entry: Any) -> str | None:
    """The class that an entry of model_index.json names; None where it may be, and is, absent."""
    if component.is_optional and (entry is None or entry == [None, None]):
        return None
    if (
        isinstance(entry, list)
        and len(entry) == 2
        and entry[0] == component.named_library
        and isinstance(entry[1], str)
        and entry[1] in component.classes
    ):
        return entry[1]
    allowed = " or ".join(f'["{component.named_library}", "{kind}"]' for kind in list(component.classes)[:3])
    raise ValueError(f"model_index.json: {component.name} must be {allowed}, got {_shown(entry)}")


def _checked(file: str, config: type[BaseModel], content: dict[str, Any], kind: str, nested: str | None) -> BaseModel:
    refuse_code(file, content)
    named = content.get("_class_name", kind)
    if named != kind:
        raise ValueError(f"{file}: _class_name must be {kind}, as in model_index.json, got {_shown(named)}")
    if nested is not None and isinstance(content.get(nested), dict):
        content = content[nested]
    try:
        return config.model_validate(content)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = printable(".".join(map(str, first["loc"])), 100)
        reason = first["msg"].removeprefix("Value error, ")
        if not where:
            raise ValueError(f"{file}: {reason}") from None
        got = "" if first["type"] == "missing" else f", got {_shown(first['input'])}"
        raise ValueError(f"{file}: {where}: {reason[0].lower()}{reason[1:]}{got}") from None


def refuse_code(file: str, content: Any) -> None:
    """Raises ValueError where a configuration, however deep within, asks for code, or is nested without end."""
    todo = [(content, 0)]
    while todo:
        value, depth = todo.pop()
        if depth > _MAX_NESTING:
            raise ValueError(f"{file}: nested too deeply")
        if isinstance(value, list):
            todo.extend((inner, depth + 1) for inner in value if isinstance(inner, list | dict))
            continue
        for key, inner in value.items() if isinstance(value, dict) else ():
            if key in _CODE_KEYS and inner not in (None, False):
                raise ValueError(
                    f"{file}: {key} cannot be used: cineray runs no code of a checkpoint's, got {_shown(inner)}"
                )
            if key.strip("_").startswith("attn_implementation") and not (
                inner is None or isinstance(inner, bool) or inner in _ATTENTION
            ):
                raise ValueError(
                    f"{file}: {shorten(key)[1:-1]} must be one of {', '.join(_ATTENTION)}, got {_shown(inner)}"
                )
            if isinstance(inner, list | dict):
                todo.append((inner, depth + 1))


def check_folder(adapter: Adapter, parts: Mapping[str, Any], folder: Path) -> None:
    """Checks what a diffusers folder on this machine holds for each component, as far as it can be seen from outside.

    Args:
        parts: as `check_configs` returns them.

    Raises:
        ValueError: a folder or file is missing, is no regular file, or its weights are of another number of layers.
    """
    if os.path.lexists(folder / "None.py"):  # diffusers would take the class of a component that is null from there
        raise ValueError("None.py is code; cineray runs no code of a checkpoint's")
    for component in adapter.components:
        if component.name not in parts:
            continue
        place = folder / component.name
        if not place.is_dir():
            raise ValueError(f"{component.name} is missing, so this is not a diffusers folder")
        _check_files(place, component)
        if component.weights is not None:
            try:
                tensors = read_headers(place, component.weights, prefers_index=component.library == "diffusers")
            except ValueError as error:
                raise ValueError(f"{component.name}/{error}") from None
            _check_layers(component, parts[component.name], tensors)


def _check_files(place: Path, component: Component) -> None:
    try:
        entries = list(_files_of(place))
    except OSError as error:
        raise ValueError(f"{component.name} cannot be read: {error.strerror}") from None
    for name, about in entries:
        shown = f"{component.name}/{shorten(name, 100)[1:-1]}"
        if about is None:
            continue  # a dangling link or a loop: as if it were not there
        if not stat.S_ISREG(about.st_mode) and not stat.S_ISDIR(about.st_mode):
            raise ValueError(f"{shown} is not a regular file")
        if name in (
            f"{component.library}.py",
            f"{component.named_library}.py",
        ):  # diffusers would take the class from there
            raise ValueError(f"{shown} is code; cineray runs no code of a checkpoint's")
        if name == "adapter_config.json":  # transformers would load the model that it names
            raise ValueError(f"{shown} is of an adapter for another model, not of a checkpoint")
        if not name.endswith(".safetensors") and about.st_size > MAX_SIDE_FILE_BYTES and _is_read(name):
            raise ValueError(f"{shown} must have at most {MAX_SIDE_FILE_BYTES} bytes, got {about.st_size}")
    for name in _SIDE_CONFIGS:
        try:
            content = read_json(place / name, MAX_CONFIG_BYTES * 16)  # a tokenizer's may list every added token
        except FileNotFoundError:
            continue
        except (OSError, ValueError) as error:
            raise ValueError(f"{component.name}/{name} cannot be read: {reason_of(error)}") from None
        refuse_code(f"{component.name}/{name}", content)


def _files_of(place: Path) -> Iterator[tuple[str, os.stat_result | None]]:
    with os.scandir(place) as entries:
        for entry in entries:
            try:
                yield entry.name, entry.stat()
            except OSError:
                yield entry.name, None


def _is_read(name: str) -> bool:
    return name.endswith((".json", ".txt", ".model", ".jinja"))


def _check_layers(component: Component, config: Any, tensors: Mapping[str, TensorHeader]) -> None:
    """Raises ValueError where a configuration counts other layers than the weights hold."""
    for count, pattern in component.layers:
        matches = (re.match(pattern, name) for name in tensors)
        held = Counter(int(match[1]) for match in matches if match)
        wanted = getattr(config, count)
        if sorted(held) != list(range(wanted)):
            file = f"{component.name}/{component.file}"
            raise ValueError(f"{file}: {count} is {wanted}, but the weights are of {len(held)} such layers")


def _shown(value: Any) -> str:
    try:
        return shorten(repr(value))[1:-1]
    except (RecursionError, ValueError):  # ValueError: a number of more than 4,300 digits
        return type(value).__name__
