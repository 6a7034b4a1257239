"""What a plan compares: how N cards are shared out among gangs, and how a gang splits a clip."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from cineray.distributed.layout import Layout, fitting_layouts
from cineray.jobs.planning.gpus import Gpu
from cineray.pipeline.adapters import Model
from cineray.pipeline.request import InputError

DECODES = ("finisher", "gang", "tiled")  # whole beside rank 0, by rows on every rank, in tiles (slightly other pixels)
MAX_GPUS = 10_000
GPUS_PER_NODE = 8


@dataclass(frozen=True, slots=True)
class Fleet:
    """The cards at hand.

    Args:
        num_nodes: they stand on, as many on each.
        usd_per_gpu_hour: None where nobody said.
    """

    gpu: Gpu
    num_gpus: int
    num_nodes: int
    usd_per_gpu_hour: float | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.num_gpus <= MAX_GPUS:
            raise InputError(f"--num-gpus must be 1 to {MAX_GPUS}, got {self.num_gpus}")
        if self.num_nodes < 1 or self.num_gpus % self.num_nodes:
            raise InputError(
                f"--nodes must divide the {self.num_gpus} GPUs evenly, got {self.num_nodes}: a gang stands on one node"
            )
        if self.usd_per_gpu_hour is not None and not self.usd_per_gpu_hour >= 0:
            raise InputError(f"--price must be 0 or more, got {self.usd_per_gpu_hour:g}")

    @property
    def gpus_per_node(self) -> int:
        return self.num_gpus // self.num_nodes


def fleet_of(gpu: Gpu, num_gpus: int, num_nodes: int | None, usd_per_gpu_hour: float | None = None) -> Fleet:
    """The fleet; without a number of nodes the fewest that hold eight cards each at most."""
    if num_nodes is None:
        num_nodes = next((n for n in range(1, num_gpus + 1) if num_gpus % n == 0 and num_gpus // n <= GPUS_PER_NODE), 1)
    return Fleet(gpu, num_gpus, num_nodes, usd_per_gpu_hour)


def layouts_of(fleet: Fleet, num_heads: int, num_branches: int) -> Iterator[Layout]:
    """Every layout that leaves no card idle: gangs of each size that divides a node's cards, split in each way.

    Args:
        num_heads: of the model's attention.
        num_branches: calls of the transformer per step.
    """
    for ranks in range(1, fleet.gpus_per_node + 1):
        if fleet.gpus_per_node % ranks == 0:
            for layout in fitting_layouts(ranks, num_heads, num_branches):
                yield replace(layout, gangs=fleet.num_gpus // ranks)


def decodes_of(layout: Layout, model: Model) -> tuple[str, ...]:
    """The ways in which a gang's clips can be decoded."""
    has_rows = layout.ranks_per_gang > 1 and bool(model.row_convolutions)
    return tuple(d for d in DECODES if (d != "gang" or has_rows) and (d != "tiled" or model.can_tile))
