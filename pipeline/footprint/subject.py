"""Models of published configurations on a fake GPU: real classes of diffusers and transformers, no state dict."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from cineray.pipeline.footprint.fake_gpu import GPU
from cineray.pipeline.footprint.published import Published, published, published_checkpoint
from cineray.pipeline.loading.model import LoadedModel
from cineray.pipeline.loading.options import LoadOptions

DTYPE = torch.bfloat16  # what LoadOptions says for CUDA


def load_fake(model: str, parts: tuple[str, ...], num_layers: int | None = None) -> LoadedModel:
    """A named checkpoint on the fake GPU; call it within `fake_gpu`.

    Args:
        parts: of the pipeline, beside the scheduler, that are there; the others are None.
        num_layers: blocks in each of the transformer's lists, None for all. A step's transients do not depend on it.

    Raises:
        InputError: no published configuration of this name.
    """
    import diffusers

    found, checkpoint = published(model), published_checkpoint(model)
    index = found.files["model_index.json"]
    made: dict[str, Any] = {}
    for name, entry in index.items():
        if isinstance(entry, list):
            made[name] = _part(found, name, entry[1], num_layers) if name in (*parts, "scheduler") else None
    pipe = getattr(diffusers, checkpoint.pipeline_class)(**made)
    return LoadedModel(
        checkpoint=checkpoint, pipe=pipe, options=LoadOptions(device="cuda"), digest="fake", revision=None
    )


def _part(found: Published, name: str, kind: str, num_layers: int | None) -> Any:
    import diffusers
    import transformers

    if name == "image_processor":
        return getattr(transformers, kind)()  # its defaults are CLIP's
    if name == "scheduler":
        return getattr(diffusers, kind).from_config(dict(found.files["scheduler/scheduler_config.json"]))
    config = dict(found.config(name))
    if name == "transformer" and num_layers is not None:
        config |= _fewer(config, num_layers)
    if hasattr(transformers, kind):
        settings = transformers.AutoConfig.for_model(**config)
        settings._attn_implementation = "sdpa"  # what from_pretrained chooses where a class has it
        with torch.device("meta"):
            module = getattr(transformers, kind)(settings)
        return on_gpu(module, DTYPE, keep_float32=())
    with torch.device("meta"):
        module = getattr(diffusers, kind).from_config(config)
    dtype = DTYPE if name != "vae" or not is_vae_in_float32(found) else torch.float32
    return on_gpu(module, dtype, keep_float32=module._keep_in_fp32_modules or ())


def is_vae_in_float32(found: Published) -> bool:
    return published_checkpoint(found.name).adapter.vae_dtype == "float32"


def _fewer(config: Mapping[str, Any], num_layers: int) -> dict[str, int]:
    return {name: num_layers for name in ("num_layers", "num_single_layers") if name in config}


def on_gpu(module: nn.Module, dtype: torch.dtype, keep_float32: tuple[str, ...] | list[str]) -> nn.Module:
    """The module with fake tensors on the GPU in the place of its own, of the types that `from_pretrained` gives them.

    Args:
        keep_float32: names of modules and parameters that stay in float32.
    """
    made: dict[int, nn.Parameter] = {}  # tied weights stay one tensor
    for owner_name, owner in module.named_modules():
        for name, own in list(owner._parameters.items()):
            if own is not None and id(own) not in made:
                is_kept = bool({*owner_name.split("."), name} & set(keep_float32))
                kind = (torch.float32 if is_kept else dtype) if own.is_floating_point() else own.dtype
                made[id(own)] = nn.Parameter(torch.empty(own.shape, dtype=kind, device=GPU), requires_grad=False)
            if own is not None:
                owner._parameters[name] = made[id(own)]
        for name, buffer in list(owner._buffers.items()):
            if buffer is not None:
                owner._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype, device=GPU)
    return module.eval()


def num_parameters(model: str, part: str) -> int:
    """The number of parameters of a part of a named checkpoint, all its layers; on no device at all."""
    import diffusers
    import transformers

    found = published(model)
    kind = found.files["model_index.json"][part][1]
    with torch.device("meta"):
        if hasattr(transformers, kind):
            module = getattr(transformers, kind)(transformers.AutoConfig.for_model(**found.config(part)))
        else:
            module = getattr(diffusers, kind).from_config(dict(found.config(part)))
    return sum(parameter.numel() for parameter in module.parameters())
