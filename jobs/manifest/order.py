"""The order in which clips are handed out: the longest first, so that none that is long begins when others end."""

from collections.abc import Callable, Iterable, Iterator, Sequence

from cineray.pipeline.request import ClipRequest

MAX_PASSES = 16  # through the rows: a million of them are not held in memory, nor written once more


def longest_first(
    requests: Iterable[ClipRequest], length_of: Callable[[ClipRequest], float], lengths: Sequence[float]
) -> Iterator[ClipRequest]:
    """Clips by falling length; those of equal length in their own order.

    Where there are more than MAX_PASSES lengths, neighbours count as equal.

    Args:
        requests: gives the clips anew each time that it is iterated.
        lengths: all that there are.
    """
    falling = sorted(set(lengths), reverse=True)
    size = -(-len(falling) // MAX_PASSES) or 1
    bands = [frozenset(falling[start : start + size]) for start in range(0, len(falling), size)]
    if len(bands) == 1:
        yield from requests
        return
    for band in bands:
        yield from (request for request in requests if length_of(request) in band)
