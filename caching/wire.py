"""Decisions as numbers, so that ranks can be told them; and a digest of what was done, so that they can compare."""

import math
import struct
import zlib
from collections.abc import Sequence

from cineray.caching.policy import Decision, Reason
from cineray.caching.rows import RowState
from cineray.caching.trace import TraceEntry

_REASONS = list(Reason)
NUMBERS_PER_ROW = 5


def pack(decisions: Sequence[Decision]) -> list[float]:
    """`NUMBERS_PER_ROW` numbers for each row of the batch."""
    numbers: list[float] = []
    for decision in decisions:
        gamma = math.nan if decision.gamma is None else decision.gamma
        reason = _REASONS.index(decision.reason)
        numbers += [float(decision.compute), float(decision.num_steps), decision.accumulated, gamma, float(reason)]
    return numbers


def unpack(numbers: Sequence[float]) -> list[Decision]:
    """The inverse of `pack`."""
    return [
        Decision(
            compute=bool(compute),
            accumulated=accumulated,
            reason=_REASONS[int(reason)],
            gamma=None if math.isnan(gamma) else gamma,
            num_steps=int(num_steps),
        )
        for compute, num_steps, accumulated, gamma, reason in zip(*[iter(numbers)] * NUMBERS_PER_ROW, strict=True)
    ]


def digest(entries: Sequence[TraceEntry], rows: Sequence[RowState]) -> float:
    """32 bits over what was done and what is carried on; a whole number."""
    crc = 0
    for entry in entries:
        gamma = math.nan if entry.gamma is None else entry.gamma
        crc = zlib.crc32(struct.pack("<qqbd", entry.step, entry.sample, entry.compute, gamma), crc)
    accumulated, num_pairs = [row.accumulated for row in rows], [row.num_pairs for row in rows]
    crc = zlib.crc32(struct.pack(f"<{len(rows)}d{len(rows)}q", *accumulated, *num_pairs), crc)
    return float(crc)
