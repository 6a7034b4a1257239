"""Fewer clips than gangs: which clip goes on in more room, when, and what becomes of it if something goes wrong."""

import math
import random

import pytest
from gang_world import DIED, World
from hypothesis import given, settings
from hypothesis import strategies as st

from cineray.jobs.gangs import events
from cineray.jobs.gangs.members import PLACE_S, GangStage
from cineray.jobs.gangs.state import BatchState
from cineray.jobs.gangs.tail import MIN_GAIN, Standing, grow

SPEEDUPS = {2: 1.9, 4: 3.6, 8: 6.4}


def busy(gang, rest_s, room=1, node="a", step_s=1.0):
    return Standing(gang=gang, room=room, node=node, rest_s=rest_s, step_s=step_s)


def idle(gang, room=1, node="a"):
    return Standing(gang=gang, room=room, node=node)


# ---- the rule


def test_the_longest_rest_goes_first_into_its_fair_share_of_the_room():
    gangs = [busy(0, 100.0), busy(1, 300.0), *(idle(n) for n in range(2, 8))]
    first, second = grow(gangs, SPEEDUPS, start_s=10.0)
    assert (first.gang, first.room, first.num_gangs) == (1, (1, 2, 3, 4), 4)
    assert first.saved_s == pytest.approx(300.0 - (1.0 + 10.0 + 300.0 / 3.6))
    assert (second.gang, second.room) == (0, (0, 5, 6, 7))


def test_a_larger_gang_is_not_worth_its_start_for_a_short_rest():
    gangs = [busy(0, 100.0), idle(1)]
    assert len(grow(gangs, SPEEDUPS, start_s=10.0)) == 1
    assert not grow(gangs, SPEEDUPS, start_s=100 * (1 - 1 / 1.9 - MIN_GAIN))
    assert not grow(gangs, {2: 1.05}, start_s=0.0)


def test_a_clip_whose_steps_are_not_known_yet_waits_and_counts():
    gangs = [busy(0, math.inf, step_s=None), busy(1, 300.0), *(idle(n) for n in range(2, 8))]
    (found,) = grow(gangs, SPEEDUPS, 10.0)
    assert (found.gang, found.num_gangs) == (1, 4)
    assert not grow(gangs[:1] + gangs[2:], SPEEDUPS, 10.0)


def test_room_that_comes_within_a_start_up_is_waited_for():
    """Two clips last, two end soon: each of the two that last shall have four, not two now and four a moment later."""
    lasting, ending = [busy(0, 300.0), busy(1, 300.0)], [busy(2, 5.0), busy(3, 5.0)]
    (first,) = grow([*lasting, *ending, *(idle(n) for n in range(4, 8))], SPEEDUPS, 10.0)
    assert (first.gang, first.num_gangs) == (0, 4)
    coming = busy(0, math.inf, room=4, step_s=None)
    assert not grow([coming, lasting[1], *ending, idle(7)], SPEEDUPS, 10.0)
    (then,) = grow([coming, lasting[1], idle(2), idle(3), idle(7)], SPEEDUPS, 10.0)
    assert then.room == (1, 2, 3, 7)


def test_gangs_that_are_being_built_are_waited_for_too():
    gangs = [busy(0, 300.0), busy(1, 300.0), idle(2), idle(3)]
    assert [growth.num_gangs for growth in grow(gangs, SPEEDUPS, 10.0)] == [2, 2]
    assert not grow(gangs[:3], SPEEDUPS, 10.0, starting=5)


def test_a_larger_gang_stands_on_one_node_if_need_be_another_one():
    apart = [busy(0, 300.0), idle(1, node="b"), idle(2, node="c")]
    assert not grow(apart, SPEEDUPS, 10.0)
    elsewhere = [busy(0, 300.0), idle(1, node="b"), idle(2, node="b")]
    assert grow(elsewhere, SPEEDUPS, 10.0)[0].room == (1, 2)
    here = [busy(0, 300.0), idle(1, node="a"), idle(2, node="b"), idle(3, node="b")]
    assert grow(here, {2: 1.9}, 10.0)[0].room == (0, 1)


