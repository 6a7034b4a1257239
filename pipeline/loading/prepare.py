"""What is done once weights are there: LoRA, quantization, attention, compilation, scheduler, who stays off the GPU."""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from cineray.pipeline.loading.options import ATTENTION_PACKAGES, LoadOptions, Lora

if TYPE_CHECKING:
    from torch import nn

# our names of kernels -> diffusers' (models/attention_dispatch.py, AttentionBackendName)
KERNELS = {"native": "native", "flash": "flash", "flash3": "_flash_3", "cudnn": "_native_cudnn", "sage": "sage"}
HOPPER = (9, 0)  # compute capability: FlashAttention 3 is for it alone


def attention_kernel(options: LoadOptions) -> str:
    """The attention kernel by its name on the command line; "auto" is resolved for this machine's GPU.

    FlashAttention 3 where it is installed on a Hopper GPU, else PyTorch's own choice: they are exact, and differ in the
    last bits. xfuser's kernels are the gang's to use, over PyTorch's here.
    """
    if options.attention != "auto":
        return options.attention
    has_flash3 = importlib.util.find_spec(ATTENTION_PACKAGES["flash3"][0]) is not None
    is_hopper = options.device == "cuda" and torch.cuda.get_device_capability() == HOPPER
    return "flash3" if has_flash3 and is_hopper else "native"


def set_attention(transformer: nn.Module, options: LoadOptions) -> None:
    """Has a transformer's layers attend by the kernel of the options.

    Raises:
        ValueError: the kernel does not run here.
    """
    kernel = attention_kernel(options)
    if kernel in ("native", "xfuser"):
        return  # what diffusers does when nothing is said
    try:
        transformer.set_attention_backend(KERNELS[kernel])  # type: ignore[operator]  # of diffusers' ModelMixin
    except (ImportError, RuntimeError) as error:
        raise ValueError(f"attention {kernel} does not run here: {error}") from error


def order_for_gpus(vae: nn.Module | None) -> None:
    """Stores 3D convolutions' kernels channels-last, which is the order that cuDNN computes in on tensor cores.

    Measured by others, not here: 6 % of Wan 2.2's decode (sgl-project/sglang#18540, a default since #23200), 9 % of
    such convolutions, and 78 % with the cuDNN of torch 2.9 (ModelTC/LightX2V#860). Last bits of pixels may differ.
    """
    for module in vae.modules() if vae is not None else ():
        if isinstance(module, torch.nn.Conv3d):
            module.weight.data = module.weight.data.contiguous(memory_format=torch.channels_last_3d)


def check_loras(pipe: Any, loras: tuple[Lora, ...]) -> None:
    """Adds LoRAs to transformers that hold no weights, so that what does not fit is told before any are read.

    Args:
        pipe: with transformers on the meta device, which are of no use afterwards.

    Raises:
        ValueError: a file that is not a LoRA of its transformer.
    """
    for number, lora in enumerate(loras):
        for component in lora.components:
            with _about(lora):
                _attach(pipe, lora, component, f"lora-{number}")


def fuse_loras(pipe: Any, loras: tuple[Lora, ...]) -> None:
    """Adds LoRA updates to the transformers' weights, one after the other; nothing of peft stays in the model.

    Raises:
        ValueError: a file that is not a LoRA of its transformer.
    """
    for number, lora in enumerate(loras):
        for component in lora.components:
            with _about(lora):
                _attach(pipe, lora, component, f"lora-{number}")
                pipe.fuse_lora(components=[component], lora_scale=lora.scale, adapter_names=[f"lora-{number}"])
                pipe.unload_lora_weights()


def _attach(pipe: Any, lora: Lora, component: str, name: str) -> None:
    path, into = Path(lora.path), {"load_into_transformer_2": True} if component == "transformer_2" else {}
    pipe.load_lora_weights(str(path.parent), weight_name=path.name, adapter_name=name, use_safetensors=True, **into)
    if name not in pipe.get_list_adapters().get(component, ()):
        raise ValueError(f"it has no weights for this {component}")


