"""Where a clip's seconds come from. In this order, the first that has something to say counts:

1. a study's clips and laws (`--study`), 2. the sidecars of an earlier run (`--out`), 3. published tables, 4. operations
over the card's rate at the utilisation that a published table of this card, else of another, has reached. What none of
them covers is refused. Utilisation is carried over and interpolated, never seconds.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from cineray.distributed.layout import Layout
from cineray.jobs.planning.anchors import LawOf, Table, clip_exchange_s, decode_s, text_s
from cineray.jobs.planning.collectives import Collectives, collectives_of
from cineray.jobs.planning.cost_model import SERIAL_SHARE, CostModel, Timed, fit, from_one, split_fixed
from cineray.jobs.planning.exchange import Shape, WorkOf
from cineray.jobs.planning.gpus import Gpu, known_gpus
from cineray.jobs.planning.sidecars import PastClips
from cineray.jobs.planning.study_file import Study, StudyFit, exchanges_of
from cineray.pipeline.footprint.published import published_checkpoint
from cineray.pipeline.request import InputError

# Engines whose seconds stand for cineray's: the authors' own code and diffusers, whose modules cineray runs. Others
# compile, quantize or fuse, and cineray would not reach their times.
LIKE_OURS = ("Wan2.1 generate.py", "xDiT", "diffusers", "DSP")


@dataclass(frozen=True, slots=True)
class ClipKind:
    """Clips that take equally long.

    Args:
        num_branches: calls of the transformer per step.
        cache: the policy as it is typed; "none" without.
        policy: the same with all its options, as a sidecar has it.
        computed_share: of the steps, with this cache; None where nobody said.
    """

    shape: Shape
    steps: int
    num_branches: int
    cache: str = "none"
    policy: str = "none"
    computed_share: float | None = None

    @property
    def text(self) -> str:
        cache = "" if self.cache == "none" else f", {self.cache.split('(')[0]}"
        return f"{self.shape.text}, {self.steps} steps{cache}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Estimate:
    """Seconds of one clip of a kind on one layout.

    Args:
        step_s: of a step, skipped ones included in the mean.
        source: in a few words, where it comes from.
    """

    clip_s: float
    step_s: float
    source: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Law:
    """A kind's law with what is known of single layouts.

    Args:
        steps: of the clip.
        computed_steps: those that exchange everything.
        known: (clip, denoising) seconds by layout of one gang, as they were measured or published.
        exchanges: seconds that exchanges add to a clip, by layout, where they were fitted.
        decode_s: what a decode by rows divides by the ranks; a part of the law's fixed seconds.
    """

    model: CostModel
    steps: int
    computed_steps: float
    source: str
    known: Mapping[Layout, tuple[float, float]] = field(default_factory=dict)
    known_source: str = ""
    exchanges: Mapping[Layout, float] = field(default_factory=dict)
    decode_s: float = 0.0


class Evidence:
    """All that is known of one model on one card.

    Args:
        past: clips of an earlier run's folder.
    """

    def __init__(
        self,
        gpu: Gpu,
        work_of: WorkOf,
        tables: Sequence[Table],
        studies: Sequence[Study] = (),
        past: Sequence[PastClips] = (),
    ) -> None:
        self.gpu, self.work_of = gpu, work_of
        self.collectives: Collectives | None = collectives_of(gpu)
        self._law_of = LawOf(work_of)
        self._tables, self._studies, self._past = tables, studies, past
        self._laws: dict[ClipKind, Law] = {}

    def estimate(self, kind: ClipKind, layout: Layout, decode: str) -> Estimate:
        """Seconds of a clip.

        Args:
            layout: of one gang.

        Raises:
            InputError: nothing is known of such clips, or of such exchanges.
        """
        law = self.law(kind)
        ranks = layout.ranks_per_gang
        saved_s = min(law.decode_s, law.model.fixed_s) * (1 - 1 / ranks) if decode == "gang" else 0.0
        if layout in law.known:
            clip_s, denoise_s = law.known[layout]
            return Estimate(clip_s=clip_s - saved_s, step_s=denoise_s / law.steps, source=law.known_source)
        denoise_s = self._denoise_s(kind, layout, law)
        source = law.source
        near = next((known for known in law.known if known.ranks_per_gang == ranks), None)
        if near is not None:  # what the law misses there, it misses here: ranks count more than how they share
            denoise_s *= law.known[near][1] / self._denoise_s(kind, near, law)
            source = f"{law.source}, through its cell of {ranks} ranks"
        return Estimate(clip_s=law.model.fixed_s + denoise_s - saved_s, step_s=denoise_s / law.steps, source=source)

    def law(self, kind: ClipKind) -> Law:
        """The law of a kind from the first source that has one.

        Raises:
            InputError: none has.
        """
        if kind not in self._laws:
            self._laws[kind] = next(self._found(kind))
        return self._laws[kind]

    def _found(self, kind: ClipKind) -> Iterator[Law]:
        yield from self._from_studies(kind)
        yield from self._from_past(kind)
        if kind.cache != "none" and kind.computed_share is None:
            raise InputError(
                f"{kind.text}: nothing says how many steps this cache computes; give --computed-share, or the --out "
                "of a run with it"
            )
        yield from self._from_tables(kind)
        yield self._from_rate(kind)

    # -- 1, 2: measured here

    def _from_studies(self, kind: ClipKind) -> Iterator[Law]:
        for fitted in (f for study in self._studies for f in study.fits):
            if fitted.gpu != self.gpu.name or fitted.cache not in (kind.cache, kind.policy) or not is_of(fitted, kind):
                continue
            rows = {row.layout: (row.clip_s, row.denoise_s) for row in fitted.rows}
            factor = kind.steps / fitted.steps
            error = "" if fitted.heldout_error is None else f", {fitted.heldout_error:.1%} off on held-out cells"
            yield Law(
                model=CostModel(fixed_s=fitted.fixed_s, work_s=fitted.work_s).with_work(factor),
                steps=kind.steps,
                computed_steps=kind.steps * fitted.computed_share,
                source=f"fitted to measured clips on {fitted.device}{error}",
                known=rows if factor == 1 else {},
                known_source=f"measured on {fitted.device}",
                exchanges={layout: s * factor for layout, s in exchanges_of(fitted)},
                decode_s=self._decode_s(kind),
            )

    def _from_past(self, kind: ClipKind) -> Iterator[Law]:
        same = [p for p in self._past if _is_past_of(p, kind)]
        if not same:
            return
        share = same[0].computed_share
        computed = kind.steps * share
        fixed_s = min(p.fixed_s for p in same)
        work_s = max(p.denoise_s * p.kind.layout.ranks_per_gang for p in same)
        cells = [
            Timed(
                p.kind.layout.ranks_per_gang,
                p.denoise_s,
                self._table_exchange_s(kind.shape, p.kind.layout, computed, work_s),
            )
            for p in same
        ]
        if len({cell.num_ranks for cell in cells}) > 1:
            law = fit(cells)
            model = CostModel(fixed_s=law.fixed_s + fixed_s, work_s=law.work_s)
        else:
            law = from_one(cells[0], 0.0)
            model = CostModel(fixed_s=fixed_s, work_s=law.work_s, serial_share=law.serial_share)
        count = sum(p.num_clips for p in same)
        yield Law(
            model=model,
            steps=kind.steps,
            computed_steps=computed,
            source=f"law of {count} earlier clips (sidecars), taken to be of this card",
            known={p.kind.layout: (p.clip_s, p.denoise_s) for p in same},
            known_source=f"{count} earlier clips (sidecars), taken to be of this card",
            decode_s=fixed_s,
        )

    # -- 3: published

    def _from_tables(self, kind: ClipKind) -> Iterator[Law]:
        for table in self._usable():
            if table.shape != kind.shape or (2 if table.guided else 1) != kind.num_branches:
                continue
            law = self._table_law(table)
            around_s = self._fixed_s(kind) if table.covers == "denoising" else 0.0
            # what a cache leaves of the work, at the same utilisation
            left, computed = self._left_of(kind)
            is_same = table.steps == kind.steps and kind.cache == "none"
            known = {c.layout: (c.seconds + around_s, c.seconds - law.fixed_s) for c in table.cells} if is_same else {}
            how = "law of" if len(table.cells) > 1 else "one cell of"
            yield Law(
                model=replace(law, fixed_s=law.fixed_s + around_s).with_work(left * kind.steps / table.steps),
                steps=kind.steps,
                computed_steps=computed,
                source=f"{how} {table.cited}",
                known=known,
                known_source=f"published: {table.cited}",
                decode_s=self._decode_s(kind),
            )

    def _from_rate(self, kind: ClipKind) -> Law:
        """Operations over the card's rate, at the utilisation of the tables that are nearest."""
        flop = self.work_of.step_flop(kind.shape) * kind.num_branches / self._max_branches(kind.shape)
        utilisation, serial_share, source = self._utilisation(kind.shape, flop)
        left, computed = self._left_of(kind)
        work_s = left * kind.steps * flop / (self.gpu.bf16_flop_s * utilisation)
        return Law(
            model=CostModel(fixed_s=self._fixed_s(kind), work_s=work_s, serial_share=serial_share),
            steps=kind.steps,
            computed_steps=computed,
            source=source,
            decode_s=self._decode_s(kind),
        )

    def _utilisation(self, shape: Shape, flop: float) -> tuple[float, float, str]:
        """(share of the card's rate, serial share, source) for a step of so many operations.

        Between two published tables of the card the utilisation runs along the logarithm of a step's operations;
        beyond them the nearest one's holds. A card without tables takes those of the card whose rate is nearest: the
        faster a card, the less of its rate is reached.
        """
        card = self._nearest_card()
        if card is None:
            raise InputError(f"{shape.text}: nothing is known of its speed on {self.gpu.title}; give --study")
        points = sorted(self._points(card), key=lambda p: p[0])
        shares = self._serial_shares(card)
        serial_share = shares[len(shares) // 2] if shares else SERIAL_SHARE
        of = "" if card == self.gpu.name else f" of {card}, the nearest card with published tables"
        below = [p for p in points if p[0] <= flop]
        above = [p for p in points if p[0] > flop]
        if below and above:
            (x0, u0, t0), (x1, u1, t1) = below[-1], above[0]
            at = math.log(flop / x0) / math.log(x1 / x0)
            value = (1 - at) * u0 + at * u1
            return value, serial_share, f"roofline at {value:.0%} of peak, between {t0.id} and {t1.id}{of}"
        _, value, table = below[-1] if below else above[0]
        return value, serial_share, f"roofline at {value:.0%} of peak, as {table.cited}{of}"

    def _nearest_card(self) -> str | None:
        """This card, if it has tables, else the one with tables whose rate is nearest."""
        cards = {name: known_gpus()[name] for name in {t.gpu for t in self._tables if t.gpu} if any(self._usable(name))}
        distance = {name: abs(math.log(c.bf16_flop_s / self.gpu.bf16_flop_s)) for name, c in cards.items()}
        return min(distance, key=lambda name: (name != self.gpu.name, distance[name], name), default=None)

    def _points(self, gpu: str) -> Iterator[tuple[float, float, Table]]:
        """(operations of a step, utilisation, table) of a card's uncached tables."""
        for table in self._usable(gpu):
            shape, card = table.shape, table.card
            if shape is None or card is None:
                continue
            flop = self.work_of.step_flop(shape) * (2 if table.guided else 1) / self._max_branches(shape)
            work_s = self._table_law(table).work_s
            yield flop, flop * table.steps / work_s / card.bf16_flop_s, table

    def _usable(self, gpu: str | None = None) -> Iterator[Table]:
        for table in self._tables:
            is_like_ours = not table.engine or table.engine in LIKE_OURS
            if is_like_ours and table.cache == "none" and table.model and table.gpu == (gpu or self.gpu.name):
                yield table

    def _table_law(self, table: Table) -> CostModel:
        fixed_s = self._law_of.fixed_s(table)
        cells = self._law_of.timed(table, table.cells)
        return split_fixed(fit(cells), fixed_s) if len(cells) > 1 else from_one(cells[0], fixed_s)

    def _serial_shares(self, gpu: str) -> list[float]:
        tables = [table for table in self._usable(gpu) if len(table.cells) > 1]
        return sorted(self._table_law(table).serial_share for table in tables)

    # -- parts

    def _left_of(self, kind: ClipKind) -> tuple[float, float]:
        """(share of the uncached work that is left, computed steps)."""
        if kind.cache == "none" or kind.computed_share is None:
            return 1.0, float(kind.steps)
        work = self.work_of(kind.shape, Layout(), kind.cache)[1]
        skipped = work.skipped_step_flop / work.computed_step_flop
        share = kind.computed_share
        return share + (1 - share) * skipped, kind.steps * (share + (1 - share) * skipped)

    def _denoise_s(self, kind: ClipKind, layout: Layout, law: Law) -> float:
        """By the law, with the exchange that was fitted, else that of the tables of collectives."""
        exchange_s = law.exchanges.get(layout)
        if exchange_s is None:
            exchange_s = self._exchange_s(kind, layout, law)
        return law.model.denoise_s(layout.ranks_per_gang, exchange_s)

    def _exchange_s(self, kind: ClipKind, layout: Layout, law: Law) -> float:
        branches = kind.num_branches / self._max_branches(kind.shape)
        steps = law.computed_steps * branches
        return self._table_exchange_s(kind.shape, layout, steps, law.model.work_s)

    def _table_exchange_s(self, shape: Shape, layout: Layout, steps: float, work_s: float) -> float:
        if layout.ranks_per_gang == 1:
            return 0.0
        if self.collectives is None:
            raise InputError(
                f"layout {layout.text}: nobody has published how fast {self.gpu.title} cards exchange; give --study"
            )
        return clip_exchange_s(self.work_of, shape, layout, self.collectives, steps, work_s)

    def _decode_s(self, kind: ClipKind) -> float:
        return decode_s(self.work_of, kind.shape, self.gpu)

    def _fixed_s(self, kind: ClipKind) -> float:
        return self._decode_s(kind) + text_s(self.work_of, kind.shape, self.gpu)

    def _max_branches(self, shape: Shape) -> int:
        return num_branches_of(shape.model)


def num_branches_of(model: str) -> int:
    """Calls of the transformer per step of a guided clip."""
    return published_checkpoint(model).num_calls


def is_of(fitted: StudyFit, kind: ClipKind) -> bool:
    """Whether a study's fit is of such clips; steps and cache apart."""
    shape = Shape(fitted.model, fitted.width, fitted.height, fitted.frames)
    return shape == kind.shape and (2 if fitted.guided else 1) == kind.num_branches


def _is_past_of(past: PastClips, kind: ClipKind) -> bool:
    k = past.kind
    shape = Shape(k.model, k.width, k.height, k.frames)
    return (shape, k.steps, k.num_branches, k.cache) == (kind.shape, kind.steps, kind.num_branches, kind.policy)
