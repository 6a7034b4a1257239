"""TeaCache (arXiv 2411.19108): skip while the timestep embedding says that little has changed.

Section 3.3: the relative L1 change of the timestep-modulated input, rescaled by a polynomial that was fitted to the
change of the model's output, is accumulated until it reaches a threshold; a skipped step adds the last residual again.
What stays open is taken from github.com/ali-vilab/TeaCache at 7c10efc: TeaCache4Wan2.1/teacache_generate.py,
TeaCache4HunyuanVideo/teacache_sample_video.py, TeaCache4FLUX/teacache_flux.py.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from cineray.caching.forecast import Forecasting
from cineray.caching.observation import Observation
from cineray.caching.policy import Decision, Reason, Signal
from cineray.caching.profile import TeaCacheProfile, find_profile

# family -> its signals; the second one comes with `ret_steps`
SIGNALS: dict[str, tuple[Signal, ...]] = {
    "wan": ("timestep-embedding", "timestep-projection"),
    "hunyuan-video": ("modulated-input",),
    "flux": ("modulated-input",),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class TeaCacheConfig:
    """When to skip; a skipped step reuses the newest residual of all blocks.

    Args:
        threshold: accumulated change at which a step is computed; 0 never skips. Default: the profile's.
        ret_steps: Wan only, the official `--use_ret_steps`: the signal is the modulation made from the embedding, the
            first 5 steps are computed and the last one may be skipped. Else the signal is the embedding itself, and
            the first and the last step are computed.
        coefficients: of the polynomial, highest power first. Default: the profile's.
        profile: name of a shipped profile, or a file made by `cineray calibrate teacache`; "" finds one that fits.
    """

    threshold: float | None = None
    ret_steps: bool = False
    coefficients: tuple[float, ...] = ()
    profile: str = ""

    def __post_init__(self) -> None:
        if self.threshold is not None and not (math.isfinite(self.threshold) and self.threshold >= 0):
            raise ValueError(f"TeaCacheConfig: threshold must be 0 or more, got {self.threshold}")
        if not all(math.isfinite(c) for c in self.coefficients):
            raise ValueError(f"TeaCacheConfig: coefficients must be finite numbers, got {self.coefficients}")

    @property
    def probe_depth(self) -> int:
        """No block runs on a skipped step."""
        return 0

    def for_model(self, family: str, transformer: Mapping[str, Any]) -> "TeaCacheConfig":
        """The same with everything that was left open filled in from a profile.

        Raises:
            ValueError: no profile fits, the family has no `ret_steps`, or coefficients without a threshold.
        """
        signal = self._signal(family)
        if self.coefficients:
            if self.threshold is None:
                raise ValueError("cache: teacache with coefficients needs a threshold too")
            return self
        fit = find_profile(TeaCacheProfile, self.profile, family, transformer).signals.get(signal)  # type: ignore[call-overload]
        if fit is None:
            raise ValueError(
                f"cache: the teacache profile has no coefficients for the {signal} (ret_steps={self.ret_steps})"
            )
        threshold = fit.threshold if self.threshold is None else self.threshold
        return replace(self, threshold=threshold, coefficients=fit.coefficients, profile="")

    def policy(self, family: str) -> "TeaCachePolicy":
        assert self.threshold is not None  # for_model has filled it in
        return TeaCachePolicy(
            threshold=self.threshold,
            coefficients=self.coefficients,
            signal=self._signal(family),
            num_first=5 if self.ret_steps else 1,
            last_step_full=not self.ret_steps,
        )

    def forecasting(self) -> Forecasting:
        return Forecasting()

    def _signal(self, family: str) -> Signal:
        if family not in SIGNALS:
            raise ValueError(f"cache: teacache does not know {family}; it knows {', '.join(SIGNALS)}")
        signals = SIGNALS[family]
        if self.ret_steps and len(signals) < 2:
            raise ValueError(f"cache: teacache has no ret_steps for {family}; its official code knows them for Wan")
        return signals[1 if self.ret_steps else 0]


@dataclass(frozen=True, kw_only=True, slots=True)
class TeaCachePolicy:
    """`decide` for a `TeaCacheConfig`.

    Args:
        num_first: steps that are computed at the start.
    """

    threshold: float
    coefficients: tuple[float, ...]
    signal: Signal
    plans_ahead: bool = False
    num_first: int
    last_step_full: bool

    def decide(self, observation: Observation) -> Decision:
        forced = self._forced(observation)
        if forced is not None:
            return Decision.compute_because(forced)
        change = observation.relative_change
        if change is None or not math.isfinite(change):
            return Decision.compute_because(Reason.UNKNOWN)
        accumulated = observation.accumulated + polynomial(self.coefficients, change)
        if not accumulated < self.threshold:
            return Decision.compute_because(Reason.THRESHOLD)
        return Decision(compute=False, accumulated=accumulated, reason=Reason.SKIP)

    def _forced(self, observation: Observation) -> Reason | None:
        if self.threshold == 0:
            return Reason.OFF  # a polynomial may be negative
        if observation.step_index < self.num_first:
            return Reason.WARMUP
        if self.last_step_full and observation.step_index == observation.num_steps - 1:
            return Reason.LAST
        return Reason.EMPTY if observation.num_pairs == 0 else None


def polynomial(coefficients: tuple[float, ...], x: float) -> float:
    """Its value at x, by Horner's rule; the highest power's coefficient comes first, as numpy.poly1d has it."""
    value = 0.0
    for coefficient in coefficients:
        value = value * x + coefficient
    return value
