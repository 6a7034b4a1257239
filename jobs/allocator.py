"""How a process's memory on a GPU is handed out."""

import os
from collections.abc import MutableMapping

_ALLOCATOR = {"PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF"}


def grow_segments(environment: MutableMapping[str, str] = os.environ) -> None:
    """Lets PyTorch's memory on a GPU grow in place, so that less of it is lost between blocks.

    To be called before torch is imported; what the user has set stays. Clips of several sizes and stages leave holes
    else, and a rank and a finisher may share a GPU, and neither can use what the other has cached
    (docs.pytorch.org/docs/stable/notes/cuda.html, expandable_segments).
    """
    if not _ALLOCATOR.intersection(environment):
        environment["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"
