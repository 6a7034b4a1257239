"""Commands that measure: calibrations, quality against cost, the same clip on several ranks."""

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cineray.jobs.cli.clips import load_options, read_requests, run_defaults
from cineray.jobs.cli.exit_codes import EXIT_DONE, EXIT_FAILED_CLIPS
from cineray.jobs.cli.options import ClipArguments, clip_options, json_option, manifest_options
from cineray.jobs.console.terminal import print_json, print_table, tell
from cineray.text import printable

if TYPE_CHECKING:  # torch and diffusers take seconds to import; `--help` should not wait for them
    from cineray.jobs.measure.bench import BenchRow
    from cineray.pipeline.loading.checkpoint import Checkpoint
    from cineray.pipeline.request import ClipRequest


def _out_option(what: str) -> Callable[..., Any]:
    return click.option("--out", type=click.Path(path_type=Path), metavar="FILE.json", required=True, help=what)


_profile_out = _out_option("Profile file to write (overwritten).")


@click.group()
def calibrate() -> None:
    """Fits a cache policy to a model, once, on a few clips."""


@calibrate.command()
@clip_options
@click.option("--alpha", type=float, required=True, metavar="A", help="Largest relative L1 error that is accepted.")
@click.option("--max-lag", type=int, default=3, show_default=True, metavar="N", help="Longest run of skipped steps.")
@_out_option("Schedule file to write (overwritten).")
@json_option
def smoothcache(asked: ClipArguments, alpha: float, max_lag: int, out: Path, as_json: bool) -> int:
    """Measures how far each layer type's output moves, and writes a schedule.

    Render about ten clips: the errors are averaged over them. Use the schedule with --cache smoothcache:FILE.json.

    \b
    Example:
      cineray calibrate smoothcache --manifest clips.jsonl --steps 50 --alpha 0.2 --out smooth.json
    """
    from cineray.jobs.measure.calibration import calibrate_smoothcache

    checkpoint, requests = _uncached_clips(asked)
    schedule = calibrate_smoothcache(checkpoint, load_options(asked, checkpoint), requests, alpha, max_lag, out)
    computed = {layer: sum(row) for layer, row in schedule.rows.items()}
    said = ", ".join(f"{layer} {number} of {schedule.num_steps}" for layer, number in computed.items())
    tell(f"{out}: computed steps: {said}")
    if as_json:
        print_json({"schedule": str(out), "steps": schedule.num_steps, "computed": computed})
    return EXIT_DONE


@calibrate.command()
@clip_options
@click.option(
    "--threshold",
    type=float,
    default=0.1,
    show_default=True,
    metavar="T",
    help="Default threshold to store in the profile.",
)
@_profile_out
@json_option
def teacache(asked: ClipArguments, threshold: float, out: Path, as_json: bool) -> int:
    """Fits TeaCache's polynomials to a model and writes a profile.

    A polynomial tells how far the blocks' residual moves from how far the timestep's embedding does. Use the profile
    with --cache "teacache(profile=FILE.json)".

    \b
    Example:
      cineray calibrate teacache --manifest clips.jsonl --out tea.json
    """
    from cineray.jobs.measure.calibration import calibrate_teacache

    checkpoint, requests = _uncached_clips(asked)
    profile, explained = calibrate_teacache(checkpoint, load_options(asked, checkpoint), requests, threshold, out)
    said = ", ".join(f"{signal}: {share:.0%} of the variance explained" for signal, share in explained.items())
    tell(f"{out}: {said}")
    if as_json:
        coefficients = {signal: fit.coefficients for signal, fit in profile.signals.items()}
        print_json({"profile": str(out), "coefficients": coefficients, "explained": explained})
    return EXIT_DONE


@calibrate.command()
@clip_options
@click.option(
    "--threshold",
    type=float,
    default=0.12,
    show_default=True,
    metavar="T",
    help="Default threshold to store in the profile.",
)
@click.option(
    "--max-skips",
    type=int,
    default=4,
    show_default=True,
    metavar="N",
    help="Default limit of skips to store in the profile.",
)
@_profile_out
@json_option
def magcache(asked: ClipArguments, threshold: float, max_skips: int, out: Path, as_json: bool) -> int:
    """Measures a model's ratios of residual magnitudes and writes a profile.

    Use the profile with --cache "magcache(profile=FILE.json)"; other numbers of steps take the nearest ratios.

    \b
    Example:
      cineray calibrate magcache --manifest clips.jsonl --out mag.json
    """
    from cineray.jobs.measure.calibration import calibrate_magcache

    checkpoint, requests = _uncached_clips(asked)
    profile = calibrate_magcache(checkpoint, load_options(asked, checkpoint), requests, threshold, max_skips, out)
    low, high = (bound(r for ratios in profile.ratios.values() for r in ratios) for bound in (min, max))
    tell(f"{out}: ratios {low:.3f} to {high:.3f}")
    if as_json:
        print_json({"profile": str(out), "ratios": profile.ratios})
    return EXIT_DONE


