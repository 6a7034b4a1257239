"""Lets a schedule skip single layers of a diffusers transformer, and records what skipping them would cost.

The layers are the modules that feed a residual add (SmoothCache, section 3.1). While the transformer's forward runs, a
hook stands in the place of each layer's own `forward`; between two forwards the layers are what they are.
"""

from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import nn

from cineray.caching.call import StepContext
from cineray.caching.policies.smoothcache import LayerSchedule
from cineray.caching.trace import Trace, TraceEntry
from cineray.pipeline.adapters import BlockLayout

_NONE = object()
COMPUTE = object()  # said by a hook whose layer is to run

Where = Callable[[], tuple[str, int]]  # (branch, step index) of the forward in flight
Kind = tuple[tuple[torch.Size, torch.dtype, torch.device], ...]


def kind_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Kind:
    """Shape, type and device of all tensors that a layer is called with."""
    values = (*args, *kwargs.values())
    return tuple((v.shape, v.dtype, v.device) for v in values if isinstance(v, torch.Tensor))


def layers_of(transformer: nn.Module, layout: BlockLayout) -> Iterator[tuple[str, int, nn.Module]]:
    """(layer type, block number, module); blocks are numbered from 0 over all lists, or along interleaved ones.

    Those that make hints come last.
    """
    number = 0
    for blocks in layout.all_lists:
        number = 0 if layout.interleaved else number
        for block in getattr(transformer, blocks).children():
            for layer, attribute in _attributes(layout, blocks):
                module = getattr(block, attribute, None)
                if module is not None:
                    yield layer, number, module
            number += 1


def _attributes(layout: BlockLayout, blocks: str) -> Iterator[tuple[str, str]]:
    """(layer type, attribute of a block) of the layer types that blocks of this list may have."""
    for layer in layout.layers:
        of_list, _, attribute = layer.rpartition(".")
        if of_list in ("", blocks):
            yield layer, attribute


_Run = TypeVar("_Run", bound=Callable[..., Any])


def _left_to_python(run: _Run) -> _Run:
    """Within a compiled block this function is not compiled; what it calls is."""
    return torch.compiler.disable(run, recursive=False)  # type: ignore[return-value]  # typed as a context


def _uncompiled(run: _Run) -> _Run:
    """Nor is what this one calls."""
    return torch.compiler.disable(run)  # type: ignore[return-value]


