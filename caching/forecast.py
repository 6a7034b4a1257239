"""The seam of *how*: the residual of a skipped step from the residuals of computed ones."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from cineray.caching.observation import AlignmentSums
from cineray.caching.policy import Signal

if TYPE_CHECKING:  # a driver on Ray reads policies, and does without torch
    import torch

# "plan": the policy says where along the line, and nothing is compared
Alignment = Literal["none", "l1", "lsq", "plan"]
Branches = Literal["separate", "joint"]
Base = Literal["input", "probe"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Forecasting:
    """How a skipped step is forecast, and what is kept for it; `DiCacheConfig` explains the fields."""

    alignment: Alignment = "none"
    gamma_clip: tuple[float, float] = (1.0, 1.0)
    base: Base = "input"
    branches: Branches = "separate"
    keep_every: int = 1
    corrector: bool = False

    def keeps_probe_residual(self, signal: Signal) -> bool:
        """Whether anything, the policy's signal included, compares what the probe blocks added at computed steps."""
        return self.follows_probe or self.base == "probe" or signal == "probe-residual"

    @property
    def follows_probe(self) -> bool:
        """Whether a forecast is placed by what the probe blocks add."""
        return self.alignment in ("l1", "lsq")

    @property
    def num_pairs(self) -> int:
        """Computed steps whose residuals a forecast takes."""
        return 1 if self.alignment == "none" else 2


def gamma(sums: AlignmentSums, alignment: Alignment) -> float | None:
    """How far along the line from the older to the newest residual the probe's residual lies.

    DiCache, equation 8, for "l1"; the projection <p - b, a - b> / |a - b|^2 for "lsq".

    Returns:
        A finite number, not yet clipped, or None where the sums do not say (both residuals equal, NaN).
    """
    above, below = (sums.l1_now, sums.l1_span) if alignment == "l1" else (sums.dot, sums.square_span)
    if not below > 0 or not math.isfinite(above) or not math.isfinite(below):
        return None
    return above / below


def streak_gamma(first: float, step: int, clip: tuple[float, float]) -> float:
    """Gamma of a skipped step, within `clip`: it goes on along the line at the pace of the step that was probed.

    Args:
        first: gamma of the step that was probed.
        step: steps since then.
    """
    return min(max(first + (first - 1) * step, clip[0]), clip[1])


def align_residual(newest: torch.Tensor, older: torch.Tensor, gammas: list[float]) -> torch.Tensor:
    """older + gamma (newest - older) for each sample [B, S, D]; DiCache, equation 9."""
    weight = newest.new_tensor(gammas).view(-1, 1, 1)
    return older + weight * (newest - older)
