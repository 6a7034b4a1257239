"""Published configurations, shipped so that nothing must be fetched to know a checkpoint's size.

Of the named checkpoints, and of some that render from a folder alone: their repositories hold no safetensors, or not in
diffusers' layout.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

from cineray.pipeline.adapters import KNOWN_MODELS, MODELS, kind_of
from cineray.pipeline.adapters.protocol import ModelConfigs
from cineray.pipeline.loading.checkpoint import Checkpoint
from cineray.pipeline.loading.parts import check_configs
from cineray.pipeline.request import InputError
from cineray.text import shorten

_FOLDER = Path(__file__).parent / "published"
FROM_FOLDERS = ("dit-xl-2-256", "dit-xl-2-512", "open-sora-1.2")


@dataclass(frozen=True, kw_only=True, slots=True)
class Published:
    """What a repository says of a checkpoint.

    Args:
        sources: part -> where its configuration was read.
        published_bytes: part -> size of its published weights: "bytes", "element_bytes", and "from" which repository.
        files: the repository's JSON files by path.
    """

    name: str
    repository: str
    sources: Mapping[str, str]
    published_bytes: Mapping[str, Mapping[str, Any]]
    files: Mapping[str, Mapping[str, Any]] = field(repr=False)

    def config(self, part: str) -> Mapping[str, Any]:
        """Configuration of a part, such as "transformer"."""
        return self.files[f"{part}/config.json"]

    def has(self, part: str) -> bool:
        return f"{part}/config.json" in self.files


def published_names() -> list[str]:
    """The checkpoints whose configuration ships."""
    return [name for name in (*KNOWN_MODELS, *FROM_FOLDERS) if (_FOLDER / f"{name}.json").is_file()]


@cache
def published(model: str) -> Published:
    """The published configuration of a checkpoint.

    Raises:
        InputError: there is none of this name; lists those that there are.
    """
    if model not in published_names():
        known = ", ".join(published_names())
        raise InputError(f"model {shorten(model, 200)} has no published configuration here; these have: {known}")
    return Published(name=model, **json.loads((_FOLDER / f"{model}.json").read_text()))


@cache
def published_checkpoint(model: str) -> Checkpoint:
    """The checkpoint as `open_checkpoint` gives it, from what ships; no network, no weights.

    Raises:
        InputError: as `published`.
    """
    found = published(model)
    index = found.files["model_index.json"]
    configs = ModelConfigs.of(index, lambda file: found.files[file])
    # whether this machine has the packages that it needs is not asked
    family, kind = kind_of(index["_class_name"], configs, MODELS)
    adapter = kind.for_checkpoint(configs)
    return Checkpoint(
        name=model,
        source=found.repository,
        is_local=False,
        pipeline_class=index["_class_name"],
        model=family,
        adapter=adapter,
        configs=configs,
        parts=check_configs(adapter, index, lambda file: dict(found.files[file])),
        defaults=replace(adapter.defaults, **(KNOWN_MODELS[model].defaults if model in KNOWN_MODELS else {})),
    )
