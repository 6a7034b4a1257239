"""Small exchanges over one axis of the mesh: a few numbers, a text, tensors of one shape.

Where the axis has one rank nothing is sent.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

import torch
import torch.distributed as dist

from cineray.distributed.mesh import Axis


def broadcast_numbers(numbers: list[float], axis: Axis, device: torch.device) -> list[float]:
    """What the first rank of the axis gave, on every rank; float64, bit for bit."""
    if axis.group is None:
        return numbers
    sent = torch.tensor(numbers, dtype=torch.float64, device=device)
    dist.broadcast(sent, axis.ranks[0], group=axis.group)
    return sent.tolist()


def gather_tensors(values: torch.Tensor, axis: Axis) -> list[torch.Tensor]:
    """Each rank's tensor, in the order of the axis; all of one shape."""
    if axis.group is None:
        return [values]
    gathered = list(values.new_empty((axis.size, *values.shape)))
    dist.all_gather(gathered, values.contiguous(), group=axis.group)
    return gathered


def gather_numbers(numbers: list[float], axis: Axis, device: torch.device) -> list[list[float]]:
    """Each rank's numbers, in the order of the axis."""
    if axis.group is None:
        return [numbers]
    sent = torch.tensor(numbers, dtype=torch.float64, device=device)
    return [received.tolist() for received in gather_tensors(sent, axis)]


def gather_text(text: str, axis: Axis, device: torch.device) -> list[str]:
    """Each rank's text, in the order of the axis."""
    if axis.group is None:
        return [text]
    raw = text.encode()
    sizes = [int(size) for (size,) in gather_numbers([len(raw)], axis, device)]
    padded = torch.tensor(list(raw.ljust(max(sizes), b" ")), dtype=torch.uint8, device=device)
    parts = gather_tensors(padded, axis)
    return [bytes(part[:size].tolist()).decode() for part, size in zip(parts, sizes, strict=True)]
