"""How long the ranks of a node take to exchange a message, from measured tables (data/collectives.json).

Between two measured sizes the rate (bytes a second) is interpolated along the logarithm of the size, never the time;
above the largest its rate holds, below the smallest its time. A number of ranks that was not measured takes the rate of
the next larger one that was.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

from pydantic import TypeAdapter

from cineray.files import read_shaped
from cineray.jobs.planning.gpus import DATA, Gpu
from cineray.pipeline.request import InputError

Kind = Literal["all_to_all", "all_gather", "all_reduce"]


@dataclass(frozen=True, slots=True)
class Collectives:
    """Those of one kind of card on one node.

    Args:
        tables: kind -> number of ranks -> (bytes, seconds), sizes rising.
        factor: what the seconds are multiplied by.
        source: of the table, with the rule by which it holds for this card.
    """

    tables: dict[str, dict[int, tuple[tuple[float, float], ...]]]
    factor: float
    source: str

    @property
    def max_ranks(self) -> int:
        return max(self.tables["all_to_all"])

    def seconds(self, kind: Kind, num_ranks: int, message_bytes: float) -> float:
        """Of one collective.

        Args:
            message_bytes: what a rank holds before an all-to-all or all-reduce, what it holds after an all-gather.

        Raises:
            InputError: more ranks than were measured.
        """
        if num_ranks == 1:
            return 0.0
        measured = min((n for n in self.tables[kind] if n >= num_ranks), default=None)
        if measured is None:
            raise InputError(
                f"no measured {kind.replace('_', '-')} of {num_ranks} ranks, at most {self.max_ranks}; give --study"
            )
        points = self.tables[kind][measured]
        smallest, largest = points[0], points[-1]
        if message_bytes <= smallest[0]:
            return self.factor * smallest[1]
        if message_bytes >= largest[0]:
            return self.factor * message_bytes * largest[1] / largest[0]
        at = next(i for i, point in enumerate(points) if point[0] >= message_bytes)
        (low, low_s), (high, high_s) = points[at - 1], points[at]
        share = math.log(message_bytes / low) / math.log(high / low)
        rate = (1 - share) * low / low_s + share * high / high_s
        return self.factor * message_bytes / rate


def collectives_of(gpu: Gpu) -> Collectives | None:
    """Those that hold for a card, or None: then clips on more than one of it cannot be forecast."""
    if gpu.collectives is None:
        return None
    content = _content()
    system = content["systems"][gpu.collectives]
    tables = {
        kind: {int(n): tuple((size, s) for size, s in points) for n, points in system[kind].items()}
        for kind in ("all_to_all", "all_gather", "all_reduce")
    }
    rule = f"; {gpu.collectives_rule}" if gpu.collectives_rule else ""
    source = f"NCCL {system['nccl']} on {system['device']} ({content['source'].split(',')[0]}){rule}"
    return Collectives(tables, gpu.collectives_factor, source)


@cache
def _content() -> dict[str, Any]:
    return read_shaped(DATA / "collectives.json", TypeAdapter(dict))
