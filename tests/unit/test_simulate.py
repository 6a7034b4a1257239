"""A batch in simulated time: the run's own rules, on a cluster that exists in numbers alone."""

import math
import os
import subprocess
import sys
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cineray.jobs.gangs.fleet_state import PER_FINISHER
from cineray.jobs.gangs.handing_out import IN_FINISHER
from cineray.jobs.gangs.retry import MAX_STRIKES
from cineray.jobs.gangs.state import START_S, clips_ahead
from cineray.jobs.simulate.assumptions import Assumptions, ClipSeconds, PlannedClip, RankDeath
from cineray.jobs.simulate.attempt import Attempt, steps_per_save
from cineray.jobs.simulate.clips import equal_clips
from cineray.jobs.simulate.ledger import HOUR_S, Use
from cineray.jobs.simulate.world import TICK_S, SimulatedBatch
from cineray.pipeline.request import InputError

TEN_STEPS = ClipSeconds(num_steps=10, step_s=10.0)
ONE_GPU = Assumptions(num_gpus=1, gpus_per_node=1, save_s=0.0, seen_s=0.0)


def simulated(assumed, num_clips=1, seconds=TEN_STEPS, deaths=()):
    return SimulatedBatch(assumed, equal_clips(num_clips, seconds), deaths).run()


def gpu_s(found, use):
    return found.gpu_hours[use] * HOUR_S


# ---- one attempt


@st.composite
def attempts(draw):
    times = st.sampled_from((0.25, 0.5, 1.0, 3.0, 7.0))
    return Attempt(
        num_steps=draw(st.integers(1, 12)),
        begin_s=draw(st.sampled_from((0.0, 2.0))),
        step_s=draw(times),
        save_s=draw(st.sampled_from((0.0, 0.25, 2.0))),
        steps_per_save=draw(st.integers(1, 15)),
    )


@settings(max_examples=300)
@given(attempts(), st.integers(0, 400))
def test_an_attempt_in_closed_form_is_its_steps_one_by_one(attempt, quarters):
    """Quarters of seconds are exact in floating point."""
    after_s, now_s, done, saved = quarters / 4, attempt.begin_s, 0, 0
    for step in range(1, attempt.num_steps + 1):
        now_s += attempt.step_s
        assert attempt.step_ends_s(step) == now_s
        done = step if now_s <= after_s else done
        if step % attempt.steps_per_save == 0 and step < attempt.num_steps:
            now_s += attempt.save_s
            saved = step if now_s <= after_s else saved
    assert attempt.total_s == now_s
    assert attempt.num_done(after_s) == done
    assert attempt.num_saved(after_s) == saved


@pytest.mark.parametrize(("every_s", "steps"), [(0, 1), (10, 1), (10.1, 2), (30, 3), (math.inf, 2**31)])
def test_a_state_is_saved_behind_the_first_step_that_is_late_enough(every_s, steps):
    assert steps_per_save(10.0, every_s) == steps


# ---- whole batches, by hand


def test_a_batch_without_trouble_takes_what_its_stages_take():
    """Prompts are ready at 5, 7, 9, 11 s, gangs at 10; both decode one after the other what both end at 210 s."""
    assumed = Assumptions(num_gpus=2, start_s=10.0, finisher_start_s=3.0, save_s=0.0)
    found = simulated(assumed, 4, replace(TEN_STEPS, encode_s=2.0, finish_s=5.0))
    assert found.ended == {"done": 4}
    assert found.makespan_s == 220.0
    assert gpu_s(found, Use.COMPUTING) == pytest.approx(400.0)
    assert gpu_s(found, Use.STARTING) == pytest.approx(20.0)
    assert gpu_s(found, Use.TAIL) == pytest.approx(20.0)
    assert found.per_hour == (4,)


def test_gangs_wait_for_prompts():
    found = simulated(ONE_GPU, 2, replace(TEN_STEPS, encode_s=150.0))
    assert found.makespan_s == 400.0
    assert gpu_s(found, Use.NO_PROMPT) == pytest.approx(200.0)


def test_clips_with_one_prompt_encode_it_once():
    seconds = replace(TEN_STEPS, encode_s=150.0)
    found = SimulatedBatch(ONE_GPU, [PlannedClip(id=name, prompt_key="p", seconds=seconds) for name in "abc"]).run()
    assert found.makespan_s == 150.0 + 3 * 100.0


def test_gangs_wait_for_finishers_that_are_behind():
    found = simulated(ONE_GPU, 8, replace(TEN_STEPS, finish_s=200.0))
    assert found.makespan_s == 100.0 + 8 * 200.0
    assert gpu_s(found, Use.NO_FINISHER) > 0
    assert gpu_s(found, Use.COMPUTING) == pytest.approx(800.0)


