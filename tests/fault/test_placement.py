"""Where a real Ray places gangs and finishers: on pretended GPUs, by actors that do nothing, and once in earnest."""

import subprocess
import sys
import threading
import time

import pytest
import ray
from gang_runs import events as events_of
from gang_runs import pixels, render, sidecar, write_manifest
from no_op_gangs import PATIENCE_S, NoOpBatch
from ray.cluster_utils import Cluster
from waiting import wait_for

from cineray.distributed.layout import Layout, parse_layout
from cineray.jobs.gangs import events, handing_out
from cineray.jobs.gangs.cluster import nodes_now
from cineray.jobs.gangs.gang_slot import scheduling_state
from cineray.jobs.gangs.members import GangStage
from cineray.jobs.gangs.placement import NodeRoom
from cineray.jobs.planning.choice import Larger

pytestmark = pytest.mark.ray

NUM_GPUS = 8
STORE_BYTES = 80 * 2**20


@pytest.fixture
def eight_gpus():
    ray.init(
        address="local",
        num_cpus=32,
        num_gpus=NUM_GPUS,
        include_dashboard=False,
        object_store_memory=STORE_BYTES,
    )
    yield
    ray.shutdown()


@pytest.fixture
def nodes():
    """Starts nodes with so many CPUs and GPUs each; the driver is not connected to them."""
    started: list[Cluster] = []

    def start(*nodes: dict[str, int]) -> Cluster:
        first, *others = ({**node, "object_store_memory": STORE_BYTES} for node in nodes)
        cluster = Cluster(initialize_head=True, head_node_args=first | {"include_dashboard": False})
        started.append(cluster)
        for node in others:
            cluster.add_node(**node)
        return cluster

    yield start
    ray.shutdown()
    for cluster in started:
        cluster.shutdown()


def all_are_free():
    (node,) = nodes_now().values()
    return node.free["GPU"] == NUM_GPUS


def wait_until(condition):
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def check_places(batch):
    """Every rank has a GPU of its own; finishers too where there are free ones, else they are with their gangs."""
    gangs = [[place.device for place in places] for places in batch.gang_places()]
    of_ranks = [device for gang in gangs for device in gang]
    assert len(set(of_ranks)) == len(of_ranks) == batch.fleet.num_gangs * batch.fleet.group.num_ranks
    for gang in gangs:
        assert gang == sorted(gang, key=int)
    finishers = [place.device for place in batch.finisher_places()]
    apart, hosted = finishers[: batch.fleet.num_apart], finishers[batch.fleet.num_apart :]
    assert batch.finishers_sharing() == [device in of_ranks for device in finishers]
    assert not set(apart) & set(of_ranks)
    assert len(set(apart)) == len(apart)
    for number, device in enumerate(hosted, batch.fleet.num_apart):
        assert device in gangs[number % batch.fleet.num_gangs]


def place(num_ranks, num_gangs, num_finishers):
    """A layout's world size is all that counts for Ray."""
    wait_until(all_are_free)
    batch = NoOpBatch.begun(Layout(ulysses=num_ranks), num_gangs, num_finishers, list(nodes_now().values()))
    batch.until(batch.all_are_placed)
    check_places(batch)
    assert len(batch.finisher_places()) == num_finishers
    batch.end()


