"""How weights are to be loaded: said, and checked, before torch is there."""

import hashlib
import importlib.util
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from cineray.pipeline.loading.weight_header import read_header, reason_of
from cineray.pipeline.request import InputError
from cineray.text import shorten

DTYPE_NAMES = ("float32", "bfloat16", "float16")
Offload = Literal["none", "model", "sequential", "group"]
Attention = Literal["auto", "native", "flash", "flash3", "cudnn", "sage", "xfuser"]
Quantize = Literal["none", "fp8", "int8"]
EXPERTS = ("high", "low", "both")  # of Wan 2.2, as pairs of LoRAs are named: of high noise and of low noise
TextEncoders = Literal["auto", "gpu", "host"]
HALF_ATTENTION = ("flash", "flash3", "cudnn", "sage")  # of 16-bit values alone: diffusers' attention_dispatch.py
QUANTIZED_ATTENTION = ("sage",)  # kernels that change more than the last bits

# what a kernel needs beside a GPU: the module to import, and the package that brings it
ATTENTION_PACKAGES: Mapping[str, tuple[str, str]] = {
    "flash": ("flash_attn", "flash-attn"),
    "flash3": ("flash_attn_interface", "flash-attn-3 (the hopper folder of the flash-attention repository)"),
    "sage": ("sageattention", "sageattention"),
    "xfuser": ("xfuser", "xfuser"),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Lora:
    """A LoRA file that is fused into the transformer's weights.

    Args:
        expert: "high" or "low" of two experts, of the noisy steps or of the others; "both"; None where there is one.
        path: of a safetensors file.
        scale: that its update is multiplied by.
        digest: of the file's bytes, 16 hex digits.
    """

    path: str
    scale: float
    digest: str
    expert: str | None = None

    @property
    def text(self) -> str:
        """What changes pixels."""
        return f"{self.digest}:{self.scale:g}{f':{self.expert}' if self.expert else ''}"

    @property
    def components(self) -> tuple[str, ...]:
        """The pipeline's transformers that it goes into."""
        return {"low": ("transformer_2",), "both": ("transformer", "transformer_2")}.get(
            self.expert or "", ("transformer",)
        )

    @classmethod
    def parse(cls, text: str) -> "Lora":
        """Reads [high:|low:|both:]PATH[:SCALE].

        Raises:
            InputError: no such file, another kind of file, or a bad scale.
        """
        expert, colon, rest = text.partition(":")
        expert, text = (expert, rest) if colon and expert in EXPERTS else (None, text)
        path, colon, scale = text.rpartition(":")
        if not colon or not re.fullmatch(r"[-+.0-9eE]+", scale):
            path, scale = text, "1"
        try:
            number = float(scale)
        except ValueError:
            number = math.nan
        if not math.isfinite(number) or number == 0 or abs(number) > 10:
            raise InputError(f"--lora {shorten(text, 200)}: the scale must be a number up to 10, not 0, got {scale}")
        if not Path(path).is_file():
            raise InputError(f"--lora {shorten(path, 200)} is not a file; give PATH[:SCALE] of a .safetensors file")
        if Path(path).suffix != ".safetensors":
            raise InputError(f"--lora {shorten(path, 200)} must be a .safetensors file: others may hold programs")
        try:
            with open(path, "rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()[:16]
        except OSError as error:
            raise InputError(f"--lora {shorten(path, 200)} cannot be read: {error.strerror}") from None
        try:
            read_header(Path(path))
        except (OSError, ValueError) as error:
            raise InputError(f"--lora {shorten(path, 200)} is no whole .safetensors file: {reason_of(error)}") from None
        return cls(path=str(Path(path).resolve()), scale=number, digest=digest, expert=expert)


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadOptions:
    """How the weights sit on the device, and what runs on them.

    Args:
        device: "cpu" or "cuda".
        dtype: name in `DTYPE_NAMES`, or "auto": float32 on a CPU, bfloat16 on CUDA.
        vae_dtype: the VAE's, or "auto": what the model's authors decode in.
        offload: "model" keeps one part of the pipeline on the GPU at a time, "sequential" one layer, "group" a few of
            the transformer's layers, the next ones on their way.
        vae_tiling: decode in overlapping tiles; less memory, slightly other pixels.
        attention: its kernel; "auto" the fastest that is installed and gives exact attention.
        quantize: the transformer's linear layers hold their weights in 8 bits.
        compile: the transformer's repeated blocks are compiled (torch.compile); the first step takes a minute.
        lora: fused into the transformer, in order.
        text_encoders: "host": their weights stay in host memory, and each layer is on the GPU only while it runs;
            "gpu": all of them stay there; "auto": in host memory where a finisher shares its GPU with a rank.
        scheduler: class of diffusers in the place of the checkpoint's own, with its settings; "auto": its own.
    """

    device: str = "cpu"
    dtype: str = "auto"
    vae_dtype: str = "auto"
    offload: Offload = "none"
    vae_tiling: bool = False
    attention: Attention = "auto"
    quantize: Quantize = "none"
    compile: bool = False
    lora: tuple[Lora, ...] = ()
    scheduler: str = "auto"
    text_encoders: TextEncoders = "auto"

    def __post_init__(self) -> None:
        _one_of("device", self.device, ("cpu", "cuda"))
        for name, value in (("dtype", self.dtype), ("vae-dtype", self.vae_dtype)):
            if value != "auto" and value not in DTYPE_NAMES:
                raise InputError(f"{name} must be auto or one of {', '.join(DTYPE_NAMES)}, got {shorten(str(value))}")
        _one_of("offload", self.offload, get_args(Offload))
        _one_of("attention", self.attention, get_args(Attention))
        _one_of("quantize", self.quantize, get_args(Quantize))
        if self.offload != "none" and self.device != "cuda":
            raise InputError(f"offload {self.offload} moves weights between CPU and GPU; it needs --device cuda")
        _one_of("text-encoders", self.text_encoders, get_args(TextEncoders))
        if self.text_encoders == "host" and self.device != "cuda":
            raise InputError("text-encoders host keeps weights off a GPU; it needs --device cuda")
        if self.text_encoders == "host" and self.offload != "none":
            raise InputError(f"text-encoders host does not go with offload {self.offload}, which moves them, too")
        if self.attention not in ("auto", "native") and self.device != "cuda":
            raise InputError(f"attention {self.attention} is a kernel of GPUs; it needs --device cuda")
        if self.attention in HALF_ATTENTION and self.dtype_name == "float32":
            raise InputError(
                f"attention {self.attention} takes values of 16 bits; it needs --dtype bfloat16 or float16"
            )
        if self.quantize != "none" and self.offload == "sequential":
            raise InputError(f"quantize {self.quantize} does not go with offload sequential; use group or model")

    @property
    def gang_attention(self) -> Literal["native", "xfuser"]:
        """Who attends across ranks: xfuser, or our own exchange around the kernel."""
        return "xfuser" if self.attention == "xfuser" else "native"

    def encoders_on_host(self, shares_gpu: bool) -> bool:
        """Whether the text encoders stay in host memory and visit the GPU layer by layer.

        Args:
            shares_gpu: who loads them is a finisher on a rank's GPU.
        """
        is_automatic = self.text_encoders == "auto" and self.device == "cuda" and self.offload == "none"
        return self.text_encoders == "host" or (is_automatic and shares_gpu)

    @property
    def dtype_name(self) -> str:
        return ("bfloat16" if self.device == "cuda" else "float32") if self.dtype == "auto" else self.dtype


def check_installed(options: LoadOptions) -> None:
    """Checks that the packages that the options need are there; for the machine that loads.

    Raises:
        InputError: a package is missing, and how to get it.
    """
    needed = [ATTENTION_PACKAGES[options.attention]] if options.attention in ATTENTION_PACKAGES else []
    asked = [f"attention {options.attention}"] * len(needed)
    if options.quantize != "none":
        needed.append(("torchao", "torchao"))
        asked.append(f"quantize {options.quantize}")
    if options.lora:
        needed.append(("peft", "peft"))
        asked.append("--lora")
    for what, (module, package) in zip(asked, needed, strict=True):
        if importlib.util.find_spec(module) is None:
            raise InputError(f"{what} needs {package}, which is not installed; install it, or leave the option out")


def _one_of(name: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        said = f"{', '.join(allowed[:-1])} or {allowed[-1]}"
        raise InputError(f"{name} must be {said}, got {shorten(str(value))}")
