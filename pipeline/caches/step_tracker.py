"""Tracks when a forward of a diffusers transformer begins and ends, and its step and branch."""

import inspect
import threading
from collections.abc import Callable
from typing import Any, Protocol

import torch
from diffusers.hooks import HookRegistry, ModelHook
from diffusers.hooks.hooks import BaseState, CacheContext, StateManager
from torch import nn
from torch._C._dynamo.eval_frame import get_eval_frame_callback
from torch._dynamo.eval_frame import OptimizedModule

from cineray.caching.call import StepContext
from cineray.pipeline.caches.clip_progress import Call, ClipProgress
from cineray.pipeline.caches.other_caches import other_cache, switched_on

_HOOK = "cineray_whereabouts"
_GUIDERS_NAMES = {"pred_cond": "cond", "pred_uncond": "uncond"}  # of branches, in diffusers/guiders


class Listener(Protocol):
    """Callbacks of what follows a transformer's calls."""

    def begin_clip(self) -> None: ...

    def begin_forward(self, latents: torch.Tensor, /) -> None:
        """The transformer's own forward is about to run, on these latents."""
        ...

    def end_forward(self, context: StepContext, /) -> None: ...

    def cancel_forward(self) -> None:
        """Ends a forward that was broken off: nothing of it may be used."""
        ...

    def free(self) -> None:
        """The clip is done: drop its tensors."""
        ...