@pytest.mark.usefixtures("eight_gpus")
def test_as_many_gangs_as_there_is_room_for_place_with_their_finishers():
    for num_ranks, num_finishers in ((1, 1), (2, 4), (3, 8)):
        place(num_ranks, NUM_GPUS // num_ranks, num_finishers)


@pytest.mark.exhaustive
@pytest.mark.usefixtures("eight_gpus")
@pytest.mark.parametrize(
    ("num_ranks", "num_gangs"),
    [(ranks, gangs) for ranks in range(1, NUM_GPUS + 1) for gangs in range(1, NUM_GPUS // ranks + 1)],
)
def test_every_number_of_gangs_ranks_and_finishers_places(num_ranks, num_gangs):
    for num_finishers in range(1, NUM_GPUS + 1):
        place(num_ranks, num_gangs, num_finishers)


@pytest.mark.usefixtures("eight_gpus")
def test_a_lost_gang_takes_its_finisher_along_and_both_have_a_place_again():
    batch = NoOpBatch.begun(Layout(ulysses=4), 2, 1, list(nodes_now().values()))
    batch.until(batch.all_are_placed)
    before = {place.pid for place in batch.finisher_places()}
    assert batch.state.finishers[0].gang == 0
    ray.kill(batch.slots.gangs[0]._ranks[3])
    batch.until(lambda: not batch.state.gangs[0].is_placed)
    batch.until(batch.all_are_placed)
    assert not before & {place.pid for place in batch.finisher_places()}
    check_places(batch)
    batch.end()


@pytest.mark.exhaustive
def test_sixteen_ranks_take_two_whole_nodes_and_their_ring_goes_over_nodes(nodes):
    ray.init(address=nodes(*[{"num_cpus": 16, "num_gpus": 8}] * 2, {"num_cpus": 1}).address)
    layout = parse_layout("ring2xulysses8")
    batch = NoOpBatch.begun(layout, 1, 2, list(nodes_now().values()))
    assert batch.fleet.num_apart == 0
    batch.until(batch.all_are_placed)
    (places,) = batch.gang_places()
    for rank, place in enumerate(places):
        first = places[layout.coordinates(rank).ring * 8]
        assert place.node_id == first.node_id  # a ulysses group is of one node
        assert int(place.device) == layout.coordinates(rank).ulysses
    assert len({place.node_id for place in places}) == 2
    assert {place.node_id for place in batch.finisher_places()} <= {place.node_id for place in places}
    batch.end()


@pytest.mark.usefixtures("eight_gpus")
def test_a_larger_gang_stands_in_the_room_of_four_and_its_finisher_with_it():
    larger = [Larger(num_gangs=4, layout=parse_layout("cfg2xulysses4"), speedup=3.5)]
    batch = NoOpBatch.begun(Layout(ulysses=2), 4, 1, list(nodes_now().values()), larger)
    batch.until(batch.all_are_placed)
    batch.until(lambda: all(gang.stage is GangStage.IDLE for gang in batch.state.gangs))
    batch.until(lambda: batch.state.finishers[0].stage == "ready")
    batch.tell(events.PromptEncoded(0, "p"))
    (mover,) = (gang for gang in batch.state.gangs if gang.clip is not None)
    time.sleep(0.1)
    batch.tell(events.StepReached(mover.number, 1), events.Tick())
    batch.tell(events.GangEnded(mover.number, preempted_at=2, is_kept=True))
    assert mover.room == 4
    batch.until(lambda: mover.is_placed and batch.state.finishers[0].stage == "ready")
    (places,) = [found for found in batch.gang_places() if found]
    assert len({place.device for place in places}) == NUM_GPUS
    assert batch.finisher_places()[0].device in {place.device for place in places}
    assert batch.slots.gangs[mover.number].spec.run.layout == parse_layout("cfg2xulysses4")
    batch.end()


@pytest.mark.exhaustive
def test_a_gang_and_its_finisher_that_are_lost_with_their_node_are_not_held_to_account(nodes):
    cluster = nodes({"num_cpus": 1}, {"num_cpus": 4, "num_gpus": 2})
    ray.init(address=cluster.address)
    batch = NoOpBatch.begun(Layout(ulysses=2), 1, 1, list(nodes_now().values()))
    batch.until(batch.all_are_placed)
    (node,) = cluster.worker_nodes
    cluster.remove_node(node, allow_graceful=False)
    batch.until(lambda: not batch.state.gangs[0].is_placed)
    assert batch.state.counts["losses"] == 1
    assert batch.state.gangs[0].num_losses_in_a_row == 0
    batch.end()


@pytest.mark.usefixtures("eight_gpus")
def test_who_waits_for_a_place_is_told_what_is_missing():
    """As the driver says it, of a gang that there is no room for and of one that there never will be."""
    batch = NoOpBatch.begun(Layout(ulysses=5), 2, 1, list(nodes_now().values()))
    assert batch.fleet.num_apart == 0  # no finisher takes what may be a gang's
    batch.until(lambda: batch.state.gangs[0].is_placed)
    wait_until(lambda: scheduling_state(batch.slots.gangs[1].placement) == "NO_RESOURCES")
    batch.end()
    batch = NoOpBatch.begun(Layout(ulysses=9), 1, 1, [NodeRoom(total={"GPU": 16}, free={"GPU": 16})])
    wait_until(lambda: scheduling_state(batch.slots.gangs[0].placement) == "INFEASIBLE")
    batch.end()


def test_a_gang_that_waits_for_its_second_node_says_so_and_renders_the_pixels_of_one_rank(
    nodes, checkpoint_folder, tmp_path, capsys, monkeypatch
):
    model, out = checkpoint_folder("wan"), tmp_path / "two"
    manifest = write_manifest(tmp_path / "m.jsonl", ["a"], 20)
    code, _, said = render(capsys, manifest, tmp_path / "one", model)
    assert code == 0, said
    monkeypatch.setattr(handing_out, "PLACE_S", 2.0)
    cluster = nodes({"num_cpus": 1})

    def bring_a_node():
        """In a process of its own: a node of `Cluster` can be started from the main thread alone."""
        wait_for(lambda: any(event["event"] == "waiting" for event in events_of(out)))
        start = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--address", cluster.address]
        start += ["--num-cpus", "1", "--object-store-memory", str(STORE_BYTES), "--disable-usage-stats"]
        coming.append(subprocess.Popen(start, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL))

    coming: list[subprocess.Popen[bytes]] = []
    bringing = threading.Thread(target=bring_a_node)
    bringing.start()
    code, _, said = render(capsys, manifest, out, model, "--layout", "ulysses2", "--address", cluster.address)
    bringing.join()
    for process in coming:
        process.terminate()
        process.wait()
    assert code == 0, said
    assert "takes 1 CPU of each of 2 nodes: 1 nodes have so much" in said
    waits = [event for event in events_of(out) if event["event"] == "waiting"]
    assert [event["actor"] for event in waits] == ["gang-0"]
    assert waits[0]["reason"].startswith("it takes 1 CPU of each of 2 nodes; only 1 of 1 nodes could hold it")
    assert "gang-0 has waited 2 s for a place: it takes 1 CPU of each of 2 nodes" in said
    (built,) = [event for event in events_of(out) if event["event"] == "built"]
    assert len(built["nodes"]) == 2
    assert "--layout ring2 sends less over the network" in said
    assert pixels(out) == pixels(tmp_path / "one")
    assert sidecar(out, "a")["layout"]["ulysses"] == 2
    (rank,) = sidecar(out, "a")["hardware"]["ranks"]
    assert rank["num_ranks"] == 2
    (denoised,) = [event for event in events_of(out) if event["event"] == "denoised"]
    assert denoised["ranks"] == [rank]
