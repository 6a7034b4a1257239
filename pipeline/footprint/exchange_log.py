"""What a rank tells the other ranks, call by call, as its process group is asked for it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._pytree import tree_flatten


@dataclass(frozen=True, slots=True)
class Exchange:
    """One collective, or one send or receive.

    Args:
        name: of the operation.
        ranks: of the world, that take part.
        sent_bytes: from this rank to others; an all-gather counts as a send to each of them.
        num_bytes: of the tensors that this rank hands over.
        dtype: of those tensors.
        peer: the rank of the group that is sent to or received from; None for a collective.
    """

    name: str
    ranks: tuple[int, ...]
    sent_bytes: float
    num_bytes: int
    dtype: str
    peer: int | None = None

    @property
    def as_seen_by_all(self) -> tuple[Any, ...]:
        """What must be equal on every rank that takes part in a collective. Shards differ in size, so bytes are not."""
        return (self.name, self.ranks, self.dtype)


def read_exchange(name: str, args: Any) -> Exchange | None:
    """An operation of torch.distributed from its name and arguments; None for one that moves nothing."""
    group = next((a for a in args if isinstance(a, torch.ScriptObject) and "ProcessGroup" in str(a._type())), None)
    if group is None:
        return None
    process_group = dist.ProcessGroup.unbox(group)
    ranks = tuple(dist.get_process_group_ranks(process_group))
    num_ranks = len(ranks)
    own = [t for t in tree_flatten(args[1] if name.startswith(("allgather", "alltoall")) else args[0])[0]]
    tensors = [t for t in own if isinstance(t, torch.Tensor)]
    num_bytes = sum(t.numel() * t.element_size() for t in tensors)
    share = {
        "allreduce_": 2 * (num_ranks - 1) / num_ranks,
        "allgather_": num_ranks - 1,
        "_allgather_base_": num_ranks - 1,
        "alltoall_base_": (num_ranks - 1) / num_ranks,
        "broadcast_": (num_ranks - 1) / num_ranks,
        "send": 1,
    }.get(name, 0)
    sent = share * num_bytes
    if name == "alltoall_base_":
        sent = _sent_of_all_to_all(args, num_bytes, process_group.rank(), num_ranks)
    peer = next((a for a in args if isinstance(a, int)), None) if name in ("send", "recv_") else None
    dtype = str(tensors[0].dtype).removeprefix("torch.") if tensors else ""
    return Exchange(name=name, ranks=ranks, sent_bytes=sent, num_bytes=num_bytes, dtype=dtype, peer=peer)


def _sent_of_all_to_all(args: Any, num_bytes: int, rank: int, num_ranks: int) -> float:
    """All but what a rank sends itself."""
    splits = [a for a in args if isinstance(a, list | tuple) and all(isinstance(n, int) for n in a)]
    sent = splits[1] if len(splits) > 1 else []
    kept = sent[rank] / sum(sent) if sent and sum(sent) else 1 / num_ranks
    return num_bytes * (1 - kept)
