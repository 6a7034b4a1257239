"""`cineray.enable_cache`: a cache on any diffusers pipeline or transformer, ours or anyone's loop around it."""

from typing import Any

import torch
from diffusers.hooks import HookRegistry, ModelHook
from diffusers.hooks.hooks import BaseState, CacheContext, StateManager
from torch import nn

from cineray.caching.controller import CacheController, StepContext
from cineray.caching.spec import CachePlan, CacheSpec, PolicyConfig, parse_spec, resolve
from cineray.caching.trace import Trace
from cineray.pipeline.cached_blocks import LAYOUTS, BlockRunner

_HOOK = "cineray_cache"


class CacheHandle:
    """A cache that is attached to one transformer.

    Attributes:
        trace: what it did to the clip in the works, or to the last one.
        policy: the policy with all its options, as text.
    """

    def __init__(self, transformer: nn.Module, plan: CachePlan, num_branches: int, scheduler: Any) -> None:
        layout = LAYOUTS[type(transformer).__name__]
        self.policy = plan.text
        self.trace = Trace(
            policy=plan.text,
            forecasting=plan.forecasting,
            num_blocks=plan.num_blocks,
            probe_depth=plan.probe_depth,
        )
        self._transformer = transformer
        self._controller = CacheController(policy=plan.policy, forecasting=plan.forecasting, trace=self.trace)
        self._hook = _Whereabouts(self._controller, num_branches, scheduler)
        self._runner = BlockRunner(transformer, layout, self._controller, plan.probe_depth, self._hook.where)
        HookRegistry.check_if_exists_or_initialize(transformer).register_hook(self._hook, _HOOK)

    def disable(self) -> None:
        """Takes the cache off; the transformer is as before."""
        self._runner.detach()
        HookRegistry.check_if_exists_or_initialize(self._transformer).remove_hook(_HOOK, recurse=False)

    def __enter__(self) -> "CacheHandle":
        return self

    def __exit__(self, *_: object) -> None:
        self.disable()


class _Whereabouts(ModelHook):
    """Learns from diffusers' `cache_context` which step and branch a forward belongs to."""

    _is_stateful = True

    def __init__(self, controller: CacheController, num_branches: int, scheduler: Any) -> None:
        super().__init__()
        # diffusers sets the context of every StateManager that it finds on a hook
        self.contexts = StateManager(BaseState)  # type: ignore[arg-type]  # annotated as an instance, takes a class
        self._controller = controller
        self._num_branches = num_branches
        self._scheduler = scheduler
        self._here: StepContext | None = None

    def where(self) -> StepContext:
        assert self._here is not None  # pre_forward ran: the blocks run inside the forward
        return self._here

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        context = self.contexts._context
        if context is None:
            raise ValueError(
                "a cache is enabled, but the call does not say which step it is: wrap it in "
                'transformer.cache_context("cond", step_index=i, num_inference_steps=n)'
            )
        step_index, num_steps = self._step(context, kwargs.get("timestep"))
        if step_index == 0 and any(entry.branch == context.name for entry in self._controller.trace.entries):
            self._controller.begin_clip()
        self._here = StepContext(
            branch=context.name, step_index=step_index, num_steps=num_steps, num_branches=self._num_branches
        )
        return args, kwargs

    def reset_state(self, module: nn.Module) -> nn.Module:
        """Called by diffusers at the end of a pipeline call: frees the tensors; the trace stays to be read."""
        self._controller.histories.clear()
        return module

    def _step(self, context: CacheContext, timestep: torch.Tensor | None) -> tuple[int, int]:
        """Step and number of steps from the context, else from the place of `timestep` in the scheduler's list."""
        if context.step_index is not None and context.num_inference_steps is not None:
            return context.step_index, context.num_inference_steps
        timesteps = getattr(self._scheduler, "timesteps", None)
        if timesteps is not None and timestep is not None:
            for scale in (1, 1000):  # FLUX's pipeline divides by num_train_timesteps
                place = (timesteps.to(timestep) / scale == timestep.flatten()[0]).nonzero()
                if len(place) == 1:
                    return int(place[0]), len(timesteps)
        raise ValueError(
            f"cache_context({context.name!r}) gives no step; call it with step_index=i, num_inference_steps=n, "
            "or enable the cache on the pipeline, whose scheduler knows"
        )


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
    if HookRegistry.check_if_exists_or_initialize(transformer).get_hook(_HOOK) is not None:
        raise ValueError(f"enable_cache: this {kind} has a cache already; call disable() of its handle first")
    plan = plan_cache(policy, kind, tuple(transformer.config[name] for name in LAYOUTS[kind].counts))
    if plan is None:
        raise ValueError("enable_cache: policy 'none' is no cache; leave the call out")
    scheduler = getattr(pipe_or_transformer, "scheduler", None)
    return CacheHandle(transformer, plan, num_branches or LAYOUTS[kind].num_branches, scheduler)


def plan_cache(policy: str | PolicyConfig, transformer_class: str, num_blocks: tuple[int, ...]) -> CachePlan | None:
    """What a policy means for a transformer with so many blocks in each of its lists; None for `none`.

    Raises:
        ValueError: a policy that is unknown, or that does not fit the transformer.
    """
    spec = parse_spec(policy) if isinstance(policy, str) else policy
    if isinstance(spec, CacheSpec) and spec.name == "none":
        return None
    if transformer_class not in LAYOUTS:
        raise ValueError(f"cache: {transformer_class} is not supported; supported: {', '.join(LAYOUTS)}")
    # the probe must end within the first list, and before the last block
    first, *others = num_blocks
    num_probeable = first if others else first - 1
    return resolve(spec, LAYOUTS[transformer_class].family, sum(num_blocks), num_probeable)
