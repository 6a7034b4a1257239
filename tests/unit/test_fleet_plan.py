"""Where actors of a run may stand: the plan alone, on GPUs and nodes that exist in numbers."""

from itertools import product

import pytest

from cineray.distributed.layout import Layout, parse_layout
from cineray.jobs.gangs.messages import WorkerLocation
from cineray.jobs.gangs.placement import (
    NodeRoom,
    crossing,
    make_room,
    missing_room,
    num_that_fit,
    plan_fleet,
    wait_reason,
)
from cineray.pipeline.request import InputError


def node(cpus, gpus=0.0, free_cpus=None, free_gpus=None):
    free = {"CPU": cpus if free_cpus is None else free_cpus, "GPU": gpus if free_gpus is None else free_gpus}
    return NodeRoom(total={"CPU": cpus, "GPU": gpus}, free=free)


def plan(gangs, layout, finishers=None, nodes=None, device="cuda", is_one_machine=False):
    layout = Layout(ulysses=layout) if isinstance(layout, int) else parse_layout(layout)
    return plan_fleet(device, layout, gangs, finishers, [node(64, 8)] if nodes is None else nodes, is_one_machine)


class Gpus:
    """The GPUs of one node, of which actors take parts as Ray gives them: a part from one GPU, a whole from free ones.

    Counted in ten thousandths, as Ray does.
    """

    def __init__(self, number, packs):
        self.free = [10_000] * number
        self.packs = packs

    def take(self, amount, among=None):
        """Indices of the GPUs that serve; a part from the fullest GPU that has it (Ray), or from the emptiest."""
        among = range(len(self.free)) if among is None else among
        wanted = round(amount * 10_000)
        count, part = divmod(wanted, 10_000)
        whole = [i for i in among if self.free[i] == 10_000][:count]
        assert len(whole) == count, f"no {amount:g} GPU is left: {self.free}"
        for i in whole:
            self.free[i] = 0
        if not part:
            return whole
        fits = [i for i in among if self.free[i] >= part]
        assert fits, f"no {amount:g} GPU is left: {self.free}"
        chosen = min(fits, key=lambda i: self.free[i] if self.packs else -self.free[i])
        self.free[chosen] -= part
        return [chosen]


@pytest.mark.parametrize("packs", [True, False])
def test_all_that_fits_by_arithmetic_places(packs):
    """Every number of gangs, ranks, guidance halves and finishers on up to 8 GPUs, however Ray shares GPUs out."""
    num_cases = 0
    for num_gpus, gangs, sp, cfg, finishers in product(range(1, 9), range(1, 9), range(1, 9), (1, 2), range(1, 12)):
        layout = Layout(ulysses=sp, cfg=cfg)
        if gangs * layout.world_size > num_gpus:
            continue
        num_cases += 1
        fleet = plan_fleet("cuda", layout, gangs, finishers, [node(64, num_gpus)])
        gpus = Gpus(num_gpus, packs)
        groups = [gpus.take(fleet.group.bundle["GPU"]) for _ in range(gangs)]  # Ray sets whole GPUs aside
        for _ in range(fleet.num_apart):
            gpus.take(fleet.apart.num_gpus)
        # free GPUs are used
        assert fleet.num_apart == min(finishers, num_gpus - gangs * layout.world_size)
        for group in groups:  # of which actors then take parts
            inside = Gpus(num_gpus, packs)
            for _ in range(fleet.group.num_ranks):
                inside.take(fleet.rank.num_gpus, group)
            for _ in range(finishers):  # all of them, should the other gangs be lost
                inside.take(fleet.hosted.num_gpus, group)
            assert all(inside.free[i] >= 0 for i in group)
    assert num_cases > 1000


def test_the_old_plan_would_not_have_passed():
    """Two finishers of a tenth on one GPU leave 0.8 of it, which fits no rank."""
    gpus = Gpus(8, packs=True)
    assert [gpus.take(0.1) for _ in range(2)] == [[0], [0]]
    assert [gpus.take(0.9) for _ in range(7)] == [[i] for i in range(1, 8)]
    with pytest.raises(AssertionError, match=r"no 0\.9 GPU is left"):
        gpus.take(0.9)


def test_finishers_on_processors_have_their_own_where_there_are_enough():
    assert plan(2, 2, 2, [node(6)], "cpu").num_apart == 2
    assert plan(2, 2, 2, [node(5)], "cpu").num_apart == 1
    assert plan(2, 2, 2, [node(4)], "cpu").num_apart == 0
    assert plan(2, 2, 2, [node(4)], "cpu").hosted.bundle == {}  # it shares a rank's
    assert plan(2, 2, 2, [node(3)], "cpu").num_apart == 0  # else it might stand in a gang's way


def test_what_others_use_is_not_free():
    assert plan(1, 4, 1, [node(64, 8, free_gpus=4)]).num_apart == 0
    assert plan(1, 4, 1, [node(64, 8, free_gpus=4.5)]).num_apart == 0
    assert plan(1, 4, 1, [node(64, 8, free_gpus=5)]).num_apart == 1


def test_one_finisher_per_four_gangs_unless_asked_for_more():
    assert [plan(gangs, 1).num_finishers for gangs in (1, 4, 5, 8)] == [1, 1, 2, 2]
    assert plan(1, 1, 3).num_finishers == 3


def test_too_many_finishers_are_refused():
    assert plan(1, 2, 2000).hosted.num_gpus == 1e-4
    with pytest.raises(InputError, match=r"--finishers must be at most 2000 where a node has 2 ranks, got 2001"):
        plan(1, 2, 2001)


