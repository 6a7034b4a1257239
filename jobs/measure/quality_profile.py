"""`cineray calibrate quality`: what each speed-up of `fitted` keeps on a few clips, for `auto`."""

from pathlib import Path

from cineray.caching.policies.fitted import MIN_STEPS, FittedConfig
from cineray.caching.profile import QualityPoint, QualityProfile
from cineray.jobs.measure.bench import bench_quality
from cineray.jobs.measure.calibration import identity_of, source_of
from cineray.jobs.out_file import check_out, replace_text
from cineray.jobs.pixels import refuse_sounds
from cineray.pipeline.loading.checkpoint import Checkpoint
from cineray.pipeline.loading.model import LoadOptions, load_model
from cineray.pipeline.request import ClipRequest, InputError

SPEEDUPS = (1.1, 1.25, 1.5, 1.75, 2.0, 2.25, 2.5, 2.75, 3.0, 3.5, 4.0)
MIN_CLIPS = 3  # two give a bound that is 9 deviations below their mean (Student's t of one degree)


def calibrate_quality(
    checkpoint: Checkpoint, options: LoadOptions, requests: list[ClipRequest], fitted: str, out: Path
) -> QualityProfile:
    """Measures every speed-up and writes a profile to `out`, in one step.

    What was measured stands in OUT.bench.json, a file of `cineray bench quality`; the same call resumes.

    Args:
        fitted: the profile of `fitted`.

    Raises:
        InputError: too few clips or steps, a bad profile, an unsupported model, one of sounds, or `out` not
            writable.
    """
    check_out(out, "calibrate")
    refuse_sounds(checkpoint, "calibrate quality")
    if len(requests) < MIN_CLIPS:
        raise InputError(f"calibrate quality: give {MIN_CLIPS} or more clips, got {len(requests)}")
    if any(request.num_inference_steps < MIN_STEPS for request in requests):
        raise InputError(f"calibrate quality: clips of fewer than {MIN_STEPS} steps are not cached")
    asked = {f"fitted(speedup={speedup:g},profile={fitted})": speedup for speedup in SPEEDUPS}
    for policy in asked:
        try:
            checkpoint.plan_cache(policy)
        except ValueError as error:
            raise InputError(f"calibrate quality: {error}") from None
    family, identity = checkpoint.model.family, identity_of(checkpoint)
    model = load_model(checkpoint, options)
    kept = out.with_name(f"{out.name}.bench.json")
    rows = [row.row for row in bench_quality(model, requests, list(asked), [], kept, num_timed=0)]
    points = [
        QualityPoint(speedup=asked[row.policy], psnr_db=row.clips_psnr_db, vmaf=row.clips_vmaf)
        for row in rows
        if row is not None
    ]
    profile = QualityProfile(
        family=family,
        transformer=identity,
        source=source_of(model, requests, "quality"),
        fitted=fitted,
        num_steps=requests[0].num_inference_steps,  # as all: the bench refuses others
        fitted_digest=FittedConfig(profile=fitted).find(family, checkpoint.configs.transformer).digest,
        points=tuple(points),
    )
    replace_text(out, profile.model_dump_json(indent=1) + "\n", "calibrate")
    return profile
