"""Where a checkpoint's weights lie on this machine, and which they are; none is read."""

from dataclasses import dataclass
from pathlib import Path

from cineray.pipeline.checkpoint import Checkpoint, weights_digest
from cineray.pipeline.request import InputError


@dataclass(frozen=True, kw_only=True, slots=True)
class Identity:
    """Which weights these are; `revision` is the hub commit, None for a folder."""

    digest: str
    revision: str | None


def identify(checkpoint: Checkpoint) -> Identity:
    """The identity of a checkpoint's weights without loading them; downloads what is not here.

    Raises:
        InputError: the download failed.
    """
    folder = local_folder(checkpoint)
    return Identity(digest=weights_digest(folder), revision=None if checkpoint.is_local else folder.name)


def local_folder(checkpoint: Checkpoint) -> Path:
    """The checkpoint's folder on this machine; downloads what is not here.

    Raises:
        InputError: the download failed.
    """
    if checkpoint.is_local:
        return Path(checkpoint.source)
    import diffusers

    try:
        pipeline_class = getattr(diffusers, checkpoint.pipeline_class)
        return Path(pipeline_class.download(checkpoint.source, use_safetensors=True))
    except Exception as error:  # network, disk, hub: all end here
        reason = " ".join(str(error).split())[:400]
        raise InputError(f"model {checkpoint.name}: download from the hub failed: {reason}") from error
