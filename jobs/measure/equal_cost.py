"""Policies at equal cost: the value of one option that makes a policy as fast as asked."""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import get_args, get_type_hints

from cineray.caching.spec import POLICIES, options_class, parse_spec
from cineray.jobs.measure import peers
from cineray.pipeline.request import InputError

_FEWER = "fewer-steps(?)"
_KNOB = re.compile(
    r"(?P<name>(?:(?:diffusers|cache-dit):)?[a-z0-9-]+)\(([^()?]*,)?\s*(?P<option>[a-z_]+)\s*=\s*\?\s*(,[^()?]*)?\)"
)

FIRST_TRY = 0.1  # of a real option; doubled until it is fast enough
CLOSE_ENOUGH = 1.01  # a speed-up within 1 % above the one asked for ends the search
RESOLUTION = 0.01  # so does an interval of values this narrow, relative to its upper end
HIGHEST = 1e6
NUM_DOUBLINGS_IN_VAIN = 3  # doublings without any gain: the policy has a bound


@dataclass(frozen=True, kw_only=True, slots=True)
class Sweep:
    """A policy with one option left open, written as `dicache(threshold=?)`; raising the option makes it faster."""

    text: str
    is_integer: bool

    def at(self, value: float) -> str:
        return self.text.replace("?", f"{value:g}" if not self.is_integer else str(int(value)))


@dataclass(frozen=True, kw_only=True, slots=True)
class OutOfReach:
    """A speed-up that no value of the option gives; `best` is the highest seen."""

    best: float


def parse_sweep(text: str) -> Sweep | None:
    """The sweep that a text stands for; None if it has no `?`.

    Raises:
        InputError: more than one `?`, or one that is not an option's value, or not a number's.
    """
    if "?" not in text:
        return None
    if text == _FEWER:
        return Sweep(text=text, is_integer=True)
    match = _KNOB.fullmatch(text.strip())
    if match is None:
        raise InputError(f"policy {text!r}: one option may be left open, as dicache(threshold=?) or {_FEWER}")
    if peers.is_peer(text):
        kind = peers.option_types(text.partition("(")[0]).get(match["option"])
        if kind is None:
            raise InputError(f"policy {text!r}: it has no option {match['option']}")
        return Sweep(text=text.strip(), is_integer=kind is int)
    try:
        spec = parse_spec(text)
    except ValueError as error:
        raise InputError(str(error)) from None
    if spec.name not in POLICIES:
        raise InputError(f"policy {text!r}: {spec.name} has no option to leave open")
    kind = get_type_hints(options_class(POLICIES[spec.name]))[match["option"]]
    kinds = set(get_args(kind)) - {type(None)} or {kind}
    if not kinds <= {int, float}:
        raise InputError(f"policy {text!r}: {match['option']} is not a number")
    return Sweep(text=text.strip(), is_integer=kinds == {int})


def find_value(
    sweep: Sweep, target: float, num_steps: int, speedup_of: Callable[[str], float]
) -> tuple[str, None] | tuple[None, OutOfReach]:
    """The policy with the lowest value of its option that is found to reach the speed-up.

    Args:
        num_steps: of the clips.
        speedup_of: measures a policy.
    """
    if sweep.text == _FEWER:
        return sweep.at(max(1, math.floor(num_steps / target))), None
    low, high, best, in_vain = 0.0, 1.0 if sweep.is_integer else FIRST_TRY, 0.0, 0
    while (speedup := speedup_of(sweep.at(high))) < target:
        in_vain = 0 if speedup > best else in_vain + 1
        best = max(best, speedup)
        if in_vain == NUM_DOUBLINGS_IN_VAIN or high > HIGHEST:
            return None, OutOfReach(best=round(best, 3))
        low, high = high, high * 2
    while speedup > target * CLOSE_ENOUGH and high - low > (1 if sweep.is_integer else RESOLUTION * high):
        middle = (low + high) // 2 if sweep.is_integer else (low + high) / 2
        if (at_middle := speedup_of(sweep.at(middle))) >= target:
            high, speedup = middle, at_middle
        else:
            low = middle
    return sweep.at(high), None
