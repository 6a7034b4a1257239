"""The arithmetic of a layout."""

import pytest

from cineray.distributed.layout import Layout


def test_ranks_multiply():
    layout = Layout(gangs=2, cfg=2, ring=3, ulysses=4)
    assert (layout.ranks_per_gang, layout.world_size) == (24, 48)
    assert Layout().world_size == 1


@pytest.mark.parametrize(("axis", "degree"), [("gangs", 0), ("ring", -1), ("ulysses", 0), ("cfg", 3)])
def test_degrees_that_cannot_be(axis, degree):
    with pytest.raises(ValueError, match=f"layout: {axis} must be .*, got {degree}"):
        Layout(**{axis: degree})
