"""What ran when, from lines of a log: by hand, and whatever the lines are."""

from hypothesis import given
from hypothesis import strategies as st

from cineray.jobs.report.event_log import Event
from cineray.jobs.report.timeline import Bar, sessions_of


def log(*lines):
    """Events from (time, event, fields)."""
    return [Event(time=float(time), event=event, **fields) for time, event, fields in lines]


def gang_run(begin, num_clips=1):
    lines = [(begin, "built", {"actor": "gang-0"})]
    for number in range(num_clips):
        lines.append((begin + 1 + 10 * number, "running", {"id": f"c{number}", "fingerprint": "f", "gang": "gang-0"}))
        lines.append((begin + 9 + 10 * number, "done", {"id": f"c{number}", "wall_s": 8.0}))
    return lines


def test_a_gang_is_busy_for_as_long_as_the_sidecar_says():
    (session,) = sessions_of(log(*gang_run(100, 2)), {("c0", "f"): 5.0, ("c1", "f"): 99.0}, None)
    (lane,) = session.lanes
    assert lane.bars == (Bar("rendered", 101, 106, "c0"), Bar("rendered", 111, 119, "c1"))  # never beyond what is known
    assert (session.begin_s, session.end_s, lane.busy_s, lane.num_clips) == (100, 119, 13, 2)
    assert session.done == (109, 119)


def test_a_lost_gang_is_down_until_it_is_built_again():
    lines = [
        (0, "built", {"actor": "gang-1"}),
        (1, "running", {"id": "a", "fingerprint": "f", "gang": "gang-1"}),
        (4, "retrying", {"id": "a", "reason": "died"}),
        (4, "lost", {"actor": "gang-1", "reason": "died"}),
        (5, "lost", {"actor": "finisher-0", "reason": "died"}),
        (9, "built", {"actor": "gang-1"}),
        (10, "running", {"id": "a", "fingerprint": "f", "gang": "gang-1"}),
        (12, "quarantined", {"id": "a", "wall_s": 11.0, "error": "died"}),
        (12, "lost", {"actor": "gang-1", "reason": "died"}),
    ]
    (session,) = sessions_of(log(*lines), {}, None)
    (lane,) = session.lanes
    kinds = [(bar.kind, bar.begin_s, bar.end_s) for bar in lane.bars]
    assert kinds == [("lost", 1, 4), ("down", 4, 9), ("lost", 10, 12), ("down", 12, 12)]
    assert (lane.num_lost, lane.down_s, lane.busy_s, session.num_retries, session.num_failed) == (2, 5, 0, 1, 1)


def test_a_new_run_begins_where_a_gang_is_built_that_stood():
    killed = [(9.5, "running", {"id": "x", "fingerprint": "f", "gang": "gang-0"})]
    sessions = sessions_of(log(*gang_run(0), *killed, *gang_run(30)), {}, None)
    assert [(s.begin_s, s.end_s, len(s.done)) for s in sessions] == [(0, 9.5, 1), (30, 39, 1)]
    assert sessions[0].lanes[0].bars[-1] == Bar("preempted", 9.5, 9.5, "x")


def test_a_run_in_one_process_then_gangs_then_a_pause_then_a_clock_set_back():
    alone = [(10, "done", {"id": "a", "fingerprint": "f", "wall_s": 4.0})]
    alone += [(12, "failed", {"id": "b", "fingerprint": "f", "wall_s": 1.0, "error": "no"})]
    later = [(5000, "done", {"id": "c", "fingerprint": "f", "wall_s": 2.0})]
    back = [(50, "done", {"id": "d", "fingerprint": "f", "wall_s": 2.0})]
    sessions = sessions_of(log(*alone, *gang_run(20), *later, *back), {}, None)
    assert [s.lanes[0].name for s in sessions] == ["process", "gang-0", "process", "process"]
    assert sessions[0].lanes[0].bars == (Bar("rendered", 6, 10, "a"), Bar("failed", 11, 12, "b"))
    assert [s.begin_s for s in sessions] == [6, 20, 4998, 48]


def test_what_has_no_end_runs_until_now_while_a_driver_is_at_work():
    lines = log((0, "built", {"actor": "gang-0"}), (1, "running", {"id": "a", "fingerprint": "f", "gang": "gang-0"}))
    assert sessions_of(lines, {}, 50.0)[0].lanes[0].bars == (Bar("running", 1, 50, "a"),)
    assert sessions_of(lines, {}, None)[0].lanes[0].bars == (Bar("preempted", 1, 1, "a"),)


def test_bins_hold_every_clip():
    (session,) = sessions_of(log(*gang_run(0, 30)), {}, None)
    assert len(session.bins) == 10
    assert sum(session.bins) == 30


events = st.lists(
    st.builds(
        Event,
        time=st.floats(0, 1e5),
        event=st.sampled_from(
            ["built", "running", "lost", "retrying", "yielded", "failed", "quarantined", "done", "existing", "stopping"]
        ),
        id=st.sampled_from([None, "a", "b"]),
        fingerprint=st.sampled_from([None, "f"]),
        gang=st.sampled_from([None, "gang-0", "gang-1"]),
        actor=st.sampled_from([None, "gang-0", "gang-1", "finisher-0"]),
        wall_s=st.none() | st.floats(0, 1e4),
    ),
    max_size=30,
)


@given(events, st.floats(0, 100), st.none() | st.floats(0, 2e5))
def test_whatever_the_log_says_no_bar_leaves_its_session(lines, denoise_s, now_s):
    sessions = sessions_of(lines, {("a", "f"): denoise_s}, now_s)
    for session in sessions:
        for lane in session.lanes:
            assert lane.busy_s <= (session.span_s + 1e-6) * len(lane.bars)
            for bar in lane.bars:
                assert session.begin_s <= bar.begin_s <= bar.end_s <= session.end_s
        assert sum(session.bins) == len(session.done)
    assert sum(len(session.done) for session in sessions) == sum(line.event == "done" for line in lines)


def test_waves_of_one_run_are_one_session_though_their_gangs_are_built_anew():
    lines = [*gang_run(100), (900, "wave", {}), *gang_run(901)]
    (session,) = sessions_of(log(*lines), {}, None)
    assert len(session.done) == 2
    assert [lane.num_clips for lane in session.lanes] == [2]
    assert len(sessions_of(log(*gang_run(100), *gang_run(200)), {}, None)) == 2
