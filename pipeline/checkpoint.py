"""Finds a checkpoint by name, folder or hub id, and reads its configuration before any weight is touched."""

import hashlib
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cineray.caching.spec import AnyPlan
from cineray.pipeline.adapters import FAMILIES, KNOWN_MODELS, Adapter, KnownCheckpoint
from cineray.pipeline.adapters.protocol import Defaults, ModelConfigs
from cineray.pipeline.cache_plan import plan_cache
from cineray.pipeline.request import InputError, SizeRule


@dataclass(frozen=True, kw_only=True, slots=True)
class Checkpoint:
    """A checkpoint whose configuration has been read and found usable; its weights may not be here yet."""

    name: str
    source: str
    pipeline_class: str
    adapter: Adapter
    configs: ModelConfigs
    defaults: Defaults

    @property
    def size_rule(self) -> SizeRule:
        return self.adapter.size_rule(self.configs)

    def plan_cache(self, policy: str) -> AnyPlan | None:
        """What a cache policy means for this model; None for `none`.

        Raises:
            ValueError: an unknown policy, or one that does not fit.
        """
        return plan_cache(policy, self.configs.transformer.get("_class_name", ""), self.configs.transformer)

    @property
    def is_local(self) -> bool:
        return Path(self.source).is_dir()


def open_checkpoint(model: str) -> Checkpoint:
    """Resolves a model.

    Args:
        model: a name of `KNOWN_MODELS`, a diffusers folder, or a hub id `owner/name`.

    Raises:
        InputError: not found, not a diffusers folder, or a pipeline that cineray cannot render.
    """
    known = KNOWN_MODELS.get(model) or _shipped_at(model)
    source = known.source if known else model
    if not Path(source).exists() and source.count("/") != 1:
        raise InputError(
            f"model {model!r} is neither a folder nor a hub id owner/name nor one of: {', '.join(KNOWN_MODELS)}"
        )
    index = _read_config(source, "model_index.json")
    pipeline_class = index.get("_class_name")
    adapter = FAMILIES.get(pipeline_class) if isinstance(pipeline_class, str) else None
    if adapter is None:
        raise InputError(
            f"model {model}: pipeline {pipeline_class!r} is not supported; supported: {', '.join(FAMILIES)}"
        )
    configs = ModelConfigs(
        index=index,
        transformer=_read_config(source, "transformer/config.json"),
        vae=_read_config(source, "vae/config.json"),
    )
    reason = adapter.unsupported(configs)
    if reason is not None:
        raise InputError(f"model {model}: {reason}")
    return Checkpoint(
        name=model,
        source=source,
        pipeline_class=str(pipeline_class),
        adapter=adapter,
        configs=configs,
        defaults=_defaults(adapter, known),
    )


def _shipped_at(model: str) -> KnownCheckpoint | None:
    """The shipped model whose folder `model` is."""
    folder = Path(model).resolve()
    return next((k for k in KNOWN_MODELS.values() if Path(k.source).is_absolute() and Path(k.source) == folder), None)


def _defaults(adapter: Adapter, known: KnownCheckpoint | None) -> Defaults:
    return replace(adapter.defaults, **known.defaults) if known else adapter.defaults


def _read_config(source: str, file: str) -> dict[str, Any]:
    """One JSON file of a diffusers folder or of a hub repository."""
    if Path(source).exists():
        path = Path(source) / file
        if not path.is_file():
            raise InputError(f"model {source}: {file} is missing, so this is not a diffusers folder")
    else:
        path = Path(_download(source, file))
    try:
        config = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"model {source}: {file} cannot be read: {error}") from None
    if not isinstance(config, dict):
        raise InputError(f"model {source}: {file} must hold a JSON object, got {type(config).__name__}")
    return config


def _download(repository: str, file: str) -> str:
    from huggingface_hub import hf_hub_download, logging
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # its retries would fill the screen: what matters is said once, below
    try:
        return hf_hub_download(repository, file)
    except GatedRepoError:
        reason = "is gated; accept its terms on the hub and log in with `hf auth login`"
    except RepositoryNotFoundError:
        reason = "does not exist on the hub, or is private (log in with `hf auth login`)"
    except HFValidationError:
        reason = "is neither a folder nor a valid hub id owner/name"
    except (LocalEntryNotFoundError, OSError):
        reason = (
            "is neither a local folder nor in the hub cache, and the hub cannot be reached; "
            "check the network, or give the path of a downloaded folder"
        )
    except EntryNotFoundError:
        reason = f"has no {file} on the hub, so it is not a diffusers checkpoint"
    finally:
        logging.set_verbosity(verbosity)
    raise InputError(f"model {repository} {reason}")


_SAMPLE_BYTES = 64 * 1024
_SAMPLES_PER_FILE = 64


def weights_digest(folder: Path) -> str:
    """Identity of a checkpoint folder: every small file whole, 64 samples of 64 KiB and the size of large ones.

    Samples make it instant for 28 GB of weights; any training step changes them everywhere. The folder's name
    and the files' dates do not count, so a copy on another machine is the same model.
    """
    digest = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.suffix in (".json", ".safetensors", ".model", ".txt")):
        size = path.stat().st_size
        digest.update(f"{path.relative_to(folder).as_posix()}:{size};".encode())
        with path.open("rb") as file:
            if size <= _SAMPLE_BYTES * _SAMPLES_PER_FILE:
                digest.update(file.read())
            else:
                for sample in range(_SAMPLES_PER_FILE):
                    file.seek(sample * (size - _SAMPLE_BYTES) // (_SAMPLES_PER_FILE - 1))
                    digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()[:16]
