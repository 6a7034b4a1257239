"""`cineray.enable_cache`: a cache on any diffusers pipeline or transformer, ours or anyone's loop around it."""

from typing import Any

from torch import nn

from cineray.caching.controller import CacheController
from cineray.caching.forecast import Forecasting
from cineray.caching.spec import CachePlan, CacheSpec, LayerPlan, ModelFacts, PolicyConfig, parse_spec, resolve
from cineray.caching.trace import Trace
from cineray.pipeline.cached_blocks import LAYOUTS, BlockRunner
from cineray.pipeline.cached_layers import LAYERS, LayerRunner
from cineray.pipeline.whereabouts import Whereabouts


class CacheHandle:
    """A cache that is attached to one transformer.

    Attributes:
        trace: what it did to the clip in the works, or to the last one.
        policy: the policy with all its options, as text.
    """

    def __init__(self, transformer: nn.Module, plan: CachePlan | LayerPlan, whereabouts: Whereabouts) -> None:
        self.policy = plan.text
        self._whereabouts = whereabouts
        if isinstance(plan, CachePlan):
            self.trace = Trace(
                policy=plan.text,
                forecasting=plan.forecasting,
                num_blocks=plan.num_blocks,
                probe_depth=plan.probe_depth,
            )
            controller = CacheController(policy=plan.policy, forecasting=plan.forecasting, trace=self.trace)
            layout = LAYOUTS[type(transformer).__name__]
            self._runner = BlockRunner(transformer, layout, controller, plan.probe_depth, whereabouts.where)
        else:
            self.trace = Trace(policy=plan.text, forecasting=Forecasting(), num_blocks=plan.num_blocks, probe_depth=0)
            self._runner = LayerRunner(transformer, plan.schedule, self.trace, whereabouts.where)
        whereabouts.listener = self._runner

    def disable(self) -> None:
        """Takes the cache off; the transformer is as before."""
        self._runner.detach()
        self._whereabouts.detach()

    def __enter__(self) -> "CacheHandle":
        return self

    def __exit__(self, *_: object) -> None:
        self.disable()


def enable_cache(pipe_or_transformer: Any, policy: str | PolicyConfig, num_branches: int | None = None) -> CacheHandle:
    """Attaches a cache.

    Args:
        pipe_or_transformer: a diffusers pipeline, or its transformer.
        policy: text as on the command line ("dicache", "dicache(threshold=0.1)"), or a configuration.
        num_branches: calls of the transformer per step; default: what the family's pipeline makes.

    Raises:
        ValueError: an unknown model or policy, an option out of range, or a cache that is enabled already.
    """
    transformer = getattr(pipe_or_transformer, "transformer", pipe_or_transformer)
    kind = type(transformer).__name__
    if kind not in LAYOUTS:
        raise ValueError(f"enable_cache: {kind} is not supported; supported: {', '.join(LAYOUTS)}")
    plan = plan_cache(policy, kind, tuple(transformer.config[name] for name in LAYOUTS[kind].counts))
    if plan is None:
        raise ValueError("enable_cache: policy 'none' is no cache; leave the call out")
    scheduler = getattr(pipe_or_transformer, "scheduler", None)
    return attach_cache(transformer, plan, num_branches or LAYOUTS[kind].num_branches, scheduler)


def attach_cache(
    transformer: nn.Module, plan: CachePlan | LayerPlan, num_branches: int, scheduler: Any = None
) -> CacheHandle:
    """Attaches a cache whose plan was made for this transformer.

    Raises:
        ValueError: a cache is enabled already.
    """
    if Whereabouts.is_attached(transformer):
        kind = type(transformer).__name__
        raise ValueError(f"enable_cache: this {kind} has a cache already; call disable() of its handle first")
    return CacheHandle(transformer, plan, Whereabouts(transformer, num_branches, scheduler))


def plan_cache(
    policy: str | PolicyConfig, transformer_class: str, num_blocks: tuple[int, ...]
) -> CachePlan | LayerPlan | None:
    """What a policy means for a transformer with so many blocks in each of its lists; None for `none`.

    Raises:
        ValueError: a policy that is unknown, or that does not fit the transformer.
    """
    spec = parse_spec(policy) if isinstance(policy, str) else policy
    if isinstance(spec, CacheSpec) and spec.name == "none":
        return None
    if transformer_class not in LAYOUTS:
        raise ValueError(f"cache: {transformer_class} is not supported; supported: {', '.join(LAYOUTS)}")
    first, *others = num_blocks
    facts = ModelFacts(
        family=LAYOUTS[transformer_class].family,
        num_blocks=sum(num_blocks),
        num_probeable=first if others else first - 1,  # within the first list, and before the last block
        layers=LAYERS[transformer_class],
    )
    return resolve(spec, facts)
