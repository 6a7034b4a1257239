"""The parts of a plan: schedule, collectives, the law of a clip's time, what counts as evidence, what is chosen."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cineray.distributed.layout import Layout
from cineray.jobs.planning.anchors import published
from cineray.jobs.planning.collectives import collectives_of
from cineray.jobs.planning.cost_model import CostModel, Timed, fit, from_one, split_fixed
from cineray.jobs.planning.evidence import ClipKind, Evidence
from cineray.jobs.planning.exchange import Shape, WorkOf, step_exchange
from cineray.jobs.planning.gpus import find_gpu, known_gpus
from cineray.jobs.planning.layouts import fleet_of, layouts_of
from cineray.jobs.planning.plan import Batch, Forecasted, Row, best, make_plan, mark_pareto, on_time
from cineray.jobs.planning.schedule import makespan_s
from cineray.jobs.planning.sidecars import PastClips, PastKind
from cineray.jobs.planning.study_file import Study
from cineray.pipeline.footprint.forecast import MemoryByPart, forecast
from cineray.pipeline.request import InputError

WAN = Shape("wan2.1-t2v-14b", 1280, 720, 81)
KIND = ClipKind(WAN, steps=50, num_branches=2)
work_of = WorkOf(forecast)


def evidence(gpu="h100", **known):
    return Evidence(find_gpu(gpu), work_of, published().tables, **known)


# -- the schedule


def one_by_one(clips, num_gangs):
    ends = [0.0] * num_gangs
    for seconds in sorted((s for s, count in clips for _ in range(count)), reverse=True):
        gang = ends.index(min(ends))
        ends[gang] += seconds
    return max(ends)


@given(st.lists(st.tuples(st.integers(1, 50), st.integers(1, 40)), min_size=1, max_size=5), st.integers(1, 9))
def test_clips_dealt_out_in_rounds_end_as_if_dealt_out_one_by_one(clips, num_gangs):
    assert makespan_s(clips, num_gangs) == one_by_one(clips, num_gangs)


def test_a_million_clips_are_scheduled_at_once():
    assert makespan_s([(3.0, 10**9), (2.0, 10**9)], 8) == pytest.approx(5 * 10**9 / 8)


# -- collectives


def test_a_measured_collective_is_given_as_it_is_and_between_two_the_rate_is_interpolated():
    h100 = collectives_of(find_gpu("h100"))
    points = dict(h100.tables["all_to_all"][8])
    low, high = 8388608, 33554432
    assert h100.seconds("all_to_all", 8, low) == pytest.approx(points[low])
    between = h100.seconds("all_to_all", 8, 16777216)
    assert 16777216 / between == pytest.approx((low / points[low] + high / points[high]) / 2)


def test_beyond_the_table_the_rate_holds_and_three_ranks_take_the_rate_of_four():
    h100 = collectives_of(find_gpu("h100"))
    size, seconds = h100.tables["all_gather"][8][-1]
    assert h100.seconds("all_gather", 8, 4 * size) == pytest.approx(4 * seconds)
    assert h100.seconds("all_to_all", 3, 2**20) == h100.seconds("all_to_all", 4, 2**20)
    assert h100.seconds("all_reduce", 1, 2**20) == 0
    with pytest.raises(InputError, match="16 ranks"):
        h100.seconds("all_to_all", 16, 2**20)


def test_a_rule_that_carries_a_table_over_to_another_card_is_said():
    a100, a800 = collectives_of(find_gpu("a100")), collectives_of(find_gpu("a800"))
    assert a800.seconds("all_to_all", 8, 2**26) == pytest.approx(1.5 * a100.seconds("all_to_all", 8, 2**26))
    assert "600/400" in a800.source
    for gpu in known_gpus().values():
        assert (gpu.collectives_factor == 1) or gpu.collectives_rule


def test_an_exchange_of_a_step_grows_less_than_the_ranks_that_make_it():
    h100 = collectives_of(find_gpu("h100"))
    seconds = {u: 50 * step_exchange(work_of, WAN, Layout(ulysses=u), h100).ulysses_s for u in (1, 2, 4, 8)}
    # facts of the same tables, by hand: 11, 8 and 5 s a clip
    assert seconds[1] == 0
    assert [round(seconds[u]) for u in (2, 4, 8)] == [11, 8, 5]


def test_a_ring_hides_behind_its_attention_and_slows_it():
    h100 = collectives_of(find_gpu("h100"))
    step = step_exchange(work_of, WAN, Layout(ring=4), h100)
    assert step.ulysses_s == 0
    assert step.ring_s > 0
    assert step.added_s(0.0) == pytest.approx(step.ring_s)
    assert step.added_s(10.0) == pytest.approx(0.22 * 3 * 10)
    mixed = step_exchange(work_of, WAN, Layout(ring=2, ulysses=2), h100)
    assert mixed.ulysses_s > 0
    assert mixed.ring_s > 0
    assert 0.6 < work_of.attention_share(WAN) < 0.8  # by hand 4 N^2 D x 40 of 6.5 PFLOP: 0.72


# -- the law


def test_a_law_is_found_again_in_cells_that_follow_it():
    true = CostModel(fixed_s=60, work_s=1800)
    cells = [Timed(g, true.clip_s(g, 5.0 * (g > 1)), 5.0 * (g > 1)) for g in (1, 2, 4, 8)]
    found = fit(cells)
    assert (found.fixed_s, found.work_s) == (pytest.approx(60), pytest.approx(1800))
    shared = split_fixed(found, 15.0)
    assert shared.fixed_s == 15
    assert [shared.clip_s(g) for g in (1, 4)] == [pytest.approx(found.clip_s(g)) for g in (1, 4)]
    with pytest.raises(ValueError, match="two different"):
        fit(cells[:1])


def test_a_law_from_one_cell_goes_through_it():
    for ranks, exchange_s in ((1, 0.0), (8, 7.0)):
        model = from_one(Timed(ranks, 300.0, exchange_s), 20.0)
        assert model.clip_s(ranks, exchange_s) == pytest.approx(300)


# -- evidence, in its order


def study(**changes):
    fitted = {
        "model": WAN.model, "width": 1280, "height": 720, "frames": 81, "steps": 50, "device": "NVIDIA H100",
        "gpu": "h100", "fixed_s": 40, "work_s": 1600, "heldout_error": 0.02,
        "exchanges": [{"ulysses": 8, "exchange_s": 3.0}],
        "rows": [{"ulysses": 1, "clip_s": 1650, "denoise_s": 1605}],
    }  # fmt: skip
    return Study.model_validate({"version": 1, "made": "2026-11-26", "fits": [fitted | changes]})


def past(ulysses=1, denoise_s=1000.0, **changes):
    kind = PastKind(
        model=WAN.model, width=1280, height=720, frames=81, steps=50, num_branches=2, cache="none",
        layout=Layout(ulysses=ulysses),
    )  # fmt: skip
    return PastClips(kind=replace(kind, **changes), num_clips=3, fixed_s=20.0, denoise_s=denoise_s, computed_share=1.0)


def test_a_published_cell_is_given_as_it_is_and_named():
    found = evidence().estimate(KIND, Layout(ulysses=4), "finisher")
    assert found.clip_s == 497.0
    assert "published: Wan2.1 T2V-14B 720p" in found.source


def test_what_was_measured_here_goes_before_what_was_published():
    by_past = evidence(past=[past()])
    assert by_past.estimate(KIND, Layout(), "finisher").clip_s == 1020
    assert "sidecars" in by_past.estimate(KIND, Layout(ulysses=8), "finisher").source
    both = evidence(past=[past()], studies=[study()])
    assert both.estimate(KIND, Layout(), "finisher").clip_s == 1650
    assert "measured" in both.estimate(KIND, Layout(), "finisher").source
    on_eight = both.estimate(KIND, Layout(ulysses=8), "finisher")
    assert on_eight.clip_s == pytest.approx(40 + 1600 / 8 + 3)
    assert "2.0% off" in on_eight.source


def test_two_layouts_of_earlier_clips_make_a_law():
    law = evidence(past=[past(), past(8, 150.0)]).law(KIND)
    assert law.model.fixed_s > 20
    assert law.known[Layout(ulysses=8)] == (170.0, 150.0)


@pytest.mark.parametrize("changes", [{"gpu": "h200"}, {"width": 832}, {"cache": "dicache"}, {"guided": False}])
def test_a_study_of_other_clips_or_cards_does_not_count(changes):
    found = evidence(studies=[study(**changes)]).estimate(KIND, Layout(), "finisher")
    assert "published" in found.source


def test_other_steps_take_the_published_law_and_other_sizes_its_utilisation():
    half = evidence().law(replace(KIND, steps=25))
    whole = evidence().law(KIND)
    assert half.model.work_s == pytest.approx(whole.model.work_s / 2)
    assert half.model.fixed_s == whole.model.fixed_s
    assert not half.known
    small = evidence().law(ClipKind(Shape(WAN.model, 832, 480, 81), 50, 2))
    assert "roofline at" in small.source
    flop = work_of.step_flop(Shape(WAN.model, 832, 480, 81))
    assert 0.3 < 50 * flop / small.model.work_s / 989e12 < 0.5


def test_a_card_without_tables_takes_the_utilisation_of_the_nearest_rate():
    assert "of h" in evidence("b200").law(KIND).source  # H100 or H200: 989 TFLOP/s
    assert "of a800" in evidence("l40s").law(KIND).source


def test_one_branch_is_half_the_work():
    one = evidence("b200").law(replace(KIND, num_branches=1))
    two = evidence("b200").law(KIND)
    assert one.model.work_s == pytest.approx(two.model.work_s / 2, rel=0.1)  # the utilisation is of another size


def test_a_cache_of_unknown_share_is_refused_and_a_known_one_shrinks_the_work_alone():
    cached = replace(KIND, cache="dicache-paper", policy="dicache-paper(...)")
    with pytest.raises(InputError, match="--computed-share"):
        evidence().law(cached)
    law = evidence().law(replace(cached, computed_share=0.4))
    whole = evidence().law(KIND)
    assert law.model.fixed_s == whole.model.fixed_s
    assert 0.4 < law.model.work_s / whole.model.work_s < 0.45  # 40 % and the probes


def test_a_card_whose_exchanges_nobody_published_is_planned_for_single_ranks_alone():
    mi300x = evidence("mi300x")
    assert mi300x.estimate(KIND, Layout(), "finisher").clip_s > 0
    with pytest.raises(InputError, match="nobody has published"):
        mi300x.estimate(KIND, Layout(ulysses=2), "finisher")
    known = evidence("mi300x", studies=[study(gpu="mi300x")])
    assert known.estimate(KIND, Layout(ulysses=8), "finisher").clip_s == pytest.approx(243)


# -- what is chosen


def memory(total):
    return MemoryByPart(weights=total, activations=0, cache=0, vae=0, text_encoder=0, total=total)


def row(layout, clip_s, total=1, num_clips=10):
    clips = ((clip_s, num_clips),)
    known = Forecasted(step_s=1, clip_s=clip_s, first_clip_s=clip_s, clips=clips, sources=("test",))
    ends_s = makespan_s(clips, layout.gangs)
    return Row(layout=layout, decode="finisher", memory=memory(total), fits=True, forecasted=known, makespan_s=ends_s)


def test_memory_decides_as_it_did_on_eight_b200():
    """Cosmos3-Super: one card a clip where 180 GB are there; TP4, and CFG2 x Ulysses4 for the first clip, in 80 GiB."""
    node = published().whole_node

    def fitting(limit_bytes):
        rows = [
            row(Layout(gangs=node.num_gpus // n.ranks, ulysses=n.ranks), n.seconds, round(n.gib * 2**30))
            for n in node.layouts
        ]
        return [r for r in rows if r.memory.total <= limit_bytes]

    large, small = fitting(180e9), fitting(80 * 2**30)
    assert best(large, lambda r: -r.clips_per_hour).layout.ranks_per_gang == 1
    assert best(small, lambda r: -r.clips_per_hour).layout.ranks_per_gang == 4
    assert best(small, lambda r: r.forecasted.first_clip_s).layout.ranks_per_gang == 8
    for r, n in zip(fitting(1e15), node.layouts, strict=True):  # the file agrees with itself
        assert r.clips_per_hour / node.num_gpus == pytest.approx(n.videos_per_hour_per_gpu, rel=0.01)


def test_the_best_layout_depends_on_the_number_of_clips():
    fleet = fleet_of(find_gpu("h100"), 8, None)
    layouts = [Layout(gangs=8 // u, ulysses=u) for u in (1, 2, 4, 8)]

    def chosen(count):
        plan = make_plan(fleet, Batch(((KIND, count),), True), layouts, evidence(), lambda _, d: d == "finisher")
        return plan.recommended

    assert (chosen(10).layout.text, round(chosen(10).makespan_s)) == ("gangs2xulysses4", 2485)
    assert (chosen(20).layout.text, round(chosen(20).makespan_s)) == ("gangs4xulysses2", 4726)
    assert chosen(8000).layout.text == "gangs8"
    assert chosen(1).layout.text == "ulysses8"


def test_a_deadline_takes_no_more_gangs_than_it_needs():
    rows = [row(Layout(gangs=8), 1000.0, num_clips=16), row(Layout(gangs=2, ulysses=4), 300.0, num_clips=16)]
    found = on_time(rows, 4000)
    assert (found.layout.gangs, found.makespan_s) == (4, 4000)
    assert on_time(rows, 16_000).layout.gangs == 1  # as many GPU-hours as with 2, 4 or 8
    assert on_time(rows, 2399).layout == Layout(gangs=8)
    assert on_time(rows, 1999) is None


def test_a_row_that_another_beats_in_everything_is_not_marked():
    rows = mark_pareto([row(Layout(gangs=8), 1000), row(Layout(ulysses=8), 130), row(Layout(ulysses=8), 140)])
    assert [r.is_pareto for r in rows] == [True, True, False]
    faster = replace(row(Layout(ulysses=8), 100), is_runnable=False)  # no choice, so it takes nobody's mark
    assert [r.is_pareto for r in mark_pareto([faster, *rows])] == [False, True, True, False]


def test_a_layout_is_unknown_where_it_cannot_be_forecast_and_the_others_are_not():
    fleet = fleet_of(find_gpu("mi300x"), 2, None)
    plan = make_plan(fleet, Batch(((KIND, 1),), False), layouts_of(fleet, 40, 2), evidence("mi300x"))
    unknown = [r for r in plan.rows if r.unknown]
    assert {r.layout.ranks_per_gang for r in unknown} == {2}
    assert plan.recommended.layout == Layout(gangs=2)
    assert unknown[0].content()["step_s"] is None


def test_gangs_stand_on_one_node_and_leave_no_card_idle():
    fleet = fleet_of(find_gpu("h100"), 24, None)
    assert (fleet.num_nodes, fleet.gpus_per_node) == (3, 8)
    found = list(layouts_of(fleet, 40, 2))
    assert all(layout.world_size == 24 and layout.ranks_per_gang <= 8 for layout in found)
    assert Layout(gangs=3, cfg=2, ulysses=4) in found
    with pytest.raises(InputError, match="--num-gpus"):
        fleet_of(find_gpu("h100"), 0, None)
    with pytest.raises(InputError, match="h100, h200"):
        find_gpu("h999")
    assert find_gpu("RTX 4090") == find_gpu("4090") == find_gpu("rtx4090")
