"""The seam of *how*: the residual of a skipped step from the residuals of computed ones."""

import math

import torch

from cineray.caching.dicache import Alignment
from cineray.caching.observation import AlignmentSums


def gamma(sums: AlignmentSums, alignment: Alignment, clip: tuple[float, float]) -> float | None:
    """How far along the line from the older to the newest residual the forecast lies.

    DiCache, equation 8, for "l1"; the projection <p - b, a - b> / |a - b|^2 for "lsq".

    Returns:
        A finite number within `clip`, or None where the sums do not say (both residuals equal, NaN).
    """
    above, below = (sums.l1_now, sums.l1_span) if alignment == "l1" else (sums.dot, sums.square_span)
    if not below > 0 or not math.isfinite(above) or not math.isfinite(below):
        return None
    return min(max(above / below, clip[0]), clip[1])


def forecast_residual(newest: torch.Tensor, older: torch.Tensor | None, gammas: list[float]) -> torch.Tensor:
    """older + gamma (newest - older) for each sample [B, ...]; the newest where there is only one."""
    if older is None:
        return newest
    weight = torch.tensor(gammas, dtype=newest.dtype, device=newest.device).view(-1, *[1] * (newest.ndim - 1))
    return older + weight * (newest - older)
