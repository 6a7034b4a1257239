"""The rules of a batch on gangs, stepped by hand: no processes, no clock, milliseconds."""

from collections import Counter

import pytest
from gang_world import DIED, SHORT, WITH_NODE, World
from hypothesis import given, settings
from hypothesis import strategies as st

from cineray.jobs.gangs import events
from cineray.jobs.gangs.fleet_state import PER_FINISHER
from cineray.jobs.gangs.handing_out import IN_FINISHER
from cineray.jobs.gangs.members import PLACE_S, GangStage
from cineray.jobs.gangs.retry import MAX_FRUITLESS, MAX_LOSSES_IN_A_ROW, MAX_STRIKES, RankOutcome
from cineray.jobs.gangs.state import REPEAT_S, START_S, BatchState

HANG_S = 10.0
NUM_STEPS = 50


def world(num_clips=4, num_gangs=2, num_finishers=1, prompts=1, depth=6, strikes=(), num_apart=None, larger=None):
    clips = [events.NewClip(f"c{i}", f"c{i}", f"p{i % prompts}", strikes, NUM_STEPS) for i in range(num_clips)]
    made = World(BatchState(num_gangs, num_finishers, HANG_S, depth, num_apart, larger), clips)
    made.read()
    return made


def until(world, condition):
    """Lets all go well until the condition holds."""
    for _ in range(1000):
        if condition():
            return
        world.read()
        world.possible(with_harm=False)[0]()
    raise AssertionError("it never came to that")


@settings(max_examples=300)
@given(
    st.data(),
    st.integers(1, 6),
    st.integers(1, 2),
    st.integers(0, 8),
    st.integers(1, 3),
    st.integers(0, 2),
    st.sampled_from(({}, {2: 1.9}, {2: 1.9, 3: 2.7})),
)
def test_no_clip_is_lost_or_ends_twice_whatever_happens(
    data, num_gangs, num_finishers, num_clips, prompts, num_apart, larger
):
    """`World` checks after every event; in the end, every clip has ended or the run has said why not."""
    here = world(num_clips, num_gangs, num_finishers, prompts, num_apart=num_apart, larger=larger)
    for _ in range(data.draw(st.integers(0, 60))):
        if here.state.is_over:
            break
        here.read()
        things = here.possible(with_harm=True)
        things[data.draw(st.integers(0, len(things) - 1))]()
    here.run_out()
    assert here.state.aborted is not None or len(here.ended) == num_clips
    assert {name for name, status in here.records.items() if status != "retrying"} == {
        name for name, status in here.ended.items() if status != "done"
    }


def test_all_goes_well():
    here = world(num_clips=5)
    here.run_out()
    assert set(here.ended.values()) == {"done"}
    assert here.done["AssignClip"] == here.done["FinishClip"] == 5
    assert here.done["EncodePrompt"] == 1  # one prompt, shared


def test_nothing_to_render_starts_nothing():
    here = world(num_clips=0)
    assert here.state.is_over
    assert not here.done


def test_a_clip_whose_gang_dies_is_tried_again_first_and_the_gang_is_built_again():
    here = world()
    until(here, lambda: 0 in here.busy)
    clip = here.busy.pop(0)
    here.tell(events.GangEnded(0, outcomes=DIED))
    assert next(iter(here.state.waiting)) == clip
    assert here.state.clips[clip].strikes == ["gang-0: rank 0 died: killed"]
    assert here.records[clip] == "retrying"
    assert 0 in here.placing
    here.run_out()
    assert here.ended[clip] == "done"


def test_three_lost_attempts_quarantine_the_clip_and_explain_the_gangs_losses():
    here = world(num_gangs=1)
    for _ in range(MAX_STRIKES):
        until(here, lambda: here.busy.get(0) == "c0")
        here.busy.pop(0)
        here.tell(events.GangEnded(0, outcomes=DIED))
    assert here.ended == {"c0": "quarantined"}
    assert not here.state.gangs[0].is_retired
    here.run_out()
    assert here.ended == {"c0": "quarantined", "c1": "done", "c2": "done", "c3": "done"}


