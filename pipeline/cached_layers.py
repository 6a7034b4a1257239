"""Lets a schedule skip single layers of a diffusers transformer, and records what skipping them would cost.

The layers are the modules that feed a residual add (SmoothCache, section 3.1). They are hooked with diffusers' own
ModelHook on each instance.
"""

from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from diffusers.hooks import HookRegistry, ModelHook
from torch import nn

from cineray.caching.controller import StepContext
from cineray.caching.smoothcache import LayerSchedule
from cineray.caching.trace import Trace, TraceEntry
from cineray.pipeline.cached_blocks import LAYOUTS

# transformer class -> layer types, by the blocks' attribute names
LAYERS: dict[str, tuple[str, ...]] = {
    "WanTransformer3DModel": ("attn1", "attn2", "ffn"),
    "HunyuanVideoTransformer3DModel": ("attn", "ff", "ff_context", "proj_mlp"),
    "FluxTransformer2DModel": ("attn", "ff", "ff_context", "proj_mlp"),
}
_HOOK = "cineray_layer"

Where = Callable[[], tuple[str, int]]  # (branch, step index) of the forward in the works


def layers_of(transformer: nn.Module) -> Iterator[tuple[str, int, nn.Module]]:
    """(layer type, block number from 0 over all lists, module)."""
    kind = type(transformer).__name__
    number = 0
    for name in LAYOUTS[kind].lists:
        for block in getattr(transformer, name):
            for layer in LAYERS[kind]:
                module = getattr(block, layer, None)
                if module is not None:
                    yield layer, number, module
            number += 1


class _LayerHook(ModelHook):
    """A hook in place of a layer's forward."""

    def _original(self) -> Callable[..., Any]:
        forward = self.fn_ref.original_forward
        assert forward is not None  # diffusers sets it when a hook that has new_forward is registered
        return forward


class ScheduledLayer(_LayerHook):
    """Reuses the layer's last output of the same branch where the schedule says so.

    A layer whose branch has no output from the step before, or one of another shape, is computed.
    """

    def __init__(self, schedule: LayerSchedule, layer: str, block: int, where: Where) -> None:
        super().__init__()
        self._computes = lambda step: schedule.computes(layer, block, step)
        self._where = where
        self._kept: dict[str, tuple[int, torch.Size, Any]] = {}
        self._has_skipped = False

    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        branch, step = self._where()
        shape = (args[0] if args else kwargs["hidden_states"]).shape
        kept = self._kept.get(branch)
        if kept is not None and kept[0] == step - 1 and kept[1] == shape and not self._computes(step):
            self._has_skipped = True
            output = kept[2]
        else:
            output = self._original()(*args, **kwargs)
        self._kept[branch] = (step, shape, output)
        return output

    def take_skipped(self) -> bool:
        """Whether the layer was skipped in the forward that ends."""
        skipped, self._has_skipped = self._has_skipped, False
        return skipped

    def forget(self) -> None:
        self._kept.clear()

    @property
    def held_bytes(self) -> int:
        return sum(t.numel() * t.element_size() for _, _, output in self._kept.values() for t in _tensors(output))


class LayerRecorder(_LayerHook):
    """Adds up, for each lag, how far a layer's output moves: sum |then - now| and sum |now| per (step, lag)."""

    def __init__(self, max_lag: int, where: Where) -> None:
        super().__init__()
        self._max_lag = max_lag
        self._where = where
        self._past: dict[str, list[tuple[int, list[torch.Tensor]]]] = {}
        self.sums: dict[tuple[int, int], list[float]] = {}  # (step before, lag) -> [sum |difference|, sum |now|]

    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        branch, step = self._where()
        output = self._original()(*args, **kwargs)
        now = [t.detach().clone() for t in _tensors(output)]
        past = [p for p in self._past.get(branch, []) if step - self._max_lag <= p[0] < step]
        size = sum(t.abs().sum(dtype=torch.float32).item() for t in now)
        for before, then in past:
            moved = sum((a - b).abs().sum(dtype=torch.float32).item() for a, b in zip(then, now, strict=True))
            sums = self.sums.setdefault((before, step - before), [0.0, 0.0])
            sums[0] += moved
            sums[1] += size
        self._past[branch] = [*past, (step, now)]
        return output


class LayerRunner:
    """Runs a transformer's layers by a schedule and records each forward.

    Args:
        where: says where the denoising loop is in this call.
    """

    def __init__(
        self, transformer: nn.Module, schedule: LayerSchedule, trace: Trace, where: Callable[[], StepContext]
    ) -> None:
        self._transformer = transformer
        self._schedule = schedule
        self._trace = trace
        self._where = where
        self._layers = [
            hook
            for _, hook in attach(transformer, lambda layer, block: ScheduledLayer(schedule, layer, block, self._place))
        ]

    def _place(self) -> tuple[str, int]:
        context = self._where()
        if context.num_steps != self._schedule.num_steps:
            raise ValueError(
                f"cache: the schedule is for {self._schedule.num_steps} steps, this clip has {context.num_steps}; "
                "calibrate one for this number of steps"
            )
        return context.branch, context.step_index

    def begin_clip(self) -> None:
        self._trace.clear()
        self.free()

    def end_forward(self, context: StepContext) -> None:
        skipped = sum(layer.take_skipped() for layer in self._layers)
        self._trace.entries.append(
            TraceEntry(
                step=context.step_index,
                branch=context.branch,
                sample=0,
                compute=skipped == 0,
                cost=1 - skipped / len(self._layers),
                reason="schedule",
                statistic=None,
                gamma=None,
            )
        )
        held = sum(layer.held_bytes for layer in self._layers)
        self._trace.held_bytes = max(self._trace.held_bytes, held)

    def free(self) -> None:
        for layer in self._layers:
            layer.forget()

    def detach(self) -> None:
        detach(self._transformer)


Hook = TypeVar("Hook", bound=ModelHook)


def attach(transformer: nn.Module, new_hook: Callable[[str, int], Hook]) -> list[tuple[str, Hook]]:
    """Hooks every layer; returns (layer type, hook)."""
    hooks = []
    for layer, block, module in layers_of(transformer):
        hook = new_hook(layer, block)
        HookRegistry.check_if_exists_or_initialize(module).register_hook(hook, _HOOK)
        hooks.append((layer, hook))
    return hooks


def detach(transformer: nn.Module) -> None:
    for _, _, module in layers_of(transformer):
        HookRegistry.check_if_exists_or_initialize(module).remove_hook(_HOOK, recurse=False)


def _tensors(output: Any) -> list[torch.Tensor]:
    values = output if isinstance(output, tuple) else (output,)
    return [v for v in values if isinstance(v, torch.Tensor)]
