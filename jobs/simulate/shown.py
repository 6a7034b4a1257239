"""A simulation for a person: tables whose every figure says that it is simulated."""

from collections.abc import Iterator
from statistics import median

from cineray.jobs.simulate.assumptions import Assumptions
from cineray.jobs.simulate.ledger import HOUR_S, MEANING, Simulated

MAX_HOURS = 24  # shown one by one


def headline(assumed: Assumptions, num_clips: int, num_finishers: int) -> str:
    """What was simulated, in one line."""
    gpus = f"{assumed.num_gpus:,} GPUs as {_many(assumed.gangs, 'gang')} of {_many(assumed.ranks_per_gang, 'rank')}"
    return f"Simulated, not measured: {_many(num_clips, 'clip')} on {gpus}, {_many(num_finishers, 'finisher')}"


def figures(found: Simulated) -> Iterator[tuple[str, str]]:
    """(what, the simulated figure) of a run."""
    yield "makespan", duration(found.makespan_s)
    yield "clips per hour", f"{found.clips_per_hour:,.1f}"
    yield "clips", ", ".join(f"{number:,} {status}" for status, number in clips(found))
    yield "retries", f"{found.num_retries:,}"
    yield "gangs lost", f"{found.num_gangs_lost:,}"
    yield "nodes lost", f"{found.num_nodes_lost:,}"
    yield "clips preempted with notice", f"{found.num_preempted:,}"
    if found.num_grown:
        yield "clips moved to larger gangs", f"{found.num_grown:,}"
    if found.num_retired:
        yield "gangs retired", f"{found.num_retired:,}"
    yield "clips done in each hour", _hours(found)


def clips(found: Simulated) -> list[tuple[str, int]]:
    """What became of clips: (status, number), leaving out what is 0."""
    ended = [(status, found.ended.get(status, 0)) for status in ("done", "failed", "quarantined")]
    return [(status, number) for status, number in [*ended, ("unfinished", found.num_unfinished)] if number]


def uses(found: Simulated) -> Iterator[tuple[str, float, float]]:
    """(what for, GPU hours, share) of all GPU time, leaving out what is 0."""
    total = sum(found.gpu_hours.values())
    for use, hours in found.gpu_hours.items():
        if hours:
            yield MEANING[use], hours, hours / total


def duration(seconds: float) -> str:
    if seconds < 2 * HOUR_S:
        return f"{seconds:,.1f} s"
    return f"{seconds / HOUR_S:,.2f} h"


def _hours(found: Simulated) -> str:
    hours = found.per_hour
    if len(hours) <= MAX_HOURS:
        return " ".join(str(number) for number in hours) or "none"
    whole = hours[:-1]
    return f"{min(whole)} to {max(whole)}, median {median(whole):g}; {hours[-1]} in the last part of an hour"


def _many(number: int, what: str) -> str:
    return f"{number:,} {what}" + ("" if number == 1 else "s")
