"""Shards the weights of a transformer's blocks over the ranks that share a clip's tokens (FSDP2, `fully_shard`).

Each rank keeps its part of every block; a block is gathered right before it runs and let go right behind, while the
next one is on its way. What is computed is what whole weights compute, bit for bit. Ranks of one guidance half alone
share weights: the halves may skip different steps, and who gathers a block waits for all that hold a part of it.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

from cineray.distributed.mesh import Axis
from cineray.pipeline.adapters import Models, transformers_in
from cineray.pipeline.loading.unread_blocks import UnreadBlocks


class _Root(nn.Module):
    """The blocks' common root, by which FSDP2 knows that they run one after the other: at most two are whole at once.

    The transformer itself cannot be it: FSDP2 gives a module another class, and models are told by their class.
    """

    def __init__(self, blocks: list[nn.Module]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


def shard_weights(
    transformer: nn.Module, axis: Axis, device: torch.device, models: Models, unread: UnreadBlocks | None = None
) -> None:
    """Leaves this rank its part of the weights of each block; what stands outside the blocks is whole on every rank.

    Args:
        transformer: on the device, or still on the host: then one block at a time goes to the device before it is cut.
        axis: more than one rank; each calls it with the same weights.
        unread: reads the transformer's blocks, where they are not in memory: each is read right before it is cut.

    Raises:
        InputError: a block cannot be read.
        ValueError: a transformer whose blocks are not known.
    """
    kind = type(transformer).__name__
    if kind not in models:
        supported = ", ".join(transformers_in(models.values()))
        raise ValueError(f"shard-weights: {kind} is not supported; supported: {supported}")
    layout = models[kind].layout
    blocks = {
        f"{name}.{number}": block
        for name in layout.all_lists
        for number, block in enumerate(getattr(transformer, name))
    }
    mesh = DeviceMesh.from_group(axis.group, device.type)  # type: ignore[arg-type]  # more than one rank has a group
    for name, block in blocks.items():
        if unread is not None:
            unread.read(name)
        block.requires_grad_(requires_grad=False)  # trainable ones of several types cannot be sharded together
        if layout.called_apart and name == f"{layout.lists[0]}.0":  # gathered by itself where it is called
            fully_shard(block.get_submodule(layout.called_apart), mesh=mesh, reshard_after_forward=True)
        fully_shard(block, mesh=mesh, reshard_after_forward=True)
    transformer.requires_grad_(requires_grad=False)
    root = _Root(list(blocks.values()))
    fully_shard(root, mesh=mesh, reshard_after_forward=True)
    root(torch.zeros((), device=device))  # the first forward makes it the root
    transformer.to(device)