def test_strikes_of_an_earlier_run_count():
    here = world(num_gangs=1, num_clips=1, strikes=("gang-0: rank 0 died",) * (MAX_STRIKES - 1))
    until(here, lambda: here.busy.get(0) == "c0")
    here.busy.pop(0)
    here.tell(events.GangEnded(0, outcomes=DIED))
    assert here.ended == {"c0": "quarantined"}


def test_a_gang_that_never_comes_up_is_retired_and_the_run_ends_with_the_reason():
    here = world(num_gangs=1)
    for _ in range(MAX_LOSSES_IN_A_ROW):
        until(here, lambda: 0 in here.starting)
        here.tell(events.GangEnded(0, outcomes=(RankOutcome(kind="raised", reason="no NCCL"),) * 2))
    assert here.state.is_over
    assert here.state.aborted == "every gang was lost several times in a row, at last: no NCCL"
    assert not here.ended


def test_one_retired_gang_of_two_does_not_end_the_run():
    here = world()
    for _ in range(MAX_LOSSES_IN_A_ROW):
        until(here, lambda: 0 in here.starting)
        here.tell(events.GangEnded(0, outcomes=DIED))
    assert here.state.gangs[0].is_retired
    here.run_out()
    assert set(here.ended.values()) == {"done"}


def test_a_clip_at_fault_fails_at_once_and_its_gang_goes_on():
    here = world()
    until(here, lambda: 0 in here.busy)
    clip = here.busy.pop(0)
    here.idle.add(0)
    fault = RankOutcome(kind="raised", reason="no such image", fault="input")
    here.tell(events.GangEnded(0, outcomes=(fault, fault)))
    assert here.ended == {clip: "failed"}
    assert here.done["KillGang"] == 0


def test_a_prompt_that_cannot_be_read_is_encoded_again_and_the_gang_goes_on():
    here = world(num_clips=1, num_gangs=1)
    until(here, lambda: 0 in here.busy)
    here.busy.pop(0)
    here.idle.add(0)
    here.tell(events.PromptMissing(0, "no such file"))
    assert here.done["EncodePrompt"] == 2
    assert here.done["KillGang"] == 0
    here.run_out()
    assert here.ended == {"c0": "done"}


def test_a_step_that_stands_still_costs_the_gang_its_clip():
    here = world()
    until(here, lambda: 0 in here.busy)
    clip = here.busy[0]
    here.tell(events.StepReached(0, 1), HANG_S - 1)
    here.tell(events.Tick(), HANG_S - 1)
    assert here.busy.get(0) == clip  # the step was a sign of life
    here.tell(events.Tick(), 2)
    assert here.state.clips[clip].strikes == [f"gang-0: no sign of progress for {HANG_S:g} s"]
    assert here.state.gangs[0].stage is GangStage.PLACING


def test_nobody_waits_too_long_for_a_place_but_loading_has_an_end():
    here = world()
    here.tell(events.Tick(), 10 * START_S)
    assert here.done["KillGang"] == 0
    until(here, lambda: 0 in here.starting)
    here.tell(events.Tick(), START_S + 1)
    assert here.done["KillGang"] >= 1


def test_a_draining_node_preempts_its_clip_without_a_strike():
    here = world()
    until(here, lambda: 0 in here.busy)
    clip = here.busy[0]
    here.tell(events.NodesDraining(frozenset({"node0"})))
    assert here.asked == {0}
    here.busy.pop(0)
    here.tell(events.GangEnded(0, preempted_at=7, is_kept=True))
    assert next(iter(here.state.waiting)) == clip
    assert here.state.clips[clip].strikes == []
    assert here.state.gangs[0].num_losses_in_a_row == 0


def test_a_gang_that_dies_with_its_draining_node_is_no_strike_either():
    here = world()
    until(here, lambda: 0 in here.busy)
    clip = here.busy[0]
    here.tell(events.NodesDraining(frozenset({"node0"})))
    here.busy.pop(0)
    here.tell(events.GangEnded(0, outcomes=DIED))
    assert here.state.clips[clip].strikes == []


def lose(here, gang, outcomes):
    here.busy.pop(gang)
    here.tell(events.GangEnded(gang, outcomes=outcomes))