def test_a_larger_gang_grows_again_by_what_is_gained_over_its_own_speed():
    gangs = [busy(0, 300.0, room=4), idle(4, room=4)]
    (found,) = grow(gangs, SPEEDUPS, 10.0)
    assert (found.room, found.num_gangs) == ((0, 4), 8)
    assert found.saved_s == pytest.approx(300.0 - (1.0 + 10.0 + 300.0 * 3.6 / 6.4))


@given(
    st.lists(st.tuples(st.sampled_from("ab"), st.sampled_from((None, 5.0, 50.0, 500.0)), st.sampled_from((1, 2, 4)))),
    st.sampled_from((0.0, 20.0)),
)
def test_room_is_never_given_twice_and_always_enough(drawn, start_s):
    gangs = [
        idle(n, room, node) if rest_s is None else busy(n, rest_s, room, node)
        for n, (node, rest_s, room) in enumerate(drawn)
    ]
    all_taken = []
    for found in grow(gangs, SPEEDUPS, start_s):
        taken = [gangs[n] for n in found.room]
        all_taken += found.room
        assert len({gang.node for gang in taken}) == 1
        assert sum(gang.room for gang in taken) >= found.num_gangs
        assert all(gang.is_idle or gang.gang == found.gang for gang in taken)
        assert found.saved_s > MIN_GAIN * gangs[found.gang].rest_s
    assert len(set(all_taken)) == len(all_taken)


# ---- what the state of a run makes of it


def tail(num_gangs=4, num_clips=1, larger=None, hang_s=1e6):
    """Gangs on two nodes, `num_clips` of which have a clip of fifty steps whose tenth is done; no other is left."""
    clips = [events.NewClip(f"c{i}", f"c{i}", "p", (), 50) for i in range(num_clips)]
    here = World(BatchState(num_gangs, 1, hang_s, 10, None, {2: 1.9} if larger is None else larger), clips)
    here.read()
    go_on(here, lambda: len(here.busy) == num_clips and len(here.busy) + len(here.idle) == num_gangs)
    for gang in list(here.busy):
        for _ in range(10):
            here.step(gang)
    return here


def go_on(here, condition):
    """What stands still is started until the condition holds; clips in flight stay there."""
    for _ in range(200):
        if condition():
            return
        for gang in sorted(here.placing):
            here.placing.discard(gang)
            here.starting.add(gang)
            here.tell(events.GangPlaced(gang, frozenset({f"node{gang % 2}"})))
        for gang in sorted(here.starting):
            here.starting.discard(gang)
            here.idle.add(gang)
            here.tell(events.GangReady(gang))
        if 0 in here.loading:
            here.loading.discard(0)
            here.finishing[0], here.encoding[0] = [], []
            here.tell(events.FinisherReady(0))
        while here.encoding.get(0):
            here.tell(events.PromptEncoded(0, here.encoding[0].pop(0)))
    raise AssertionError("it never came to that")


def preempt(here, gang, step=11):
    here.busy.pop(gang)
    here.tell(events.GangEnded(gang, preempted_at=step, is_kept=True))


def test_the_last_clip_goes_on_in_the_room_of_two_gangs():
    here = tail()
    assert here.busy == {0: "c0"}
    here.tell(events.Tick())
    assert here.asked == {0}
    preempt(here, 0)
    assert here.joined == {2: 0}  # on node0, as gang 0
    assert here.busy == {}  # though gangs are idle: it waits for the larger one
    go_on(here, lambda: 0 in here.busy)
    assert here.busy == {0: "c0"}
    assert here.state.clips["c0"].room == 2
    assert here.state.clips["c0"].strikes == []
    here.run_out()
    assert here.ended == {"c0": "done"}
    assert here.state.counts["growths"] == 1
    assert any("goes on with gang-0 in the room of gang-2, too" in line for line in here.said)


def test_no_gang_grows_while_a_clip_waits_or_the_manifest_goes_on():
    here = tail()
    here.state.is_exhausted = False
    here.tell(events.Tick())
    assert not here.asked
    here.state.is_exhausted = True
    here.state._larger = {}
    here.tell(events.Tick())
    assert not here.asked


