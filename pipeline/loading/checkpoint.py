"""Finds a checkpoint by name, folder or hub id, and reads its configuration before any weight is touched."""

import errno
import hashlib
import importlib
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from cineray.caching.plan import AnyPlan
from cineray.caching.policies.auto import FloorPlan
from cineray.files import open_regular, read_json
from cineray.pipeline.adapters import (
    MODELS,
    Adapter,
    KnownCheckpoint,
    Model,
    Models,
    by_transformer,
    checkpoints_of,
    pipelines_of,
    renderer_of,
)
from cineray.pipeline.adapters.cache_plan import plan_cache, plan_floors
from cineray.pipeline.adapters.model import num_heads
from cineray.pipeline.adapters.protocol import Defaults, ModelConfigs
from cineray.pipeline.loading.errors import LoadingError, is_passing
from cineray.pipeline.loading.parts import MAX_CONFIG_BYTES, check_configs, check_folder
from cineray.pipeline.loading.weight_header import reason_of
from cineray.pipeline.media.output import written_as
from cineray.pipeline.request import ClipRequest, InputError, SizeRule
from cineray.text import printable, shorten


@dataclass(frozen=True, kw_only=True, slots=True)
class Checkpoint:
    """A checkpoint whose configuration has been read and found usable; its weights may not be here yet.

    Args:
        is_local: it is a folder on this machine, else a repository of the hub.
        model: what cineray knows of its transformer.
        adapter: how its pipeline is rendered.
        parts: the checked configurations of its components, by name.
    """

    name: str
    source: str
    is_local: bool
    pipeline_class: str
    model: Model
    adapter: Adapter
    configs: ModelConfigs
    parts: Mapping[str, Any] = field(repr=False)
    defaults: Defaults

    @property
    def pipeline_type(self) -> Any:
        """The class of its pipeline; imports what has it."""
        return getattr(importlib.import_module(self.model.pipelines_from), self.pipeline_class)

    @property
    def size_rule(self) -> SizeRule:
        return self.adapter.size_rule(self.configs)

    def scheduler_named(self, name: str) -> str:
        """What `LoadOptions.scheduler` is to say for a scheduler's class: "auto" for the checkpoint's own.

        Raises:
            InputError: the model's loop cannot be driven by it; lists those that it can.
        """
        component = next(c for c in self.adapter.components if c.name == "scheduler")
        own = self.configs.index["scheduler"][1]
        if name in ("auto", own):
            return "auto"
        if name not in component.classes:
            raise InputError(
                f"--scheduler must be one of {', '.join(component.classes)} for model {printable(self.name, 200)}, "
                f"whose own is {own}; got {shorten(name)}"
            )
        return name

    def written_as(self, name: str | None) -> "Checkpoint":
        """The same with clips of another kind of file, by the end of its name; None: the model's own.

        Raises:
            InputError: its clips cannot be such files; lists those that they can.
        """
        if name is None:
            return self
        try:
            output = written_as(self.model.output, name)
        except ValueError as error:
            raise InputError(f"model {printable(self.name, 200)}: {error}") from None
        return replace(self, model=replace(self.model, output=output))

    @property
    def num_calls(self) -> int:
        """The most calls of the transformer in a step: one for each branch, unless they stand in one call's batch."""
        return 1 if self.model.stacked else len(self.model.branches)

    @property
    def num_heads(self) -> int:
        """Of the transformer's attention."""
        return num_heads(self.configs.transformer)

    def num_shared_tokens(self, request: ClipRequest) -> int:
        """Tokens of a clip that can be shared out among ranks: places of a frame, where each rank has its own in all
        frames."""
        num_frames_of = self.model.sharded.num_frames
        num_frames = 1 if num_frames_of is None else num_frames_of(request)
        return self.adapter.num_tokens(self.configs, request) // num_frames

    def tokens_here(self, request: ClipRequest, num_ranks: int) -> int:
        """Tokens of the rank that has most, where so many ranks share a clip's tokens."""
        everywhere, shared = self.adapter.num_tokens(self.configs, request), self.num_shared_tokens(request)
        return everywhere // shared * -(-shared // num_ranks)

    @property
    def num_experts(self) -> int:
        """Transformers that share a clip's steps."""
        return sum(name in self.parts for name in self.model.denoiser_parts)

    def plan_cache(self, policy: str) -> AnyPlan | None:
        """What a cache policy means for this model; None for `none`.

        Raises:
            ValueError: an unknown policy, or one that does not fit.
        """
        models = by_transformer(self.model)
        return plan_cache(policy, self.model.transformer, self.configs.transformer, models=models)

    def plan_floors(self, policy: str) -> FloorPlan | None:
        """The floors of a cache policy, and what is known of the settings that may keep them; None where it has none.

        Raises:
            ValueError: as `plan_cache`.
        """
        models = by_transformer(self.model)
        return plan_floors(policy, self.model.transformer, self.configs.transformer, models=models)

    def check_files(self, folder: Path) -> None:
        """Checks the files of a folder that holds it, whose weights are not loaded.

        Raises:
            InputError: one is missing or broken, or the weights are of another number of layers.
        """
        try:
            check_folder(self.adapter, self.parts, folder)
        except (OSError, ValueError) as error:
            reason = reason_of(error) if isinstance(error, OSError) else str(error)
            raise _refused(self.name, reason, error) from None


