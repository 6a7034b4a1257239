"""What is seen of a batch's clips while they are checked, beside whether the model can render them."""

from dataclasses import dataclass, field

from cineray.caching.policies.smoothcache import LayerPlan
from cineray.caching.policies.taylorseer import SeriesPlan
from cineray.jobs.idle_cache import IdleCaches, without_idle_cache
from cineray.jobs.memory_check import MemoryCheck
from cineray.pipeline.footprint.fit import Demand
from cineray.pipeline.loading.checkpoint import Checkpoint
from cineray.pipeline.request import ClipRequest
from cineray.text import shorten


@dataclass(frozen=True, slots=True)
class Outlook:
    """A further check of each clip, as `RequestCheck` takes it, and what it has found.

    Args:
        memory: None where nothing is known of the model, or nothing runs on a GPU.
        compiled: the checkpoint, where its blocks are compiled; else None.
    """

    memory: MemoryCheck | None = None
    compiled: Checkpoint | None = None
    idle: IdleCaches = field(default_factory=IdleCaches)

    def __call__(self, request: ClipRequest) -> str | None:
        self.idle.add(request)
        if self.compiled is not None and _works_within_blocks(self.compiled, without_idle_cache(request).cache):
            return (
                f"cache {shorten(request.cache)} works within blocks, which --compile compiles; use a policy that "
                "decides between blocks (dicache, fbcache, interval), or leave --compile out"
            )
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


def _works_within_blocks(checkpoint: Checkpoint, cache: str) -> bool:
    return isinstance(checkpoint.plan_cache(cache), LayerPlan | SeriesPlan)
