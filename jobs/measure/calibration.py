"""Calibration runs: render a few clips, measure, write one file."""

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

from pydantic import ValidationError

from cineray.caching.policies import fitted
from cineray.caching.policies.smoothcache import LayerSchedule, dump_schedule
from cineray.caching.profile import (
    DiCacheProfile,
    FittedProfile,
    MagCacheProfile,
    TeaCacheFit,
    TeaCacheProfile,
)
from cineray.jobs.console.measure import progress_bar
from cineray.jobs.console.terminal import tell
from cineray.jobs.measure.bench import measured_on
from cineray.jobs.measure.trial_log import Point, TrialLog
from cineray.jobs.out_file import check_out, ended_by_sigterm, replace_text
from cineray.jobs.pixels import refuse_sounds
from cineray.pipeline.adapters import MODELS, by_transformer, transformers_in
from cineray.pipeline.calibrate.dicache import CURVE, MIN_STEPS, SPEEDUPS, CurvePoint, StepCostSearch
from cineray.pipeline.calibrate.fitted import SchedulePoint, ScheduleSearch
from cineray.pipeline.calibrate.smoothcache import measure_layer_errors, smooth_schedule
from cineray.pipeline.calibrate.teacache_magcache import StepChanges, fit_polynomial, magnitude_ratios, measure_steps
from cineray.pipeline.loading.checkpoint import Checkpoint
from cineray.pipeline.loading.model import LoadedModel, LoadOptions, load_model
from cineray.pipeline.media.compare import EQUAL_CLIPS_DB
from cineray.pipeline.render import render_clip
from cineray.pipeline.request import ClipRequest, InputError


def calibrate_smoothcache(
    checkpoint: Checkpoint, options: LoadOptions, requests: list[ClipRequest], alpha: float, max_lag: int, out: Path
) -> LayerSchedule:
    """Measures layer errors over the clips and writes the schedule to `out`, in one step.

    Raises:
        InputError: bad alpha or lag, clips of different lengths, a model without such layers, or `out` not writable.
    """
    kind = checkpoint.configs.transformer.get("_class_name")
    if kind not in MODELS:
        raise InputError(
            f"calibrate: {kind} is not supported; supported: {', '.join(transformers_in(MODELS.values()))}"
        )
    if not alpha >= 0:
        raise InputError(f"calibrate: alpha must be 0 or more, got {alpha}")
    num_steps = _number_of_steps(requests)
    if not 1 <= max_lag < num_steps:
        raise InputError(f"calibrate: max-lag must be 1 to {num_steps - 1} for {num_steps} steps, got {max_lag}")
    with _measuring(out), progress_bar("clips", len(requests)) as on_done:
        model = load_model(checkpoint, options)
        clips = [partial(render_clip, model, request, lambda *_: None) for request in requests]
        models = by_transformer(checkpoint.model)
        errors = measure_layer_errors(model.pipe, clips, num_steps, max_lag, lambda done, _: on_done(done), models)
        schedule = smooth_schedule(errors, alpha)
        replace_text(out, dump_schedule(schedule), "calibrate")
    return schedule


def calibrate_teacache(
    checkpoint: Checkpoint, options: LoadOptions, requests: list[ClipRequest], threshold: float, out: Path
) -> tuple[TeaCacheProfile, dict[str, float]]:
    """Fits the polynomial of each of the family's signals and writes a profile to `out`, in one step.

    Args:
        threshold: that the profile proposes.

    Returns:
        The profile; for each signal the share of the residual's change that its polynomial explains.

    Raises:
        InputError: a bad threshold, clips of different lengths, too few steps, an unknown family, or `out` not
            writable.
    """
    family = family_of(checkpoint)
    with _measuring(out):
        model, changes = _measure_steps(checkpoint, options, requests, threshold)
        try:
            fits = {signal: fit_polynomial(changes, signal) for signal in checkpoint.model.signals}
        except ValueError as error:
            raise InputError(f"calibrate: {error}; use clips with more steps") from None
        profile = TeaCacheProfile(
            family=family,
            transformer=identity_of(checkpoint),
            source=source_of(model, requests, "teacache"),
            signals={s: TeaCacheFit(coefficients=c, threshold=threshold) for s, (c, _) in fits.items()},  # type: ignore[misc]
        )
        replace_text(out, profile.model_dump_json(indent=1) + "\n", "calibrate")
    return profile, {str(signal): explained for signal, (_, explained) in fits.items()}


