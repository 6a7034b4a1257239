"""Published seconds of clips by layout (data/anchors.json), and the law that a table's cells follow."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from cineray.distributed.layout import Layout
from cineray.files import read_shaped
from cineray.jobs.planning.collectives import Collectives, collectives_of
from cineray.jobs.planning.cost_model import DECODE_UTILISATION, TEXT_UTILISATION, CostModel, Timed
from cineray.jobs.planning.exchange import Shape, StepExchange, WorkOf, step_exchange
from cineray.jobs.planning.gpus import DATA, Gpu, known_gpus
from cineray.pipeline.footprint.published import published_checkpoint

_Degree = Annotated[int, Field(ge=1)]
_Seconds = Annotated[float, Field(gt=0)]


class Cell(BaseModel):
    """One layout of one gang and its seconds."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    cfg: _Degree
    ring: _Degree
    ulysses: _Degree
    seconds: _Seconds

    @property
    def layout(self) -> Layout:
        return Layout(cfg=self.cfg, ring=self.ring, ulysses=self.ulysses)


class Table(BaseModel):
    """Cells that differ in their layout alone.

    Args:
        model: a name of `cineray models`; None for one that cineray does not render.
        guided: two branches a step.
        gpu: a name of gpus.json; None where the source does not say.
        computed_share: of the steps; below 1 with a cache.
        covers: what the seconds are of.
        published: a date, as far as it is known.
        doubt: why nothing is fitted to it; empty where something may be.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: str
    title: str
    model: str | None
    width: int
    height: int
    frames: int
    steps: _Degree
    guided: bool
    gpu: str | None
    cache: str
    computed_share: Annotated[float, Field(gt=0, le=1)]
    covers: Literal["clip", "denoising"]
    engine: str
    source: str
    published: str | None
    note: str
    doubt: str
    cells: tuple[Cell, ...]

    @property
    def shape(self) -> Shape | None:
        return None if self.model is None else Shape(self.model, self.width, self.height, self.frames)

    @property
    def card(self) -> Gpu | None:
        return None if self.gpu is None else known_gpus()[self.gpu]

    @property
    def cited(self) -> str:
        """The source and its date in a few words."""
        return f"{self.title}, {self.published}" if self.published else self.title


class NodeLayout(BaseModel):
    """A whole node filled with gangs of one kind."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    ranks: _Degree
    seconds: _Seconds
    gib: _Seconds
    videos_per_hour_per_gpu: _Seconds


class WholeNode(BaseModel):
    """Published throughput of one node by how it is shared out."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    title: str
    source: str
    published: str
    num_gpus: _Degree
    layouts: tuple[NodeLayout, ...]


class Anchors(BaseModel):
    """The whole file."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: Literal[1]
    about: str
    read: str
    tables: tuple[Table, ...]
    whole_node: WholeNode


@cache
def published() -> Anchors:
    """What ships."""
    return read_shaped(DATA / "anchors.json", TypeAdapter(Anchors))


class LawOf:
    """What the forecast and the collectives say of published tables, so that a law can be fitted to their cells."""

    def __init__(self, work_of: WorkOf) -> None:
        self.work_of = work_of

    def fixed_s(self, table: Table) -> float:
        """Text and decode, forecast; 0 where the seconds are of the denoising alone, or nothing can be said."""
        if table.covers == "denoising" or table.card is None or table.shape is None:
            return 0.0
        return decode_s(self.work_of, table.shape, table.card) + text_s(self.work_of, table.shape, table.card)

    def exchange_s(self, table: Table, cell: Cell, work_s: float) -> float:
        """Of a clip on a cell's layout.

        Args:
            work_s: the clip's on one GPU, which a ring's exchange hides behind.
        """
        if table.shape is None:
            return 0.0
        collectives = None if table.card is None else collectives_of(table.card)
        return clip_exchange_s(
            self.work_of, table.shape, cell.layout, collectives, table.steps * table.computed_share, work_s
        )

    def timed(self, table: Table, cells: Sequence[Cell]) -> list[Timed]:
        """Cells with their exchanges. The work that a ring hides behind is taken from the first cell's seconds."""
        first = cells[0]
        work_s = max(0.0, first.seconds - self.fixed_s(table)) * first.layout.ranks_per_gang
        return [Timed(c.layout.ranks_per_gang, c.seconds, self.exchange_s(table, c, work_s)) for c in cells]

    def predicted_s(self, table: Table, cell: Cell, model: CostModel) -> float:
        """What a law says of a cell."""
        return model.clip_s(cell.layout.ranks_per_gang, self.exchange_s(table, cell, model.work_s))


def decode_s(work_of: WorkOf, shape: Shape, gpu: Gpu) -> float:
    """Of one clip on one card, at DECODE_UTILISATION."""
    is_float32 = published_checkpoint(shape.model).adapter.vae_dtype == "float32"
    utilisation = DECODE_UTILISATION * (1 if is_float32 else 2)
    return work_of(shape, Layout())[1].decode_flop / (gpu.bf16_flop_s * utilisation)


def text_s(work_of: WorkOf, shape: Shape, gpu: Gpu) -> float:
    """Of one clip's prompts on one card, at TEXT_UTILISATION."""
    return work_of(shape, Layout())[1].text_flop / (gpu.bf16_flop_s * TEXT_UTILISATION)


def clip_exchange_s(
    work_of: WorkOf, shape: Shape, layout: Layout, collectives: Collectives | None, computed_steps: float, work_s: float
) -> float:
    """What exchanges add to a clip.

    Args:
        collectives: None where they are not known: then a ring's slower attention alone.
        computed_steps: those that exchange.
        work_s: of all of them on one GPU; a ring slows its attention, and hides behind it.
    """
    step = StepExchange(num_turns=layout.ring)
    if collectives is not None:
        step = step_exchange(work_of, shape, layout, collectives)
    attention_s = 0.0
    if layout.ring > 1:
        attention_s = work_of.attention_share(shape) * work_s / layout.ranks_per_gang / computed_steps
    return computed_steps * step.added_s(attention_s)
