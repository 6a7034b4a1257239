"""The seam of *when*: a policy looks at an observation and says whether the deep blocks run."""

from dataclasses import dataclass
from typing import Literal, Protocol

from cineray.caching.observation import Observation


@dataclass(frozen=True, kw_only=True, slots=True)
class Decision:
    """What a policy wants for one sample of one branch at one step.

    Args:
        compute: run the deep blocks; else forecast them.
        accumulated: carried into the next observation.
        reason: one word for the trace.
        gamma: forces the alignment of the forecast; None lets it follow the probe.
    """

    compute: bool
    accumulated: float
    reason: str
    gamma: float | None = None


# What the two sums of an observation compare: the probe's output with that of the step before (DiCache); what the
# probe blocks add with what they added at the last computed step (FBCache); or nothing, and no tensor is touched.
Signal = Literal["probe", "probe-residual", "none"]


class Policy(Protocol):
    """Pure: the same observation gives the same decision, and nothing else changes."""

    @property
    def signal(self) -> Signal: ...

    def decide(self, observation: Observation) -> Decision: ...