def calibrate_magcache(
    checkpoint: Checkpoint,
    options: LoadOptions,
    requests: list[ClipRequest],
    threshold: float,
    max_skips: int,
    out: Path,
) -> MagCacheProfile:
    """Measures the ratios of residual magnitudes and writes a profile to `out`, in one step.

    Args:
        threshold, max_skips: that the profile proposes.

    Raises:
        InputError: a bad threshold, clips of different lengths, or `out` not writable.
    """
    if max_skips < 0:
        raise InputError(f"calibrate: max-skips must be 0 or more, got {max_skips}")
    with _measuring(out):
        model, changes = _measure_steps(checkpoint, options, requests, threshold)
        profile = MagCacheProfile(
            family=family_of(checkpoint),
            transformer=identity_of(checkpoint),
            source=source_of(model, requests, "magcache"),
            ratios=magnitude_ratios(changes),  # type: ignore[arg-type]
            threshold=threshold,
            max_skips=max_skips,
        )
        replace_text(out, profile.model_dump_json(indent=1) + "\n", "calibrate")
    return profile


def calibrate_fitted(
    checkpoint: Checkpoint, options: LoadOptions, requests: list[ClipRequest], num_trials: int, out: Path
) -> tuple[FittedProfile, float, float]:
    """Searches where the computed steps lie best and writes a profile to `out`, in one step.

    Args:
        num_trials: curves to try; each denoises all clips once at each of the search's speed-ups.

    Returns:
        The profile; its score in dB, and that of the curve that the search began with.

    Raises:
        InputError: no trials, clips of different lengths, too few steps, an unsupported model, or `out` not writable.

    What was measured stands in OUT.trials until the profile is written; the same call resumes.
    """
    if num_trials < 0:
        raise InputError(f"calibrate: trials must be 0 or more, got {num_trials}")
    if _number_of_steps(requests) < fitted.MIN_STEPS:
        raise InputError(f"calibrate: fitted needs clips of {fitted.MIN_STEPS} or more steps")
    with _measuring(out), TemporaryDirectory(prefix="cineray-calibrate-") as folder:
        model = load_model(checkpoint, options)
        known = _trial_log(out, model, requests, SchedulePoint)
        search = ScheduleSearch(model, requests, Path(folder), known)
        family, identity = checkpoint.model.family, identity_of(checkpoint)
        begin = fitted.FittedConfig().find(family, identity)
        names = {"family": family, "transformer": identity, "source": source_of(model, requests, "fitted")}
        start = begin.model_copy(update=names)
        with progress_bar("trials", num_trials + 1) as on_done:
            found = search.run(start, num_trials, lambda done, best: on_done(done + 1, f"best so far {best:.1f} dB"))
        replace_text(out, found.model_dump_json(indent=1) + "\n", "calibrate")
        known.delete()  # not before the profile is there: hours would be lost with it
    return found, search.mean_score(found), search.mean_score(start)


def calibrate_dicache(
    checkpoint: Checkpoint,
    options: LoadOptions,
    requests: list[ClipRequest],
    num_trials: int,
    floor_db: float | None,
    out: Path,
) -> tuple[DiCacheProfile, list[CurvePoint]]:
    """Searches the skip costs of the steps and writes a profile to `out`, in one step.

    Args:
        num_trials: skip costs to try; each renders all clips once at each of `SPEEDUPS`.
        floor_db: the profile proposes the fastest threshold whose worst clip keeps this PSNR; without a floor, that
            of a clip that changes as expected at 2.5x.

    Returns:
        The profile; quality and speed-up over a row of thresholds, on these clips.

    Raises:
        InputError: no trials, clips of different lengths, too few steps, a floor that nothing reaches, or `out` not
            writable.

    What was measured stands in OUT.trials until the profile is written; the same call resumes.
    """
    refuse_sounds(checkpoint, "calibrate dicache")
    if num_trials < 0:
        raise InputError(f"calibrate: trials must be 0 or more, got {num_trials}")
    if floor_db is not None and not 0 < floor_db < math.inf:
        raise InputError(f"calibrate: --floor must be a number of dB above 0, got {floor_db}")
    if floor_db is not None and floor_db > EQUAL_CLIPS_DB:
        raise InputError(
            f"calibrate: no threshold keeps {floor_db} dB on every clip; the best keeps {EQUAL_CLIPS_DB:g} dB, which "
            "stands for equal frames"
        )
    if _number_of_steps(requests) < MIN_STEPS:
        raise InputError(f"calibrate: dicache needs clips of {MIN_STEPS} or more steps")
    with _measuring(out), TemporaryDirectory(prefix="cineray-calibrate-") as folder:
        model = load_model(checkpoint, options)
        known = _trial_log(out, model, requests, CurvePoint)
        search = StepCostSearch(model, requests, Path(folder), known)
        with progress_bar("trials", num_trials + 1) as on_done:
            start = search.first_guess(
                checkpoint.model.family, identity_of(checkpoint), source_of(model, requests, "dicache")
            )
            found = search.run(
                start, SPEEDUPS, num_trials, lambda done, best: on_done(done + 1, f"best so far {best:.1f} dB")
            )
        points = []
        with progress_bar("thresholds", len(CURVE)) as on_done:
            for speedup in CURVE:
                points.append(search.point(found, search.threshold_for(found, speedup)))
                on_done(len(points))
        good = [p for p in points if floor_db is not None and p.worst_psnr_db >= floor_db]
        if floor_db is not None and not good:
            best = max(p.worst_psnr_db for p in points)
            raise InputError(
                f"calibrate: no threshold keeps {floor_db} dB on every clip; the best keeps {best} dB; what was "
                f"measured stays in {known.path}: the same command with a lower --floor resumes"
            )
        threshold = max(good, key=lambda p: p.speedup).threshold if good else search.threshold_for(found, 2.5)
        found = found.model_copy(update={"threshold": threshold})
        replace_text(out, found.model_dump_json(indent=1) + "\n", "calibrate")
        known.delete()  # not before the profile is there: hours would be lost with it
    return found, points


