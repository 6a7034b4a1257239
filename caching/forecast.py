"""The seam of *how*: the residual of a skipped step from the residuals of computed ones."""

from __future__ import annotations

import math
from collections.abc import Sequence
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
# What is forecast: what all blocks add, or the clean latents that the step's output leads to
Target = Literal["residual", "clean_latents"]
# What of the variance of clean latents is each step's own: slows the pace between neighbours by 12 %.
# That of the searches on tiny-wan and tiny-hunyuan, which found the lengths
_NOISE = 2.8e-4
_SHIFT = 3.0  # of the schedules that profiles of `fitted` are given in: the tiny models' own, and Wan's at 480p


@dataclass(frozen=True, kw_only=True, slots=True)
class Forecasting:
    """How a skipped step is forecast, and what is kept for it; `DiCacheConfig` explains the fields.

    Args:
        length: over which clean latents stay alike, as a share of the clip (`places_of`); above 0 where they are
            forecast.
        curvature: what the corrector puts between computed steps: 0 a straight line, 1 a cubic.
    """

    alignment: Alignment = "none"
    gamma_clip: tuple[float, float] = (1.0, 1.0)
    base: Base = "input"
    branches: Branches = "separate"
    keep_every: int = 1
    corrector: bool = False
    target: Target = "residual"
    length: float = 0.0
    curvature: float = 0.0

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


def places_of(num_steps: int, sigmas: Sequence[float] | None) -> list[float]:
    """Where each step lies in its clip, from 0 to 1: the same place is the same noise, however a schedule is shifted.

    As the step's number does for a schedule shifted by `_SHIFT` (sigma = shift t / (1 + (shift - 1) t), t falling
    evenly; Esser et al. 2024, arXiv 2403.03206, section 5.3.2).

    Args:
        sigmas: noise level of each step, falling; None: even steps.
    """
    if sigmas is None or len(sigmas) != num_steps or num_steps < 2:
        return [step / max(1, num_steps - 1) for step in range(num_steps)]
    times = [sigma / (_SHIFT - (_SHIFT - 1) * sigma) for sigma in sigmas]
    return [(times[0] - time) / (times[0] - times[-1]) for time in times]


def damped_gamma(ahead: float, apart: float) -> float:
    """How far along the line through two computed steps the clean latents of a later one are best looked for.

    Least squares for a process of unknown level whose covariance is exp(-d^2 / 2) over a distance of d lengths
    (Gaussian process regression; Rasmussen and Williams 2006, section 2.7): close by it goes on nearly at the line's
    pace, ever less so further on.

    Args:
        ahead, apart: of the step from the newer one, and of this from the older one, in lengths.
    """

    def alike(distance: float) -> float:
        return math.exp(-0.5 * distance**2)

    moved = alike(ahead) - alike(ahead + apart) - 1 + alike(apart)
    return 1 + (moved - _NOISE) / (2 * (1 - alike(apart) + _NOISE))


def align_residual(newest: torch.Tensor, older: torch.Tensor, gammas: list[float]) -> torch.Tensor:
    """older + gamma (newest - older) for each sample [B, S, D]; DiCache, equation 9."""
    weight = newest.new_tensor(gammas).view(-1, 1, 1)
    return older + weight * (newest - older)
