"""A batch on gangs: list scheduling, longest clip first, as the queue hands them out at its best."""

from __future__ import annotations

import heapq
from collections.abc import Iterable


def makespan_s(clips: Iterable[tuple[float, int]], num_gangs: int) -> float:
    """When the last clip is done, if each gang takes the longest clip left as soon as it is free.

    Clips of equal length are dealt out in whole rounds once the gangs are no further apart than one of them: a million
    take no longer than a thousand, with the very same result.

    Args:
        clips: (seconds, how many).
    """
    ends = [0.0] * num_gangs
    for seconds, count in sorted(clips, reverse=True):
        left = count
        while left and max(ends) - ends[0] > seconds:
            heapq.heapreplace(ends, ends[0] + seconds)
            left -= 1
        rounds, left = divmod(left, num_gangs)
        ends = [end + rounds * seconds for end in ends]  # in the same order: still a heap
        for _ in range(left):
            heapq.heapreplace(ends, ends[0] + seconds)
    return max(ends)
