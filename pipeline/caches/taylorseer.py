"""TaylorSeer on a diffusers transformer: layers that are computed every n-th step and extrapolated in between.

As in the official code, the layers are those that feed a residual add, their outputs taken before the gate; gates and
modulations are the present step's. Of a single-stream block that is its output projection, and what runs before it in
the block has no other reader, so that on a skipped step it gives zeros that cost nothing.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from cineray.caching.call import StepContext
from cineray.caching.policies.taylorseer import TaylorSeerConfig, derivatives, extrapolate
from cineray.caching.trace import Trace
from cineray.pipeline.adapters import BlockLayout
from cineray.pipeline.caches.layers import COMPUTE, Kind, LayerHook, LayerRunner, Where, layers_of


def series_layers(transformer: nn.Module, layout: BlockLayout) -> Iterator[tuple[nn.Module, bool]]:
    """(module, whether it is extrapolated; else it gives zeros on skipped steps)."""
    single_blocks = {number for layer, number, _ in layers_of(transformer, layout) if layer == "proj_mlp"}
    for _, number, module in layers_of(transformer, layout):
        yield module, number not in single_blocks
    single = getattr(transformer, "single_transformer_blocks", None)
    for block in single.children() if single is not None else ():
        yield block.proj_out, True


def run_series(
    transformer: nn.Module,
    layout: BlockLayout,
    config: TaylorSeerConfig,
    trace: Trace,
    where: Callable[[], StepContext],
) -> LayerRunner:
    """TaylorSeer: every layer by its series."""
    are_extrapolated = [is_extrapolated for _, is_extrapolated in series_layers(transformer, layout)]

    def new_hook(place: int, where: Where) -> LayerHook:
        return SeriesLayer(config, are_extrapolated[place], where)

    def modules() -> list[nn.Module]:
        return [module for module, _ in series_layers(transformer, layout)]

    return LayerRunner(transformer, modules, new_hook, None, trace, where)


class SeriesLayer(LayerHook):
    """Extrapolates the layer's output between computed steps; one series per branch and per tensor of the output.

    A layer whose branch has no output from the step before, or one of other inputs' kind, is computed.
    """

    def __init__(self, config: TaylorSeerConfig, is_extrapolated: bool, where: Where) -> None:
        super().__init__(where)
        self._config = config
        self._is_extrapolated = is_extrapolated
        self._kept: dict[str, _Series] = {}

    def instead(self, kind: Kind, /) -> Any:
        branch, step = self.where()
        series = self._kept.get(branch)
        if series is None or not series.goes_on(step, kind) or self._config.computes(step):
            return COMPUTE
        self.has_skipped = True
        series.last_step = step
        return series.forecast(step)

    def keep(self, kind: Kind, output: Any, /) -> None:
        branch, step = self.where()
        series = self._kept.get(branch)
        goes_on = series is not None and series.goes_on(step, kind)
        before = series if goes_on and self._config.keeps_derivatives(step) else None
        order = self._config.order if self._is_extrapolated else None
        self._kept[branch] = _Series(output, step, kind, order, before)

    def reset(self) -> None:
        self._kept.clear()

    @property
    def held_bytes(self) -> int:
        return sum(series.held_bytes for series in self._kept.values())


class _Series:
    """One layer's output at a computed step, with its derivatives.

    Args:
        kind: of the layer's inputs.
        order: of the series; None keeps shapes alone and forecasts zeros.
        before: of the computed step before.
    """

    def __init__(self, output: Any, step: int, kind: Kind, order: int | None, before: "_Series | None") -> None:
        self.last_step = step
        self.kind = kind
        self._computed_step = step
        self._is_tuple = isinstance(output, tuple)
        outputs = output if isinstance(output, tuple) else (output,)
        self._zeros = [torch.zeros((), dtype=o.dtype, device=o.device).expand(o.shape) for o in outputs]
        self._series: list[list[torch.Tensor]] = []
        if order is not None:
            past = before._series if before else [[] for _ in outputs]
            distance = step - before._computed_step if before else 0
            self._series = [derivatives(o, p, distance, order) for o, p in zip(outputs, past, strict=True)]

    def goes_on(self, step: int, kind: Kind) -> bool:
        """Whether it reaches to the step before, of inputs of this kind."""
        return self.last_step == step - 1 and self.kind == kind

    def forecast(self, step: int) -> Any:
        distance = step - self._computed_step
        outputs = [extrapolate(s, distance) for s in self._series] if self._series else self._zeros
        return tuple(outputs) if self._is_tuple else outputs[0]

    @property
    def held_bytes(self) -> int:
        return sum(t.numel() * t.element_size() for series in self._series for t in series)
