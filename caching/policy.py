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
        num_steps: steps that a skip holds for, this one included; in the others nobody looks.
        reason: one word for the trace.
        gamma: forces the alignment of the forecast; None lets it follow the probe.
    """

    compute: bool
    accumulated: float
    reason: str
    gamma: float | None = None
    num_steps: int = 1


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