@pytest.mark.parametrize(
    ("layout", "gpus", "num_nodes", "ranks_per_node"),
    [
        ("ulysses8", [8, 8], 1, 8),
        ("ring2xulysses8", [8, 8], 2, 8),
        ("cfg2xulysses8", [8, 8, 8], 2, 8),
        ("ring2xulysses4", [4, 4], 2, 4),
        ("ring3xulysses4", [8, 8, 8], 3, 4),  # 2 x 6 would tear ulysses groups
        ("ulysses16", [8, 8], 2, 8),
        ("ring2xulysses8", [], 2, 8),  # none is up: of a usual size
    ],
)
def test_a_gang_larger_than_a_node_takes_whole_groups_of_several(layout, gpus, num_nodes, ranks_per_node):
    fleet = plan(1, layout, nodes=[node(64, number) for number in gpus])
    assert (fleet.group.num_nodes, fleet.group.ranks_per_node) == (num_nodes, ranks_per_node)
    assert fleet.group.bundle == {"CPU": ranks_per_node, "GPU": ranks_per_node}
    nodes_of_ranks = [fleet.group.node_of(rank) for rank in range(fleet.group.num_ranks)]
    assert nodes_of_ranks == sorted(nodes_of_ranks)
    assert len(set(nodes_of_ranks)) == num_nodes


def test_only_ulysses_over_nodes_is_warned_of():
    nodes = [node(64, 8), node(64, 8)]
    assert crossing(parse_layout("ring2xulysses8"), plan(1, "ring2xulysses8", nodes=nodes).group) is None
    said = crossing(parse_layout("ulysses16"), plan(1, "ulysses16", nodes=nodes).group)
    assert said is not None
    assert "--layout ring2xulysses8 sends less" in said


def test_gangs_of_several_nodes_are_counted_by_nodes():
    group = plan(1, "ring2xulysses8", nodes=[node(64, 8), node(64, 8)]).group
    assert num_that_fit(group, [{"CPU": 64, "GPU": 8}] * 3) == 1
    assert num_that_fit(group, [{"CPU": 64, "GPU": 8}] * 4) == 2
    assert num_that_fit(group, [{"CPU": 64, "GPU": 16}]) == 0  # two nodes are asked for
    assert num_that_fit(group, [{"CPU": 64, "GPU": 16}] * 2) == 2


def test_what_no_node_could_hold_is_said_with_what_there_is():
    one = [node(64, 2)]
    assert missing_room(plan(1, 2, nodes=one), one) is None
    said = missing_room(plan(1, 4, nodes=one, is_one_machine=True), one)
    assert said == (
        "no machine has room for a gang of 4 ranks, each of which takes 1 CPU and 0.9 GPU: the largest has 64 CPU and "
        "2 GPU; use a smaller --sp or --layout, or a larger machine"
    )
    said = missing_room(plan(1, "ring2xulysses8", nodes=[node(64, 8)]), [node(64, 8)])
    assert said is not None
    assert "takes 8 CPU and 8 GPU of each of 2 nodes: 1 nodes have so much" in said


def test_a_wait_is_explained_by_what_is_wanted_and_what_is_there():
    nodes = [node(16, 8, 12, 3), node(16, 8, 2, 0)]
    group = plan(1, 4, nodes=nodes).group
    assert wait_reason(group.bundle, 1, nodes, "NO_RESOURCES") == (
        "it takes 4 CPU and 4 GPU of a node; 0 of 2 nodes have so much free, the emptiest has 12 CPU and 3 GPU free of "
        "16 CPU and 8 GPU (Ray: NO_RESOURCES)"
    )
    said = wait_reason({"CPU": 9, "GPU": 9}, 1, nodes, "INFEASIBLE")
    assert said == (
        "it takes 9 CPU and 9 GPU of a node; none of 2 nodes has so much, the largest has 16 CPU and 8 GPU "
        "(Ray: INFEASIBLE)"
    )
    assert "only 1 of 1 nodes could hold it" in wait_reason({"GPU": 8}, 2, nodes[:1], "INFEASIBLE")
    assert "no node is up" in wait_reason({"GPU": 8}, 2, [], "NO_RESOURCES")


def test_finishers_make_room_where_that_is_enough_for_a_gang():
    group = plan(1, 4).group
    apart = {"CPU": 1, "GPU": 1}
    nodes = {"a": node(64, 4, free_gpus=2), "b": node(64, 4, free_gpus=0)}
    assert make_room(group, apart, nodes, {0: "a", 1: "a", 2: "b"}) == (0, 1)
    assert make_room(group, apart, nodes, {0: "a", 2: "b"}) == ()  # 3 of 4
    assert make_room(group, apart, {"a": node(64, 4)}, {0: "a"}) == ()  # it fits without
    assert make_room(group, apart, nodes, {0: "gone"}) == ()


def test_ranks_count_by_node_and_then_by_the_number_of_their_gpu():
    """As text "10" would come before "2", and neighbours in a ring would not be neighbours."""
    places = [WorkerLocation(node_id=n, device=d, pid=0) for n in ("b", "a") for d in ("10", "2", "0", "MIG-1/2")]
    assert [(p.node_id, p.device) for p in sorted(places, key=lambda place: place.order)] == [
        (name, device) for name in ("a", "b") for device in ("0", "2", "10", "MIG-1/2")
    ]