@calibrate.command("dicache")
@clip_options
@click.option("--trials", type=int, default=60, show_default=True, metavar="N", help="Weights to try.")
@click.option("--floor", type=float, metavar="DB", help="Propose the fastest threshold that keeps every clip above it.")
@_profile_out
@json_option
def dicache_skip_costs(asked: ClipArguments, trials: int, floor: float | None, out: Path, as_json: bool) -> int:
    """Searches where over the steps the computed ones do most for the frames, and writes a profile.

    A trial renders every clip three times, at about 2x, 2.5x and 3x; four to eight clips are enough. Use the profile
    with --cache "dicache(profile=FILE.json)"; it serves other numbers of steps, too. Stopped, the same command resumes
    where it was (FILE.json.trials).

    \b
    Example:
      cineray calibrate dicache --manifest clips.jsonl --floor 40 --out profile.json
    """
    from cineray.jobs.measure.calibration import calibrate_dicache

    checkpoint, requests = _uncached_clips(asked)
    profile, points = calibrate_dicache(checkpoint, load_options(asked, checkpoint), requests, trials, floor, out)
    for point in points:
        tell(
            f"threshold {point.threshold:.4g}: {point.speedup:.2f}x by blocks, PSNR {point.psnr_db:.1f} dB, "
            f"worst clip {point.worst_psnr_db:.1f} dB"
        )
    tell(f"{out}: proposes threshold {profile.threshold:.4g}")
    if as_json:
        curve = [asdict(point) for point in points]
        print_json({"profile": str(out), "threshold": profile.threshold, "curve": curve})
    return EXIT_DONE


@calibrate.command("fitted")
@clip_options
@click.option("--trials", type=int, default=60, show_default=True, metavar="N", help="Sets of curves to try.")
@_profile_out
@json_option
def fitted_schedule(asked: ClipArguments, trials: int, out: Path, as_json: bool) -> int:
    """Searches where over the steps the computed ones keep clips best, and writes a profile.

    A trial denoises every clip at 2x and 2.8x, each with a curve of its own (and at 1.4x where the shipped profile that
    it starts from has a curve for that); four to eight clips are enough.
    Use the profile with --cache "fitted(profile=FILE.json,speedup=2.5)"; it serves every speed-up and other numbers of
    steps. Stopped, the same command resumes where it was (FILE.json.trials).

    \b
    Example:
      cineray calibrate fitted --manifest clips.jsonl --out profile.json
    """
    from cineray.caching.policies.fitted import CURVE_SPEEDUPS
    from cineray.jobs.measure.calibration import calibrate_fitted

    checkpoint, requests = _uncached_clips(asked)
    profile, score, before = calibrate_fitted(checkpoint, load_options(asked, checkpoint), requests, trials, out)
    tell(f"{out}: latents are kept to {score:.1f} dB, where the search began to {before:.1f} dB")
    if as_json:
        scores = {"profile": str(out), "score_db": score, "first_score_db": before}
        print_json(scores | profile.model_dump(include={*CURVE_SPEEDUPS, "length", "curvature"}))
    return EXIT_DONE


@calibrate.command("quality")
@clip_options
@click.option("--profile", default="auto", show_default=True, metavar="NAME|FILE", help="Profile of `fitted`.")
@_profile_out
@json_option
def quality_floors(asked: ClipArguments, profile: str, out: Path, as_json: bool) -> int:
    """Measures what each speed-up of `fitted` keeps, for --cache "auto(psnr>=30,profile=FILE.json)".

    Each clip is rendered uncached and at eleven speed-ups. Six to ten clips are enough for PSNR; the worst of 19 or
    more is a bound for a further clip whatever the scores' distribution, as VMAF needs it. Stopped, the same command
    resumes where it was (FILE.json.bench.json).

    \b
    Example:
      cineray calibrate quality --manifest clips.jsonl --out quality.json
    """
    from cineray.caching.policies.auto import kept
    from cineray.jobs.measure.quality_profile import calibrate_quality

    checkpoint, requests = _uncached_clips(asked)
    found = calibrate_quality(checkpoint, load_options(asked, checkpoint), requests, profile, out)
    bounds = {point.speedup: round(kept(point.psnr_db), 1) for point in found.points}
    tell(*(f"speed-up {speedup:g}: a clip keeps {bound} dB (95 %)" for speedup, bound in bounds.items()))
    if as_json:
        print_json({"profile": str(out), "floors": [{"speedup": s, "psnr": b} for s, b in bounds.items()]})
    return EXIT_DONE


