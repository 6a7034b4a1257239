"""The process groups of one gang. A layout says which ranks; this makes the groups, and takes them down again."""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from cineray.distributed.layout import Coordinates, Layout


@dataclass(frozen=True, kw_only=True, slots=True)
class Axis:
    """The ranks along one axis of the mesh, and where this one stands among them.

    `group` is None where the axis has one rank: then nothing is exchanged.
    """

    size: int
    index: int
    group: dist.ProcessGroup | None
    ranks: tuple[int, ...]  # of the world


@dataclass(slots=True)
class Mesh:
    """The groups that this rank's gang exchanges over; never the whole world.

    Attributes:
        gang: all ranks that render the clip.
        sequence: those that share this branch's tokens (ring x ulysses).
        cfg: one rank of each guidance half.
    """

    layout: Layout
    rank: int
    coordinates: Coordinates
    gang: Axis
    sequence: Axis
    ring: Axis
    ulysses: Axis
    cfg: Axis
    _groups: dict[tuple[int, ...], dist.ProcessGroup] = field(default_factory=dict[tuple[int, ...], dist.ProcessGroup])
    _owns_world: bool = False

    @property
    def is_leader(self) -> bool:
        """Whether this is the gang's first rank."""
        return self.gang.index == 0

    def with_whole_sequences(self) -> "Mesh":
        """The same gang whose ranks hold all tokens of their branch each; it shares this one's groups: close this."""
        alone = _axis_alone(self.rank)
        return replace(self, sequence=alone, ring=alone, ulysses=alone)

    def close(self) -> None:
        """Destroys the groups that were made here and nothing else."""
        if not dist.is_initialized():
            return
        if self._owns_world:
            dist.destroy_process_group()  # with all its subgroups
        else:
            for group in self._groups.values():
                dist.destroy_process_group(group)
        self._groups.clear()


def _axis_alone(rank: int) -> Axis:
    return Axis(size=1, index=0, group=None, ranks=(rank,))


def mesh_alone() -> Mesh:
    """The mesh of one rank, without torch.distributed: nothing is exchanged along its axes."""
    alone, layout = _axis_alone(0), Layout()
    return Mesh(
        layout=layout,
        rank=0,
        coordinates=layout.coordinates(0),
        gang=alone,
        sequence=alone,
        ring=alone,
        ulysses=alone,
        cfg=alone,
    )


def new_mesh(
    layout: Layout,
    rank: int,
    device: torch.device,
    timeout: timedelta,
    init_method: str | None = None,
    store: Any = None,
    *,
    binds_device: bool = True,
) -> Mesh:
    """Makes the groups of the gang in which `rank` stands; all ranks of the world call it together.

    Where torch.distributed is up already (torchrun, a caller of one's own) its world is used and stays; else it is
    brought up here, and `close` takes it down. Gangs that come and go by themselves need a world each.

    Args:
        init_method, store: where the ranks meet, as torch.distributed.init_process_group takes them.
        binds_device: NCCL's world is bound to the device from the beginning, and makes its groups by splitting itself.

    Raises:
        ValueError: the world has another size than the layout, or this process another rank.
    """
    coordinates = layout.coordinates(rank)
    backend = "nccl" if device.type == "cuda" else "gloo"
    owns_world = not dist.is_initialized()
    if owns_world:
        device_id = device if device.type == "cuda" and binds_device else None
        dist.init_process_group(
            backend,
            init_method=init_method,
            store=store,
            rank=rank,
            world_size=layout.world_size,
            timeout=timeout,
            device_id=device_id,
        )
    if (dist.get_world_size(), dist.get_rank()) != (layout.world_size, rank):
        raise ValueError(
            f"layout {layout.text}: torch.distributed is up with rank {dist.get_rank()} of {dist.get_world_size()}, "
            f"this was to be rank {rank} of {layout.world_size}"
        )
    try:
        groups = _new_groups(layout, rank, timeout, backend)
    except BaseException:
        if owns_world:
            dist.destroy_process_group()
        raise

    def axis(name: str) -> Axis:
        ranks = _ranks_along(layout, coordinates, _AXES[name])
        return Axis(size=len(ranks), index=ranks.index(rank), group=groups.get(ranks), ranks=ranks)

    return Mesh(
        layout=layout,
        rank=rank,
        coordinates=coordinates,
        **{name: axis(name) for name in _AXES},
        _groups=groups,
        _owns_world=owns_world,
    )


# axis of the mesh -> degrees of the layout that vary along it
_AXES = {
    "gang": ("cfg", "ring", "ulysses"),
    "sequence": ("ring", "ulysses"),
    "ring": ("ring",),
    "ulysses": ("ulysses",),
    "cfg": ("cfg",),
}


def _ranks_along(layout: Layout, coordinates: Coordinates, degrees: tuple[str, ...]) -> tuple[int, ...]:
    all_coordinates = [coordinates]
    for name in degrees:
        all_coordinates = [replace(c, **{name: i}) for c in all_coordinates for i in range(getattr(layout, name))]
    return tuple(layout.rank_at(c) for c in all_coordinates)


def _new_groups(
    layout: Layout, rank: int, timeout: timedelta, backend: str
) -> dict[tuple[int, ...], dist.ProcessGroup]:
    """This rank's groups, by their ranks.

    Every rank makes every group, in one order, as torch.distributed wants it. Its way around that
    (use_local_synchronization) names a group by its ranks, and a second mesh over the same ranks then meets the
    first one's stale addresses in the store and hangs.
    """
    every_rank = [layout.coordinates(r) for r in range(layout.world_size)]
    wanted = dict.fromkeys(_ranks_along(layout, its, degrees) for degrees in _AXES.values() for its in every_rank)
    made: dict[tuple[int, ...], dist.ProcessGroup] = {}
    for ranks in wanted:
        if len(ranks) > 1:
            group = dist.new_group(list(ranks), timeout=timeout, backend=backend)
            if rank in ranks:
                assert isinstance(group, dist.ProcessGroup)  # else it is of other ranks
                made[ranks] = group
    return made