def test_a_dead_rank_costs_the_steps_since_the_last_save():
    """Saves behind steps 3, 6, 9 end at 31, 62, 93 s; it dies at 75 s, in step 8, is seen at 77 s and up at 84 s."""
    assumed = replace(ONE_GPU, checkpoint_s=30.0, save_s=1.0, start_s=7.0)
    found = simulated(assumed, deaths=[RankDeath(at_s=7.0 + 75.0, gang=0, seen_s=2.0)])
    assert gpu_s(found, Use.COMPUTING) == pytest.approx(100.0)
    assert gpu_s(found, Use.LOST) == pytest.approx(75.0 - 62.0)
    assert gpu_s(found, Use.SAVING) == pytest.approx(3.0)  # behind 3 and 6, and behind 9 in the second attempt
    assert gpu_s(found, Use.NO_NODE) == pytest.approx(2.0)
    assert found.makespan_s == 7.0 + 75.0 + 2.0 + 7.0 + 4 * 10.0 + 1.0
    assert (found.num_retries, found.num_gangs_lost, found.num_nodes_lost) == (1, 1, 0)


def test_without_saves_a_clip_begins_anew_and_after_three_deaths_it_is_quarantined():
    assumed = replace(ONE_GPU, checkpoint_s=math.inf)
    deaths = [RankDeath(at_s=90.0 * (1 + n), gang=0, seen_s=0.0) for n in range(MAX_STRIKES)]
    found = simulated(assumed, 2, deaths=deaths)
    assert found.ended == {"quarantined": 1, "done": 1}
    assert gpu_s(found, Use.LOST) == pytest.approx(270.0)
    assert found.makespan_s == 370.0


def test_a_node_that_goes_with_notice_costs_no_step_and_no_strike():
    assumed = replace(ONE_GPU, spot_losses=20.0, notice_s=15.0, checkpoint_s=math.inf, seed=3)
    found = simulated(assumed, 20)
    assert found.ended == {"done": 20}
    assert found.num_preempted > 3
    assert gpu_s(found, Use.LOST) == 0.0
    assert gpu_s(found, Use.COMPUTING) == pytest.approx(2000.0)


def test_a_gang_of_a_lost_node_waits_for_the_next_one():
    assumed = replace(ONE_GPU, spot_losses=6.0, replace_s=500.0, checkpoint_s=10.0, seed=1)
    found = simulated(assumed, 20)
    assert found.ended == {"done": 20}
    assert found.num_nodes_lost > 0
    assert gpu_s(found, Use.NO_NODE) == pytest.approx(500.0 * found.num_nodes_lost)


def test_all_gangs_of_a_node_are_lost_with_it():
    """One node, sudden losses: each takes both gangs, and the finisher that stands there."""
    assumed = Assumptions(num_gpus=8, ranks_per_gang=4, spot_losses=1.0, checkpoint_s=10.0, seed=1)
    found = simulated(assumed, 30)
    assert found.ended == {"done": 30}
    assert found.num_nodes_lost > 0
    assert found.num_gangs_lost == 2 * found.num_nodes_lost


def test_a_straggler_takes_longer():
    found = simulated(replace(ONE_GPU, straggler_share=1.0, straggler_factor=1.5), 2)
    assert found.makespan_s == 300.0


def test_a_step_that_takes_too_long_costs_the_gang_and_at_last_the_clip():
    """The watchdog looks a second after the limit."""
    found = simulated(replace(ONE_GPU, hang_s=5.0), 1)
    assert found.ended == {"quarantined": 1}
    assert found.num_gangs_lost == MAX_STRIKES
    assert found.makespan_s == MAX_STRIKES * (5.0 + TICK_S)
    assert gpu_s(found, Use.LOST) == pytest.approx(found.makespan_s)


def test_steps_kept_of_a_clip_that_is_quarantined_while_its_gang_hangs_are_lost():
    """Two gangs of slow nodes, one behind the other: a look at one finds that the other has saved a step, and hangs."""
    slow = replace(ONE_GPU, num_gpus=2, gpus_per_node=2, straggler_share=1.0, straggler_factor=2.0)
    assumed = replace(slow, hang_s=15.0, checkpoint_s=0.0, save_s=1.0)
    found = simulated(assumed, 2, ClipSeconds(num_steps=2, step_s=8.0), [RankDeath(at_s=0.5, gang=0)])
    assert found.ended == {"quarantined": 1, "done": 1}
    assert sum(gpu_s(found, use) for use in Use) == pytest.approx(2 * found.makespan_s)


