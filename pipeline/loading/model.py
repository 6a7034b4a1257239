"""Loads the weights of a checkpoint into a diffusers pipeline."""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from cineray.pipeline.adapters import Adapter
from cineray.pipeline.adapters.component import Component
from cineray.pipeline.linear_runs import LinearRuns
from cineray.pipeline.loading.checkpoint import Checkpoint
from cineray.pipeline.loading.device import check_device, gpu_memory_bytes
from cineray.pipeline.loading.errors import loading_errors
from cineray.pipeline.loading.loaded_weights import check_finite, check_names, check_scheduler, check_vocabulary
from cineray.pipeline.loading.options import LoadOptions, check_installed
from cineray.pipeline.loading.prepare import (
    check_loras,
    compile_blocks,
    expert_transformers,
    fuse_loras,
    keep_encoders_on_host,
    order_for_gpus,
    other_scheduler,
    quantize,
    set_attention,
)
from cineray.pipeline.loading.unread_blocks import UnreadBlocks, open_blocks
from cineray.pipeline.loading.weights import identify, local_folder

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadedModel:
    """A checkpoint in memory, ready to render.

    Args:
        pipe: the diffusers pipeline that model_index.json names.
        revision: hub commit, None for a folder.
        unread: by their names in the pipeline, transformers whose blocks are read while `Gang.shard_weights` cuts them.
        runs: of its scheduler's steps, as its clips find them.
    """

    checkpoint: Checkpoint
    pipe: Any
    options: LoadOptions
    digest: str
    revision: str | None
    unread: Mapping[str, UnreadBlocks] = field(default_factory=dict[str, UnreadBlocks])
    runs: LinearRuns = field(default_factory=LinearRuns, compare=False)

    @property
    def adapter(self) -> Adapter:
        return self.checkpoint.adapter


def load_model(
    checkpoint: Checkpoint, options: LoadOptions, skip_components: Sequence[str] = (), *, is_sharded: bool = False
) -> LoadedModel:
    """Loads the pipeline, from safetensors only.

    Args:
        skip_components: parts that stay out of memory and are None in the pipeline: some of the model's
            `encoder_parts`, `denoiser_parts` and `decoder_parts`.
        is_sharded: the caller cuts the transformers' blocks over ranks and puts the model on the device, as
            `Gang.shard_weights` does: whole it may not fit there. Unless a LoRA is fused the blocks are not read here.

    Raises:
        InputError: a file is missing or broken, the weights are not those that the configuration asks for or are not
            finite, the download failed, or there is no such device.
        LoadingError: of these, what tells of this machine or of the hub: another machine may load it.
    """
    import diffusers
    import transformers

    check_device(options.device)
    check_installed(options)
    folder = local_folder(checkpoint)
    # their weight-loading bars and "expected types" notes would tear our progress display apart
    for library in (diffusers, transformers):
        library.utils.logging.disable_progress_bar()
        library.utils.logging.set_verbosity_error()
    with loading_errors(checkpoint.name, folder):
        _check_loras(checkpoint, folder, options, skip_components)
        _check_names(checkpoint, folder, skip_components)
        with warnings.catch_warnings(action="ignore", category=FutureWarning):  # of what diffusers builds from
            unread = _unread(checkpoint, folder, options, skip_components) if is_sharded else {}
            pipe = _load(checkpoint, folder, options, skip_components, is_sharded, unread)
        _check_loaded(checkpoint, pipe)
    identity = identify(checkpoint)
    return LoadedModel(
        checkpoint=checkpoint,
        pipe=pipe,
        options=options,
        digest=identity.digest,
        revision=identity.revision,
        unread=unread,
    )


def _unread(
    checkpoint: Checkpoint, folder: Path, options: LoadOptions, skip_components: Sequence[str]
) -> dict[str, UnreadBlocks]:
    """The transformers by their names in the pipeline, without their blocks' weights."""
    if options.lora:  # which is fused into whole weights
        return {}
    names = [n for n in checkpoint.model.denoiser_parts if n in checkpoint.parts and n not in skip_components]
    return {
        name: open_blocks(
            _component(checkpoint, name),
            checkpoint.configs.index[name][1],
            folder / name,
            DTYPES[options.dtype_name],
            checkpoint.model.layout.all_lists,
            checkpoint.name,
        )
        for name in names
    }


def _check_loras(checkpoint: Checkpoint, folder: Path, options: LoadOptions, skip_components: Sequence[str]) -> None:
    names = [name for name in checkpoint.model.denoiser_parts if name not in skip_components]
    if options.lora and names:
        parts = {name: None for name, entry in checkpoint.configs.index.items() if isinstance(entry, list)}
        parts |= {name: _on_meta(checkpoint, folder, name) for name in names if name in checkpoint.parts}
        check_loras(checkpoint.pipeline_type(**parts), options.lora)


def _check_names(checkpoint: Checkpoint, folder: Path, skip_components: Sequence[str]) -> None:
    for component in checkpoint.adapter.components:
        if component.weights is None or component.name in skip_components or component.name not in checkpoint.parts:
            continue
        kind = checkpoint.configs.index[component.name][1]
        with _about(component.name):
            check_names(component, kind, folder / component.name)


