"""Where a checkpoint's weights lie on this machine, and which they are; none is read."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

from cineray.pipeline.loading.checkpoint import Checkpoint, download, weights_digest
from cineray.pipeline.loading.errors import LoadingError, is_passing
from cineray.pipeline.request import InputError
from cineray.text import printable


@dataclass(frozen=True, kw_only=True, slots=True)
class Identity:
    """Identity of a checkpoint's weights; `revision` is the hub commit, None for a folder."""

    digest: str
    revision: str | None


def identify(checkpoint: Checkpoint) -> Identity:
    """The identity of a checkpoint's weights without loading them; downloads none of them.

    A repository of the hub is identified by its name and commit, so that a driver without a disk for 80 GB of weights
    can name clips; a folder by its files.

    Raises:
        InputError: the folder cannot be read, or the repository not be found.
    """
    if not checkpoint.is_local:
        commit = hub_commit(checkpoint)
        digest = hashlib.sha256(f"{checkpoint.source}@{commit}".encode()).hexdigest()[:16]
        return Identity(digest=digest, revision=commit)
    folder = local_folder(checkpoint)
    try:
        digest = weights_digest(folder)
    except OSError as error:
        kind = LoadingError if is_passing(error) else InputError
        raise kind(f"model {printable(checkpoint.name, 200)}: cannot be read: {error.strerror}") from None
    return Identity(digest=digest, revision=None)


def local_folder(checkpoint: Checkpoint) -> Path:
    """The checkpoint's folder on this machine; downloads what is not here.

    Raises:
        InputError: the download failed, or brought files that cannot be loaded; or the folder has gone.
    """
    if checkpoint.is_local:
        if not Path(checkpoint.source).is_dir():
            raise InputError(f"model {printable(checkpoint.name, 200)}: the folder has gone since it was looked at")
        return Path(checkpoint.source)
    if checkpoint.model.pipelines_from != "diffusers":
        raise InputError(
            f"model {printable(checkpoint.name, 200)}: a {checkpoint.pipeline_class} is loaded from a folder on this "
            "machine; download it with `hf download` and give its path"
        )
    commit = hub_commit(checkpoint)  # of the files that were judged, though the repository may have moved on
    try:
        folder = Path(checkpoint.pipeline_type.download(checkpoint.source, revision=commit, use_safetensors=True))
    except Exception as error:  # network, disk, hub: all end here
        reason = printable(" ".join(str(error).split()), 400)
        kind = LoadingError if is_passing(error) else InputError
        raise kind(f"model {printable(checkpoint.name, 200)}: download from the hub failed: {reason}") from error
    checkpoint.check_files(folder)
    return folder


def hub_commit(checkpoint: Checkpoint) -> str:
    """The commit of a hub repository whose configuration is on this machine: the folder of its snapshot.

    Raises:
        InputError: the repository cannot be found.
    """
    return Path(download(checkpoint.source, "model_index.json")).parent.name