def test_gangs_whose_steps_are_short_enough_outlive_a_look_at_one_that_hangs():
    """Some of these nodes hang whenever they have a clip; the others take longer for a clip than the limit is."""
    assumed = replace(ONE_GPU, num_gpus=8, straggler_share=0.5, straggler_factor=2.0, hang_s=15.0)
    found = simulated(assumed, 40)
    assert found.num_gangs_lost > 0
    assert found.ended["done"] > 0
    assert gpu_s(found, Use.LOST) == pytest.approx(found.num_gangs_lost * (15.0 + TICK_S))


def test_a_fleet_that_never_comes_up_ends_the_run_with_the_reason():
    found = simulated(replace(ONE_GPU, start_s=START_S + 10.0), 3)
    assert found.aborted is not None
    assert "every gang was lost" in found.aborted
    assert (found.ended, found.num_unfinished) == ({}, 3)
    assert gpu_s(found, Use.STARTING) == pytest.approx(found.makespan_s)


def test_gpus_that_make_no_gang_are_left_over():
    found = simulated(Assumptions(num_gpus=13, ranks_per_gang=3, gpus_per_node=8), 3)
    assert gpu_s(found, Use.LEFT_OVER) == pytest.approx((13 - 3 * 3) * found.makespan_s)


def test_a_long_stream_is_read_as_far_as_the_run_reads():
    num_read = num_ended = most = 0

    def clips():
        nonlocal num_read, most
        for clip in equal_clips(3000, TEN_STEPS):
            num_read += 1
            most = max(most, num_read - num_ended)
            yield clip

    def on_end(ended):
        nonlocal num_ended
        num_ended = ended

    found = SimulatedBatch(Assumptions(num_gpus=4), clips(), on_end=on_end).run()
    assert found.ended == {"done": 3000}
    assert most <= clips_ahead(4) + 4 + PER_FINISHER + IN_FINISHER


# ---- whatever happens


@st.composite
def worlds(draw):
    """(assumptions, number of clips, their seconds, deaths) of a small world in trouble."""
    gpus_per_node = draw(st.integers(1, 4))
    ranks_per_gang = draw(st.integers(1, gpus_per_node))
    larger = draw(st.sampled_from(({}, {2: 1.6}, {2: 1.6, 3: 2.1, 4: 2.4})))
    assumed = Assumptions(
        num_gpus=draw(st.integers(gpus_per_node, 8)),
        ranks_per_gang=ranks_per_gang,
        larger={room: speedup for room, speedup in larger.items() if room * ranks_per_gang <= gpus_per_node},
        gpus_per_node=gpus_per_node,
        num_finishers=draw(st.integers(1, 3)),
        hang_s=draw(st.sampled_from((15.0, 300.0))),
        checkpoint_s=draw(st.sampled_from((0.0, 25.0, math.inf))),
        start_s=draw(st.sampled_from((0.0, 20.0))),
        finisher_start_s=draw(st.sampled_from((0.0, 30.0))),
        save_s=draw(st.sampled_from((0.0, 1.0))),
        spot_losses=draw(st.sampled_from((0.0, 0.0, 1.0, 5.0, 20.0))),
        notice_s=draw(st.sampled_from((0.0, 5.0, 60.0))),
        replace_s=draw(st.sampled_from((0.0, 40.0))),
        seen_s=draw(st.sampled_from((0.0, 2.0))),
        straggler_share=draw(st.sampled_from((0.0, 0.5))),
        straggler_factor=2.0,
        seed=draw(st.integers(0, 1000)),
    )
    seconds = ClipSeconds(
        num_steps=draw(st.integers(1, 12)),
        step_s=draw(st.sampled_from((1.0, 8.0))),
        encode_s=draw(st.sampled_from((0.0, 3.0))),
        finish_s=draw(st.sampled_from((0.0, 10.0, 60.0))),
    )
    deaths = draw(
        st.lists(st.builds(RankDeath, at_s=st.floats(0.0, 500.0), gang=st.integers(0, assumed.gangs - 1)), max_size=6)
    )
    return assumed, draw(st.integers(0, 25)), seconds, deaths


@settings(max_examples=400)
@given(worlds())
def test_each_clip_ends_once_and_no_gpu_time_is_lost_sight_of(world):
    assumed, num_clips, seconds, deaths = world
    found = simulated(assumed, num_clips, seconds, deaths)
    if found.aborted is None:
        assert sum(found.ended.values()) == num_clips
        assert found.num_unfinished == 0
    else:
        assert sum(found.ended.values()) + found.num_unfinished <= num_clips
    assert sum(found.per_hour) == found.ended.get("done", 0)
    assert sum(found.gpu_hours.values()) == pytest.approx(assumed.num_gpus * found.makespan_s / HOUR_S)
    assert min(found.gpu_hours.values()) >= -1e-9
    least_s = found.ended.get("done", 0) * seconds.num_steps * seconds.step_s * assumed.ranks_per_gang
    slowest = assumed.straggler_factor if assumed.straggler_share else 1.0
    slowest *= max((room / speedup for room, speedup in assumed.larger.items()), default=1.0)  # GPUs that do one step
    assert least_s - 1e-6 <= gpu_s(found, Use.COMPUTING) <= slowest * least_s + 1e-6
    assert simulated(assumed, num_clips, seconds, deaths) == found


