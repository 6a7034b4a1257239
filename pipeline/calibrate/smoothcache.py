"""Calibrates SmoothCache: how far each layer type's output moves in 1, 2, ... steps, over a few clips.

SmoothCache (arXiv 2411.10510), section 3.2: the relative L1 error of a layer's output between two steps, averaged
over the blocks of a layer type and over the calibration clips.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

from cineray.caching.policies.smoothcache import LayerSchedule, schedule_row
from cineray.pipeline.adapters import MODELS, Models
from cineray.pipeline.caches.enable import scheduler_of, step_tracker_of, transformers_of
from cineray.pipeline.caches.layers import LayerRecorder, attach_hook, detach_hook, layers_of
from cineray.pipeline.caches.step_tracker import StepTracker

Errors = dict[str, list[list[float]]]  # layer type -> [lag - 1][step]; NaN where a step has no such successor


def measure_layer_errors(
    pipe_or_transformer: Any,
    clips: Sequence[Callable[[], object]],
    num_steps: int,
    max_lag: int,
    on_clip: Callable[[int, int], None] = lambda *_: None,
    models: Models = MODELS,
) -> Errors:
    """Renders the clips uncached and compares each layer's outputs.

    Experts that share a clip's steps are measured at their own: there is no error across the boundary, so the first
    step of the next expert is computed.

    Args:
        pipe_or_transformer: what the clips are rendered with; as for `enable_cache`.
        clips: each call renders one clip, of `num_steps` steps.
        max_lag: longest run of skipped steps to consider.
        on_clip: called with (clips done, clips).
        models: as for `enable_cache`.

    Raises:
        ValueError: a clip of another number of steps, or one whose loop does not say where it is.
    """
    transformers = transformers_of(pipe_or_transformer)
    trackers: list[StepTracker] = []
    for transformer in transformers:
        model = models[type(transformer).__name__]
        trackers.append(step_tracker_of(transformer, model, None, scheduler_of(pipe_or_transformer)))
    values: dict[str, list[list[list[float]]]] = defaultdict(
        lambda: [[[] for _ in range(num_steps)] for _ in range(max_lag)]
    )
    with ExitStack() as attached:
        for tracker in trackers:
            tracker.attach()
            attached.callback(tracker.detach)
        for number, render in enumerate(clips, 1):
            recorders: list[tuple[str, Any, LayerRecorder]] = []
            for transformer, tracker in zip(transformers, trackers, strict=True):
                place = partial(_place, tracker, num_steps)
                layers = layers_of(transformer, models[type(transformer).__name__].layout)
                recorders += [(layer, module, LayerRecorder(max_lag, place)) for layer, _, module in layers]
            try:
                for _, module, recorder in recorders:
                    attach_hook(module, recorder)
                render()
            finally:
                for _, module, _ in recorders:
                    detach_hook(module)
            for layer, _, recorder in recorders:
                for (step, lag), (moved, size) in recorder.sums.items():
                    values[layer][lag - 1][step].append(moved / size if size > 0 else math.inf)
            on_clip(number, len(clips))
    return {
        layer: [[math.fsum(v) / len(v) if v else math.nan for v in row] for row in by_lag]
        for layer, by_lag in values.items()
    }


def _place(tracker: StepTracker, num_steps: int) -> tuple[str, int]:
    here = tracker.where()
    if here.num_steps != num_steps:
        raise ValueError(f"calibrate: a clip has {here.num_steps} steps; num_steps is {num_steps}")
    return here.branch, here.step_index


def smooth_schedule(errors: Errors, alpha: float) -> LayerSchedule:
    """One schedule row per layer type."""
    return LayerSchedule({layer: schedule_row(by_lag, len(by_lag[0]), alpha) for layer, by_lag in errors.items()})