def open_checkpoint(model: str, models: Models = MODELS) -> Checkpoint:
    """Resolves a model, and judges it by its configuration and, where its weights are here, by their headers.

    Args:
        model: a name of `KNOWN_MODELS`, a diffusers folder, or a hub id `owner/name`.
        models: what can be rendered; one of your own beside them is `{**MODELS, **by_transformer(MINE)}`.

    Raises:
        InputError: not found, not a diffusers folder, broken, or a pipeline that cineray cannot render.
    """
    names, pipelines = checkpoints_of(models), pipelines_of(models)
    known = names.get(model) or _shipped_at(model, names)
    source = known.source if known else model
    is_local = _is_folder(source)
    if not is_local and source.count("/") != 1:
        raise InputError(
            f"model {shorten(model, 200)} is neither a folder nor a hub id owner/name nor one of those that "
            "`cineray models` lists"
        )

    def read(file: str) -> dict[str, Any]:
        return _read_config(source, file, is_local)

    try:
        index = read("model_index.json")
        pipeline_class = index.get("_class_name")
        if pipeline_class not in pipelines:
            named = shorten(pipeline_class) if isinstance(pipeline_class, str) else "of no name"
            raise ValueError(f"pipeline {named} is not supported; supported: {', '.join(pipelines)}")
        configs = ModelConfigs.of(index, read)
        family, adapter = renderer_of(str(pipeline_class), configs, models)
        parts = check_configs(adapter, index, read)
    except InputError:
        raise
    except ValueError as error:
        raise _refused(model, str(error), error) from None
    checkpoint = Checkpoint(
        name=model,
        source=source,
        is_local=is_local,
        pipeline_class=str(pipeline_class),
        model=family,
        adapter=adapter,
        configs=configs,
        parts=parts,
        defaults=_defaults(adapter, known),
    )
    if is_local:
        checkpoint.check_files(Path(source))
    return checkpoint


def _is_folder(source: str) -> bool:
    try:
        return stat.S_ISDIR(os.stat(source).st_mode)
    except (FileNotFoundError, NotADirectoryError, ValueError):  # ValueError: a null character
        return False
    except OSError as error:
        raise _refused(source, f"cannot be read: {error.strerror}", error) from None


def _refused(model: str, reason: str, error: Exception) -> InputError:
    kind = LoadingError if is_passing(error) else InputError
    return kind(f"model {printable(model, 200)}: {reason}")


def _shipped_at(model: str, names: Mapping[str, KnownCheckpoint]) -> KnownCheckpoint | None:
    """The shipped model whose folder `model` is."""
    try:
        folder = Path(model).resolve()
    except (OSError, RuntimeError, ValueError):  # a loop of links; a null character
        return None
    return next((k for k in names.values() if Path(k.source).is_absolute() and Path(k.source) == folder), None)


def _defaults(adapter: Adapter, known: KnownCheckpoint | None) -> Defaults:
    return replace(adapter.defaults, **known.defaults) if known else adapter.defaults


def _read_config(source: str, file: str, is_local: bool) -> dict[str, Any]:
    """One JSON file of a diffusers folder or of a hub repository.

    Raises:
        ValueError: it is missing, or not such a file.
        InputError: the hub does not give it.
    """
    path = Path(source, file) if is_local else Path(download(source, file))
    try:
        config = read_json(path, MAX_CONFIG_BYTES)
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(f"{file} is missing, so this is not a diffusers folder") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"{file} cannot be read: {reason_of(error)}") from None
    if not isinstance(config, dict):
        raise ValueError(f"{file} must hold a JSON object, got {type(config).__name__}")
    return config


def download(repository: str, file: str) -> str:
    """The path of one file of a hub repository, which is downloaded if it is not here.

    Raises:
        InputError: no such repository or file, or no way to them.
    """
    from huggingface_hub import hf_hub_download, logging
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    kind = InputError
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
        kind = LoadingError
        reason = (
            "is neither a local folder nor in the hub cache, and the hub cannot be reached; "
            "check the network, or give the path of a downloaded folder"
        )
    except EntryNotFoundError:
        reason = f"has no {file} on the hub, so it is not a diffusers checkpoint"
    finally:
        logging.set_verbosity(verbosity)
    raise kind(f"model {printable(repository, 200)} {reason}")


_SAMPLE_BYTES = 64 * 1024
_SAMPLES_PER_FILE = 64


def weights_digest(folder: Path) -> str:
    """Identity of a checkpoint folder: every small file whole, 64 samples of 64 KiB and the size of large ones.

    Samples make it instant for 28 GB of weights; any training step changes them everywhere. The folder's name
    and the files' dates do not count, so a copy on another machine is the same model. Nor does what is not a file
    that can be read: folders, FIFOs, devices, links that lead nowhere.

    Raises:
        OSError: the disk does not give what a file holds.
    """
    digest = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.suffix in (".json", ".safetensors", ".model", ".txt")):
        try:
            file = open_regular(path)
        except OSError as error:
            if error.errno == errno.EIO:
                raise
            continue
        with file:
            size = os.fstat(file.fileno()).st_size
            digest.update(os.fsencode(f"{path.relative_to(folder).as_posix()}:{size};"))
            if size <= _SAMPLE_BYTES * _SAMPLES_PER_FILE:
                digest.update(file.read(_SAMPLE_BYTES * _SAMPLES_PER_FILE))
            else:
                for sample in range(_SAMPLES_PER_FILE):
                    file.seek(sample * (size - _SAMPLE_BYTES) // (_SAMPLES_PER_FILE - 1))
                    digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()[:16]
