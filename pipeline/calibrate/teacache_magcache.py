"""Calibrates TeaCache and MagCache: what all blocks add at each step, compared with the step before, over a few clips.

TeaCache (arXiv 2411.19108), section 3.3: pairs of the signal's relative L1 change and that of the blocks' residual, all
steps of all clips, fitted by a polynomial of degree 4 (numpy.polyfit, as its author says in
github.com/ali-vilab/TeaCache/issues/2). MagCache (arXiv 2506.09045), section 3.1: the mean over tokens of
|r_t| / |r_(t-1)|, averaged over clips.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import nn

from cineray.caching.call import CallPlan
from cineray.caching.observation import BRANCH_ORDER
from cineray.caching.policy import Signal
from cineray.caching.token_sums import SignalValues, change_sums
from cineray.pipeline.adapters import Model
from cineray.pipeline.caches.blocks import BlockRunner
from cineray.pipeline.caches.enable import step_tracker_of
from cineray.pipeline.caches.signals import SignalReader, signal_reader
from cineray.pipeline.calibrate.recorder import Recorder
from cineray.pipeline.loading.model import LoadedModel
from cineray.pipeline.render import render_clip
from cineray.pipeline.request import ClipRequest

DEGREE = 4  # of TeaCache's polynomial, in the paper and in every official coefficient list


@dataclass(slots=True)
class StepChanges:
    """Relative changes from step to step [clip][step - 1] of each branch.

    Args:
        signals: relative L1 change of each of TeaCache's signals.
        residual: relative L1 change of what all blocks add.
        magnitude: mean over tokens of |r_t| / |r_(t-1)|.
    """

    signals: dict[Signal, dict[str, list[list[float]]]] = field(
        default_factory=lambda: defaultdict(lambda: defaultdict(list))
    )
    residual: dict[str, list[list[float]]] = field(default_factory=lambda: defaultdict(list))
    magnitude: dict[str, list[list[float]]] = field(default_factory=lambda: defaultdict(list))


class AllSignals:
    """Reads every signal of a family at once."""

    def __init__(self, transformer: nn.Module, model: Model, signals: Sequence[Signal]) -> None:
        self._readers: dict[Signal, SignalReader] = {}
        self.now: dict[Signal, torch.Tensor] = {}
        for signal in signals:
            reader = signal_reader(transformer, model, signal)
            if reader is not None:
                self._readers[signal] = reader

    def read(self, block: nn.Module, hidden_states: torch.Tensor, temb: torch.Tensor) -> SignalValues:
        signal_values = None
        self.now = {}  # a new one: the recorder keeps the one before
        for signal, reader in self._readers.items():
            signal_values = reader.read(block, hidden_states, temb)
            self.now[signal] = signal_values.values
        assert signal_values is not None  # every family of TeaCache has a signal
        return signal_values

    def attach(self) -> None:
        for reader in self._readers.values():
            reader.attach()

    def detach(self) -> None:
        for reader in self._readers.values():
            reader.detach()


class StepRecorder(Recorder):
    """Writes down how it differs from the one before."""

    def __init__(self, changes: StepChanges, signals: AllSignals) -> None:
        self._changes = changes
        self._signals = signals
        self._past: dict[str, tuple[torch.Tensor, dict[Signal, torch.Tensor]]] = {}  # branch -> residual, signals

    def begin_clip(self) -> None:
        self._past.clear()

    def remember(self, plan: CallPlan, blocks_input: torch.Tensor, blocks_output: torch.Tensor) -> None:
        branch, residual, changes = plan.context.branch, (blocks_output - blocks_input).float(), self._changes
        signals = self._signals.now
        if branch not in self._past:  # the clip's first step
            for series in (changes.residual, changes.magnitude, *(changes.signals[s] for s in signals)):
                series[branch].append([])
        else:
            before, signals_before = self._past[branch]
            changes.residual[branch][-1].append(_relative(residual, before))
            ratio = residual.norm(dim=-1) / before.norm(dim=-1)  # [B, S]
            changes.magnitude[branch][-1].append(ratio.mean().item())
            for signal, values in signals.items():
                changes.signals[signal][branch][-1].append(_relative(values, signals_before[signal]))
        self._past[branch] = (residual, signals)


def _relative(now: torch.Tensor, before: torch.Tensor) -> float:
    moved, size = change_sums(now, before).sum(dim=1).tolist()
    return moved / size if size > 0 else math.inf


def measure_steps(
    model: LoadedModel, requests: list[ClipRequest], signals: Sequence[Signal], on_clip: Callable[[int], None]
) -> StepChanges:
    """Renders the clips uncached and compares each step with the one before.

    Args:
        requests: all with the same number of steps.
        signals: of TeaCache for this family.
        on_clip: called with the number of clips done.
    """
    changes = StepChanges()
    transformer = model.pipe.transformer
    known = model.checkpoint.model
    tracker = step_tracker_of(transformer, known, None, None)
    reader = AllSignals(transformer, known, signals)
    tracker.attach(BlockRunner(transformer, known.layout, StepRecorder(changes, reader), 0, reader, tracker.where))
    try:
        for number, request in enumerate(requests, 1):
            render_clip(model, request, lambda *_: None)
            on_clip(number)
    finally:
        tracker.detach()
    return changes


def fit_polynomial(changes: StepChanges, signal: Signal) -> tuple[tuple[float, ...], float]:
    """(coefficients of degree 4, highest power first; share of the residual change's variance that they explain).

    Raises:
        ValueError: fewer distinct signal values than coefficients.
    """
    x, y = (
        np.array([v for clips in series.values() for clip in clips for v in clip])
        for series in (changes.signals[signal], changes.residual)
    )
    if len(np.unique(x)) <= DEGREE:
        raise ValueError(f"a polynomial of degree {DEGREE} needs more than {DEGREE} changes, got {len(np.unique(x))}")
    coefficients = np.polyfit(x, y, DEGREE)
    unexplained = np.square(y - np.polyval(coefficients, x)).sum() / np.square(y - y.mean()).sum()
    return tuple(float(c) for c in coefficients), float(1 - unexplained)


def magnitude_ratios(changes: StepChanges) -> dict[str, tuple[float, ...]]:
    """Magnitude ratios by branch, one per step, the first 1; 5 digits as in the official files."""
    return {
        branch: (1.0, *(round(_mean(column), 5) for column in zip(*changes.magnitude[branch], strict=True)))
        for branch in BRANCH_ORDER
        if changes.magnitude[branch]
    }


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)
