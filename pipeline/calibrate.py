"""Calibrates SmoothCache: how far each layer type's output moves in 1, 2, ... steps, over a few clips.

SmoothCache (arXiv 2411.10510), section 3.2: the relative L1 error of a layer's output between two steps, averaged
over the blocks of a layer type and over the calibration clips.
"""

import math
from collections import defaultdict
from collections.abc import Callable

from cineray.caching.smoothcache import LayerSchedule, schedule_row
from cineray.pipeline.cached_blocks import LAYOUTS
from cineray.pipeline.cached_layers import LayerRecorder, attach, detach
from cineray.pipeline.loading import LoadedModel
from cineray.pipeline.render import render_clip
from cineray.pipeline.request import ClipRequest
from cineray.pipeline.whereabouts import Whereabouts

Errors = dict[str, list[list[float]]]  # layer type -> [lag - 1][step]; NaN where a step has no such successor


def measure_layer_errors(
    model: LoadedModel, requests: list[ClipRequest], max_lag: int, on_clip: Callable[[int, int], None]
) -> Errors:
    """Renders the clips uncached and compares each layer's outputs.

    Args:
        requests: all with the same number of steps.
        max_lag: longest run of skipped steps to consider.
        on_clip: called with (clips done, clips).
    """
    transformer = model.pipe.transformer
    num_steps = requests[0].num_inference_steps
    whereabouts = Whereabouts(transformer, LAYOUTS[type(transformer).__name__].num_branches, None)
    values: dict[str, list[list[list[float]]]] = defaultdict(
        lambda: [[[] for _ in range(num_steps)] for _ in range(max_lag)]
    )

    def place() -> tuple[str, int]:
        here = whereabouts.where()
        return here.branch, here.step_index

    try:
        for number, request in enumerate(requests, 1):
            hooks = attach(transformer, lambda layer, block: LayerRecorder(max_lag, place))
            try:
                render_clip(model, request, lambda done, total: None)
            finally:
                detach(transformer)
            for layer, recorder in hooks:
                for (step, lag), (moved, size) in recorder.sums.items():
                    values[layer][lag - 1][step].append(moved / size if size > 0 else math.inf)
            on_clip(number, len(requests))
    finally:
        whereabouts.detach()
    return {
        layer: [[math.fsum(v) / len(v) if v else math.nan for v in row] for row in by_lag]
        for layer, by_lag in values.items()
    }


def smooth_schedule(errors: Errors, alpha: float) -> LayerSchedule:
    """One schedule row per layer type."""
    return LayerSchedule({layer: schedule_row(by_lag, len(by_lag[0]), alpha) for layer, by_lag in errors.items()})
