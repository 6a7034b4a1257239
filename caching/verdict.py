"""A step's verdict as numbers, so that ranks can be told it; and a digest of it, so that they can compare."""

import math
import struct
import zlib
from collections.abc import Sequence

from cineray.caching.policy import Decision
from cineray.caching.trace import TraceEntry

_LETTERS = 6  # letters of a reason in one number: 48 bits, which a float64 holds exactly
_WORDS = 2
NUMBERS_PER_ROW = 4 + _WORDS


def pack(decisions: Sequence[Decision], gammas: Sequence[float | None]) -> list[float]:
    """`NUMBERS_PER_ROW` numbers for each row of the batch; the reason is cut to twelve letters."""
    numbers: list[float] = []
    for decision, gamma in zip(decisions, gammas, strict=True):
        reason = decision.reason.encode("ascii", "replace").ljust(_LETTERS * _WORDS)
        words = [float(int.from_bytes(reason[i * _LETTERS : (i + 1) * _LETTERS], "big")) for i in range(_WORDS)]
        numbers += [float(decision.compute), float(decision.num_steps), decision.accumulated]
        numbers += [math.nan if gamma is None else gamma, *words]
    return numbers


def unpack(numbers: Sequence[float]) -> tuple[list[Decision], list[float | None]]:
    """The inverse of `pack`; the gamma that a policy forces is among the gammas."""
    decisions: list[Decision] = []
    gammas: list[float | None] = []
    for row in range(0, len(numbers), NUMBERS_PER_ROW):
        compute, num_steps, accumulated, gamma, *words = numbers[row : row + NUMBERS_PER_ROW]
        reason = b"".join(int(word).to_bytes(_LETTERS, "big") for word in words).decode("ascii").rstrip()
        decision = Decision(compute=bool(compute), accumulated=accumulated, reason=reason, num_steps=int(num_steps))
        decisions.append(decision)
        gammas.append(None if math.isnan(gamma) else gamma)
    return decisions, gammas


def digest(entries: Sequence[TraceEntry], accumulated: Sequence[float], num_pairs: Sequence[int]) -> float:
    """32 bits over what was done and what is carried on; a whole number."""
    crc = 0
    for entry in entries:
        gamma = math.nan if entry.gamma is None else entry.gamma
        crc = zlib.crc32(struct.pack("<qqbd", entry.step, entry.sample, entry.compute, gamma), crc)
    crc = zlib.crc32(struct.pack(f"<{len(accumulated)}d{len(num_pairs)}q", *accumulated, *num_pairs), crc)
    return float(crc)
