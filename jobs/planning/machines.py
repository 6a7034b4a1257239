"""What there is to render on, as a plan sees it: how many ranks each node has room for, and on which card."""

from __future__ import annotations

import os
from dataclasses import dataclass

from cineray.jobs.threads import rank_threads
from cineray.pipeline.loading.device import cuda_devices


@dataclass(frozen=True, kw_only=True, slots=True)
class Machines:
    """The machines at hand.

    Args:
        device: "cpu" or "cuda".
        card: the GPUs' name, as their maker or Ray gives it; empty on CPUs, or where nobody knows.
        places: ranks that each node has room for: one a GPU, or the cores over a rank's threads.
    """

    device: str
    card: str
    places: tuple[int, ...]

    @property
    def num_places(self) -> int:
        return sum(self.places)

    @property
    def text(self) -> str:
        """`8 x NVIDIA H100 on 1 node`."""
        what = (self.card or "GPU") if self.device == "cuda" else ("core" if self.num_places == 1 else "cores")
        number = f"{self.num_places} {what}" if self.device == "cpu" else f"{self.num_places} x {what}"
        return f"{number} on {len(self.places)} {'node' if len(self.places) == 1 else 'nodes'}"

    def gangs_of(self, num_ranks: int) -> int:
        """Gangs of so many ranks, each on one node, that there is room for."""
        return sum(places // num_ranks for places in self.places)


def machines_here(device: str) -> Machines:
    """This machine alone."""
    if device == "cuda":
        names = cuda_devices()
        return Machines(device=device, card=names[0] if names else "", places=(len(names),))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return Machines(device=device, card="", places=(max(1, cores // rank_threads()),))