class StepTracker(ModelHook):
    """Learns where the loop is, and tells a listener.

    It does nothing until `attach`, and nothing more after `detach`.

    From diffusers' `cache_context` if the loop sets one; else the step is the place of `timestep` in the scheduler's
    list, and the branch is told by the order of the calls of a step (`ClipProgress`).

    diffusers tells contexts to the hooks of its registry, so it stands there; but a registered hook wraps `forward` in
    a closure that a deep copy shares with its original and that accelerate's offloading drops. So it wraps nothing,
    and PyTorch's own hooks say when a forward begins and ends. A copy of it, by `deepcopy` or pickle, does nothing.

    Args:
        num_branches: guidance branches per step.
        scheduler: looks up the scheduler in use, which a pipeline's user may exchange; or None.
        stacked: branches that stand one after the other in the batch of one call, when there is guidance; or ().
        progress: shared by the transformers that render a clip's steps in turn.
    """

    _is_stateful = True

    def __init__(
        self,
        transformer: nn.Module,
        num_branches: int,
        scheduler: Callable[[], Any] | None,
        stacked: tuple[str, ...] = (),
        progress: ClipProgress | None = None,
    ) -> None:
        super().__init__()
        # diffusers sets the context of every StateManager that it finds on a hook
        self.contexts = StateManager(BaseState)  # type: ignore[arg-type]  # annotated as an instance, takes a class
        self.listener: Listener | None = None
        self._transformer: nn.Module | None = None
        self._tracked = transformer
        self._num_branches = num_branches
        self._scheduler = scheduler
        self._stacked = stacked
        self._arguments = tuple(inspect.signature(type(transformer).forward).parameters)[1:]  # names, without self
        self._progress = progress or ClipProgress()
        self._caller = ""
        self._here: StepContext | None = None
        self._name = ""
        self._running = threading.Lock()  # held during a forward
        self._thread = 0  # that holds it
        self._had_registry = False
        self._handles: list[Any] = []

    def attach(self, listener: Listener | None = None) -> "StepTracker":
        """Puts it on the transformer; the listener is told from here on."""
        transformer = self._tracked
        self.listener = listener
        self._caller = self._progress.listen(self._begin_clip, self._forget)
        self._had_registry = hasattr(transformer, "_diffusers_hook")
        self._transformer = transformer
        registry = HookRegistry.check_if_exists_or_initialize(transformer)
        _strike_out(registry)  # what a copy brought along
        registry.hooks[_HOOK] = self
        registry._hook_order.insert(0, _HOOK)
        registry._fn_refs.insert(0, _NothingWrapped(registry))  # type: ignore[arg-type]
        self._handles.append(transformer.register_forward_pre_hook(self._enter, with_kwargs=True))
        self._handles.append(transformer.register_forward_hook(self._leave, always_call=True))
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return _nowhere, ()

    @staticmethod
    def is_attached(transformer: nn.Module) -> bool:
        hook = _hook_of(transformer)
        return hook is not None and hook._transformer is not None

    def detach(self) -> None:
        """Takes it off, unless that has been done; what others have put there stays."""
        transformer = self._transformer
        if transformer is None:
            return
        registry = getattr(transformer, "_diffusers_hook", None)
        if registry is not None and registry.hooks.get(_HOOK) is self:
            _strike_out(registry)
            if not registry.hooks and not self._had_registry:
                del transformer._diffusers_hook
        self._let_go()

    def _let_go(self) -> None:
        self._transformer = None
        for handle in self._handles:
            handle.remove()
        if self.listener is not None:
            self.listener.cancel_forward()
            self.listener.free()

    def deinitalize_hook(self, module: nn.Module) -> nn.Module:
        """Called by diffusers when someone else removes the hook from its registry."""
        if self._transformer is not None:
            self._let_go()
        return module

    def where(self) -> StepContext:
        assert self._here is not None  # the blocks run inside the forward
        return self._here

    def reset_state(self, module: nn.Module) -> nn.Module:
        """Called by diffusers at the end of a pipeline call."""
        if self._transformer is not None:
            self._progress.end()
            self._forget()
        return module

    def _begin_clip(self) -> None:
        if self._transformer is not None:
            refuse_other_cache(other_cache(self._transformer), self._transformer)
            if self.listener is not None:
                self.listener.begin_clip()

    def _forget(self) -> None:
        if self.listener is not None:
            self.listener.free()

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if module is not self._transformer:
            return  # of a copy
        check_can_cache(module)
        self._begin_forward(module)
        try:
            given = dict(zip(self._arguments, args, strict=False)) | kwargs
            self._here = self._context(given["hidden_states"], given.get("timestep"))
            if self.listener is not None:
                self.listener.begin_forward(given["hidden_states"])
        except BaseException:
            self._end_forward()
            raise

    def _begin_forward(self, module: nn.Module) -> None:
        if not self._running.acquire(blocking=False):
            if self._thread != threading.get_ident():
                raise ValueError(
                    f"a cache is enabled, and this {type(module).__name__} is called while another thread's call of it "
                    "runs; a cache follows one clip at a time: give each thread a transformer of its own"
                )
            if self.listener is not None:
                self.listener.cancel_forward()  # an interrupt broke off this thread's last call
        self._thread = threading.get_ident()

    def _end_forward(self) -> None:
        self._thread = 0
        self._running.release()

    def _leave(self, module: nn.Module, _args: Any, output: Any) -> None:
        if module is not self._transformer or self._thread != threading.get_ident():
            return  # of a copy, or a call that was refused
        try:
            if output is None:  # an exception passes
                if self.listener is not None:
                    self.listener.cancel_forward()
            else:
                if self.listener is not None:
                    self.listener.end_forward(self.where())
                self._progress.done(self._name)
        finally:
            self._end_forward()

    def _context(self, hidden_states: torch.Tensor, timestep: torch.Tensor | None) -> StepContext:
        said = self.contexts._context
        if said is None and self._scheduler is None:
            raise ValueError(
                "a cache is enabled, but the call does not say which step it is: wrap it in "
                'transformer.cache_context("cond", step_index=i, num_inference_steps=n), or enable the cache with '
                "scheduler=..."
            )
        step_index, num_steps = self._step(said or CacheContext("cond"), timestep)
        scheduler = self._scheduler() if self._scheduler is not None else None
        stacked = self._stack(hidden_states)
        self._name = self._progress.enter(
            Call(
                step_index=step_index,
                num_steps=num_steps,
                name=_GUIDERS_NAMES.get(said.name, said.name) if said is not None else None,
                hidden_states=hidden_states,
                stacks=bool(stacked),
                timesteps=getattr(scheduler, "timesteps", None),
            ),
            self._caller,
        )
        num_samples = len(hidden_states) // (len(stacked) or 1)
        return StepContext(
            branch="cond" if stacked else self._name,
            step_index=step_index,
            num_steps=num_steps,
            num_branches=len(stacked) or self._num_branches,
            rows=tuple((branch, sample) for branch in stacked or (self._name,) for sample in range(num_samples)),
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

        `step_index` of diffusers' schedulers is the place of the call in flight, None before the first step.
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


class _NothingWrapped:
    """A stand-in for what diffusers keeps of a hook: for one that wraps nothing and stands innermost."""

    pre_forward = post_forward = original_forward = None

    def __init__(self, registry: HookRegistry) -> None:
        self._registry = registry

    @property
    def forward(self) -> Any:
        """What is called next, which remains so when the hook is removed."""
        outer = self._registry._fn_refs[1:]
        return outer[0].forward if outer else self._registry._module_ref.forward


def _nowhere() -> StepTracker:
    """A copy, which does nothing."""
    copy = StepTracker.__new__(StepTracker)
    ModelHook.__init__(copy)
    copy._transformer = copy.listener = None
    copy.contexts = StateManager(BaseState)  # type: ignore[arg-type]
    return copy


def _hook_of(transformer: nn.Module) -> StepTracker | None:
    registry = getattr(transformer, "_diffusers_hook", None)
    return registry.hooks.get(_HOOK) if registry is not None else None


def _strike_out(registry: HookRegistry) -> None:
    if registry.hooks.pop(_HOOK, None) is not None:
        place = registry._hook_order.index(_HOOK)
        del registry._hook_order[place], registry._fn_refs[place]


def refuse_other_cache(name: str | None, transformer: nn.Module) -> None:
    """
    Raises:
        ValueError: there is a name.
    """
    if name is not None:
        raise ValueError(
            f"enable_cache: this {type(transformer).__name__} has {name} on it too, and two caches at once give "
            "neither's result; take one off: transformer.disable_cache() and the like, or disable() of cineray's handle"
        )


def check_can_cache(transformer: nn.Module) -> None:
    """What may have changed since the cache was enabled.

    Raises:
        ValueError: the transformer is compiled as a whole, has another library's cache, or is trained.
    """
    check_not_compiled_whole(transformer)
    refuse_other_cache(switched_on(transformer), transformer)
    if torch.is_grad_enabled() and getattr(transformer, "gradient_checkpointing", False):
        raise ValueError(
            "enable_cache: gradient checkpointing runs blocks twice, which a cache cannot follow; call the transformer "
            "under torch.no_grad(), or disable the cache for training"
        )


def check_not_compiled_whole(transformer: Any) -> None:
    """A cache works between a transformer's blocks, so those may be compiled, one by one.

    Raises:
        ValueError: the transformer is compiled as one graph, in which a cache's decisions would be frozen.
    """
    if is_compiled(transformer) or is_compiled_forward(transformer) or torch.compiler.is_compiling() or _is_traced():
        raise ValueError(
            f"enable_cache: this {type(getattr(transformer, '_orig_mod', transformer)).__name__} is compiled as a "
            "whole, and a cache decides between its blocks; compile the blocks instead: "
            "transformer.compile_repeated_blocks(), or block.compile() on each"
        )


def is_compiled(module: Any) -> bool:
    """Whether the module is compiled, by `torch.compile(module)` or in place by `module.compile()`."""
    return isinstance(module, OptimizedModule) or getattr(module, "_compiled_call_impl", None) is not None


def is_compiled_forward(module: Any) -> bool:
    """Whether its forward is compiled, by `module.forward = torch.compile(module.forward)`."""
    return hasattr(getattr(module, "forward", None), "_torchdynamo_orig_callable")


def _is_traced() -> bool:
    """Whether a compiled function calls: it may run uncompiled, but what it calls is still compiled piece by piece."""
    return get_eval_frame_callback() not in (None, False)
