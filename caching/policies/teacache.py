"""TeaCache (arXiv 2411.19108): skip while the timestep embedding says that little has changed.

Section 3.3: the relative L1 change of the timestep-modulated input, rescaled by a polynomial that was fitted to the
change of the model's output, is accumulated until it reaches a threshold; a skipped step adds the last residual again.
What stays open is taken from github.com/ali-vilab/TeaCache at 7c10efc: TeaCache4Wan2.1/teacache_generate.py,
TeaCache4HunyuanVideo/teacache_sample_video.py, TeaCache4FLUX/teacache_flux.py.
"""

import math
from dataclasses import dataclass, replace

from cineray.caching.observation import Observation
from cineray.caching.plan import CachePlan, ModelFacts, check_field, plan_blocks
from cineray.caching.policy import Decision, Reason, Signal, forced
from cineray.caching.profile import TeaCacheProfile, find_profile


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
        threshold = 0.0 if self.threshold is None else self.threshold
        check_field(self, "threshold", math.isfinite(threshold) and threshold >= 0, "0 or more")
        check_field(self, "coefficients", all(math.isfinite(c) for c in self.coefficients), "finite numbers")

    def plan(self, name: str, model: ModelFacts) -> CachePlan:
        """No block runs on a skipped step."""
        config = self.for_model(model)
        return plan_blocks(name, config, model, config.policy(model))

    def for_model(self, model: ModelFacts) -> "TeaCacheConfig":
        """The same with everything that was left open filled in from a profile.

        Raises:
            ValueError: no profile fits, the model has no signal or no `ret_steps`, or coefficients without a threshold.
        """
        signal = self._signal(model)
        if self.coefficients:
            if self.threshold is None:
                raise ValueError("cache: teacache with coefficients needs a threshold too")
            return self
        profile = find_profile(TeaCacheProfile, self.profile, model.family, model.transformer)
        fit = profile.signals.get(signal)  # type: ignore[call-overload]
        if fit is None:
            raise ValueError(
                f"cache: the teacache profile has no coefficients for the {signal} (ret_steps={self.ret_steps})"
            )
        threshold = fit.threshold if self.threshold is None else self.threshold
        return replace(self, threshold=threshold, coefficients=fit.coefficients, profile="")

    def policy(self, model: ModelFacts) -> "TeaCachePolicy":
        assert self.threshold is not None  # for_model has filled it in
        return TeaCachePolicy(
            threshold=self.threshold,
            coefficients=self.coefficients,
            signal=self._signal(model),
            num_first=5 if self.ret_steps else 1,
            last_step_full=not self.ret_steps,
        )

    def _signal(self, model: ModelFacts) -> Signal:
        if not model.signals:
            raise ValueError(f"cache: teacache does not know {model.family}: no signal is known to judge it by")
        if self.ret_steps and len(model.signals) < 2:
            raise ValueError(
                f"cache: teacache has no ret_steps for {model.family}; its official code knows them for Wan"
            )
        return model.signals[1 if self.ret_steps else 0]


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
        reason = forced(
            observation,
            is_off=self.threshold == 0,  # a polynomial may be negative
            is_warmup=observation.step_index < self.num_first,
            last_step_full=self.last_step_full,
        )
        if reason is not None:
            return Decision.compute_because(reason)
        change = observation.relative_change
        if change is None or not math.isfinite(change):
            return Decision.compute_because(Reason.UNKNOWN)
        accumulated = observation.accumulated + polynomial(self.coefficients, change)
        if not accumulated < self.threshold:
            return Decision.compute_because(Reason.THRESHOLD)
        return Decision(compute=False, accumulated=accumulated, reason=Reason.SKIP)


def polynomial(coefficients: tuple[float, ...], x: float) -> float:
    """The polynomial's value at x, by Horner's rule; coefficients from the highest power down, as in numpy.poly1d."""
    value = 0.0
    for coefficient in coefficients:
        value = value * x + coefficient
    return value
