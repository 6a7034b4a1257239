"""The search for the value of an open option."""

import math

import pytest

from cineray.jobs.measure.equal_cost import find_value, parse_sweep
from cineray.pipeline.request import InputError


def find(text, target, speedup_at, num_steps=50):
    """(value found, values tried)."""
    sweep, tried = parse_sweep(text), []
    assert sweep is not None

    def speedup_of(policy):
        head, tail = text.split("?")
        value = float(policy.removeprefix(head).removesuffix(tail))
        tried.append(value)
        return speedup_at(value)

    found, bound = find_value(sweep, target, num_steps, speedup_of)
    return found, bound, tried


@pytest.mark.parametrize("target", [1.5, 2.0, 3.0, 40.0])
def test_a_real_value_is_found_to_one_percent(target):
    found, bound, tried = find("dicache(threshold=?,probe_depth=2)", target, lambda value: 1 + 10 * value)
    assert bound is None
    assert found is not None
    assert found.endswith(",probe_depth=2)")
    value = float(found.split("=")[1].split(",")[0])
    assert target <= 1 + 10 * value <= target * 1.02
    assert len(tried) < 20


def test_a_staircase_gives_the_lowest_value_of_the_step_that_is_fast_enough():
    found, _, _ = find("teacache(threshold=?)", 2.0, lambda value: 1.0 if value < 0.337 else 4.0)
    assert found is not None
    assert 0.337 <= float(found[len("teacache(threshold=") : -1]) <= 0.337 * 1.01


@pytest.mark.parametrize(("target", "interval"), [(1.0, 1), (2.0, 2), (2.5, 3), (3.0, 3), (7.5, 8), (25.0, 25)])
def test_a_whole_number_is_the_lowest_that_is_fast_enough(target, interval):
    found, _, tried = find("taylorseer(order=2,interval=?)", target, lambda value: value)
    assert found == f"taylorseer(order=2,interval={interval})"
    assert len(tried) == len(set(tried))


def test_fewer_steps_needs_no_search():
    assert [find("fewer-steps(?)", t, lambda value: math.nan)[0] for t in (2.0, 2.5, 3.0, 50.0)] == [
        "fewer-steps(25)",
        "fewer-steps(20)",
        "fewer-steps(16)",
        "fewer-steps(1)",
    ]


def test_a_bound_is_told():
    found, bound, tried = find("dicache(threshold=?)", 3.0, lambda value: min(1 + value, 2.3))
    assert found is None
    assert bound is not None
    assert bound.best == 2.3
    assert len(tried) < 12


@pytest.mark.parametrize("text", ["dicache", "fewer-steps(25)", "dicache(threshold=0.1)", "smoothcache:a.json"])
def test_policies_without_an_open_option_are_no_sweep(text):
    assert parse_sweep(text) is None


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("dicache(threshold=?,warmup=?)", "one option may be left open, as dicache\\(threshold=\\?\\)"),
        ("dicache?", "one option may be left open"),
        ("dicache(?)", "one option may be left open"),
        ("dicache(treshold=?)", "unknown option 'treshold=\\?' of dicache"),
        ("dicash(threshold=?)", "unknown policy 'dicash'"),
        ("dicache(alignment=?)", "alignment is not a number"),
        ("teacache(profile=?)", "profile is not a number"),
        ("teacache(ret_steps=?)", "ret_steps is not a number"),
    ],
)
def test_bad_sweeps_are_one_clear_error(text, said):
    with pytest.raises(InputError, match=said):
        parse_sweep(text)


def test_optional_numbers_can_be_left_open():
    assert parse_sweep("magcache(max_skips=?)").is_integer  # type: ignore[union-attr]
    assert not parse_sweep("magcache( threshold = ? , max_skips=4)").is_integer  # type: ignore[union-attr]