def test_a_gang_that_goes_with_its_node_is_no_strike_and_retires_no_slot():
    here = world(num_clips=1, num_gangs=1)
    for step in range(1, 2 * MAX_LOSSES_IN_A_ROW):
        until(here, lambda: 0 in here.busy)
        here.tell(events.StepReached(0, step))  # it gets on between losses
        lose(here, 0, WITH_NODE)
    assert here.state.clips["c0"].strikes == []
    here.run_out()
    assert here.ended == {"c0": "done"}
    assert not here.records


def test_a_clip_whose_nodes_die_before_a_step_more_is_done_is_quarantined_in_the_end():
    here = world(num_clips=1, num_gangs=1)
    for _ in range(MAX_FRUITLESS + MAX_STRIKES):
        assert not here.ended
        until(here, lambda: 0 in here.busy)
        here.tell(events.StepReached(0, 7))
        lose(here, 0, WITH_NODE)
    assert here.ended == {"c0": "quarantined"}


def test_a_finisher_that_goes_with_its_node_is_no_strike_either():
    here = world(num_clips=2)
    for _ in range(2 * MAX_LOSSES_IN_A_ROW):
        until(here, lambda: bool(here.finishing.get(0)))
        here.tell(events.FinisherLost(0, "its node has died", is_node_gone=True))
    here.run_out()
    assert set(here.ended.values()) == {"done"}
    assert not here.records


def test_a_clip_that_was_lost_on_a_node_goes_to_another_and_loses_one_strike_to_each():
    here = world(num_clips=4, num_gangs=3)  # gangs 0 and 2 stand on node0, gang 1 on node1
    until(here, lambda: len(here.busy) == 3)
    clip = here.busy[0]
    lose(here, 0, DIED)
    here.busy.pop(2)
    here.idle.add(2)
    here.tell(events.GangEnded(2))
    assert here.busy[2] != clip  # though it waits before all others
    here.busy.pop(1)
    here.idle.add(1)
    here.tell(events.GangEnded(1))
    assert here.busy[1] == clip
    here.run_out()
    assert here.ended[clip] == "done"


def test_a_second_loss_on_one_node_is_no_strike_while_there_are_others():
    here = world(num_clips=8, num_gangs=3, depth=10)
    until(here, lambda: len(here.busy) == 3)
    clip = here.busy[0]
    here.state.clips[clip].struck_on = frozenset({"node0"})  # it came back where nobody else was there
    lose(here, 0, DIED)
    assert here.state.clips[clip].strikes == []
    alone = world(num_clips=1, num_gangs=1)
    until(alone, lambda: 0 in alone.busy)
    alone.state.clips["c0"].struck_on = frozenset({"node0"})
    lose(alone, 0, DIED)
    assert len(alone.state.clips["c0"].strikes) == 1


def test_a_clip_that_was_lost_on_one_node_and_does_not_fit_on_the_other_is_still_tried():
    here = world(num_clips=1, num_gangs=3)  # gangs 0 and 2 stand on node0, gang 1 on node1
    until(here, lambda: len(here.idle) == 2 and 0 in here.busy)
    lose(here, 0, DIED)
    assert here.busy == {1: "c0"}
    here.busy.pop(1)
    here.idle.add(1)
    here.tell(events.GangEnded(1, outcomes=(SHORT,)))
    here.run_out()
    assert here.ended == {"c0": "done"}


def test_a_node_that_hangs_loses_its_gangs_and_quarantines_no_clip():
    here = world(num_clips=30, num_gangs=4, depth=10)
    for _ in range(10_000):
        here.read()
        if here.state.is_over:
            break
        on_it = [gang for gang in here.busy if gang % 2 == 0]
        if on_it:
            lose(here, on_it[0], DIED)
        else:
            here.possible(with_harm=False)[0]()
    assert set(here.ended.values()) == {"done"}
    assert [gang.is_retired for gang in here.state.gangs] == [True, False, True, False]


def test_a_stop_preempts_what_is_denoised_ends_what_is_decoded_and_starts_nothing():
    here = world(num_clips=8)
    until(here, lambda: here.finishing.get(0) and 0 in here.busy)
    finishing = here.finishing[0][0]
    assigned = here.done["AssignClip"]
    here.tell(events.StopRequested(15))
    assert here.asked == set(here.busy)
    assert not here.state.is_over
    here.run_out()
    assert here.ended[finishing] == "done"
    assert here.done["AssignClip"] == assigned
    assert here.state.num_wanted == 0


