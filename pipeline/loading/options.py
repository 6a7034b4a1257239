"""How weights are to be loaded: said, and checked, before torch is there."""

from dataclasses import dataclass
from typing import Literal

from cineray.pipeline.request import InputError
from cineray.text import shorten

DTYPE_NAMES = ("float32", "bfloat16", "float16")
Offload = Literal["none", "model", "sequential"]


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadOptions:
    """How the weights sit on the device.

    Args:
        device: "cpu" or "cuda".
        dtype: name in `DTYPE_NAMES`, or "auto": float32 on a CPU, bfloat16 on CUDA. Wan's VAE stays in float32, as its
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
            raise InputError(f"device must be cpu or cuda, got {shorten(str(self.device))}")
        if self.dtype != "auto" and self.dtype not in DTYPE_NAMES:
            raise InputError(f"dtype must be auto or one of {', '.join(DTYPE_NAMES)}, got {shorten(str(self.dtype))}")
        if self.offload not in ("none", "model", "sequential"):
            raise InputError(f"offload must be none, model or sequential, got {shorten(str(self.offload))}")
        if self.offload != "none" and self.device != "cuda":
            raise InputError(f"offload {self.offload} moves weights between CPU and GPU; it needs --device cuda")

    @property
    def dtype_name(self) -> str:
        return ("bfloat16" if self.device == "cuda" else "float32") if self.dtype == "auto" else self.dtype
