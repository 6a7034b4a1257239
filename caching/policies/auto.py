"""`auto(psnr>=30)`, `auto(speedup=2.5)`: the setting of `fitted` that a model's quality profile promises this of."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cineray.caching.plan import CachePlan, ModelFacts, check_field
from cineray.caching.policies.fitted import MAX_SPEEDUP, FittedConfig
from cineray.caching.profile import QualityPoint, QualityProfile, find_profile

CONFIDENCE = 0.95  # that a clip which nobody has seen keeps the floor
# A cliff: the next faster setting loses so much that the one before it may be at its edge. 12 dB for 0.01 of a
# threshold have been seen (vllm-omni#5840); between neighbours of a profile of the tiny models it is 1 to 5 dB.
CLIFF_DB = 8.0


@dataclass(frozen=True, kw_only=True, slots=True)
class AutoConfig:
    """What is asked for: a floor or a speed, not both; neither is the speed that `fitted` has by itself.

    Args:
        psnr: dB that a clip keeps against the uncached one, with a confidence of 95 %; written `psnr>=30`.
        speedup: steps divided by computed steps.
        profile: name of a shipped quality profile, or a file made by `cineray calibrate quality`; "" finds one that
            fits.
    """

    psnr: float | None = None
    speedup: float | None = None
    profile: str = ""

    def __post_init__(self) -> None:
        floor, speedup = 1.0 if self.psnr is None else self.psnr, 1.0 if self.speedup is None else self.speedup
        check_field(self, "psnr", 0 < floor < math.inf, "a number of dB above 0")
        check_field(self, "speedup", 1 <= speedup <= MAX_SPEEDUP, f"1 to {MAX_SPEEDUP:g}")

    def plan(self, name: str, model: ModelFacts) -> CachePlan:
        """
        Raises:
            ValueError: both are given, no profile fits, or the floor cannot be kept.
        """
        if self.psnr is not None and self.speedup is not None:
            raise ValueError(f"cache: {name} takes a floor or a speed: {name}(psnr>=30) or {name}(speedup=2.5)")
        if self.psnr is None:
            config = FittedConfig() if self.speedup is None else FittedConfig(speedup=self.speedup)
            return config.plan("fitted", model)
        profile = self._find(model.family, model.transformer)
        speedup = fastest(profile.points, self.psnr)
        if speedup is None:
            best = max(lower_bound(point.psnr_db) for point in profile.points)
            raise ValueError(
                f"cache: {name}(psnr>={self.psnr:g}) cannot be kept: the slowest setting that was measured keeps "
                f"{best:.1f} dB; ask for less, or render with --cache none"
            )
        return FittedConfig(speedup=speedup, profile=profile.fitted).plan("fitted", model)

    def _find(self, family: str, transformer: Mapping[str, Any]) -> QualityProfile:
        return find_profile(QualityProfile, self.profile, family, transformer)


def lower_bound(values: Sequence[float]) -> float:
    """What a further clip keeps with `CONFIDENCE`: the one-sided prediction bound of a normal sample.

    Student's t of n - 1 degrees times the deviation of a new value from the mean, s sqrt(1 + 1/n); -inf for one value.
    """
    # takes a second to import; strict pyright wants stubs that scipy does not have
    from scipy.stats import t  # pyright: ignore[reportMissingTypeStubs]

    if len(values) < 2:
        return -math.inf
    quantile = t.ppf(CONFIDENCE, len(values) - 1)  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
    spread = statistics.stdev(values) * math.sqrt(1 + 1 / len(values))
    return statistics.fmean(values) - float(quantile) * spread


def fastest(points: Sequence[QualityPoint], floor_db: float) -> float | None:
    """The highest speed-up up to which every setting keeps the floor, and that is not at the edge of a cliff."""
    rows = sorted(points, key=lambda point: point.speedup)
    bounds = [lower_bound(point.psnr_db) for point in rows]
    number = next((i for i, bound in enumerate(bounds) if bound < floor_db), len(bounds))
    while 0 < number < len(bounds):
        here, beyond = (statistics.fmean(rows[i].psnr_db) for i in (number - 1, number))
        if here - beyond <= CLIFF_DB:
            break
        number -= 1
    return rows[number - 1].speedup if number else None
