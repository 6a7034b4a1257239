"""Whether weights are those that the configuration asks for, and numbers: loaders say it late, or not at all."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cineray.pipeline.adapters import Adapter
from cineray.pipeline.adapters.component import Component
from cineray.pipeline.adapters.protocol import Defaults
from cineray.pipeline.finite import is_finite
from cineray.pipeline.loading.weight_header import TensorHeader, read_headers
from cineray.pipeline.request import ClipRequest
from cineray.text import shorten

# Buffers that older versions saved and newer ones make anew.
_MADE_ANEW = re.compile(r"(?:.*\.)?(?:position_ids|inv_freq)")


def check_names(component: Component, kind: str, folder: Path) -> None:
    """Builds a component without memory for it, and compares its tensors with those in the files.

    Args:
        kind: its class.
        folder: of the component.

    Raises:
        ValueError: tensors are missing, of another shape, or of no use.
    """
    if component.library == "diffusers":
        _check_diffusers(component, kind, folder)
    else:
        _check_transformers(kind, folder)


def _check_diffusers(component: Component, kind: str, folder: Path) -> None:
    model_class = component.class_named(kind)
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of sizes that the comparison is about to refuse
        model = model_class.from_config(model_class.load_config(folder, local_files_only=True))
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    held = read_headers(folder, component.weights or "", prefers_index=True)
    ignored = [re.compile(pattern) for pattern in model_class._keys_to_ignore_on_load_unexpected or ()]
    extra = [name for name in held if name not in wanted and not any(p.search(name) for p in ignored)]
    _refuse_names((name for name in wanted if name not in held), extra, _other_shapes(wanted, held))


def _other_shapes(wanted: Mapping[str, tuple[int, ...]], held: Mapping[str, TensorHeader]) -> list[str]:
    return [name for name, shape in wanted.items() if name in held and held[name].shape != shape]


def _check_transformers(kind: str, folder: Path) -> None:
    """Checks a transformer by its own loader, onto no device: it knows which names are tied, left out or renamed."""
    import transformers

    model, found = getattr(transformers, kind).from_pretrained(
        folder,
        device_map="meta",
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # they are reported, instead of a report on the screen
        use_safetensors=True,
        local_files_only=True,
    )
    # a whole model's checkpoint has parts that the encoder does without; within the encoder nothing is left over
    tops = {name.partition(".")[0] for name in model.state_dict()}
    extra = [n for n in found["unexpected_keys"] if n.partition(".")[0] in tops and not _MADE_ANEW.fullmatch(n)]
    _refuse_names(found["missing_keys"], extra, [str(m[0]) for m in found["mismatched_keys"]])


def _refuse_names(missing: Iterable[str], extra: Iterable[str], misshapen: Iterable[str]) -> None:
    for names, what in (
        (missing, "are missing from the weights"),
        (misshapen, "have another shape in the weights than the configuration says"),
        (extra, "are in the weights and not in the model that the configuration describes"),
    ):
        found = sorted(names)
        if found:
            raise ValueError(f"{len(found)} tensors {what}, such as {shorten(found[0], 120)}")


@torch.no_grad()
def check_finite(modules: Mapping[str, Any]) -> None:
    """Looks at every number: with a NaN in one weight the clips are black.

    Costs one pass over the weights: a gigabyte a second on a busy core.

    Args:
        modules: name -> component; what is not a module, and tensors that are not in memory, are passed over.

    Raises:
        ValueError: a tensor holds something that is not a finite number.
    """
    for part, module in modules.items():
        if not isinstance(module, nn.Module):
            continue
        for name, tensor in (*module.named_parameters(), *module.named_buffers()):
            if tensor.is_floating_point() and not tensor.is_meta and not is_finite(tensor):
                raise ValueError(
                    f"{part}: tensor {shorten(name, 120)} holds values that are not finite as "
                    f"{str(tensor.dtype).removeprefix('torch.')}; such weights render nothing"
                )


def check_vocabulary(tokenizer: Any, text_encoder: Any) -> None:
    """Raises ValueError where a tokenizer gives numbers that the text encoder has no embedding for."""
    largest = max(tokenizer.get_vocab().values(), default=-1)
    rows = text_encoder.get_input_embeddings().num_embeddings
    if not 0 <= largest < rows:
        raise ValueError(f"its tokens go up to {largest}, but the text encoder's vocab_size is {rows}")


def check_scheduler(adapter: Adapter, pipe: Any, defaults: Defaults) -> None:
    """Raises ValueError where the denoising loop could not be driven by the pipeline's scheduler."""
    request = ClipRequest(
        id="trial",
        prompt="",
        width=defaults.width,
        height=defaults.height,
        num_frames=defaults.num_frames,
        num_inference_steps=4,
        guidance_scale=defaults.guidance_scale,
        fps=defaults.fps,
    )
    trial, timesteps = adapter.schedule(pipe, request)
    sigmas = getattr(trial, "sigmas", timesteps)  # DDIM has none
    if len(timesteps) != 4 or not torch.isfinite(timesteps).all() or not torch.isfinite(sigmas).all():
        raise ValueError("its 4 timesteps for 4 steps are not all finite numbers")