@click.group()
def bench() -> None:
    """Measures cache policies."""


@bench.command()
@click.argument("policies", nargs=-1, required=True, metavar="POLICY...")
@manifest_options
@click.option(
    "--at",
    "targets",
    type=float,
    multiple=True,
    metavar="X",
    help="Speed-up by blocks at which policies with an open option are compared; can be given several times.",
)
@click.option(
    "--timed",
    "num_timed",
    type=click.IntRange(min=1),
    default=3,
    show_default=True,
    metavar="N",
    help="Clips of each policy that are timed, in turn with the uncached ones; on idle cores, more say it better.",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    metavar="FILE.json",
    help="Keeps each row when it is done; the same command resumes.",
)
@click.option(
    "--tables",
    type=click.Path(path_type=Path, file_okay=False),
    metavar="DIR",
    help="Folder for quality.csv, .md, .png and .svg of these rows.",
)
@json_option
def quality(
    asked: ClipArguments,
    policies: tuple[str, ...],
    targets: tuple[float, ...],
    num_timed: int,
    out: Path | None,
    tables: Path | None,
    as_json: bool,
) -> int:
    """Compares cached clips with uncached ones: PSNR, SSIM, VMAF, cost and time of each policy.

    Sounds are compared by their signal-to-noise ratio and their spectra.

    A policy is written as for --cache, or is fewer-steps(N): N uncached steps, the rival that every cache must beat,
    or fewer-steps(N,profile=auto): those of the steps that `fitted` with this profile would compute; or a cache of
    diffusers: diffusers:taylorseer-lite(interval=3,order=1,before=12,after=48), taylorseer, seacache, fbcache,
    magcache, pab, fastercache; or cache-dit:dbcache(threshold=0.1,taylor=1), where cache-dit is installed. Time is
    measured on the first clips (--timed), in turn with the uncached ones. One option may be left open with a question
    mark: its value is then searched on the first two clips for each speed-up of --at, and measured on all.

    \b
    Examples:
      cineray bench quality --manifest clips.jsonl "fewer-steps(25)" dicache "dicache(threshold=0.1)"
      cineray bench quality --manifest clips.jsonl --at 2 --at 3 "fewer-steps(?)" "dicache(threshold=?)" --out b.json
    """
    from cineray.jobs.measure.bench import bench_quality, in_short, write_tables
    from cineray.jobs.out_file import check_out
    from cineray.pipeline.loading.model import load_model
    from cineray.pipeline.request import InputError

    if asked.manifest is None:
        raise InputError("bench quality: give the clips with --manifest FILE.jsonl")
    if out is not None:
        check_out(out, "bench quality")
    checkpoint, requests = _uncached_clips(asked)
    model = load_model(checkpoint, load_options(asked, checkpoint))
    rows = bench_quality(model, requests, list(policies), list(targets), out, num_timed)
    _print_quality(rows)
    if tables is not None:
        write_tables(tables, rows, f"{checkpoint.name}, {requests[0].num_inference_steps} steps")
    if as_json:
        print_json({"model": checkpoint.name, "rows": [{**asdict(row), **in_short(row)} for row in rows]})
    return EXIT_DONE


def _print_quality(rows: "list[BenchRow]") -> None:
    from rich.table import Table
    from rich.text import Text

    from cineray.jobs.measure.quality_tables import kept_text

    is_of_sounds = any(bench_row.row is not None and bench_row.row.is_of_sounds for bench_row in rows)
    kept, further = ("SNR", "log STFT dB apart") if is_of_sounds else ("PSNR", "VMAF")
    table = Table(
        "at", "by blocks", "by CPU time", f"{kept} dB [95 %]", "worst clip dB", further, "denoising s", box=None
    )
    table.add_column("policy", overflow="fold")
    for bench_row in rows:
        at, row = f"{bench_row.at:g}x" if bench_row.at else "", bench_row.row
        policy = Text(printable(bench_row.asked if row is None else row.policy))
        if row is None:
            table.add_row(at, f"at most {bench_row.best_speedup:.2f}x", "", "", "", "", "", policy)
            continue
        by_time = "" if row.cpu_ratio is None else f"{1 / row.cpu_ratio:.2f}x"
        score = row.log_stft_db if is_of_sounds else row.vmaf
        values = (f"{row.speedup:.2f}x", by_time, kept_text(row), f"{row.worst_kept_db:.1f}")
        values += ("" if score is None else f"{score:.1f}",)
        table.add_row(at, *values, f"{row.denoise_s:.2f}", policy)
    print_table(table)


