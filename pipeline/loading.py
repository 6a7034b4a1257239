"""Loads the weights of a checkpoint into a diffusers pipeline."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from cineray.pipeline.adapters import Adapter
from cineray.pipeline.checkpoint import Checkpoint
from cineray.pipeline.device import check_device
from cineray.pipeline.load_options import LoadOptions
from cineray.pipeline.request import InputError
from cineray.pipeline.weights import identify, local_folder

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


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
    folder = local_folder(checkpoint)
    # their weight-loading bars and "expected types" notes would tear our progress display apart
    for library in (diffusers, transformers):
        library.utils.logging.disable_progress_bar()
        library.utils.logging.set_verbosity_error()
    dtype = DTYPES[options.dtype_name]
    vae_dtype = torch.float32 if checkpoint.adapter.vae_in_float32 else dtype
    try:
        pipe = getattr(diffusers, checkpoint.pipeline_class).from_pretrained(
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
    identity = identify(checkpoint)
    return LoadedModel(
        checkpoint=checkpoint, pipe=pipe, options=options, digest=identity.digest, revision=identity.revision
    )