def _trial_log(out: Path, model: LoadedModel, requests: list[ClipRequest], kind: type[Point]) -> TrialLog[Point]:
    known = TrialLog(out.with_name(f"{out.name}.trials"), json.dumps(measured_on(model, requests)), kind)
    if known:
        tell(f"resuming from {len(known)} points of an earlier run")
    return known


def _measure_steps(
    checkpoint: Checkpoint, options: LoadOptions, requests: list[ClipRequest], threshold: float
) -> tuple[LoadedModel, StepChanges]:
    if not 0 <= threshold < float("inf"):
        raise InputError(f"calibrate: threshold must be 0 or more, got {threshold}")
    if _number_of_steps(requests) < 2:
        raise InputError("calibrate: clips must have 2 or more steps")
    model = load_model(checkpoint, options)
    with progress_bar("clips", len(requests)) as on_done:
        return model, measure_steps(model, requests, tuple(checkpoint.model.signals), on_done)


def family_of(checkpoint: Checkpoint) -> str:
    """The family of a model that TeaCache and MagCache know."""
    if not checkpoint.model.signals:
        known = ", ".join(transformers_in(model for model in MODELS.values() if model.signals))
        raise InputError(f"calibrate: {checkpoint.model.transformer} is not supported; supported: {known}")
    return checkpoint.model.family


def identity_of(checkpoint: Checkpoint) -> dict[str, object]:
    """The entries of the transformer's configuration by which a profile is found."""
    config = checkpoint.configs.transformer
    # as the classes call them
    widths = ("num_attention_heads", "attention_head_dim", "num_heads", "hidden_size", "in_channels")
    return {name: config[name] for name in (*checkpoint.model.layout.counts, *widths) if name in config}


def source_of(model: LoadedModel, requests: list[ClipRequest], policy: str) -> str:
    first = requests[0]
    size = f"{first.width}x{first.height}, {first.num_frames} frames, {first.num_inference_steps} steps"
    clips = f"{len(requests)} clips of {size}, guidance {first.guidance_scale}"
    return f"cineray calibrate {policy}: {clips}; weights {model.digest}"


def _number_of_steps(requests: list[ClipRequest]) -> int:
    steps = {request.num_inference_steps for request in requests}
    if len(steps) != 1:
        raise InputError(f"calibrate: all clips must have the same number of steps, got {sorted(steps)}")
    return steps.pop()


@contextmanager
def _measuring(out: Path) -> Iterator[None]:
    """What comes out goes to `out`, which is looked at first.

    Raises:
        InputError: `out` cannot be written, or the numbers that were measured make no profile.
    """
    check_out(out, "calibrate")
    try:
        with ended_by_sigterm():
            yield
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where, reason = ".".join(map(str, first["loc"])), first["msg"].removeprefix("Value error, ")
        raise InputError(
            f"calibrate: what was measured makes no {error.title}: {where}: {reason}; use more clips, or "
            "clips that move"
        ) from None
