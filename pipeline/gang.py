"""The ranks that render one clip together: joined by torchrun, by Ray actors or by local processes alike; or one."""

import json
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from typing import Any, Literal, get_args

import torch

from cineray.caching.observation import BRANCH_ORDER
from cineray.caching.plan import CachePlan
from cineray.caching.trace import Trace, TraceEntry
from cineray.distributed.attention import NativeAttention, SequenceAttention
from cineray.distributed.consensus import GangConsensus, Mode
from cineray.distributed.exchange import gather_numbers, gather_tensors, gather_text
from cineray.distributed.layout import Layout, check_layout
from cineray.distributed.mesh import Mesh, mesh_alone, new_mesh
from cineray.pipeline.adapters import Branch, Denoising, by_transformer
from cineray.pipeline.adapters.model import num_heads
from cineray.pipeline.blocks import calling_without_mask
from cineray.pipeline.caches.enable import attach_cache
from cineray.pipeline.denoise import StepDone, denoise, run_here
from cineray.pipeline.loading.model import LoadedModel
from cineray.pipeline.parallel.decode import decoding_by_rows
from cineray.pipeline.parallel.sharding import ShardedTransformer
from cineray.pipeline.parallel.weights import shard_weights
from cineray.pipeline.request import ClipRequest
from cineray.pipeline.resume.step_state import Keeper
from cineray.pipeline.resume.trace_keeper import TraceKeeper

