"""What a run may be told, and what of it is refused in one line."""

import pytest

from cineray.distributed.layout import Layout
from cineray.jobs.run_options import RunOptions
from cineray.pipeline.request import InputError


def test_a_layout_is_that_of_one_gang():
    assert RunOptions(sp=4, cfg_parallel=True).layout == Layout(cfg=2, ulysses=4)
    assert RunOptions(layout_name="ring2xulysses4").layout == Layout(ring=2, ulysses=4)
    assert RunOptions(layout_name="cfg2xring2xulysses4").uses_ray
    assert RunOptions(layout_name="8").layout == Layout(ulysses=8)
    assert not RunOptions(layout_name="1").uses_ray


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"layout_name": "ring2", "sp": 2}, "give --layout, or --sp and --cfg-parallel, not both"),
        ({"layout_name": "ring2", "cfg_parallel": True}, "give --layout, or --sp and --cfg-parallel, not both"),
        ({"layout_name": "gangs2xring2"}, "--layout gangs2xring2 is that of one gang; leave gangs2 out, give --gangs"),
        ({"layout_name": "ring200xulysses200"}, "--layout ring200xulysses200 takes 40000 ranks; 10000 are the most"),
        ({"layout_name": "ring0"}, "--layout: ring must be 1 or more, got 0"),
        ({"layout_name": "cfg3"}, "--layout: cfg must be 1 or 2 (guidance has two branches), got 3"),
    ],
)
def test_a_layout_that_cannot_be_is_refused_in_one_line(options, said):
    with pytest.raises(InputError) as caught:
        RunOptions(**options)
    assert caught.value.lines == (said,)


@pytest.mark.parametrize("text", ["", "ring", "2xring2", "ring2xring2", "tp2", "9" * 5000])
def test_a_layout_that_is_none_is_refused_with_its_form(text):
    with pytest.raises(InputError, match="--") as caught:
        RunOptions(layout_name=text)
    assert len(caught.value.lines) == 1
    assert "\n" not in caught.value.lines[0]
