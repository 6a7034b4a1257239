"""The arithmetic of a layout and of shards."""

import pytest

from cineray.distributed.layout import Layout, check_layout, fitting_layouts, parse_layout
from cineray.distributed.tokens import split_tokens


def test_ranks_multiply():
    layout = Layout(gangs=2, cfg=2, ring=3, ulysses=4)
    assert (layout.sequence_ranks, layout.ranks_per_gang, layout.world_size) == (12, 24, 48)
    assert Layout().world_size == 1


@pytest.mark.parametrize(("axis", "degree"), [("gangs", 0), ("ring", -1), ("ulysses", 0), ("cfg", 3)])
def test_degrees_that_cannot_be(axis, degree):
    with pytest.raises(ValueError, match=f"layout: {axis} must be .*, got {degree}"):
        Layout(**{axis: degree})


def test_each_rank_has_one_place():
    layout = Layout(gangs=2, cfg=2, ring=3, ulysses=2)
    places = [layout.coordinates(rank) for rank in range(layout.world_size)]
    assert len(set(places)) == 24
    assert [layout.rank_at(place) for place in places] == list(range(24))
    assert [p.ulysses for p in places[:4]] == [0, 1, 0, 1]
    assert [p.gang for p in places] == [0] * 12 + [1] * 12
    with pytest.raises(ValueError, match="rank must be 0 to 23, got 24"):
        layout.coordinates(24)


@pytest.mark.parametrize("text", ["1", "ulysses4", "cfg2xring2xulysses2", "gangs2xulysses2"])
def test_a_layout_reads_back_what_it_writes(text):
    assert parse_layout(text).text == text


def test_a_number_means_ulysses():
    assert parse_layout("4") == Layout(ulysses=4)


@pytest.mark.parametrize("text", ["", "ulysses", "ulysses2xulysses2", "tp4", "2x2", "ulysses2;"])
def test_what_is_no_layout(text):
    with pytest.raises(ValueError, match="is not of the form"):
        parse_layout(text)


def test_a_layout_that_does_not_fit_says_what_does():
    with pytest.raises(ValueError, match=r"ulysses must divide the model's 12 attention heads \(1, 2, 3, 4, 6, 12\)"):
        check_layout(Layout(ulysses=8), num_heads=12, num_branches=2)
    with pytest.raises(ValueError, match=r"of 8 ranks that fit: ring2xulysses4, ring4xulysses2, ring8, cfg2xulysses4"):
        check_layout(Layout(ulysses=8), num_heads=12, num_branches=2)
    with pytest.raises(ValueError, match="cfg 2 needs two guidance branches, this clip has 1"):
        check_layout(Layout(cfg=2), num_heads=24, num_branches=1)
    with pytest.raises(ValueError, match=r"it takes 4 ranks, there are 3; layouts of 3 ranks that fit: ulysses3"):
        check_layout(Layout(ulysses=4), num_heads=12, num_branches=1, world_size=3)
    check_layout(Layout(gangs=2, cfg=2, ring=2, ulysses=4), num_heads=12, num_branches=2, world_size=32)


def test_every_fitting_layout_fits():
    for num_ranks in range(1, 17):
        layouts = list(fitting_layouts(num_ranks, num_heads=40, num_branches=2))
        assert len(set(layouts)) == len(layouts) > 0
        for layout in layouts:
            check_layout(layout, num_heads=40, num_branches=2, world_size=num_ranks)


@pytest.mark.parametrize(("num_tokens", "num_ranks"), [(320, 4), (315, 4), (7, 3), (4, 4)])
def test_shards_are_contiguous_and_differ_by_one(num_tokens, num_ranks):
    shards = [split_tokens(num_tokens, num_ranks, index) for index in range(num_ranks)]
    assert [s.begin for s in shards] == [sum(shards[0].sizes[:i]) for i in range(num_ranks)]
    assert sum(s.size for s in shards) == num_tokens
    assert max(shards[0].sizes) - min(shards[0].sizes) <= 1
    with pytest.raises(ValueError, match=f"{num_tokens} tokens cannot be sharded over {num_tokens + 1} ranks"):
        split_tokens(num_tokens, num_tokens + 1, 0)
