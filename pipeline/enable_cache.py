"""`cineray.enable_cache`: a cache on any diffusers pipeline or transformer, ours or anyone's loop around it."""

from collections.abc import Callable
from typing import Any

from torch import nn

from cineray.caching.consensus import Alone, Consensus
from cineray.caching.controller import CacheController
from cineray.caching.forecast import Forecasting
from cineray.caching.spec import AnyPlan, CachePlan, LayerPlan, PolicyConfig
from cineray.caching.trace import Trace
from cineray.pipeline.adapters import MODELS
from cineray.pipeline.cache_plan import plan_cache
from cineray.pipeline.cached_blocks import BlockRunner
from cineray.pipeline.cached_layers import check_blocks_not_compiled, run_schedule
from cineray.pipeline.forecast_layers import run_series
from cineray.pipeline.modulated_input import signal_reader
from cineray.pipeline.sharding import is_sharded
from cineray.pipeline.whereabouts import Whereabouts, check_not_compiled_whole


class CacheHandle:
    """A cache that is attached to one transformer.

    Attributes:
        trace: what it did to the clip in the works, or to the last one.
        policy: the policy with all its options, as text.
    """

    def __init__(self, transformer: nn.Module, plan: AnyPlan, whereabouts: Whereabouts, consensus: Consensus) -> None:
        self.policy = plan.text
        self._whereabouts = whereabouts
        if isinstance(plan, CachePlan):
            self.trace = Trace(
                policy=plan.text,
                forecasting=plan.forecasting,
                num_blocks=plan.num_blocks,
                probe_depth=plan.probe_depth,
            )
            controller = CacheController(
                policy=plan.policy, forecasting=plan.forecasting, trace=self.trace, consensus=consensus
            )
            layout = MODELS[type(transformer).__name__].layout
            signal = signal_reader(transformer, plan.policy.signal)
            self._runner = BlockRunner(transformer, layout, controller, plan.probe_depth, signal, whereabouts.where)
        else:
            self.trace = Trace(
                policy=plan.text, forecasting=Forecasting(), num_blocks=plan.num_blocks, probe_depth=0, by_layer=True
            )
            if isinstance(plan, LayerPlan):
                self._runner = run_schedule(transformer, plan.schedule, self.trace, whereabouts.where)
            else:
                self._runner = run_series(transformer, plan.config, self.trace, whereabouts.where)
        whereabouts.listener = self._runner

    def disable(self) -> None:
        """Takes the cache off; the transformer is as before."""
        self._runner.detach()
        self._whereabouts.detach()

    def __enter__(self) -> "CacheHandle":
        return self

    def __exit__(self, *_: object) -> None:
        self.disable()


def enable_cache(
    pipe_or_transformer: Any, policy: str | PolicyConfig, num_branches: int | None = None, scheduler: Any = None
) -> CacheHandle:
    """Attaches a cache.

    Args:
        pipe_or_transformer: a diffusers pipeline, or its transformer.
        policy: text as on the command line ("dicache", "dicache(threshold=0.1)"), or a configuration.
        num_branches: guidance branches per step; default: what the family's pipeline makes. 1 says that no branches
            are stacked in the batch; else that is seen by the batch's halves being equal.
        scheduler: for a transformer in a loop that sets no `cache_context`: its timesteps tell the step.

    Raises:
        ValueError: an unknown model or policy, an option out of range, a transformer compiled as a whole, or a cache
            that is enabled already.
    """
    transformer: Any = getattr(pipe_or_transformer, "transformer", pipe_or_transformer)
    check_not_compiled_whole(transformer)
    kind = type(transformer).__name__
    if kind not in MODELS:
        raise ValueError(f"enable_cache: {kind} is not supported; supported: {', '.join(MODELS)}")
    plan = plan_cache(policy, kind, transformer.config)
    if plan is None:
        raise ValueError("enable_cache: policy 'none' is no cache; leave the call out")
    return attach_cache(transformer, plan, num_branches, scheduler_of(pipe_or_transformer, scheduler))


def scheduler_of(pipe_or_transformer: Any, scheduler: Any = None) -> Callable[[], Any] | None:
    """Looks up the scheduler that a loop uses: the one given, or the pipeline's at the time of the call."""
    if scheduler is not None:
        return lambda: scheduler
    return (lambda: pipe_or_transformer.scheduler) if hasattr(pipe_or_transformer, "scheduler") else None


def attach_cache(
    transformer: nn.Module,
    plan: AnyPlan,
    num_branches: int | None = None,
    scheduler: Callable[[], Any] | None = None,
    consensus: Consensus | None = None,
) -> CacheHandle:
    """Attaches a cache whose plan was made for this transformer.

    Args:
        consensus: how a gang's ranks agree; None for one process.

    Raises:
        ValueError: a cache is enabled already, the transformer is sharded already (the cache must see shards), or
            layers are to be cached within compiled blocks.
    """
    if Whereabouts.is_attached(transformer):
        kind = type(transformer).__name__
        raise ValueError(f"enable_cache: this {kind} has a cache already; call disable() of its handle first")
    if is_sharded(transformer):
        raise ValueError("enable_cache: the transformer is sharded already; enable the cache first, then shard")
    if not isinstance(plan, CachePlan):
        check_blocks_not_compiled(transformer)
    whereabouts = whereabouts_of(transformer, num_branches, scheduler)
    return CacheHandle(transformer, plan, whereabouts, consensus or Alone())


def whereabouts_of(
    transformer: nn.Module, num_branches: int | None, scheduler: Callable[[], Any] | None
) -> Whereabouts:
    """A `Whereabouts` on a transformer, with what its model says of the branches unless told otherwise."""
    model = MODELS[type(transformer).__name__]
    stacked = model.branches if model.stacked and num_branches != 1 else ()
    calls = 1 if model.stacked else len(model.branches)
    return Whereabouts(transformer, num_branches or calls, scheduler, stacked)
