"""Which step and branch a forward of a diffusers transformer belongs to: said by the loop, never counted."""

from typing import Any, Protocol

import torch
from diffusers.hooks import HookRegistry, ModelHook
from diffusers.hooks.hooks import BaseState, CacheContext, StateManager
from torch import nn

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
    """Learns from diffusers' `cache_context` where the loop is, and tells a listener.

    Args:
        num_branches: calls of the transformer per step.
        scheduler: knows the step by its timestep where the context does not say it (some pipelines); or None.
    """

    _is_stateful = True

    def __init__(self, transformer: nn.Module, num_branches: int, scheduler: Any) -> None:
        super().__init__()
        # diffusers sets the context of every StateManager that it finds on a hook
        self.contexts = StateManager(BaseState)  # type: ignore[arg-type]  # annotated as an instance, takes a class
        self.listener: Listener | None = None
        self._transformer = transformer
        self._num_branches = num_branches
        self._scheduler = scheduler
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
        context = self.contexts._context
        if context is None:
            raise ValueError(
                "a cache is enabled, but the call does not say which step it is: wrap it in "
                'transformer.cache_context("cond", step_index=i, num_inference_steps=n)'
            )
        step_index, num_steps = self._step(context, kwargs.get("timestep"))
        if step_index == 0 and context.name in self._branches_seen:
            self._branches_seen.clear()
            if self.listener is not None:
                self.listener.begin_clip()
        self._branches_seen.add(context.name)
        self._here = StepContext(
            branch=context.name, step_index=step_index, num_steps=num_steps, num_branches=self._num_branches
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