Attention = Literal["native", "xfuser"]
# A rank that is not heard of for so long counts as lost: some of the slowest steps of the largest models.
TIMEOUT_S = 300.0
# A product of one to three rows runs in other kernels, whose last bits differ (MKL, float32, on AMD's CPUs); from four
# on rows were as among all 520, for every size tried. On Intel's, MKL is asked for the same bits for any number of rows
# (`jobs/exact_products.py`). A smaller clip gains nothing by being sharded.
MIN_TOKENS_PER_RANK = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class Gang:
    """This process's place among the ranks of a gang. Nothing of it outlives `close`.

    One process by itself is a gang of one, `SOLO`: the same code runs, and nothing is exchanged.
    """

    mesh: Mesh
    device: torch.device
    attention: SequenceAttention
    consensus: GangConsensus
    parallel_decode: bool

    @classmethod
    def join(
        cls,
        layout: Layout,
        rank: int,
        world_size: int,
        *,
        device: str = "cpu",
        init_method: str | None = None,
        store: Any = None,
        timeout_s: float = TIMEOUT_S,
        attention: Attention = "native",
        consensus: Mode = "all",
        parallel_decode: bool | None = None,
    ) -> "Gang":
        """Meets the other ranks; returns when this rank's gang is complete.

        Args:
            rank, world_size: of all gangs together, as torchrun counts.
            device: "cpu", or "cuda:N", which becomes this process's current device; load the model after joining.
            init_method, store: where the ranks meet, as torch.distributed.init_process_group takes them; neither
                under torchrun, or where torch.distributed is up already.
            timeout_s: a collective that takes longer fails on every rank.
            attention: "native", or "xfuser" for its kernels (CUDA).
            consensus: "all", or "rank0": the first rank judges by its own tokens.
            parallel_decode: every rank decodes a band of rows, which changes the last bits; else the first rank
                decodes alone. None: where there are GPUs; on a CPU clips stay equal bit for bit.

        Raises:
            ValueError: the layout takes another number of ranks, or an unknown attention or consensus.
        """
        if layout.world_size != world_size:
            raise ValueError(f"layout {layout.text} takes {layout.world_size} ranks, there are {world_size}")
        if attention not in get_args(Attention):
            raise ValueError(f"attention must be one of {', '.join(get_args(Attention))}, got {attention!r}")
        if consensus not in get_args(Mode):
            raise ValueError(f"consensus must be one of {', '.join(get_args(Mode))}, got {consensus!r}")
        here = torch.device(device)
        if here.type == "cuda":
            torch.cuda.set_device(here)
        # xfuser's groups break where the world is bound to a device (its core/distributed/parallel_state.py, 0.7.0)
        timeout, binds_device = timedelta(seconds=timeout_s), attention != "xfuser"
        mesh = new_mesh(layout, rank, here, timeout, init_method, store, binds_device=binds_device)
        try:
            return cls(
                mesh=mesh,
                device=here,
                attention=_new_attention(attention, mesh),
                consensus=GangConsensus(mesh=mesh, device=here, mode=consensus),
                parallel_decode=here.type == "cuda" if parallel_decode is None else parallel_decode,
            )
        except BaseException:
            mesh.close()
            raise

    def close(self) -> None:
        """Leaves the gang; other process groups of this process stay."""
        self.attention.close()
        self.mesh.close()

    def __enter__(self) -> "Gang":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def is_leader(self) -> bool:
        """Whether this is the gang's first rank, which alone writes files and decodes."""
        return self.mesh.is_leader

    def exchange(self, numbers: list[float]) -> list[list[float]]:
        """Each rank's numbers, by rank; every rank calls it."""
        return gather_numbers(numbers, self.mesh.gang, self.device)

    def exchange_text(self, text: str) -> list[str]:
        """Each rank's text, by rank; every rank calls it."""
        return gather_text(text, self.mesh.gang, self.device)

    def denoise(
        self,
        model: LoadedModel,
        request: ClipRequest,
        clip: Denoising,
        on_step: StepDone,
        keeper: Keeper | None = None,
        plan: CachePlan | None = None,
    ) -> tuple[torch.Tensor, Trace | None]:
        """Latents of the clip, on every rank; the trace is that of all branches.

        Tokens are sharded unless they are so few that every rank had better hold them all.

        Args:
            clip: the same on every rank.
            keeper: keeps step states; one per rank, and all act alike.
            plan: of the cache, the same on every rank; None for the one that the request names.

        Raises:
            ValueError: the gang's layout does not fit the model or the request.
        """
        num_branches, models = len(clip.branches), by_transformer(model.checkpoint.model)
        for transformer in clip.transformers:
            check_layout(self.mesh.layout, num_heads(transformer.config), num_branches)
        planned = plan or model.checkpoint.plan_cache(request.cache)
        is_sharded = self.mesh.sequence.size > 1
        consensus = self.consensus
        if is_sharded and self._holds_all_tokens(model, request):
            is_sharded, consensus = False, replace(consensus, mesh=self.mesh.with_whole_sequences())
        with ExitStack() as attached:
            cache = None
            if planned is not None:
                # branches that stand in the batch are seen there
                calls = None if model.checkpoint.model.stacked else num_branches
                cache = attached.enter_context(
                    attach_cache(clip.transformers, planned, calls, consensus=consensus, models=models, runs=model.runs)
                )
            for transformer in clip.transformers if not clip.hides_text else ():
                attached.enter_context(calling_without_mask(transformer, model.checkpoint.model.layout))
            for transformer in clip.transformers if is_sharded else ():
                attached.enter_context(ShardedTransformer(transformer, self.mesh, self.attention, models))
            kept = TraceKeeper(keeper, cache and cache.trace, self._whole_trace) if keeper else None
            latents = denoise(clip, on_step, self._run_branches, kept, cache)
        if cache is None:
            return latents, None
        trace = self._whole_trace(cache.trace)
        return latents, kept.with_earlier(trace) if kept else trace

    def shard_weights(self, model: LoadedModel) -> None:
        """Leaves each rank a part of the transformers' weights, and puts the model on the gang's device.

        Args:
            model: loaded with `is_sharded`, or on the device; the same on every rank.

        Raises:
            InputError: a block that was left on disk cannot be read.
            ValueError: no two ranks of this gang share a clip's tokens.
        """
        axis = self.mesh.sequence
        if axis.size == 1:
            raise ValueError(f"shard-weights: in layout {self.mesh.layout.text} no ranks share a clip's tokens")
        models = by_transformer(model.checkpoint.model)
        for name in model.checkpoint.model.denoiser_parts:
            transformer = getattr(model.pipe, name, None)
            if transformer is not None:
                shard_weights(transformer, axis, self.device, models, model.unread.get(name))
        model.pipe.to(self.device)

    def decode(self, model: LoadedModel, request: ClipRequest, latents: torch.Tensor) -> torch.Tensor | None:
        """The video on the gang's first rank, None on the others."""

        def decode() -> torch.Tensor:
            generator = torch.Generator("cpu").manual_seed(request.seed)
            return model.adapter.decode(model.pipe, request, latents, generator)

        convolutions = model.checkpoint.model.row_convolutions
        if not (self.parallel_decode and convolutions):
            return decode() if self.is_leader else None
        with decoding_by_rows(model.pipe.vae, convolutions, self.mesh.gang):
            video = decode()
        return video if self.is_leader else None

    def _holds_all_tokens(self, model: LoadedModel, request: ClipRequest) -> bool:
        return model.checkpoint.num_shared_tokens(request) < MIN_TOKENS_PER_RANK * self.mesh.sequence.size

    def _run_branches(self, branches: Sequence[Branch], run: Callable[[Branch], torch.Tensor]) -> list[torch.Tensor]:
        if self.mesh.cfg.size == 1:
            return run_here(branches, run)
        return gather_tensors(run(branches[self.mesh.cfg.index]), self.mesh.cfg)

    def _whole_trace(self, trace: Trace) -> Trace:
        """The trace with the entries of the branch that ran on the other half, in the order of one process."""
        if self.mesh.cfg.size == 1:
            return trace
        trace = replace(trace, entries=list(trace.entries))
        texts = gather_text(json.dumps([trace.held_bytes, *map(asdict, trace.entries)]), self.mesh.cfg, self.device)
        halves = [json.loads(text) for text in texts]
        entries = [TraceEntry(**entry) for _, *half in halves for entry in half]
        entries.sort(key=lambda entry: (entry.step, BRANCH_ORDER.index(entry.branch)))
        trace.entries[:] = entries
        trace.held_bytes = max(held for held, *_ in halves)
        return trace


def _new_attention(name: Attention, mesh: Mesh) -> SequenceAttention:
    if name == "native":
        return NativeAttention(mesh)
    from cineray.distributed.xfuser_attention import new_xfuser_attention  # heavy, and refuses to load without a GPU

    return new_xfuser_attention(mesh)


def _solo() -> Gang:
    mesh, here = mesh_alone(), torch.device("cpu")
    return Gang(
        mesh=mesh,
        device=here,
        attention=NativeAttention(mesh),
        consensus=GangConsensus(mesh=mesh, device=here),
        parallel_decode=False,
    )


SOLO = _solo()  # one process, on whatever device: its tensors are sent nowhere