def test_gangs_wait_when_finishers_are_behind():
    here = world(num_clips=9, depth=20)
    until(here, lambda: len(here.busy) == 2 and 0 in here.finishing)
    while here.busy:
        gang = min(here.busy)
        here.busy.pop(gang)
        here.idle.add(gang)
        here.tell(events.GangEnded(gang))
    assert len(here.finishing[0]) == IN_FINISHER
    assert len(here.finishing[0]) + len(here.state.denoised) >= PER_FINISHER
    here.run_out()
    assert set(here.ended.values()) == {"done"}


def test_a_lost_finisher_costs_one_strike_and_its_clips_are_decoded_by_the_next():
    here = world(num_clips=6, depth=10)
    until(here, lambda: len(here.finishing.get(0, ())) == 2)
    first, second = here.finishing[0]
    here.tell(events.FinisherLost(0, "killed"))
    assert here.state.clips[first].strikes == ["finisher-0: killed"]
    assert here.state.clips[second].strikes == []
    assert list(here.state.denoised)[:2] == [first, second]
    here.run_out()
    assert set(here.ended.values()) == {"done"}


def test_a_decode_that_stands_still_costs_the_finisher():
    here = world()
    until(here, lambda: bool(here.finishing.get(0)))
    here.tell(events.Tick(), 5 * HANG_S)
    assert 0 in here.loading


def test_clips_of_a_prompt_that_two_finishers_cannot_encode_fail_together():
    here = world(num_clips=4, prompts=2, num_finishers=2)
    until(here, lambda: bool(here.encoding.get(0)) and 1 in here.encoding)
    key = here.encoding[0].pop(0)
    here.tell(events.PromptFailed(0, key, "KeyError: 7"))
    assert not here.ended
    assert key in here.encoding[1]  # another one tries
    here.encoding[1].remove(key)
    here.tell(events.PromptFailed(1, key, "KeyError: 7"))
    assert sorted(here.ended.values()) == ["failed", "failed"]
    here.run_out()
    assert sorted(here.ended.values()) == ["done", "done", "failed", "failed"]


def test_a_prompt_that_one_finisher_could_not_encode_costs_no_clip():
    here = world(num_clips=2)
    until(here, lambda: bool(here.encoding.get(0)))
    here.tell(events.PromptFailed(0, here.encoding[0].pop(0), "KeyError: 7"))
    here.run_out()
    assert set(here.ended.values()) == {"done"}
    assert here.records == {}


def test_a_prompt_that_memory_is_too_short_for_is_nobodys_fault():
    here = world(num_clips=2)
    for _ in range(MAX_STRIKES):
        until(here, lambda: bool(here.encoding.get(0)))
        here.tell(events.PromptFailed(0, here.encoding[0].pop(0), SHORT.reason, "memory"))
    assert set(here.ended.values()) == {"quarantined"}


def test_a_clip_that_a_gang_has_no_memory_for_goes_to_another_and_is_never_bad_input():
    here = world(num_clips=2)
    until(here, lambda: here.busy.get(0) == "c0" and 1 in here.busy)
    here.busy.pop(0)
    here.idle.add(0)
    here.tell(events.GangEnded(0, outcomes=(SHORT,)))
    assert here.done["KillGang"] == 0  # a rank alone has emptied its memory
    assert 0 in here.idle  # though the clip waits: it goes to the other gang
    assert list(here.state.waiting) == ["c0"]
    here.busy.pop(1)
    here.idle.add(1)
    here.tell(events.GangEnded(1))
    assert here.busy == {1: "c0"}
    here.run_out()
    assert here.ended == {"c0": "done", "c1": "done"}


def test_the_peers_of_a_rank_without_memory_are_built_again():
    here = world(num_clips=1, num_gangs=1)
    until(here, lambda: 0 in here.busy)
    here.busy.pop(0)
    here.tell(events.GangEnded(0, outcomes=(RankOutcome(kind="silent"), SHORT)))
    assert here.done["KillGang"] == 1
    assert here.state.clips["c0"].strikes == [f"gang-0: {SHORT.reason}"]


