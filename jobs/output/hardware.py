"""What a process rendered on, for sidecars and events. It may change last bits and times, and is no part of a clip."""

import platform
import re
import resource
import socket
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_DRIVER = Path("/proc/driver/nvidia/version")
_CPUS = Path("/proc/cpuinfo")
Hardware = Mapping[str, Any]


def hardware(device: str) -> dict[str, Any]:
    """Names of host and GPU, versions of driver, CUDA and cuDNN, and the most memory of it that was in use.

    On CPUs the processor's name, and the most memory of this process so far.

    Args:
        device: "cpu" or "cuda", of which it is the current one.
    """
    found: dict[str, Any] = {"host": socket.gethostname()}
    if device != "cuda":
        return found | {"cpu": _cpu_name(), "peak_bytes": _peak_rss_bytes()}
    import torch

    return found | {
        "gpu": torch.cuda.get_device_name(),
        "driver": driver_version(),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "peak_bytes": torch.cuda.max_memory_allocated(),
    }


def begin_peak(device: str) -> None:
    """From now on the peak is counted anew; not on CPUs, whose systems do not forget it."""
    if device == "cuda":
        import torch

        torch.cuda.reset_peak_memory_stats()


def summed_up(ranks: Sequence[Hardware]) -> list[dict[str, Any]]:
    """One entry for each kind of place, with how many ranks had it and the highest of their peaks."""
    kinds: dict[tuple[Any, ...], dict[str, Any]] = {}
    for rank in ranks:
        key = tuple(value for name, value in sorted(rank.items()) if name != "peak_bytes")
        kind = kinds.setdefault(key, {**rank, "num_ranks": 0})
        kind["num_ranks"] += 1
        kind["peak_bytes"] = max(kind["peak_bytes"], rank["peak_bytes"])
    return list(kinds.values())


def driver_version(file: Path = _DRIVER) -> str | None:
    """Version of NVIDIA's kernel module, from its line: `NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54`."""
    found = re.search(r"Kernel Module(?: for \S+)?\s+(\d[\d.]*)", _text(file))
    return found[1] if found else None


def _cpu_name(file: Path = _CPUS) -> str:
    found = re.search(r"^model name\s*:\s*(.+)$", _text(file), re.MULTILINE)
    return found[1].strip() if found else platform.processor() or platform.machine()


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _peak_rss_bytes() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