def _uncached_clips(asked: ClipArguments) -> tuple["Checkpoint", list["ClipRequest"]]:
    """The model and all clips, checked, for a process that renders them itself."""
    from cineray.jobs.run import use_threads
    from cineray.pipeline.loading.checkpoint import open_checkpoint

    checkpoint = open_checkpoint(asked.model)
    _, requests = read_requests(asked, run_defaults(asked, checkpoint, "none", None), checkpoint)
    use_threads(checkpoint, load_options(asked, checkpoint))
    return checkpoint, list(requests)


@click.command()
@clip_options
@click.option("--cache", default="dicache", show_default=True, metavar="SPEC", help="Cache policy.")
@click.option(
    "--layouts",
    metavar="LIST",
    help="As ulysses4,ring2xulysses2,cfg2xulysses2; a number means ulysses.  [default: those of 2 and 4 ranks]",
)
@click.option("--consensus", default="all", show_default=True, metavar="all|rank0", help="Whose statistics decide.")
@click.option("--parallel-decode", is_flag=True, help="Every rank decodes a band of rows, as it does on GPUs.")
@json_option
def verify(
    asked: ClipArguments,
    cache: str,
    layouts: str | None,
    consensus: str,
    parallel_decode: bool,
    as_json: bool,
) -> int:
    """Renders the same clips on one rank and on gangs of local processes, and compares them.

    Prints the largest error of the latents, the PSNR of the frames, and whether every step was decided alike. On a
    CPU in float32 everything must be equal bit for bit, except with a ring, whose softmax is added up in another
    order. In 16 bits each step begins at the same latents on both sides, and its output may be three times as far off
    as another attention kernel's on one rank. Exit code 1 if a layout gives another clip. Processes have one thread
    each.

    \b
    Examples:
      cineray verify
      cineray verify --model tiny-hunyuan --cache dicache-paper --steps 20 --layouts 2,4
      cineray verify "a cat walks" --model wan2.1-t2v-1.3b --device cuda --layouts 2,cfg2xulysses2 --json
    """
    from dataclasses import replace

    from cineray.jobs.measure.local_ranks import RankFailed
    from cineray.jobs.measure.verify import GangOptions, Verified, check_gpus, choose_layouts
    from cineray.jobs.measure.verify import verify as verify_clips
    from cineray.jobs.measure.verify_steps import VerifiedSteps, verify_steps
    from cineray.jobs.measure.verify_table import CLIP_NAMES, STEP_NAMES, show_verified
    from cineray.pipeline.finite import NotFiniteError
    from cineray.pipeline.loading.checkpoint import open_checkpoint

    checkpoint = open_checkpoint(asked.model)
    options = load_options(asked, checkpoint)
    gang = GangOptions(attention=options.gang_attention, consensus=consensus, parallel_decode=parallel_decode or None)
    if not asked.prompts and asked.manifest is None:
        asked = replace(asked, prompts=("a red circle moving left on a navy background",))
    _, requests = read_requests(asked, run_defaults(asked, checkpoint, cache, None), checkpoint)
    clips = list(requests)
    chosen = choose_layouts(checkpoint, clips, layouts.split(",") if layouts else [])
    num_rows, arguments = len(clips) * len(chosen), (checkpoint, options, clips, chosen, gang)
    check_gpus(options, chosen)
    rows: list[Verified] | list[VerifiedSteps]
    try:
        if options.dtype_name == "float32":
            rows = show_verified(verify_clips(*arguments), num_rows, CLIP_NAMES)
        else:
            rows = show_verified(verify_steps(*arguments), num_rows, STEP_NAMES)
    except NotFiniteError as error:
        tell(f"cineray verify: {error}")
        return EXIT_FAILED_CLIPS
    except RankFailed as error:
        tell(f"cineray verify: {error}")
        return EXIT_FAILED_CLIPS
    good = all(row.ok for row in rows)
    if as_json:
        print_json({"model": asked.model, "cache": cache, "ok": good, "clips": [row.to_dict() for row in rows]})
    return EXIT_DONE if good else EXIT_FAILED_CLIPS
