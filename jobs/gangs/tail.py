"""When a batch has fewer clips left than gangs: which clip goes on in the room of several gangs. Numbers only.

The rule: every clip that is left has a fair share of all room. The clip with the longest rest goes first. If room of
its share can be had on one node, of its own gang and idle ones or of idle ones alone, and it would end sooner there
even though the larger gang has to start first, it moves.

Clips that end within a start-up do not count: their room is free before a larger gang could begin, and who is next
waits for it, as for gangs that are starting. What a better rule could gain (to start a larger gang while the clip goes
on where it is, to look ahead at several ends) is about a start-up for each clip that moves.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

MIN_GAIN = 0.1  # of a clip's rest: the worst error of a plan from two measured layouts (docs/scaling.md)


@dataclass(frozen=True, kw_only=True, slots=True)
class Standing:
    """A gang that has its place.

    Args:
        room: gangs as they began, of which it is one or takes the place of several.
        rest_s: of its clip; None where it has none.
        step_s: of its clip; None where it is not known yet, or may not be moved now.
    """

    gang: int
    room: int
    node: str
    rest_s: float | None = None
    step_s: float | None = None

    @property
    def is_idle(self) -> bool:
        return self.rest_s is None


@dataclass(frozen=True, kw_only=True, slots=True)
class Growth:
    """A clip moves to a larger gang.

    Args:
        gang: that it is on now.
        room: numbers of the gangs whose room the larger one takes; the first one is its number.
        num_gangs: its size.
        saved_s: by which the clip ends sooner.
    """

    gang: int
    room: tuple[int, ...]
    num_gangs: int
    saved_s: float


def grow(gangs: Sequence[Standing], speedups: Mapping[int, float], start_s: float, starting: int = 0) -> list[Growth]:
    """The clips that should move now, the one with the longest rest first.

    Args:
        gangs: all that have their place, and those that are being built larger, which are busy for ever.
        speedups: number of gangs whose room one takes -> how much faster its steps are than theirs.
        start_s: that a gang takes to start.
        starting: gangs as they began that are being built; their room comes soon.
    """
    idle: dict[str, list[Standing]] = defaultdict(list)
    for gang in gangs:
        if gang.is_idle:
            idle[gang.node].append(gang)
    lasting = [gang for gang in gangs if gang.rest_s is not None and gang.rest_s > start_s]
    if not lasting or not idle:
        return []
    share = (sum(gang.room for gang in gangs) + starting) // len(lasting)
    sizes = sorted((size for size in speedups if size <= share), reverse=True)
    if starting or any(gang.rest_s is not None and gang.rest_s <= start_s for gang in gangs):
        sizes = sizes[:1]  # more room comes soon
    found = []
    for gang in sorted(lasting, key=lambda gang: (-(gang.rest_s or 0.0), gang.gang)):
        growth = _growth(gang, idle, sizes, speedups, start_s)
        if growth is not None:
            found.append(growth)
            for node, standing in list(idle.items()):
                idle[node] = [gang for gang in standing if gang.gang not in growth.room]
    return found


def _growth(
    mover: Standing,
    idle: Mapping[str, Sequence[Standing]],
    sizes: Sequence[int],
    speedups: Mapping[int, float],
    start_s: float,
) -> Growth | None:
    if mover.step_s is None or mover.rest_s is None:
        return None
    for size in sizes:
        after_s = mover.step_s + start_s + mover.rest_s * speedups.get(mover.room, 1.0) / speedups[size]
        room = _room(mover, idle, size) if after_s < (1 - MIN_GAIN) * mover.rest_s else None
        if room is not None:
            return Growth(gang=mover.gang, room=room, num_gangs=size, saved_s=mover.rest_s - after_s)
    return None


def _room(mover: Standing, idle: Mapping[str, Sequence[Standing]], size: int) -> tuple[int, ...] | None:
    """Numbers of gangs of one node that have so much room together, its own first; else idle ones of another node."""
    here = idle.get(mover.node, ())
    places = [([mover], here)] if here else []
    for first, others in [*places, *(([], idle[node]) for node in sorted(idle))]:
        taken, num_taken = [gang.gang for gang in first], sum(gang.room for gang in first)
        for gang in others:
            if num_taken >= size:
                break
            taken.append(gang.gang)
            num_taken += gang.room
        if num_taken >= size:
            return tuple(taken)
    return None
