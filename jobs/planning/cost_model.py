"""The law of a clip's time on a gang: T(g) = fixed + work / g + serial share x work + exchange(g).

`fixed` is what one rank does while the others wait (text, decode, encode), `work` what the gang shares, all of it on
one GPU. The serial share is the part of the work that does not get shorter with more ranks: what is replicated, and
what kernels lose as their share of the tokens shrinks. With two cells or more, fixed and work are fitted to them by
least squares of the relative error, and the serial share is what the fit finds fixed beyond the forecast text and
decode. With one cell it cannot be seen, and SERIAL_SHARE stands in.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

# Fitted, the only number here that is: least squares of the logarithms over the published tables of data/anchors.json,
# from each table's one-GPU cell to its other cells. scripts/planner_truth.py fits it again and checks it, and prints
# each table's error with the value that the *other* tables give.
SERIAL_SHARE = 0.018
# Operations of a float32 VAE's decode a second, as a share of the card's bf16 rate; of a bf16 VAE twice that, since
# TF32 has half of bf16's rate. Published for Wan's, float32, at 720p (639 TFLOP): 9.6 s (sglang#18540, card not
# named, if an H100 6.7 %) and 26 s on an H20 (sglang#16510, 16.6 %).
DECODE_UTILISATION = 0.10
TEXT_UTILISATION = 0.40  # a prompt is a thousandth of a clip: any value between 0.1 and 1 gives the same plan


@dataclass(frozen=True, kw_only=True, slots=True)
class CostModel:
    """Seconds of one clip.

    Args:
        fixed_s: on one rank while the others wait.
        work_s: shared by the ranks; on one GPU.
        serial_share: of the work, on top of it, that all ranks do alike.
    """

    fixed_s: float
    work_s: float
    serial_share: float = 0.0

    def clip_s(self, num_ranks: int, exchange_s: float = 0.0) -> float:
        return self.fixed_s + self.denoise_s(num_ranks, exchange_s)

    def denoise_s(self, num_ranks: int, exchange_s: float = 0.0) -> float:
        return self.work_s * (1 / num_ranks + self.serial_share) + exchange_s

    def with_work(self, factor: float) -> CostModel:
        """For so many times as much to denoise: other steps, a cache, one guidance branch."""
        return replace(self, work_s=self.work_s * factor)


@dataclass(frozen=True, slots=True)
class Timed:
    """A clip whose seconds are known, and what its ranks take for their exchanges by the tables."""

    num_ranks: int
    seconds: float
    exchange_s: float = 0.0


def fit(cells: Sequence[Timed]) -> CostModel:
    """Fixed part and work, neither below zero, that give the cells with the least relative error.

    Args:
        cells: two or more, of different numbers of ranks.
    """
    import numpy as np
    from scipy.optimize import nnls

    if len({cell.num_ranks for cell in cells}) < 2:
        raise ValueError("a fit needs cells of two different numbers of ranks")
    rows = np.array([[1 / c.seconds, 1 / (c.num_ranks * c.seconds)] for c in cells])
    rest = np.array([max(0.0, c.seconds - c.exchange_s) / c.seconds for c in cells])
    (fixed, work), _ = nnls(rows, rest)
    return CostModel(fixed_s=float(fixed), work_s=float(work))


def from_one(cell: Timed, fixed_s: float, serial_share: float = SERIAL_SHARE) -> CostModel:
    """The same from one cell.

    Args:
        fixed_s: a forecast; held below the cell's own seconds.
    """
    fixed_s = min(fixed_s, 0.9 * cell.seconds)
    shared = max(0.0, cell.seconds - cell.exchange_s - fixed_s)
    work_s = shared / (1 / cell.num_ranks + serial_share)
    return CostModel(fixed_s=fixed_s, work_s=work_s, serial_share=serial_share)


def split_fixed(fitted: CostModel, fixed_s: float) -> CostModel:
    """The same law, what is fixed beyond a forecast of text and decode taken as a share of the work.

    So it can be carried over to other steps and sizes: what is serial grows with the work, a decode does not.
    """
    if fitted.work_s == 0 or fitted.fixed_s <= fixed_s:
        return fitted
    beyond = fitted.fixed_s - fixed_s
    return CostModel(fixed_s=fixed_s, work_s=fitted.work_s, serial_share=fitted.serial_share + beyond / fitted.work_s)
