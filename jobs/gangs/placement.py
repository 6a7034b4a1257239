"""Where the actors of a run may stand: what each takes, which share a placement group, whether all fit. Numbers only.

A gang's placement group has one bundle for each node that it stands on, of whole GPUs. A rank takes nine tenths of one;
the tenths that are left serve finishers that have no GPU of their own. So no finisher can take from a GPU what a rank
needs: Ray would pack two finishers on one GPU, and 0.8 of it would then fit no rank (ray-project/ray#42683).
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from cineray.distributed.layout import Layout
from cineray.pipeline.request import InputError

GANGS_PER_FINISHER = 4  # unless the user says otherwise
GPU_SHARE_OF_FINISHERS = 0.1  # of a GPU, beside a rank
SMALLEST_SHARE = 1e-4  # of a GPU: what Ray counts in (FixedPoint, src/ray/common/scheduling/fixed_point.h)
GPUS_PER_NODE = 8  # assumed of nodes that an autoscaler has not brought yet: the largest that clouds rent

Amounts = Mapping[str, float]  # by Ray's names: CPU, GPU


@dataclass(frozen=True, kw_only=True, slots=True)
class Resources:
    """What one actor takes of a node."""

    num_cpus: float
    num_gpus: float

    @property
    def bundle(self) -> dict[str, float]:
        return {name: n for name, n in (("CPU", self.num_cpus), ("GPU", self.num_gpus)) if n}


@dataclass(frozen=True, kw_only=True, slots=True)
class NodeRoom:
    """What a node has, and what of it is free."""

    total: Amounts
    free: Amounts


@dataclass(frozen=True, kw_only=True, slots=True)
class GangGroup:
    """The placement group of one gang: a bundle on each of `num_nodes` nodes, no two of them on one."""

    num_nodes: int
    ranks_per_node: int
    bundle: dict[str, float]

    @property
    def num_ranks(self) -> int:
        return self.num_nodes * self.ranks_per_node

    def node_of(self, rank: int) -> int:
        """Index of the bundle that a rank stands in."""
        return rank // self.ranks_per_node


@dataclass(frozen=True, kw_only=True, slots=True)
class Fleet:
    """How many actors, and what each takes.

    Args:
        num_apart: the first so many finishers have a place of their own; the others stand in gangs' groups.
        apart: what a finisher takes that has a place of its own.
        hosted: what it takes of a gang's group.
    """

    num_gangs: int
    num_finishers: int
    num_apart: int
    group: GangGroup
    rank: Resources
    apart: Resources
    hosted: Resources


def group_of_larger(group: GangGroup, num_ranks: int) -> GangGroup:
    """The group of a gang of more ranks in the room of several: on one node, as theirs are."""
    bundle = {name: amount / group.ranks_per_node * num_ranks for name, amount in group.bundle.items()}
    return GangGroup(num_nodes=1, ranks_per_node=num_ranks, bundle=bundle)


def finishers_for(num_gangs: int, asked: int | None = None) -> int:
    """How many finishers so many gangs have: as many as the user says, else one per four."""
    return asked or -(-num_gangs // GANGS_PER_FINISHER)


def plan_fleet(
    device: str,
    layout: Layout,
    num_gangs: int,
    num_finishers: int | None,
    nodes: Sequence[NodeRoom],
    is_one_machine: bool = False,
) -> Fleet:
    """Plans the places of all actors: a CPU for each, with CUDA a GPU per rank, and free ones for finishers.

    Args:
        layout: of one gang.
        num_finishers: None for one per four gangs.
        nodes: that are up now.
        is_one_machine: no other node will come, so that no gang can span several.

    Raises:
        InputError: more finishers than the GPUs can be shared by.
    """
    is_cuda = device == "cuda"
    number = finishers_for(num_gangs, num_finishers)
    apart = Resources(num_cpus=1, num_gpus=1 if is_cuda else 0)
    group = _group(layout, apart.bundle, nodes, is_one_machine)
    return Fleet(
        num_gangs=num_gangs,
        num_finishers=number,
        num_apart=min(number, _num_apart(num_gangs, group, apart.bundle, nodes)),
        group=group,
        rank=Resources(num_cpus=1, num_gpus=1 - GPU_SHARE_OF_FINISHERS if is_cuda else 0),
        apart=apart,
        hosted=Resources(num_cpus=0, num_gpus=_hosted_share(number, group.ranks_per_node) if is_cuda else 0),
    )


def _group(layout: Layout, one: Amounts, nodes: Sequence[NodeRoom], is_one_machine: bool) -> GangGroup:
    """The group of a gang: on one node if the largest is large enough, else evenly on as few as can be.

    Ranks that split the attention heads stay on one node if that can be: what they exchange in each block is more than
    what a ring or the guidance halves do.
    """
    world_size = layout.world_size
    scarce = "GPU" if "GPU" in one else "CPU"
    largest = max((int(node.total.get(scarce, 0)) for node in nodes), default=0)
    if not largest and scarce == "GPU":
        largest = GPUS_PER_NODE
    num_nodes = 1
    if world_size > largest > 0 and not is_one_machine:
        splits = [n for n in range(2, world_size + 1) if world_size % n == 0 and world_size // n <= largest]
        num_nodes = next((n for n in splits if world_size // n % layout.ulysses == 0), splits[0])
    ranks_per_node = world_size // num_nodes
    bundle = {name: amount * ranks_per_node for name, amount in one.items()}
    return GangGroup(num_nodes=num_nodes, ranks_per_node=ranks_per_node, bundle=bundle)


def _num_apart(num_gangs: int, group: GangGroup, apart: Amounts, nodes: Sequence[NodeRoom]) -> int:
    """How many finishers can have a place of their own beside all gangs; none if the gangs alone do not fit now."""
    free = [dict(node.free) for node in nodes]
    room = [_num_fitting(node, group.bundle) for node in free]
    if num_that_fit(group, free) < num_gangs:
        return 0
    for _ in range(num_gangs):  # onto the nodes with most room: so they always fit if they can
        for index in sorted(range(len(free)), key=lambda i: -room[i])[: group.num_nodes]:
            room[index] -= 1
            free[index] = {name: n - group.bundle.get(name, 0) for name, n in free[index].items()}
    return sum(_num_fitting(node, apart) for node in free)


def _num_fitting(free: Amounts, bundle: Amounts) -> int:
    return min(int(free.get(name, 0) / amount + 1e-6) for name, amount in bundle.items())


def num_that_fit(group: GangGroup, free: Iterable[Amounts]) -> int:
    """How many gangs fit side by side on nodes with so much room."""
    room = [_num_fitting(node, group.bundle) for node in free]
    if group.num_nodes == 1:
        return sum(room)
    # m gangs fit where nodes hold n * m bundles, and no node more than one of each gang
    most = sum(room) // group.num_nodes
    return max(m for m in range(most + 1) if sum(min(n, m) for n in room) >= group.num_nodes * m)


def _hosted_share(num_finishers: int, num_gpus: int) -> float:
    """What a finisher takes of a GPU with a rank, so small that all of them fit into one node's part of one gang."""
    per_gpu = -(-num_finishers // num_gpus)
    share = math.floor(GPU_SHARE_OF_FINISHERS / per_gpu / SMALLEST_SHARE + 1e-6) * SMALLEST_SHARE
    if not share:
        most = round(GPU_SHARE_OF_FINISHERS / SMALLEST_SHARE) * num_gpus
        raise InputError(f"--finishers must be at most {most} where a node has {num_gpus} ranks, got {num_finishers}")
    return round(share, 4)


def missing_room(fleet: Fleet, nodes: Sequence[NodeRoom]) -> str | None:
    """Why the nodes that are up could not hold one gang, were they all free; None if they can."""
    group = fleet.group
    if num_that_fit(group, [node.total for node in nodes]):
        return None
    largest = {name: max((float(n.total.get(name, 0)) for n in nodes), default=0.0) for name in group.bundle}
    each = f"{group.num_ranks} ranks, each of which takes {text_of(fleet.rank.bundle)}"
    if group.num_nodes == 1:
        return (
            f"no machine has room for a gang of {each}: the largest has {text_of(largest)}; use a smaller --sp or "
            "--layout, or a larger machine"
        )
    enough = sum(_num_fitting(node.total, group.bundle) > 0 for node in nodes)
    return (
        f"a gang of {each}, takes {text_of(group.bundle)} of each of {group.num_nodes} nodes: {enough} nodes have so "
        "much; use a smaller --layout, or more nodes"
    )


def make_room(
    group: GangGroup, apart: Amounts, nodes: Mapping[str, NodeRoom], places: Mapping[int, str]
) -> tuple[int, ...]:
    """Finishers whose places would be enough for one more gang to fit; none where it fits, or would not even so.

    Args:
        apart: what a finisher with a place of its own takes.
        nodes: by id.
        places: finisher -> id of the node where it has a place of its own.
    """
    free = {name: dict(node.free) for name, node in nodes.items()}
    moved: list[int] = []
    for finisher, node in places.items():
        if num_that_fit(group, free.values()):
            break
        if node in free:
            free[node] = {name: n + apart.get(name, 0) for name, n in free[node].items()}
            moved.append(finisher)
    if not num_that_fit(group, free.values()):
        return ()
    return tuple(moved)


def wait_reason(bundle: Amounts, num_nodes: int, nodes: Sequence[NodeRoom], ray_says: str) -> str:
    """What somebody who waits for a place wants, and what there is, in one line.

    Args:
        bundle: wanted of each of `num_nodes` nodes.
        ray_says: the scheduling state of the placement group.
    """
    wanted = f"{text_of(bundle)} of {'a node' if num_nodes == 1 else f'each of {num_nodes} nodes'}"
    if not nodes:
        return f"it takes {wanted}, and no node is up (Ray: {ray_says})"
    free = sum(_num_fitting(node.free, bundle) > 0 for node in nodes)
    large = sum(_num_fitting(node.total, bundle) > 0 for node in nodes)
    if large < num_nodes:
        there = (
            f"only {large} of {len(nodes)} nodes could hold it" if large else f"none of {len(nodes)} nodes has so much"
        )
        most: Mapping[str, float] = {n: max(float(node.total.get(n, 0)) for node in nodes) for n in bundle}
        return f"it takes {wanted}; {there}, the largest has {text_of(most)} (Ray: {ray_says})"
    best = max(nodes, key=lambda node: min(node.free.get(name, 0) / amount for name, amount in bundle.items()))
    there = f"{free} of {len(nodes)} nodes have so much free, the emptiest has"
    return (
        f"it takes {wanted}; {there} {text_of({n: best.free.get(n, 0) for n in bundle})} free of "
        f"{text_of({n: best.total.get(n, 0) for n in bundle})} (Ray: {ray_says})"
    )


def crossing(layout: Layout, group: GangGroup) -> str | None:
    """A warning where ranks that split the attention heads stand on several nodes; None where they do not."""
    if group.num_nodes == 1 or group.ranks_per_node % layout.ulysses == 0:
        return None
    inner = math.gcd(layout.ulysses, group.ranks_per_node)
    better = replace(layout, ring=layout.ring * layout.ulysses // inner, ulysses=inner).text
    return (
        f"layout {layout.text}: a gang spans {group.num_nodes} nodes, and its ranks exchange attention heads between "
        f"them in each block; --layout {better} sends less over the network"
    )


def text_of(amounts: Amounts) -> str:
    """`4 CPU and 3.6 GPU`."""
    return " and ".join(f"{amount:g} {name}" for name, amount in amounts.items())