class LayerHook:
    """Stands in place of a layer's forward; what it holds and whether it skipped is asked after each forward."""

    def __init__(self, where: Where) -> None:
        self.where = where
        self.has_run = self.has_skipped = False
        self.original: Callable[..., Any] = self._no_hook
        self.before: Any = _NONE  # the layer's own attribute `forward`, if it has one
        self._kind: Kind = ()  # of the call in flight

    @_left_to_python
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        kept = self._ask(args, kwargs)
        if kept is not COMPUTE:
            return kept
        output = self.original(*args, **kwargs)
        self._show(output)
        return output

    @_uncompiled
    def _ask(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self.has_run = True
        self._kind = kind_of(args, kwargs)
        return self.instead(self._kind)

    @_uncompiled
    def _show(self, output: Any) -> None:
        self.keep(self._kind, output)

    def instead(self, _kind: Kind, /) -> Any:
        """What stands for the layer's output when it is called with such inputs, or COMPUTE."""
        return COMPUTE

    def keep(self, kind: Kind, output: Any, /) -> None:
        """Takes what the layer computed of such inputs."""
        raise NotImplementedError

    @staticmethod
    def _no_hook(*_args: Any, **_kwargs: Any) -> Any:
        raise AssertionError("a hook runs only where it hangs")

    def consume_has_run(self) -> bool:
        """Whether the layer was asked for in the forward that ends."""
        run, self.has_run = self.has_run, False
        return run

    def consume_skipped(self) -> bool:
        """Whether the layer was skipped in the forward that ends."""
        skipped, self.has_skipped = self.has_skipped, False
        return skipped

    def reset(self) -> None:
        """Drops what is held of the clip."""

    @property
    def held_bytes(self) -> int:
        return 0


class ScheduledLayer(LayerHook):
    """Reuses the layer's last output of the same branch where the schedule says so.

    A layer whose branch has no output from the step before, or one of other inputs' kind, is computed.
    """

    def __init__(self, schedule: LayerSchedule, layer: str, block: int, where: Where) -> None:
        super().__init__(where)
        self._computes = lambda step: schedule.computes(layer, block, step)
        self._kept: dict[str, tuple[int, Kind, Any]] = {}

    def instead(self, kind: Kind, /) -> Any:
        branch, step = self.where()
        kept = self._kept.get(branch)
        if kept is None or kept[:2] != (step - 1, kind) or self._computes(step):
            return COMPUTE
        self.has_skipped = True
        self.keep(kind, kept[2])
        return kept[2]

    def keep(self, kind: Kind, output: Any, /) -> None:
        branch, step = self.where()
        self._kept[branch] = (step, kind, output)

    def reset(self) -> None:
        self._kept.clear()

    @property
    def held_bytes(self) -> int:
        return sum(t.numel() * t.element_size() for _, _, output in self._kept.values() for t in _tensors(output))


class LayerRecorder(LayerHook):
    """Adds up, for each lag, how far a layer's output moves: sum |then - now| and sum |now| per (step, lag)."""

    def __init__(self, max_lag: int, where: Where) -> None:
        super().__init__(where)
        self._max_lag = max_lag
        self._past: dict[str, list[tuple[int, list[torch.Tensor]]]] = {}
        self.sums: dict[tuple[int, int], list[float]] = {}  # (step before, lag) -> [sum |difference|, sum |now|]

    def keep(self, _kind: Kind, output: Any, /) -> None:
        branch, step = self.where()
        now = [t.detach().clone() for t in _tensors(output)]
        past = [p for p in self._past.get(branch, []) if step - self._max_lag <= p[0] < step]
        size = sum(t.abs().sum(dtype=torch.float32).item() for t in now)
        for before, then in past:
            moved = sum((a - b).abs().sum(dtype=torch.float32).item() for a, b in zip(then, now, strict=True))
            sums = self.sums.setdefault((before, step - before), [0.0, 0.0])
            sums[0] += moved
            sums[1] += size
        self._past[branch] = [*past, (step, now)]


class LayerRunner:
    """Runs a transformer's layers by their hooks and records each forward.

    Args:
        transformer: whose layers they are.
        modules: finds the layers, which may be exchanged; their number stays.
        new_hook: the hook of the layer with this place in `modules`.
        num_steps: of the clips that it is made for; None for any.
        where: says where the denoising loop is in this call.
    """

    def __init__(
        self,
        transformer: nn.Module,
        modules: Callable[[], list[nn.Module]],
        new_hook: Callable[[int, Where], LayerHook],
        num_steps: int | None,
        trace: Trace,
        where: Callable[[], StepContext],
    ) -> None:
        self._transformer = transformer
        self._modules = modules
        self._num_steps = num_steps
        self._trace = trace
        self._where = where
        self._layers = [new_hook(place, self._place) for place in range(len(modules()))]
        self._hung: list[nn.Module] = []

    def _place(self) -> tuple[str, int]:
        context = self._where()
        if self._num_steps is not None and context.num_steps != self._num_steps:
            raise ValueError(
                f"cache: the schedule is for {self._num_steps} steps, this clip has {context.num_steps}; "
                "calibrate one for this number of steps"
            )
        return context.branch, context.step_index

    def begin_clip(self) -> None:
        self._trace.clear()
        self.free()

    def begin_forward(self, _latents: torch.Tensor, /) -> None:
        """
        Raises:
            ValueError: layers were added or taken away since the cache was enabled.
        """
        self._take_down()
        modules = self._modules()
        if len(modules) != len(self._layers):
            raise ValueError(
                f"cache: this {type(self._transformer).__name__} had {len(self._layers)} layers when the cache was "
                f"enabled and has {len(modules)} now; disable the cache and enable it again"
            )
        for module, hook in zip(modules, self._layers, strict=True):
            attach_hook(module, hook)
            self._hung.append(module)

    def end_forward(self, context: StepContext) -> None:
        """
        Raises:
            ValueError: no layer was asked for.
        """
        self._take_down()
        skipped = sum(layer.consume_skipped() for layer in self._layers)
        has_run = [layer.consume_has_run() for layer in self._layers]  # each one forgets that it ran
        if not any(has_run):
            raise ValueError(
                f"a cache is enabled, and the forward of this {type(self._transformer).__name__} ran none of its "
                "layers: it has been replaced, by another cache or by hand; undo that, or disable the cache"
            )
        for branch, sample in context.rows:
            self._trace.entries.append(
                TraceEntry(
                    step=context.step_index,
                    branch=branch,
                    sample=sample,
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
            layer.reset()

    def cancel_forward(self) -> None:
        self._take_down()
        for layer in self._layers:
            layer.consume_skipped()
            layer.consume_has_run()
        self.free()

    def _take_down(self) -> None:
        for module in self._hung:
            detach_hook(module)
        self._hung.clear()


def attach_hook(module: nn.Module, hook: LayerHook) -> None:
    hook.original, hook.before = module.forward, module.__dict__.get("forward", _NONE)
    module.forward = hook


def detach_hook(module: nn.Module) -> None:
    """Puts back what the hook replaced, unless someone else has replaced the hook."""
    hook = module.__dict__.get("forward")
    if isinstance(hook, LayerHook):
        if hook.before is _NONE:
            del module.forward
        else:
            module.forward = hook.before
        hook.before = _NONE


def run_schedule(
    transformer: nn.Module,
    layout: BlockLayout,
    schedule: LayerSchedule,
    trace: Trace,
    where: Callable[[], StepContext],
) -> LayerRunner:
    """SmoothCache: every layer by its row of the schedule."""
    names = [(layer, block) for layer, block, _ in layers_of(transformer, layout)]

    def new_hook(place: int, where: Where) -> LayerHook:
        layer, block = names[place]
        return ScheduledLayer(schedule, layer, block, where)

    def modules() -> list[nn.Module]:
        return [module for _, _, module in layers_of(transformer, layout)]

    return LayerRunner(transformer, modules, new_hook, schedule.num_steps, trace, where)


def _tensors(output: Any) -> list[torch.Tensor]:
    values = output if isinstance(output, tuple) else (output,)
    return [v for v in values if isinstance(v, torch.Tensor)]
