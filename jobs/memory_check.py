"""Whether a batch's clips fit into the memory of the GPUs that it is to be rendered on, told before weights are read.

Known models on known GPUs alone: of others nothing is said, and nothing is refused. A forecast, without PyTorch.
"""

from dataclasses import replace

from cineray.jobs.gangs.placement import finishers_for
from cineray.jobs.run_options import RunOptions, decodes_on_gang
from cineray.pipeline.footprint.fit import (
    Demand,
    Setup,
    demands,
    fits,
    nearest_fit,
    published_like,
    shortage,
)
from cineray.pipeline.loading.checkpoint import Checkpoint
from cineray.pipeline.loading.device import gpu_memory_bytes
from cineray.pipeline.loading.options import LoadOptions
from cineray.pipeline.request import ClipRequest, InputError

MAX_RANKS = 8  # of a gang, that are advised where nobody knows how many GPUs there are: a node's
MAX_KINDS = 1000  # of clips, that are looked at; a batch has a few


class MemoryCheck:
    """Says of clips whether they fit, each kind of them once.

    Args:
        known: one of `published_like`.
        memory_bytes: of the smallest GPU; None where it is not known, so that nothing is refused.
        max_ranks: that a gang may have.
    """

    def __init__(self, known: Checkpoint, setup: Setup, memory_bytes: int | None, max_ranks: int = MAX_RANKS) -> None:
        self._known = known
        self._setup = setup
        self._memory_bytes = memory_bytes
        self._max_ranks = max_ranks
        self._kinds: dict[tuple[object, ...], tuple[ClipRequest, str | None]] = {}

    def __call__(self, request: ClipRequest) -> str | None:
        """Why a clip that the model can render cannot fit, and what would; None where it can, or nobody knows."""
        kind = _kind(request)
        if kind not in self._kinds and len(self._kinds) < MAX_KINDS:
            self._kinds[kind] = request, self._refusal(request)
        return self._kinds.get(kind, (request, None))[1]

    @property
    def warnings(self) -> tuple[str, ...]:
        """What may run out of memory, though it need not, a sentence for each kind of clip."""
        if self._memory_bytes is None:
            return ()
        return tuple(
            f"{_size(request)}: {self._tight(request)}"
            for request, refusal in self._kinds.values()
            if refusal is None and not fits(self._known, request, self._setup, self._memory_bytes)
        )

    def largest(self, shares_gpu: bool | None = None) -> tuple[Demand, ...]:
        """The most that a clip seen so far takes of each kind of GPU.

        Args:
            shares_gpu: a finisher stands on a rank's GPU; None as the check was made with.
        """
        setup = self._setup if shares_gpu is None else replace(self._setup, shares_gpu=shares_gpu)
        found: dict[str, Demand] = {}
        for request, _ in self._kinds.values():
            for demand in demands(self._known, request, setup):
                before = found.get(demand.place)
                if before is None or demand.tensor_bytes > before.tensor_bytes:
                    found[demand.place] = demand
        return tuple(found.values())

    def of(self, request: ClipRequest, shares_gpu: bool) -> tuple[Demand, ...]:
        """What a clip that was seen takes of each kind of GPU; nothing of one that nobody looked at.

        Args:
            shares_gpu: a finisher stands on a rank's GPU.
        """
        known = self._kinds.get(_kind(request))
        return () if known is None else demands(self._known, known[0], replace(self._setup, shares_gpu=shares_gpu))

    def _refusal(self, request: ClipRequest) -> str | None:
        try:
            needed = demands(self._known, request, self._setup)
        except InputError:
            return None  # layout and cache are checked elsewhere, by the checkpoint itself
        if self._memory_bytes is None:
            return None
        short = next((said for d in needed if (said := shortage(d, self._memory_bytes))), None)
        return (
            None
            if short is None
            else f"{_size(request)} does not fit, by forecast: {short} GB; {self._advice(request)}"
        )

    def _tight(self, request: ClipRequest) -> str:
        assert self._memory_bytes is not None
        fullest = max(demands(self._known, request, self._setup), key=lambda d: d.tensor_bytes)
        has = f"which has {self._memory_bytes / 1e9:.1f} GB"
        return f"may run out of memory, by forecast: it takes {fullest.text}, {has}; {self._advice(request)}"

    def _advice(self, request: ClipRequest) -> str:
        assert self._memory_bytes is not None
        found = nearest_fit(self._known, request, self._setup, self._memory_bytes, self._max_ranks)
        if found is None:
            return "no options of cineray make it fit; use fewer frames or pixels, or larger GPUs"
        options, setup = found
        most = max(d.tensor_bytes for d in demands(self._known, request, setup))
        return f"with {options} it takes {most / 1e9:.1f} GB and fits"


def _kind(request: ClipRequest) -> tuple[object, ...]:
    """Equal for clips that take the same memory."""
    is_guided = request.guidance_scale > 1
    return request.width, request.height, request.num_frames, request.cache, is_guided


def _size(request: ClipRequest) -> str:
    if request.width * request.height == 1:  # a sound
        return "a clip"
    return f"a clip of {request.width}x{request.height}, {request.num_frames} frames"


def memory_check(checkpoint: Checkpoint, options: LoadOptions, run: RunOptions) -> MemoryCheck | None:
    """The check of a run's clips; None where nothing is known of the model, or nothing runs on a GPU.

    Of a cluster the GPUs' memory is not known here: its actors compare what they find with `MemoryCheck.largest`.
    """
    known = published_like(checkpoint) if options.device == "cuda" else None
    if known is None:
        return None
    here = gpu_memory_bytes() if run.is_local else ()
    num_actors = run.num_gangs * run.layout.world_size
    if run.uses_ray:
        num_actors += finishers_for(run.num_gangs, run.num_finishers)
    return MemoryCheck(
        known,
        Setup(
            options=options,
            layout=run.layout,
            has_finishers=run.uses_ray,
            shares_gpu=run.uses_ray and num_actors > len(here),
            shards_weights=run.shard_weights,
            decodes_on_gang=run.uses_ray and decodes_on_gang(run, options, checkpoint.model),
        ),
        min(here, default=None),
        max(run.layout.world_size, len(here) // run.num_gangs if here else MAX_RANKS),
    )
