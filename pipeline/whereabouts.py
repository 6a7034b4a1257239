"""Which step and branch a forward of a diffusers transformer belongs to: said by the loop, never counted."""

import inspect
from collections.abc import Callable
from typing import Any, Protocol

import torch
from diffusers.hooks import HookRegistry, ModelHook
from diffusers.hooks.hooks import BaseState, CacheContext, StateManager
from torch import nn
from torch._dynamo.eval_frame import OptimizedModule

from cineray.caching.controller import StepContext

_HOOK = "cineray_whereabouts"


class Listener(Protocol):
    """Who wants to know."""

    def begin_clip(self) -> None: ...

    def end_forward(self, context: StepContext) -> None: ...

    def free(self) -> None:
        """The clip is done: drop its tensors."""
        ...


class Whereabouts(ModelHook):
    """Learns where the loop is, and tells a listener.

    From diffusers' `cache_context` if the loop sets one; else the step is the place of `timestep` in the scheduler's
    list, and the branch is "cond", which is all there is where one call makes the step.

    Args:
        num_branches: guidance branches per step.
        scheduler: looks up the scheduler in use, which a pipeline's user may exchange; or None.
        stacked: branches that stand one after the other in the batch of one call, when there is guidance; or ().
    """

    _is_stateful = True

    def __init__(
        self,
        transformer: nn.Module,
        num_branches: int,
        scheduler: Callable[[], Any] | None,
        stacked: tuple[str, ...] = (),
    ) -> None:
        super().__init__()
        # diffusers sets the context of every StateManager that it finds on a hook
        self.contexts = StateManager(BaseState)  # type: ignore[arg-type]  # annotated as an instance, takes a class
        self.listener: Listener | None = None
        self._transformer = transformer
        self._num_branches = num_branches
        self._scheduler = scheduler
        self._stacked = stacked
        self._arguments = inspect.signature(type(transformer).forward)
        self._here: StepContext | None = None
        self._branches_seen: set[str] = set()
        HookRegistry.check_if_exists_or_initialize(transformer).register_hook(self, _HOOK)

    @staticmethod
    def is_attached(transformer: nn.Module) -> bool:
        return HookRegistry.check_if_exists_or_initialize(transformer).get_hook(_HOOK) is not None

    def detach(self) -> None:
        HookRegistry.check_if_exists_or_initialize(self._transformer).remove_hook(_HOOK, recurse=False)

    def where(self) -> StepContext:
        assert self._here is not None  # pre_forward ran: the blocks run inside the forward
        return self._here

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        check_not_compiled_whole(module)
        given = self._arguments.bind(module, *args, **kwargs).arguments
        context = self.contexts._context or self._default_context()
        step_index, num_steps = self._step(context, given.get("timestep"))
        if step_index == 0 and context.name in self._branches_seen:
            self._branches_seen.clear()
            if self.listener is not None:
                self.listener.begin_clip()
        self._branches_seen.add(context.name)
        stacked = self._stack(given["hidden_states"])
        num_samples = len(given["hidden_states"]) // (len(stacked) or 1)
        self._here = StepContext(
            branch="cond" if stacked else context.name,
            step_index=step_index,
            num_steps=num_steps,
            num_branches=len(stacked) or self._num_branches,
            rows=tuple((branch, sample) for branch in stacked or (context.name,) for sample in range(num_samples)),
        )
        return args, kwargs

    def post_forward(self, module: nn.Module, output: Any) -> Any:
        if self.listener is not None:
            self.listener.end_forward(self.where())
        return output

    def reset_state(self, module: nn.Module) -> nn.Module:
        """Called by diffusers at the end of a pipeline call."""
        if self.listener is not None:
            self.listener.free()
        return module

    def _default_context(self) -> CacheContext:
        """For loops that set none: the scheduler must know the step, and the call must make the whole of it."""
        if self._scheduler is not None and (self._num_branches == 1 or self._stacked):
            return CacheContext("cond")
        raise ValueError(
            "a cache is enabled, but the call does not say which step it is: wrap it in "
            'transformer.cache_context("cond", step_index=i, num_inference_steps=n)'
            + (", or enable the cache with scheduler=..." if self._scheduler is None else "")
        )

    def _stack(self, hidden_states: torch.Tensor) -> tuple[str, ...]:
        """The stacked branches; () without guidance. All branches of a sample start from the same latents."""
        size, uneven = divmod(len(hidden_states), len(self._stacked) or 1)
        if not self._stacked or uneven:
            return ()
        first, *others = hidden_states.split(size)
        same = all(torch.allclose(first, other, rtol=0, atol=0, equal_nan=True) for other in others)
        return self._stacked if same else ()

    def _step(self, context: CacheContext, timestep: torch.Tensor | None) -> tuple[int, int]:
        """Step and number of steps from the context, else from the place of `timestep` in the scheduler's list."""
        if context.step_index is not None and context.num_inference_steps is not None:
            return context.step_index, context.num_inference_steps
        scheduler = self._scheduler() if self._scheduler is not None else None
        timesteps = getattr(scheduler, "timesteps", None)
        if timesteps is None or timestep is None:
            raise ValueError(
                f"cache_context({context.name!r}) gives no step; call it with step_index=i, num_inference_steps=n, "
                "or enable the cache on the pipeline, whose scheduler knows"
            )
        now = timestep.flatten()[0]
        for scale in (1, 1000):  # FLUX's pipeline divides by num_train_timesteps
            places = (timesteps.to(now) / scale == now).nonzero().flatten().tolist()
            if places:
                return self._place(scheduler, places, now), len(timesteps)
        raise ValueError(
            f"timestep {now.item():g} is not in the list of the pipeline's {type(scheduler).__name__}; "
            "say the step with cache_context(..., step_index=i, num_inference_steps=n)"
        )

    @staticmethod
    def _place(scheduler: Any, places: list[int], timestep: torch.Tensor) -> int:
        """The one of these places that is meant: a timestep stands twice in the lists of Heun and its kind.

        `step_index` of diffusers' schedulers is the place of the call in the works, None before the first step.
        """
        if len(places) == 1:
            return places[0]
        place = getattr(scheduler, "step_index", None)
        if place is None:
            place = getattr(scheduler, "begin_index", None) or 0
        if not hasattr(scheduler, "step_index") or place not in places:
            raise ValueError(
                f"{type(scheduler).__name__} comes to timestep {timestep.item():g} {len(places)} times and does not "
                "tell which time this is; say the step with cache_context(..., step_index=i, num_inference_steps=n)"
            )
        return place


def check_not_compiled_whole(transformer: Any) -> None:
    """A cache works between a transformer's blocks, so those may be compiled, one by one.

    Raises:
        ValueError: the transformer is compiled as one graph, in which a cache's decisions would be frozen.
    """
    if is_compiled(transformer):
        raise ValueError(
            f"enable_cache: this {type(getattr(transformer, '_orig_mod', transformer)).__name__} is compiled as a "
            "whole, and a cache decides between its blocks; compile the blocks instead: "
            "transformer.compile_repeated_blocks(), or block.compile() on each"
        )


def is_compiled(module: Any) -> bool:
    """By `torch.compile(module)` or in place by `module.compile()`."""
    return isinstance(module, OptimizedModule) or getattr(module, "_compiled_call_impl", None) is not None
