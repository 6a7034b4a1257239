"""What a rank tells the other ranks, call by call, as its process group is asked for it."""

from __future__ import annotations

from collections.abc import Sequence
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
        num_bytes: of the tensors that this rank hands over or, for a receive, gets.
        dtype: of those tensors.
        peer: the rank of the world that is sent to or received from; None for a collective.
        sent, received: bytes for and from each rank of the group; of an all-to-all alone.
    """

    name: str
    ranks: tuple[int, ...]
    sent_bytes: float
    num_bytes: int
    dtype: str
    peer: int | None = None
    sent: tuple[int, ...] = ()
    received: tuple[int, ...] = ()


# operation -> how often its tensors leave a rank of n
_SHARE = {
    "allreduce_": lambda n: 2 * (n - 1) / n,
    "allgather_": lambda n: n - 1,
    "_allgather_base_": lambda n: n - 1,
    "broadcast_": lambda n: 1 / n,  # the first rank sends it once, on average
    "send": lambda _: 1,
}


def read_exchange(name: str, args: Any) -> Exchange | None:
    """An operation of torch.distributed from its name and arguments; None for one that moves nothing."""
    group = next((a for a in args if isinstance(a, torch.ScriptObject) and "ProcessGroup" in str(a._type())), None)
    if group is None:
        return None
    process_group = dist.ProcessGroup.unbox(group)
    ranks, here = tuple(dist.get_process_group_ranks(process_group)), process_group.rank()
    given = args[1] if name.startswith(("allgather", "_allgather", "alltoall")) else args[0]
    tensors = [t for t in tree_flatten(given)[0] if isinstance(t, torch.Tensor)]
    num_bytes = sum(t.numel() * t.element_size() for t in tensors)
    dtype = str(tensors[0].dtype).removeprefix("torch.") if tensors else ""
    if name == "alltoall_base_":
        received, sent = (
            _shares(tensor, splits, len(ranks)) for tensor, splits in zip(args[:2], args[3:5], strict=True)
        )
        return Exchange(name, ranks, num_bytes - sent[here], num_bytes, dtype, sent=sent, received=received)
    peer = ranks[args[2]] if name in ("send", "recv_") else None
    share = _SHARE[name](len(ranks)) if name in _SHARE else 0
    return Exchange(name, ranks, share * num_bytes, num_bytes, dtype, peer)


def _shares(tensor: torch.Tensor, splits: Sequence[int], num_ranks: int) -> tuple[int, ...]:
    """Bytes of an all-to-all's tensor by rank."""
    row = tensor.element_size() * tensor[:1].numel()
    return tuple(row * n for n in (splits or [tensor.shape[0] // num_ranks] * num_ranks))


def disagreement(logs: Sequence[Sequence[Exchange]]) -> str | None:
    """Where ranks would wait for each other for ever, or mix up what they get; None if they agree.

    Args:
        logs: what each rank of the world did, by rank.
    """
    for group in dict.fromkeys(e.ranks for log in logs for e in log):
        calls = [[e for e in logs[rank] if e.ranks == group and e.peer is None] for rank in group]
        longest = max(calls, key=len)
        for number in range(len(longest)):
            now = [log[number] if number < len(log) else None for log in calls]
            problem = _problem(now)
            if problem is not None:
                return f"exchange {number} of ranks {group}: {problem}"
    return _unpaired(logs)


def _problem(now: Sequence[Exchange | None]) -> str | None:
    """What is wrong with one collective, as its ranks call it."""
    names = [e and f"{e.name} of {e.dtype}" for e in now]
    if len(set(names)) > 1:
        return f"ranks call {names}"
    calls = [e for e in now if e is not None]
    if calls[0].name == "alltoall_base_":
        for i, sender in enumerate(calls):
            for j, receiver in enumerate(calls):
                if sender.sent[j] != receiver.received[i]:
                    return f"{i} sends {sender.sent[j]} bytes to {j}, which expects {receiver.received[i]}"
    elif len({e.num_bytes for e in calls}) > 1:
        return f"{calls[0].name} of {[e.num_bytes for e in calls]} bytes"
    return None


def _unpaired(logs: Sequence[Sequence[Exchange]]) -> str | None:
    for a in range(len(logs)):
        for b in range(len(logs)):
            sent = [e.num_bytes for e in logs[a] if e.name == "send" and e.peer == b]
            received = [e.num_bytes for e in logs[b] if e.name == "recv_" and e.peer == a]
            if sent != received:
                return f"rank {a} sends {len(sent)} times to {b}, which receives {len(received)} times, or other sizes"
    return None