def test_a_clip_that_ends_before_it_could_be_preempted_is_done_and_nothing_grows():
    here = tail()
    here.tell(events.Tick())
    here.busy.pop(0)
    here.idle.add(0)
    here.tell(events.GangEnded(0))
    assert not here.joined
    here.run_out()
    assert here.ended == {"c0": "done"}


def test_a_gang_whose_room_is_promised_takes_no_clip_and_its_loss_leaves_the_clip_where_it_was():
    here = tail(num_clips=2)  # on gangs 0 and 1
    here.tell(events.Tick())
    asked = min(here.asked)
    promised = here.state._growing[asked].room[1]
    other = 1 - asked
    here.busy.pop(other)
    here.tell(events.GangEnded(other, outcomes=DIED))  # its clip waits again, first
    assert promised not in here.busy
    here.idle.discard(promised)
    here.tell(events.GangEnded(promised, outcomes=DIED))
    preempt(here, asked)
    assert not here.joined
    here.run_out()
    assert set(here.ended.values()) == {"done"}


def test_a_larger_gang_that_is_lost_falls_apart_and_no_gang_grows_again():
    here = tail()
    here.tell(events.Tick())
    preempt(here, 0)
    go_on(here, lambda: 0 in here.busy)
    here.busy.pop(0)
    here.tell(events.GangEnded(0, outcomes=DIED))
    assert not here.joined
    assert {0, 2} <= here.placing
    assert not here.state.is_in_tail
    here.run_out()
    assert here.ended == {"c0": "done"}


def test_a_larger_gang_that_finds_no_place_falls_apart():
    here = tail()
    here.tell(events.Tick())
    preempt(here, 0)
    here.tell(events.Tick(), PLACE_S)
    assert not here.joined
    assert here.busy  # an idle gang has taken it
    assert any("gang-0 finds no place as a larger gang" in line for line in here.said)


def test_a_stop_while_a_gang_is_about_to_grow_ends_the_run():
    here = tail()
    here.tell(events.Tick())
    here.tell(events.StopRequested(15))
    preempt(here, 0)
    assert not here.joined
    assert here.state.is_over


def test_a_stop_while_a_larger_gang_starts_ends_the_run():
    here = tail()
    here.tell(events.Tick())
    preempt(here, 0)
    here.tell(events.StopRequested(15))
    assert here.state.is_over
    assert not here.joined


def test_a_drained_node_takes_a_larger_gang_and_gives_both_back():
    here = tail()
    here.tell(events.Tick())
    preempt(here, 0)
    go_on(here, lambda: 0 in here.busy)
    here.tell(events.NodesDraining(frozenset({"node0"})))
    preempt(here, 0, 20)
    assert not here.joined
    here.run_out()
    assert here.ended == {"c0": "done"}


def test_time_of_a_larger_gang_counts_as_that_of_the_gangs_whose_room_it_has():
    here = tail()
    here.tell(events.Tick())
    preempt(here, 0)
    go_on(here, lambda: 0 in here.busy)
    before = here.state.busy_s, here.state.idle_s
    here.tell(events.Tick(), 5.0)
    assert here.state.busy_s - before[0] == pytest.approx(2 * 5.0)
    assert here.state.idle_s - before[1] == pytest.approx(2 * 5.0)


@settings(max_examples=150)
@given(st.integers(0, 10**6), st.integers(1, 3), st.integers(2, 7), st.sampled_from(({2: 1.9}, {2: 1.9, 3: 2.7, 4: 3})))
def test_every_clip_ends_once_whatever_befalls_gangs_that_grow(seed, num_clips, num_gangs, larger):
    """Begins in the tail, where it is worth it to grow; then anything may happen, in any order."""
    draw = random.Random(seed)
    here = tail(num_gangs, min(num_clips, num_gangs), larger)
    for _ in range(draw.randrange(60)):
        if here.state.is_over:
            break
        here.tell(events.Tick())
        things = here.possible(with_harm=draw.random() < 0.5)
        things[draw.randrange(len(things))]()
    here.run_out()
    assert here.state.aborted is not None or len(here.ended) == len(here.clips)
    assert not any(gang.stage is GangStage.JOINED and gang.is_retired for gang in here.state.gangs)
