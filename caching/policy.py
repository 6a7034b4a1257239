"""The seam of *when*: a policy judges an observation and says whether the deep blocks run."""

from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

from cineray.caching.observation import Observation


class Reason(StrEnum):
    """Why a step is computed or skipped, as the trace says it. Ranks send each other its place here."""

    OFF = "off"  # the threshold is 0: nothing is ever skipped
    WARMUP = "warmup"
    LAST = "last"
    EMPTY = "empty"  # too few computed steps to forecast from
    CAP = "cap"  # as many steps in a row were skipped as may be
    NEVER = "never"  # the profile never skips this step
    THRESHOLD = "threshold"
    UNKNOWN = "unknown"  # no change to judge by, or no number
    INTERVAL = "interval"
    REPLAY = "replay"
    SKIP = "skip"
    STREAK = "run"  # skipped by what an earlier step decided


@dataclass(frozen=True, kw_only=True, slots=True)
class Decision:
    """What a policy wants for one sample of one branch at one step.

    Args:
        compute: run the deep blocks; else forecast them.
        accumulated: carried into the next observation.
        num_steps: consecutive steps to skip, starting with this one; the probe does not run in the remaining ones.
        gamma: forces the alignment of the forecast; None lets it follow the probe.
    """

    compute: bool
    accumulated: float
    reason: Reason
    gamma: float | None = None
    num_steps: int = 1

    @classmethod
    def compute_because(cls, reason: Reason) -> "Decision":
        """Runs the deep blocks; change begins to accumulate anew."""
        return cls(compute=True, accumulated=0.0, reason=reason)


# What the two sums of an observation compare: "probe", the probe's output with that of the step before (DiCache);
# "probe-residual", what the probe blocks add with what they added at the last computed step (FBCache); "none", nothing,
# and no tensor is touched; or, with that of the step before, what the reader of this name in `pipeline` reads.
Signal = str
WITHOUT_READER: tuple[Signal, ...] = ("probe", "probe-residual", "none")


class Policy(Protocol):
    """Pure: the same observation gives the same decision, and nothing else changes."""

    @property
    def signal(self) -> Signal: ...

    @property
    def plans_ahead(self) -> bool:
        """Whether a decision may hold for several steps."""
        ...

    def decide(self, observation: Observation) -> Decision: ...


def forced(
    observation: Observation,
    *,
    is_off: bool = False,
    is_warmup: bool = False,
    last_step_full: bool = False,
    min_pairs: int = 1,
    max_skips: int = 0,
) -> Reason | None:
    """Why a step is computed whatever its change is; None if the change may say.

    Args:
        is_off: nothing is skipped at all.
        last_step_full: the last step is computed.
        min_pairs: residual pairs without which nothing is forecast.
        max_skips: most steps skipped in a row; 0 means no limit.
    """
    if is_off:
        return Reason.OFF
    if is_warmup:
        return Reason.WARMUP
    if last_step_full and observation.step_index == observation.num_steps - 1:
        return Reason.LAST
    if observation.num_pairs < min_pairs:
        return Reason.EMPTY
    if max_skips and observation.num_skips_in_a_row >= max_skips:
        return Reason.CAP
    return None
