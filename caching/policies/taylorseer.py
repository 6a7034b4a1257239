"""TaylorSeer (arXiv 2503.06923): compute every n-th step, extrapolate each layer's output in between.

Section 3.2: a layer's output at a skipped step is its Taylor series around the last computed step, with finite
differences over the computed steps in place of derivatives. Rules as in github.com/Shenyi-Z/TaylorSeer at 288776d:
TaylorSeer-Wan2.1/wan/taylorseer, TaylorSeer-HunyuanVideo/hyvideo/modules, TaylorSeer-FLUX/src/flux.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cineray.caching.plan import ModelFacts, check_field, text_of

if TYPE_CHECKING:  # a driver on Ray reads policies, and does without torch
    import torch


@dataclass(frozen=True, kw_only=True, slots=True)
class SeriesPlan:
    """A Taylor series of each layer for a model, and its whole text."""

    text: str
    config: TaylorSeerConfig
    num_blocks: int


@dataclass(frozen=True, kw_only=True, slots=True)
class TaylorSeerConfig:
    """Options of TaylorSeer: which steps are computed, and the order of the series.

    Args:
        interval: steps from one computed step to the next.
        order: highest derivative; 0 reuses. Each costs one more tensor per layer.
        warmup_steps: steps at the start that are computed, `first_enhance` in the official code.
    """

    interval: int = 5
    order: int = 1
    warmup_steps: int = 1

    def __post_init__(self) -> None:
        for name, least in (("interval", 1), ("order", 0), ("warmup_steps", 1)):
            check_field(self, name, getattr(self, name) >= least, f"{least} or more")

    def plan(self, name: str, model: ModelFacts) -> SeriesPlan:
        return SeriesPlan(text=text_of(name, self), config=self, num_blocks=model.num_blocks)

    def computes(self, step_index: int) -> bool:
        return step_index < self.warmup_steps or (step_index - self.warmup_steps + 1) % self.interval == 0

    def keeps_derivatives(self, step_index: int) -> bool:
        """Whether this computed step takes differences to the one before: the warm-up keeps its last alone."""
        return step_index >= self.warmup_steps - 1


def derivatives(output: torch.Tensor, before: list[torch.Tensor], distance: int, order: int) -> list[torch.Tensor]:
    """Finite differences at a computed step: [output, first derivative, ...], at most `order` of them.

    Args:
        output: of the layer, any shape.
        before: what this gave at the computed step before, `distance` steps ago; empty if there is none.
    """
    found = [output]
    for previous in before[:order]:
        found.append((found[-1] - previous) / distance)
    return found


def extrapolate(found: list[torch.Tensor], distance: int) -> torch.Tensor:
    """The Taylor series `distance` steps after the step of these derivatives."""
    output = found[0]
    for order, derivative in enumerate(found[1:], 1):
        output = output + derivative * (distance**order / math.factorial(order))
    return output
