"""What a gang's ranks take for their exchanges in one computed step: bytes from the forecast, rates from the tables."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

from cineray.distributed.layout import Layout
from cineray.jobs.planning.collectives import Collectives
from cineray.pipeline.footprint.forecast import MemoryByPart, Work


class Forecast(Protocol):
    """`cineray.pipeline.footprint.forecast.forecast`."""

    def __call__(
        self,
        model: str,
        *,
        width: int,
        height: int,
        frames: int,
        cfg: int,
        ring: int,
        ulysses: int,
        cache: str,
        decode: str = "auto",
    ) -> tuple[MemoryByPart, Work]: ...


@dataclass(frozen=True, slots=True)
class Shape:
    """What is denoised: a model at a size."""

    model: str
    width: int
    height: int
    frames: int

    @property
    def text(self) -> str:
        """Of a sound, which has no pixels and whose length changes nothing, the model alone."""
        has_pixels = self.width * self.height > 1
        return f"{self.model} {self.width}x{self.height}x{self.frames}" if has_pixels else self.model


# Attention block by block, whose parts are merged, takes longer than in one kernel: by this share for each turn after
# the first. From one published number, Wan 14B on a ring of 8 H100s: 3.5x (Wan-Video/Wan2.1#314) where Ulysses reaches
# 6.38x: 237 s more, with 153 s of attention and 7 further turns. ChituBench's ring of 2 (data/anchors.json) checks it.
RING_SLOWDOWN = 0.22


@dataclass(frozen=True, slots=True)
class StepExchange:
    """Seconds of one computed step.

    Args:
        ulysses_s: all-to-alls, which everything waits for.
        ring_s: keys and values passed on while attention runs over those that are here.
        num_turns: of the ring; 1 without.
    """

    ulysses_s: float = 0.0
    ring_s: float = 0.0
    num_turns: int = 1

    def added_s(self, attention_s: float) -> float:
        """What it adds to the step's time.

        Args:
            attention_s: of the step on each rank, in one kernel.
        """
        slower_s = attention_s * (1 + RING_SLOWDOWN * (self.num_turns - 1))
        hidden_s = slower_s * (self.num_turns - 1) / self.num_turns  # nothing travels in the last turn
        return self.ulysses_s + (slower_s - attention_s) + max(0.0, self.ring_s - hidden_s)


class WorkOf:
    """The forecast's work of a shape on a layout of one gang; each asked for once.

    Args:
        forecast: as the pipeline has it.
    """

    def __init__(self, forecast: Forecast) -> None:
        self._forecast = forecast
        self._ask = lru_cache(maxsize=4096)(self._ask_forecast)

    def __call__(
        self, shape: Shape, layout: Layout, cache: str = "none", decode: str = "finisher"
    ) -> tuple[MemoryByPart, Work]:
        return self._ask(shape, layout.cfg, layout.ring, layout.ulysses, cache, decode)

    def _ask_forecast(
        self, shape: Shape, cfg: int, ring: int, ulysses: int, cache: str, decode: str
    ) -> tuple[MemoryByPart, Work]:
        return self._forecast(
            shape.model,
            width=shape.width,
            height=shape.height,
            frames=shape.frames,
            cfg=cfg,
            ring=ring,
            ulysses=ulysses,
            cache=cache,
            decode=decode,
        )

    def step_flop(self, shape: Shape) -> float:
        """Of a computed step with all its branches, on one rank."""
        return self(shape, Layout())[1].computed_step_flop

    def attention_share(self, shape: Shape) -> float:
        """Attention's part of a step's operations."""
        work = self(shape, Layout())[1]
        return work.attention_flop / work.computed_step_flop


def step_exchange(work_of: WorkOf, shape: Shape, layout: Layout, collectives: Collectives) -> StepExchange:
    """Seconds that a layout's ranks take for their exchanges in one computed step.

    Args:
        layout: of one gang.

    Raises:
        InputError: more ranks than were measured.
    """
    if layout.ranks_per_gang == 1:
        return StepExchange()
    work = work_of(shape, layout)[1]
    sent, count = work.exchanged_bytes_per_computed_step, work.num_exchanges_per_computed_step
    if layout.ring == 1:
        ranks = max(layout.ulysses, layout.cfg)  # with cfg alone: a swap between its two halves
        return StepExchange(ulysses_s=_all_to_alls(collectives, ranks, sent, count))
    ulysses_s = 0.0
    if layout.ulysses > 1:  # each rank's all-to-alls hold 1 / ring of what they hold without a ring
        alone = work_of(shape, Layout(cfg=layout.cfg, ulysses=layout.ulysses))[1]
        sent_there = alone.exchanged_bytes_per_computed_step / layout.ring
        count_there = alone.num_exchanges_per_computed_step
        ulysses_s = _all_to_alls(collectives, layout.ulysses, sent_there, count_there)
        sent, count = max(0.0, sent - sent_there), max(1, count - count_there)
    # a turn of the ring moves what one turn of an all-gather moves: its neighbour's part
    turn_bytes = sent / count
    turns_s = collectives.seconds("all_gather", layout.ring, layout.ring * turn_bytes) / (layout.ring - 1)
    return StepExchange(ulysses_s=ulysses_s, ring_s=count * turns_s, num_turns=layout.ring)


def _all_to_alls(collectives: Collectives, num_ranks: int, sent_bytes: float, count: int) -> float:
    """Seconds of `count` all-to-alls in which a rank sends `sent_bytes` to others, altogether."""
    message = sent_bytes / count * num_ranks / (num_ranks - 1)  # with what it keeps
    return count * collectives.seconds("all_to_all", num_ranks, message)
