"""What this machine can compute on, asked with and without PyTorch in this process."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

from cineray.pipeline.loading.errors import LoadingError


def default_device() -> str:
    """ "cuda" where PyTorch sees a GPU, else "cpu"."""
    return "cuda" if sees_cuda() else "cpu"


def check_device(device: str) -> None:
    """Raises LoadingError, an InputError, where this machine has no such device."""
    if device == "cuda" and not sees_cuda():
        raise LoadingError("device cuda: this PyTorch sees no CUDA GPU; use --device cpu, or install a CUDA build")


def sees_cuda() -> bool:
    """Whether PyTorch sees a GPU.

    A process that has not imported it asks another one, unless its version says that it was built for CPUs alone:
    a driver on Ray does without PyTorch, which takes seconds and hundreds of megabytes.
    """
    if "torch" not in sys.modules:
        if _is_for_cpus_alone():
            return False
        ask = "import sys, torch; sys.exit(not torch.cuda.is_available())"
        return subprocess.run([sys.executable, "-c", ask], capture_output=True, check=False).returncode == 0
    import torch

    return torch.cuda.is_available()


def cuda_devices() -> list[str]:
    """Names of the GPUs that PyTorch sees; asked of another process where this one has not imported it."""
    if "torch" not in sys.modules:
        if _is_for_cpus_alone():
            return []
        ask = "import torch; [print(torch.cuda.get_device_name(n)) for n in range(torch.cuda.device_count())]"
        asked = subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True, check=False)
        return asked.stdout.splitlines() if asked.returncode == 0 else []
    import torch

    return [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]


def gpu_memory_bytes() -> tuple[int, ...]:
    """Memory of each GPU that PyTorch sees, as its driver reports it; none without GPUs.

    As `sees_cuda`, a process that has not imported PyTorch asks another one.
    """
    if "torch" in sys.modules:
        import torch

        return tuple(torch.cuda.get_device_properties(n).total_memory for n in range(torch.cuda.device_count()))
    if _is_for_cpus_alone():
        return ()
    ask = (
        "from torch import cuda; "
        "print(*(cuda.get_device_properties(n).total_memory for n in range(cuda.device_count())))"
    )
    said = subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True, check=False).stdout
    return tuple(int(number) for number in said.split() if number.isdecimal())


def _is_for_cpus_alone() -> bool:
    """Whether torch/version.py says so: `cuda` and `hip` are None there."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return False
    try:
        text = Path(spec.origin).with_name("version.py").read_text(encoding="utf-8")
    except OSError:
        return False
    found = dict(re.findall(r"^(cuda|hip)\b[^=\n]*= *(\S+)", text, re.MULTILINE))
    return found == {"cuda": "None", "hip": "None"}