@contextmanager
def _about(lora: Lora) -> Iterator[None]:
    """Puts the file's name before what is wrong with it, and nothing else on the screen."""
    from diffusers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)  # diffusers prints what it raises, in lines of its own
    try:
        yield
    except Exception as error:  # diffusers, peft and safetensors each raise their own
        said = " ".join(str(error).split()) or type(error).__name__
        if isinstance(error, LookupError):  # their converters look for names without asking
            said = f"it is no whole LoRA in a form that diffusers reads ({type(error).__name__}: {said})"
        raise ValueError(f"--lora {lora.path} does not fit: {said}") from error
    finally:
        logging.set_verbosity(before)


def quantize(transformer: nn.Module, options: LoadOptions, device: torch.device | None = None) -> None:
    """Holds the weights of the blocks' linear layers in 8 bits, by torchao; what stands outside the blocks stays.

    "fp8" stores float8 e4m3, "int8" a signed byte with a scale for each row; both compute in the transformer's type.

    Args:
        device: where each layer goes right before, from the host, so that no more than one is there whole; None: all
            stay where they are.
    """
    if options.quantize == "none":
        return
    from torchao.quantization import (  # type: ignore[import-not-found]  # an extra
        Float8WeightOnlyConfig,
        Int8WeightOnlyConfig,
        quantize_,
    )

    config = Float8WeightOnlyConfig() if options.quantize == "fp8" else Int8WeightOnlyConfig()
    blocks = [module for module in transformer.children() if isinstance(module, torch.nn.ModuleList)]
    for block in blocks:
        quantize_(block, config, device=device)


def compile_blocks(transformer: nn.Module) -> None:
    """Compiles the repeated blocks (regional compilation): one graph serves all of them, and caches run beside it."""
    transformer.compile_repeated_blocks(fullgraph=False)  # type: ignore[operator]  # of diffusers' ModelMixin


def other_scheduler(own: Any, name: str) -> Any:
    """A scheduler of another class with the settings of a pipeline's own.

    Of a model that predicts the flow, what one class calls `flow_shift` the other calls `shift`; one that serves other
    models too is told which this is.
    """
    import diffusers

    kind: Any = getattr(diffusers, name)
    if own.config.get("prediction_type", "flow_prediction") != "flow_prediction":
        return kind.from_config(own.config)
    shift = own.config.get("flow_shift", own.config.get("shift", 1.0))
    if "shift" in inspect.signature(kind).parameters:
        return kind.from_config(own.config, shift=shift)
    return kind.from_config(own.config, flow_shift=shift, prediction_type="flow_prediction", use_flow_sigmas=True)


def keep_encoders_on_host(pipe: Any, names: Collection[str], device: torch.device) -> None:
    """Has the text encoders' weights wait in host memory: each layer goes to the device, runs, and leaves it again.

    What is computed is what encoders on the device compute, bit for bit; a prompt waits for the copies. A rank beside
    them is at its steps meanwhile, so that encoders that came back whole would have to find their room all the same.

    Args:
        names: of the encoders; what of them is not in the pipeline is left out.
        device: where they run; all that is no encoder goes there and stays.
    """
    from accelerate import cpu_offload

    for name, part in pipe.components.items():
        if not isinstance(part, torch.nn.Module):
            continue
        if name in names:
            # as diffusers' enable_sequential_cpu_offload: buffers of a module with weights of its own go with them
            cpu_offload(part, execution_device=device, offload_buffers=bool(part._parameters))
        else:
            part.to(device)


def expert_transformers(pipe: Any, names: tuple[str, ...]) -> list[nn.Module]:
    """The transformers of a pipeline that are in memory."""
    return [part for name in names if (part := getattr(pipe, name, None)) is not None]
