"""How far the law of a clip's time is from what was published: cells that it has not seen, table by table."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from cineray.jobs.planning.anchors import Cell, LawOf, Table
from cineray.jobs.planning.cost_model import CostModel, fit, from_one, split_fixed
from cineray.jobs.planning.schedule import makespan_s

NODE_GPUS = 8  # layouts of a table are compared as gangs that fill a node


@dataclass(frozen=True, slots=True)
class Miss:
    """A cell that a law did not see.

    Args:
        error: relative; above 0 where the law says more seconds than were published.
    """

    cell: Cell
    predicted_s: float

    @property
    def error(self) -> float:
        return self.predicted_s / self.cell.seconds - 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Checked:
    """One table against the law.

    Args:
        left_out: each cell, from a fit to all others.
        from_ends: the cells between, from a fit to the smallest and the largest gang.
        from_one: all other cells, from the smallest gang's alone.
        serial_share: that `from_one` used: fitted to the other tables.
        published_best, predicted_best: ranks of a gang with most clips per hour; predicted from the two ends.
    """

    table: Table
    left_out: tuple[Miss, ...]
    from_ends: tuple[Miss, ...]
    from_one: tuple[Miss, ...]
    serial_share: float
    published_best: int
    predicted_best: int


def scaling_tables(tables: Iterable[Table]) -> list[Table]:
    """Those with three sizes of gang and more: a law can be fitted, and something is left to check it with."""
    return [t for t in tables if len({c.layout.ranks_per_gang for c in t.cells}) > 2]


def pairs(tables: Iterable[Table]) -> list[Table]:
    """Those with one card and one larger gang."""
    return [t for t in tables if len({c.layout.ranks_per_gang for c in t.cells}) == 2]


def check(tables: Sequence[Table], law_of: LawOf) -> list[Checked]:
    """Every scaling table; the serial share that one card's cell needs is fitted to the others without a doubt."""
    scaling = scaling_tables(tables)
    sure = undoubted(scaling)
    return [_checked(t, law_of, fit_serial_share([o for o in sure if o is not t], law_of)) for t in scaling]


def undoubted(tables: Iterable[Table]) -> list[Table]:
    """Those that something may be fitted to."""
    return [t for t in tables if not t.doubt]


def fit_serial_share(tables: Sequence[Table], law_of: LawOf) -> float:
    """The one serial share with which the smallest gangs' cells predict all others best.

    Least squares of the logarithms, every table with the same weight.
    """
    from scipy.optimize import minimize_scalar

    def loss(share: float) -> float:
        return sum(
            statistics.fmean(math.log1p(miss.error) ** 2 for miss in single_cell(t, law_of, share)) for t in tables
        )

    return float(minimize_scalar(loss, bounds=(0.0, 0.2), method="bounded", options={"xatol": 1e-5}).x)  # type: ignore[attr-defined]


def single_cell(table: Table, law_of: LawOf, serial_share: float) -> tuple[Miss, ...]:
    """All other cells from the smallest gang's alone."""
    first, *rest = _by_ranks(table)
    model = from_one(law_of.timed(table, [first])[0], law_of.fixed_s(table), serial_share)
    return tuple(Miss(cell, law_of.predicted_s(table, cell, model)) for cell in rest)


def cached_from(base: Table, cached: Table, law_of: LawOf) -> tuple[Miss, ...]:
    """A cached table from the uncached one of the same clips, and the share of steps that the cache computes alone.

    What a skipped step still takes is left out: the share is made from the speed-up on one card, which has it in it.
    """
    uncached = split_fixed(fit(law_of.timed(base, _by_ranks(base))), law_of.fixed_s(base))
    model = uncached.with_work(cached.computed_share)
    return tuple(Miss(cell, law_of.predicted_s(cached, cell, model)) for cell in _by_ranks(cached))


def worst(misses: Iterable[Miss]) -> float:
    """The largest relative error."""
    return max(abs(miss.error) for miss in misses)


def median(misses: Iterable[Miss]) -> float:
    """The median of the relative errors."""
    return statistics.median(abs(miss.error) for miss in misses)


def node_makespan_s(table: Table, num_clips: int, num_ranks: int) -> float:
    """Of equal clips on a node full of gangs of so many ranks, by the published seconds."""
    cell = next(c for c in table.cells if c.layout.ranks_per_gang == num_ranks)
    return makespan_s([(cell.seconds, num_clips)], NODE_GPUS // num_ranks)


def _checked(table: Table, law_of: LawOf, serial_share: float) -> Checked:
    cells = _by_ranks(table)
    ends = _ends(table, law_of)

    def predicted(cell: Cell) -> float:
        is_seen = cell in (cells[0], cells[-1])
        return cell.seconds if is_seen else law_of.predicted_s(table, cell, ends)

    return Checked(
        table=table,
        left_out=tuple(_left_out(table, cell, law_of) for cell in cells),
        from_ends=tuple(Miss(cell, predicted(cell)) for cell in cells[1:-1]),
        from_one=single_cell(table, law_of, serial_share),
        serial_share=serial_share,
        published_best=_best(cells, lambda cell: cell.seconds),
        predicted_best=_best(cells, predicted),
    )


def _left_out(table: Table, cell: Cell, law_of: LawOf) -> Miss:
    rest = [c for c in _by_ranks(table) if c is not cell]
    return Miss(cell, law_of.predicted_s(table, cell, fit(law_of.timed(table, rest))))


def _ends(table: Table, law_of: LawOf) -> CostModel:
    cells = _by_ranks(table)
    return fit(law_of.timed(table, [cells[0], cells[-1]]))


def _best(cells: Sequence[Cell], seconds: Callable[[Cell], float]) -> int:
    """Ranks of the gang that spends the fewest GPU-seconds on a clip."""
    return min(cells, key=lambda cell: cell.layout.ranks_per_gang * seconds(cell)).layout.ranks_per_gang


def _by_ranks(table: Table) -> list[Cell]:
    """Rising; of two with as many ranks the faster one last, so that the largest gang's best cell is the end."""
    return sorted(table.cells, key=lambda c: (c.layout.ranks_per_gang, -c.seconds))
