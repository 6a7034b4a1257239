"""Loads the weights of a checkpoint into a diffusers pipeline."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from cineray.pipeline.adapters import Adapter
from cineray.pipeline.checkpoint import Checkpoint, weights_digest
from cineray.pipeline.request import InputError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
Offload = Literal["none", "model", "sequential"]


def default_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def check_device(device: str) -> None:
    """Raises InputError where this machine has no such device."""
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError("device cuda: this PyTorch sees no CUDA GPU; use --device cpu, or install a CUDA build")


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadOptions:
    """How the weights sit on the device.

    Args:
        device: "cpu" or "cuda".
        dtype: name in `DTYPES`, or "auto": float32 on a CPU, bfloat16 on CUDA. Wan's VAE stays in float32, as its
            authors advise.
        offload: "model" keeps one part of the pipeline on the GPU at a time, "sequential" one layer.
        vae_tiling: decode in overlapping tiles; less memory, slightly other pixels.
    """

    device: str = "cpu"
    dtype: str = "auto"
    offload: Offload = "none"
    vae_tiling: bool = False

    def __post_init__(self) -> None:
        if self.device not in ("cpu", "cuda"):
            raise InputError(f"device must be cpu or cuda, got {self.device!r}")
        if self.dtype != "auto" and self.dtype not in DTYPES:
            raise InputError(f"dtype must be auto or one of {', '.join(DTYPES)}, got {self.dtype!r}")
        if self.offload not in ("none", "model", "sequential"):
            raise InputError(f"offload must be none, model or sequential, got {self.offload!r}")
        if self.offload != "none" and self.device != "cuda":
            raise InputError(f"offload {self.offload} moves weights between CPU and GPU; it needs --device cuda")

    @property
    def dtype_name(self) -> str:
        return ("bfloat16" if self.device == "cuda" else "float32") if self.dtype == "auto" else self.dtype


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadedModel:
    """A checkpoint in memory, ready to render."""

    checkpoint: Checkpoint
    pipe: Any  # the diffusers pipeline that model_index.json names
    options: LoadOptions
    digest: str
    revision: str | None  # hub commit, None for a folder

    @property
    def adapter(self) -> Adapter:
        return self.checkpoint.adapter


# the parts of a pipeline that one stage of a batch needs and another does not
TEXT_ENCODERS = ("text_encoder", "text_encoder_2")
TRANSFORMER = ("transformer",)


def load_model(checkpoint: Checkpoint, options: LoadOptions, without: Sequence[str] = ()) -> LoadedModel:
    """Loads the pipeline, from safetensors only.

    Args:
        without: parts that stay out of memory and are None in the pipeline.

    Raises:
        InputError: a file is missing or broken, the download failed, or there is no such device.
    """
    import diffusers
    import transformers

    check_device(options.device)
    pipeline_class = getattr(diffusers, checkpoint.pipeline_class)
    folder = _local_folder(checkpoint, pipeline_class)
    # their weight-loading bars and "expected types" notes would tear our progress display apart
    for library in (diffusers, transformers):
        library.utils.logging.disable_progress_bar()
        library.utils.logging.set_verbosity_error()
    dtype = DTYPES[options.dtype_name]
    vae_dtype = torch.float32 if checkpoint.adapter.vae_in_float32 else dtype
    try:
        pipe = pipeline_class.from_pretrained(
            folder,
            dtype={"default": dtype, "vae": vae_dtype},
            use_safetensors=True,
            local_files_only=True,
            **{name: None for name in without if name in checkpoint.configs.index},
        )
    except Exception as error:  # diffusers, transformers, safetensors and tokenizers each raise their own
        reason = " ".join(str(error).split())[:400]
        raise InputError(f"model {checkpoint.name}: loading from {folder} failed: {reason}") from error
    pipe.set_progress_bar_config(disable=True)
    if options.vae_tiling:
        pipe.vae.enable_tiling()
    if options.offload == "model":
        pipe.enable_model_cpu_offload()
    elif options.offload == "sequential":
        pipe.enable_sequential_cpu_offload()
    else:
        pipe.to(options.device)
    identity = _identity(checkpoint, folder)
    return LoadedModel(
        checkpoint=checkpoint, pipe=pipe, options=options, digest=identity.digest, revision=identity.revision
    )


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
    import diffusers

    return _identity(checkpoint, _local_folder(checkpoint, getattr(diffusers, checkpoint.pipeline_class)))


def _identity(checkpoint: Checkpoint, folder: Path) -> Identity:
    return Identity(digest=weights_digest(folder), revision=None if checkpoint.is_local else folder.name)


def _local_folder(checkpoint: Checkpoint, pipeline_class: Any) -> Path:
    if checkpoint.is_local:
        return Path(checkpoint.source)
    try:
        return Path(pipeline_class.download(checkpoint.source, use_safetensors=True))
    except Exception as error:  # network, disk, hub: all end here
        reason = " ".join(str(error).split())[:400]
        raise InputError(f"model {checkpoint.name}: download from the hub failed: {reason}") from error
