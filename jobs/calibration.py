"""Calibration runs: render a few clips, measure, write one file."""

import os
import sys
import uuid
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from cineray.caching.smoothcache import LayerSchedule, dump_schedule
from cineray.pipeline.cached_layers import LAYERS
from cineray.pipeline.calibrate import measure_layer_errors, smooth_schedule
from cineray.pipeline.checkpoint import Checkpoint
from cineray.pipeline.loading import LoadOptions, load_model
from cineray.pipeline.request import ClipRequest, InputError


def calibrate_smoothcache(
    checkpoint: Checkpoint, options: LoadOptions, requests: list[ClipRequest], alpha: float, max_lag: int, out: Path
) -> LayerSchedule:
    """Measures layer errors over the clips and writes the schedule to `out`, in one step.

    Raises:
        InputError: bad alpha or lag, clips of different lengths, a model without such layers, or `out` not writable.
    """
    kind = checkpoint.configs.transformer.get("_class_name")
    if kind not in LAYERS:
        raise InputError(f"calibrate: {kind} is not supported; supported: {', '.join(LAYERS)}")
    if not alpha >= 0:
        raise InputError(f"calibrate: alpha must be 0 or more, got {alpha}")
    steps = {request.num_inference_steps for request in requests}
    if len(steps) != 1:
        raise InputError(f"calibrate: all clips must have the same number of steps, got {sorted(steps)}")
    if not 1 <= max_lag < min(steps):
        raise InputError(f"calibrate: max-lag must be 1 to {min(steps) - 1} for {min(steps)} steps, got {max_lag}")
    temporary = out.with_name(f".{out.name}.{uuid.uuid4().hex}")
    try:
        temporary.touch()
    except OSError as error:
        raise InputError(f"calibrate: {out} cannot be written: {error.strerror}") from None
    try:
        model = load_model(checkpoint, options)
        with Progress(console=Console(file=sys.stderr), transient=True) as bars:
            bar = bars.add_task("calibrating", total=len(requests))
            errors = measure_layer_errors(
                model, requests, max_lag, lambda done, total: bars.update(bar, completed=done)
            )
        schedule = smooth_schedule(errors, alpha)
        temporary.write_text(dump_schedule(schedule))
        os.replace(temporary, out)
    finally:
        temporary.unlink(missing_ok=True)
    return schedule