def test_after_two_shortages_alike_it_is_said_that_the_clip_does_not_fit():
    here = world(num_clips=1, num_gangs=1)
    for _ in range(MAX_STRIKES):
        until(here, lambda: 0 in here.busy)
        here.busy.pop(0)
        here.idle.add(0)
        here.tell(events.GangEnded(0, outcomes=(SHORT,)))
    assert here.ended == {"c0": "quarantined"}
    assert "c0: will try again (1 strikes): gang-0: out of memory: needs 5 GiB, has 1 GiB" in here.said
    assert "the clip does not fit: out of memory: needs 5 GiB, has 1 GiB" in here.said[-1]
    assert not here.state.gangs[0].is_retired


def test_a_shortage_on_a_gang_says_nothing_of_one_on_a_finisher():
    here = world(num_clips=1, num_gangs=1)
    until(here, lambda: 0 in here.busy)
    here.busy.pop(0)
    here.idle.add(0)
    here.tell(events.GangEnded(0, outcomes=(SHORT,)))
    until(here, lambda: bool(here.finishing.get(0)))
    here.tell(events.VideoFailed(0, here.finishing[0].pop(0), SHORT.reason, "memory"))
    assert sum("will try again" in said for said in here.said) == 2
    assert not any("does not fit" in said for said in here.said)


def test_a_finisher_without_memory_puts_the_clip_back_for_another():
    here = world(num_clips=4, num_finishers=2, depth=8)
    until(here, lambda: bool(here.finishing.get(0)) and 1 in here.finishing)
    name = here.finishing[0].pop(0)
    here.tell(events.VideoFailed(0, name, SHORT.reason, "memory"))
    assert name in here.finishing[1]
    here.run_out()
    assert set(here.ended.values()) == {"done"}


def test_finishers_without_a_place_of_their_own_wait_for_gangs_and_share_them_evenly():
    here = world(num_gangs=2, num_finishers=2, num_apart=0)
    assert not here.loading
    here.placing.discard(1)
    here.starting.add(1)
    here.tell(events.GangPlaced(1, frozenset({"node1"})))
    assert here.stands_with == {1: 1}  # finisher-0 waits for its own gang, for a while
    here.placing.discard(0)
    here.starting.add(0)
    here.tell(events.GangPlaced(0, frozenset({"node0"})))
    assert here.stands_with == {0: 0, 1: 1}
    here.run_out()
    assert set(here.ended.values()) == {"done"}


def test_a_finisher_whose_gang_finds_no_place_stands_with_another():
    here = world(num_gangs=2, num_finishers=1, num_apart=0)
    here.placing.discard(1)
    here.starting.add(1)
    here.tell(events.GangPlaced(1, frozenset({"node1"})))
    assert not here.loading
    here.tell(events.Tick(), PLACE_S)
    assert here.stands_with == {0: 1}


def test_a_lost_gang_takes_its_finisher_along_and_both_are_built_again():
    here = world(num_clips=6, num_gangs=1, num_apart=0, depth=10)
    until(here, lambda: len(here.finishing.get(0, ())) == 2)
    first, second = here.finishing[0]
    if 0 not in here.busy:
        until(here, lambda: 0 in here.busy)
    here.busy.pop(0)
    here.tell(events.GangEnded(0, outcomes=DIED))
    assert not here.stands_with
    assert list(here.state.denoised)[:2] == [first, second]
    assert here.state.clips[first].strikes == []  # the gang's end was not its fault
    assert here.state.finishers[0].num_losses_in_a_row == 0
    here.placing.discard(0)
    here.starting.add(0)
    here.tell(events.GangPlaced(0, frozenset({"node0"})))
    assert here.stands_with == {0: 0}
    here.run_out()
    assert set(here.ended.values()) == {"done"}


def test_a_decode_that_takes_its_gang_along_each_time_is_quarantined_in_the_end():
    here = world(num_clips=1, num_gangs=1, num_apart=0)
    for _ in range(3 * MAX_STRIKES):
        until(here, lambda: bool(here.ended) or bool(here.finishing.get(0)) or here.state.is_over)
        if here.ended or here.state.is_over:
            break
        here.idle.discard(0)
        here.state.gangs[0].num_losses_in_a_row = 0  # other clips are done between
        here.tell(events.GangEnded(0, outcomes=DIED))
    assert here.ended == {"c0": "quarantined"}