def _load(
    checkpoint: Checkpoint,
    folder: Path,
    options: LoadOptions,
    skip_components: Sequence[str],
    is_sharded: bool,
    unread: Mapping[str, UnreadBlocks],
) -> Any:
    dtype = DTYPES[options.dtype_name]
    skipped = [name for name in skip_components if name in checkpoint.parts]
    encoders = {*checkpoint.model.encoder_parts} - {*skip_components}
    goes_there = options.offload == "none" and not is_sharded
    parts_encoders = goes_there and options.text_encoders == "host" and bool(encoders)
    is_shrunk = goes_there and options.quantize != "none" and not _has_room(folder, checkpoint, skipped, options)
    goes_whole = goes_there and not parts_encoders and not is_shrunk
    # tensor by tensor onto the GPU, else a copy of all weights stands in host memory first, for each rank
    is_straight = options.device == "cuda" and goes_whole and not options.lora
    pipe = checkpoint.pipeline_type.from_pretrained(
        folder,
        device_map=options.device if is_straight else None,
        dtype={"default": dtype, "vae": DTYPES[vae_dtype_name(checkpoint, options)]},
        use_safetensors=True,
        local_files_only=True,
        **{name: _without_weights(checkpoint, folder, name) for name in skipped},
        **{name: blocks.transformer for name, blocks in unread.items()},
    )
    pipe.register_modules(**dict.fromkeys(skipped))
    pipe.set_progress_bar_config(disable=True)
    if options.vae_tiling and hasattr(pipe.vae, "use_tiling"):
        pipe.vae.enable_tiling()
    if options.device == "cuda":
        order_for_gpus(getattr(pipe, "vae", None))
    transformers = expert_transformers(pipe, checkpoint.model.denoiser_parts)
    if transformers:
        fuse_loras(pipe, options.lora)
    if goes_whole and not is_straight:
        pipe.to(options.device)
    check_finite(pipe.components)  # on the device, where it is fastest, and before parts of it are offloaded
    for transformer in transformers:
        quantize(transformer, options, torch.device(options.device) if is_shrunk else None)
        set_attention(transformer, options)
        if options.compile:
            compile_blocks(transformer)
    if options.scheduler != "auto":
        pipe.register_modules(scheduler=other_scheduler(pipe.scheduler, options.scheduler))
    checkpoint.adapter.loaded(pipe, options.device)
    if parts_encoders:
        keep_encoders_on_host(pipe, encoders, torch.device(options.device))
    elif is_shrunk:
        pipe.to(options.device)
    _offload(pipe, options)
    return pipe


def _has_room(folder: Path, checkpoint: Checkpoint, skipped: Sequence[str], options: LoadOptions) -> bool:
    """Whether a GPU has room for the weights as their files have them, which is what they take in 16 bits or more."""
    if options.device != "cuda":
        return True
    files = (file for name in {*checkpoint.parts} - {*skipped} for file in (folder / name).glob("*.safetensors"))
    return sum(file.stat().st_size for file in files) < gpu_memory_bytes()[0]


def vae_dtype_name(checkpoint: Checkpoint, options: LoadOptions) -> str:
    """The VAE's dtype: the one asked for, else what the model's authors decode in where the run is not in float32."""
    if options.vae_dtype != "auto":
        return options.vae_dtype
    if options.dtype_name == "float32" or options.device != "cuda":
        return "float32" if checkpoint.adapter.vae_dtype == "float32" else options.dtype_name
    return checkpoint.adapter.vae_dtype


def _offload(pipe: Any, options: LoadOptions) -> None:
    match options.offload:
        case "model":
            pipe.enable_model_cpu_offload()
        case "sequential":
            pipe.enable_sequential_cpu_offload()
        case "group":
            pipe.enable_group_offload(
                onload_device=torch.device(options.device), offload_type="leaf_level", use_stream=True
            )


def _without_weights(checkpoint: Checkpoint, folder: Path, name: str) -> Any:
    """What stands for a part while the pipeline is built: scale factors and the like come from its configuration."""
    component = _component(checkpoint, name)
    if name not in checkpoint.model.read_parts or component.library != "diffusers":
        return None
    return _on_meta(checkpoint, folder, name)


def _on_meta(checkpoint: Checkpoint, folder: Path, name: str) -> Any:
    """A part of diffusers' without memory for its weights."""
    component = _component(checkpoint, name)
    kind = component.class_named(checkpoint.configs.index[name][1])
    with torch.device("meta"):
        return kind.from_config(kind.load_config(folder / name, local_files_only=True))


def _component(checkpoint: Checkpoint, name: str) -> Component:
    return next(c for c in checkpoint.adapter.components if c.name == name)


def _check_loaded(checkpoint: Checkpoint, pipe: Any) -> None:
    with _about("scheduler"):
        check_scheduler(checkpoint.adapter, pipe, checkpoint.defaults)
    for encoder in checkpoint.model.encoder_parts:
        tokenizer = encoder.replace("text_encoder", "tokenizer")
        if tokenizer != encoder and getattr(pipe, encoder, None) is not None:
            with _about(tokenizer):
                check_vocabulary(getattr(pipe, tokenizer), getattr(pipe, encoder))


@contextmanager
def _about(part: str) -> Iterator[None]:
    """Puts the part's name before what is wrong with it."""
    try:
        yield
    except Exception as error:
        raise ValueError(f"{part}: {' '.join(str(error).split()) or type(error).__name__}") from error
