"""The seam of *when*: a policy judges an observation and says whether the deep blocks run."""

from dataclasses import dataclass
from enum import StrEnum
from typing import Literal, Protocol

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


# What the two sums of an observation compare: the probe's output with that of the step before (DiCache); what the
# probe blocks add with what they added at the last computed step (FBCache); the timestep's embedding, its projection to
# modulations, or the first block's modulated input with that of the step before (TeaCache); or nothing, and no tensor
# is touched.
Signal = Literal["probe", "probe-residual", "timestep-embedding", "timestep-projection", "modulated-input", "none"]


class Policy(Protocol):
    """Pure: the same observation gives the same decision, and nothing else changes."""

    @property
    def signal(self) -> Signal: ...

    @property
    def plans_ahead(self) -> bool:
        """Whether a decision may hold for several steps."""
        ...

    def decide(self, observation: Observation) -> Decision: ...
