"""What is seen of a batch's clips while they are checked, beside whether the model can render them."""

from dataclasses import dataclass, field

from cineray.jobs.idle_cache import IdleCaches, without_idle_cache
from cineray.jobs.memory_check import MemoryCheck
from cineray.pipeline.footprint.fit import Demand
from cineray.pipeline.request import ClipRequest


@dataclass(frozen=True, slots=True)
class Outlook:
    """A further check of each clip, as `RequestCheck` takes it, and what it has found.

    Args:
        memory: None where nothing is known of the model, or nothing runs on a GPU.
    """

    memory: MemoryCheck | None = None
    idle: IdleCaches = field(default_factory=IdleCaches)

    def __call__(self, request: ClipRequest) -> str | None:
        self.idle.add(request)
        return self.memory(without_idle_cache(request)) if self.memory else None

    @property
    def warnings(self) -> tuple[str, ...]:
        return (*self.idle.warnings, *(self.memory.warnings if self.memory else ()))

    def demands(self, shares_gpu: bool | None = None) -> tuple[Demand, ...]:
        """As `MemoryCheck.largest`; none where nothing is known."""
        return self.memory.largest(shares_gpu) if self.memory else ()

    def demands_of(self, request: ClipRequest, shares_gpu: bool) -> tuple[Demand, ...]:
        """As `MemoryCheck.of`, of a clip that was checked; none where nothing is known."""
        return self.memory.of(without_idle_cache(request), shares_gpu) if self.memory else ()
