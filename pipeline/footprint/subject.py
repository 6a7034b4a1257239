"""Models of published configurations on a fake GPU: real classes of diffusers and transformers, no state dict."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import nn

from cineray.pipeline.footprint.fake_gpu import GPU
from cineray.pipeline.footprint.published import Published, published, published_checkpoint
from cineray.pipeline.loading.model import DTYPES, LoadedModel, vae_dtype_name
from cineray.pipeline.loading.options import LoadOptions
from cineray.pipeline.loading.prepare import keep_encoders_on_host, order_for_gpus

DTYPE = torch.bfloat16  # what LoadOptions says for CUDA
CUDA = LoadOptions(device="cuda")
HOST = torch.device("cpu")


def load_fake(
    model: str, parts: tuple[str, ...], num_layers: int | None = None, options: LoadOptions = CUDA
) -> LoadedModel:
    """A named checkpoint on the fake GPU, as `load_model` loads it; call it within `fake_gpu`.

    Args:
        parts: of the pipeline, beside the scheduler, that are there; the others are None.
        num_layers: blocks in each of the transformer's lists, None for all. A step's transients do not depend on it.
        options: where text encoders stay; the rest of them is not looked at.

    Raises:
        InputError: no published configuration of this name.
    """
    found, checkpoint = published(model), published_checkpoint(model)
    on_host = checkpoint.model.encoder_parts if options.text_encoders == "host" else ()
    kinds = {name: entry[1] for name, entry in found.files["model_index.json"].items() if isinstance(entry, list)}
    is_denoiser = {name: name in checkpoint.model.denoiser_parts for name in kinds}
    made: dict[str, Any] = dict.fromkeys(kinds)
    for name in {name for name, kind in kinds.items() if kind is not None} & {*parts, "scheduler"}:
        device = HOST if name in on_host else GPU
        made[name] = _part(found, name, kinds[name], num_layers if is_denoiser[name] else None, options, device)
    # what the pipeline's constructor asks for sizes, its scale factors above all
    absent = [name for name in {"vae", *checkpoint.model.read_parts} if made[name] is None]
    for name in absent:
        made[name] = empty_part(found, name, kinds[name])
    index = found.files["model_index.json"].items()
    settings = {name: value for name, value in index if not isinstance(value, list) and not name.startswith("_")}
    pipelines = importlib.import_module(checkpoint.model.pipelines_from)
    pipe = getattr(pipelines, checkpoint.pipeline_class)(**made, **settings)
    pipe.register_modules(**dict.fromkeys(absent))
    order_for_gpus(getattr(pipe, "vae", None))
    checkpoint.adapter.loaded(pipe, options.device)
    if on_host:
        keep_encoders_on_host(pipe, on_host, GPU)
    return LoadedModel(checkpoint=checkpoint, pipe=pipe, options=options, digest="fake", revision=None)


def empty_part(found: Published, name: str, kind: str, **changes: Any) -> Any:
    """A part on no device at all."""
    import transformers

    config: dict[str, Any] = dict(found.config(name)) | changes
    with torch.device("meta"):
        if not hasattr(transformers, kind):
            return _class(found, name, kind).from_config(config)
        settings = transformers.AutoConfig.for_model(**config)
        settings._attn_implementation = "sdpa"  # what from_pretrained chooses where a class has it
        return getattr(transformers, kind)(settings)


def _class(found: Published, name: str, kind: str) -> Any:
    """A class of diffusers' kind: diffusers', or cineray's own where diffusers has none."""
    (component,) = (part for part in published_checkpoint(found.name).adapter.components if part.name == name)
    return getattr(importlib.import_module(component.module or "diffusers"), kind)


def _part(
    found: Published, name: str, kind: str, num_layers: int | None, options: LoadOptions, device: torch.device
) -> Any:
    import diffusers
    import transformers

    if name == "image_processor":
        return getattr(transformers, kind)()  # its defaults are CLIP's
    if name == "scheduler":
        return getattr(diffusers, kind).from_config(dict(found.files["scheduler/scheduler_config.json"]))
    if name == "vae":
        dtype = DTYPES[vae_dtype_name(published_checkpoint(found.name), options)]
        return fake_weights(empty_part(found, name, kind), dtype, (), device)
    config = found.config(name)
    counts = ("num_layers", "num_single_layers", "depth")
    fewer: dict[str, Any] = {n: num_layers for n in counts if num_layers and n in config}
    if num_layers and "vace_layers" in config:  # the blocks that hints are added to
        fewer["vace_layers"] = [n for n in config["vace_layers"] if n < num_layers]
    module = empty_part(found, name, kind, **fewer)
    # transformers keeps its own for float16 alone
    kept = module._keep_in_fp32_modules if isinstance(module, diffusers.ModelMixin) else ()
    return fake_weights(module, DTYPE, kept or (), device)


def fake_weights(
    module: nn.Module, dtype: torch.dtype, keep_float32: tuple[str, ...] | list[str], device: torch.device = GPU
) -> nn.Module:
    """The module with fake tensors in the place of its own, of the types that `from_pretrained` gives them.

    Args:
        keep_float32: names of modules and parameters that stay in float32.
    """
    made: dict[int, nn.Parameter] = {}  # tied weights stay one tensor
    for owner_name, owner in module.named_modules():
        for name, own in list(owner._parameters.items()):
            if own is not None and id(own) not in made:
                is_kept = bool({*owner_name.split("."), name} & set(keep_float32))
                kind = (torch.float32 if is_kept else dtype) if own.is_floating_point() else own.dtype
                made[id(own)] = nn.Parameter(torch.empty(own.shape, dtype=kind, device=device), requires_grad=False)
            if own is not None:
                owner._parameters[name] = made[id(own)]
        for name, buffer in list(owner._buffers.items()):
            if buffer is not None:
                owner._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype, device=device)
    return module.eval()


def num_parameters(model: str, part: str) -> int:
    """The number of parameters of a part of a named checkpoint, all its layers; on no device at all."""
    found = published(model)
    module = empty_part(found, part, found.files["model_index.json"][part][1])
    return sum(parameter.numel() for parameter in module.parameters())