def test_a_stop_lets_a_finisher_end_its_clip_that_stands_with_an_idle_gang():
    here = world(num_clips=1, num_gangs=1, num_apart=0)
    until(here, lambda: bool(here.finishing.get(0)))
    here.tell(events.StopRequested(15))
    assert here.finishing[0]
    assert not here.state.is_over
    here.run_out()
    assert here.ended == {"c0": "done"}


def test_a_gang_that_must_go_waits_for_the_clip_of_its_finisher_and_gives_it_no_other():
    here = world(num_clips=6, num_gangs=1, num_apart=0, depth=10)
    until(here, lambda: bool(here.finishing.get(0)) and 0 in here.busy)
    num_finishing = len(here.finishing[0])
    here.tell(events.NodesDraining(frozenset({"node0"})))
    here.busy.pop(0)
    here.idle.add(0)  # its ranks are there, and told to stop
    here.tell(events.GangEnded(0, preempted_at=3, is_kept=True))
    assert here.done["KillGang"] == 0
    assert len(here.finishing[0]) == num_finishing
    while here.finishing.get(0):
        here.tell(events.VideoCommitted(0, here.finishing[0].pop(0)))
    assert here.done["KillGang"] == 1
    here.run_out()
    assert set(here.ended.values()) == {"done"}


def test_a_prompt_that_a_finisher_encodes_on_a_node_that_goes_is_not_given_to_another():
    here = world(num_clips=1, num_gangs=2, num_finishers=2, num_apart=0)
    until(here, lambda: any(here.encoding.values()) and len(here.encoding) == 2)
    (finisher,) = (number for number, keys in here.encoding.items() if keys)
    here.tell(events.NodesDraining(here.state.gangs[here.stands_with[finisher]].nodes))
    assert here.done["EncodePrompt"] == 1
    here.run_out()
    assert here.ended == {"c0": "done"}


def test_who_waits_for_a_place_is_told_of_once_and_again_after_minutes():
    here = world(num_gangs=1)
    here.tell(events.Tick(), PLACE_S - 1)
    assert here.done["ExplainWait"] == 0
    for _ in range(10):
        here.tell(events.Tick(), 1.0)
    assert here.done["ExplainWait"] == 1
    here.tell(events.Tick(), REPEAT_S)
    assert here.done["ExplainWait"] == 2


def test_a_finisher_that_finds_no_place_of_its_own_or_is_in_the_way_stands_with_a_gang():
    here = world(num_gangs=1)
    until(here, lambda: 0 in here.starting)
    here.tell(events.Tick(), PLACE_S)
    assert here.stands_with == {0: 0}
    here = world(num_gangs=1)
    until(here, lambda: bool(here.finishing.get(0)))
    here.tell(events.FinishersInTheWay((0,)))
    assert here.stands_with == {0: 0}
    here.run_out()
    assert set(here.ended.values()) == {"done"}


def test_a_finisher_that_never_ends_loading_or_encoding_is_lost():
    here = world(num_gangs=1)
    here.tell(events.FinisherPlaced(0))
    here.tell(events.Tick(), START_S + 1)
    assert here.done["KillFinisher"] == 1
    until(here, lambda: bool(here.encoding.get(0)))
    here.tell(events.Tick(), 4 * HANG_S + 1)
    assert here.done["KillFinisher"] == 2


def test_time_is_counted_where_gangs_could_have_worked():
    here = world(num_clips=1, num_gangs=1)
    until(here, lambda: 0 in here.busy)
    before = here.state.busy_s
    here.tell(events.Tick(), 5.0)
    assert here.state.busy_s - before == pytest.approx(5.0)
    assert here.state.could_be_busy_s >= here.state.busy_s


def test_a_run_can_be_replayed_from_its_events():
    """The same events at the same times give the same effects."""
    here = world(num_clips=4)
    log = []
    handle = here.state.handle
    here.state.handle = lambda event, now_s: (log.append((event, now_s)), handle(event, now_s))[1]
    here.run_out()
    again = BatchState(2, 1, HANG_S, 6)
    read = events.ClipsRead(tuple(here.clips), is_last=True)
    replayed = [effect for event, now_s in [(read, 0.1), *log] for effect in again.handle(event, now_s)]
    assert again.is_over
    assert Counter(type(effect).__name__ for effect in replayed) == here.done