# ---- fewer clips than gangs


NODE_OF_EIGHT = Assumptions(num_gpus=8, save_s=0.0, larger={2: 1.95, 4: 3.8, 8: 7.0})
LONG = ClipSeconds(num_steps=50, step_s=36.0)


def test_ten_long_clips_on_eight_gpus_end_a_third_sooner():
    """Eight clips of 1800 s; of the two others a step at once, then one more, and 48 on four GPUs each."""
    assert simulated(replace(NODE_OF_EIGHT, larger={}), 10, LONG).makespan_s == 3600.0
    found = simulated(NODE_OF_EIGHT, 10, LONG)
    assert found.makespan_s == pytest.approx(1800.0 + 2 * 36.0 + 48 * 36.0 / 3.8, abs=2.0)
    assert found.num_grown == 2
    assert found.ended == {"done": 10}
    assert sum(gpu_s(found, use) for use in Use) == pytest.approx(8 * found.makespan_s)


def test_gangs_do_not_grow_where_they_would_take_longer_to_start_than_they_save():
    found = simulated(replace(NODE_OF_EIGHT, start_s=1700.0), 10, LONG)
    assert (found.makespan_s, found.num_grown) == (1700.0 + 3600.0, 0)


@settings(max_examples=100)
@given(
    st.integers(1, 20),
    st.integers(1, 2),
    st.sampled_from((0.0, 20.0, 90.0)),
    st.sampled_from((2.0, 8.0, 30.0)),
    st.lists(st.sampled_from((4, 10, 50)), min_size=1, max_size=4),
)
def test_a_batch_that_nothing_befalls_ends_no_later_for_it(num_clips, num_nodes, start_s, step_s, steps):
    """But for what a second's grain of looks costs: two steps and a start-up of a clip that gained little."""
    assumed = replace(NODE_OF_EIGHT, num_gpus=8 * num_nodes, start_s=start_s, finisher_start_s=start_s)
    plans = [
        PlannedClip(id=str(n), prompt_key="p", seconds=ClipSeconds(num_steps=steps[n % len(steps)], step_s=step_s))
        for n in range(num_clips)
    ]
    found, plain = SimulatedBatch(assumed, plans).run(), SimulatedBatch(replace(assumed, larger={}), plans).run()
    assert found.ended == plain.ended == {"done": num_clips}
    assert found.makespan_s <= plain.makespan_s + 2 * step_s


# ---- what it must not need, and what it refuses


@pytest.mark.process
def test_it_imports_neither_ray_nor_torch():
    code = (
        "import sys, cineray.jobs.cli.main, cineray.jobs.simulate.world, cineray.jobs.simulate.clips, "
        "cineray.jobs.simulate.shown, cineray.jobs.simulate.plot\n"
        "print(*(name for name in ('ray', 'torch', 'matplotlib', 'diffusers') if name in sys.modules))"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | {"PYTHONSAFEPATH": "1"}
    )
    assert (run.returncode, run.stdout.strip()) == (0, ""), run.stderr


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"num_gpus": 0}, "--num-gpus must be 1 to"),
        ({"ranks_per_gang": 2}, "a gang of 2 ranks does not fit on a node of 1 GPUs"),
        ({"num_gangs": 2}, "room for 1 gangs of 1, got --gangs 2"),
        ({"num_gangs": 0}, "--gangs must be 1 to"),
        ({"spot_losses": -1.0}, "--spot-loss-per-gpu-hour must be 0 or more, got -1"),
        ({"start_s": math.nan}, "--start-up-s must be 0 or more, got nan"),
        ({"checkpoint_s": -1.0}, "--checkpoint-interval-s must be 0 or more, or inf for never"),
        ({"hang_s": 0.0}, "--hang-timeout must be above 0"),
        ({"straggler_share": 1.5}, "--straggler-share must be 0 to 1"),
        ({"straggler_factor": 0.5}, "--straggler-factor must be 1 or more"),
        ({"larger": {2: 1.9}}, "--elastic-tail: a gang must take the room of 2 to 1 gangs"),
        ({"num_gpus": 8, "gpus_per_node": 8, "larger": {4: 0.5}}, "must be 1 or more times as fast, got 0.5"),
    ],
)
def test_what_cannot_be_assumed_is_refused_in_a_line(changed, said):
    with pytest.raises(InputError) as refused:
        replace(ONE_GPU, **changed)
    (line,) = refused.value.lines
    assert said in line
