"""The command line: what a person types, and what the process answers."""

import json
import sys
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cineray.jobs.clip_options import Asked, clip_options

if TYPE_CHECKING:  # torch and diffusers take seconds to import; `--help` should not wait for them
    from cineray.jobs.batch import ClipResult
    from cineray.jobs.manifest import RunDefaults
    from cineray.pipeline.checkpoint import Checkpoint
    from cineray.pipeline.loading import LoadOptions
    from cineray.pipeline.request import ClipRequest

EXIT_DONE, EXIT_FAILED_CLIPS, EXIT_BAD_INPUT, EXIT_INTERRUPTED = 0, 1, 2, 130

_json = click.option("--json", "as_json", is_flag=True, help="Print one JSON object as the last line of stdout.")


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="cineray", message="%(prog)s %(version)s")
def cineray() -> None:
    """Renders batches of video clips with WAN 2.1 and HunyuanVideo."""


@cineray.command()
@clip_options
@click.option("--out", type=click.Path(path_type=Path), metavar="DIR", required=True, help="Folder for the clips.")
@click.option("--cache", default="none", show_default=True, metavar="SPEC", help="Cache policy; see docs/caching.md.")
@click.option("--fps", type=int, metavar="N", help="Frames per second of the MP4.  [default: the model's]")
@click.option("--lossless", is_flag=True, help="MP4s whose decoded RGB frames are exactly the rendered ones.")
@_json
def render(asked: Asked, out: Path, cache: str, fps: int | None, lossless: bool, as_json: bool) -> int:
    """Renders clips from prompts or from a manifest.

    A clip that is in the output folder already is not rendered again: the same command continues an interrupted
    batch.

    \b
    Examples:
      cineray render "a red circle moving left on a navy background" --out out/first
      cineray render --manifest examples/demo.jsonl --out out/demo --steps 30 --json
      cineray render "a cat walks" --model wan2.1-t2v-1.3b --device cuda --offload model --out out/cat
    """
    from cineray.pipeline.checkpoint import open_checkpoint

    checkpoint = open_checkpoint(asked.model)
    defaults = _run_defaults(asked, checkpoint, cache, fps)
    options = _load_options(asked)
    num_clips, requests = _requests(asked, defaults, checkpoint)
    results, wall_s = _render(num_clips, requests, checkpoint, options, defaults, out, lossless)
    counts = Counter(r.status for r in results)
    summary = {
        "clips": [{k: v for k, v in asdict(r).items() if k != "error" or v} for r in results],
        "wall_s": round(wall_s, 3),
        "clips_per_hour": round(counts["done"] / wall_s * 3600, 1),
    }
    said = ", ".join(f"{number} {status}" for status, number in counts.items())
    print(f"{said} in {wall_s:.1f} s ({summary['clips_per_hour']:.0f} clips per hour), in {out}", file=sys.stderr)
    if as_json:
        print(json.dumps(summary, ensure_ascii=False))
    return EXIT_FAILED_CLIPS if counts["failed"] else EXIT_DONE


@cineray.group()
def calibrate() -> None:
    """Fits a cache policy to a model, once, on a few clips."""


@calibrate.command()
@clip_options
@click.option("--alpha", type=float, required=True, metavar="A", help="Largest relative L1 error that is accepted.")
@click.option("--max-lag", type=int, default=3, show_default=True, metavar="N", help="Longest run of skipped steps.")
@click.option("--out", type=click.Path(path_type=Path), metavar="FILE.json", required=True, help="Schedule; replaced.")
@_json
def smoothcache(asked: Asked, alpha: float, max_lag: int, out: Path, as_json: bool) -> int:
    """Measures how far each layer type's output moves, and writes a schedule.

    Render about ten clips: the errors are averaged over them. Use the schedule with --cache smoothcache:FILE.json.

    \b
    Example:
      cineray calibrate smoothcache --manifest clips.jsonl --steps 50 --alpha 0.2 --out smooth.json
    """
    from cineray.jobs.calibration import calibrate_smoothcache
    from cineray.pipeline.checkpoint import open_checkpoint

    checkpoint = open_checkpoint(asked.model)
    _, requests = _requests(asked, _run_defaults(asked, checkpoint, "none", None), checkpoint)
    schedule = calibrate_smoothcache(checkpoint, _load_options(asked), list(requests), alpha, max_lag, out)
    computed = {layer: sum(row) for layer, row in schedule.rows.items()}
    said = ", ".join(f"{layer} {number} of {schedule.num_steps}" for layer, number in computed.items())
    print(f"{out}: computed steps: {said}", file=sys.stderr)
    if as_json:
        print(json.dumps({"schedule": str(out), "steps": schedule.num_steps, "computed": computed}))
    return EXIT_DONE


def _run_defaults(asked: Asked, checkpoint: "Checkpoint", cache: str, fps: int | None) -> "RunDefaults":
    from cineray.jobs.manifest import RunDefaults

    sizes = checkpoint.defaults
    return RunDefaults(
        negative_prompt=asked.negative_prompt,
        seed=asked.seed,
        width=_given(asked.width, sizes.width),
        height=_given(asked.height, sizes.height),
        num_frames=_given(asked.frames, sizes.num_frames),
        num_inference_steps=_given(asked.steps, sizes.num_inference_steps),
        guidance_scale=_given(asked.guidance, sizes.guidance_scale),
        fps=_given(fps, sizes.fps),
        cache=cache,
        image=None if asked.image is None else str(asked.image.resolve()),
    )


def _load_options(asked: Asked) -> "LoadOptions":
    from cineray.pipeline.loading import LoadOptions, default_device

    return LoadOptions(
        device=asked.device or default_device(),
        dtype=asked.dtype,
        offload=asked.offload,  # type: ignore[arg-type]  # LoadOptions checks it
        vae_tiling=asked.vae_tiling,
    )


def _given(value: Any, default: Any) -> Any:
    return default if value is None else value


def _requests(asked: Asked, defaults: "RunDefaults", checkpoint: "Checkpoint") -> tuple[int, Iterable["ClipRequest"]]:
    """(number of clips, the clips as a stream), all of them checked."""
    from cineray.jobs.manifest import check_manifest, check_prompts, stream_requests
    from cineray.jobs.progress import checking_lines
    from cineray.pipeline.request import InputError

    if asked.manifest is None:
        requests = check_prompts(list(asked.prompts), defaults, checkpoint)
        return len(requests), requests
    if asked.prompts:
        raise InputError("give prompts or --manifest, not both")
    with checking_lines(asked.manifest.name) as on_line:
        num_clips = check_manifest(asked.manifest, defaults, checkpoint, on_line)
    return num_clips, stream_requests(asked.manifest, defaults)


def _render(
    num_clips: int,
    requests: Iterable["ClipRequest"],
    checkpoint: "Checkpoint",
    options: "LoadOptions",
    defaults: "RunDefaults",
    out: Path,
    lossless: bool,
) -> tuple[list["ClipResult"], float]:
    """(results, seconds after the model was loaded)."""
    from cineray.jobs.batch import Batch, render_batch
    from cineray.jobs.output_folder import OutputFolder
    from cineray.jobs.progress import RenderProgress
    from cineray.pipeline.loading import load_model

    folder = OutputFolder(out)
    try:
        model = load_model(checkpoint, options)
        run = {"model": checkpoint.name, "options": asdict(options), "defaults": asdict(defaults)}
        folder.write_json("run.json", run)
        began = time.monotonic()
        with RenderProgress(num_clips) as progress:
            batch = Batch(model=model, folder=folder, progress=progress, lossless=lossless)
            results = render_batch(batch, requests)
        return results, time.monotonic() - began
    finally:
        folder.close()


@cineray.command()
@_json
def models(as_json: bool) -> int:
    """Lists what can be rendered by name.

    \b
    Example:
      cineray models
    """
    from rich.console import Console
    from rich.table import Table

    from cineray.pipeline.adapters import FAMILIES
    from cineray.pipeline.checkpoint import KNOWN_MODELS

    if as_json:
        rows = [{"name": n, "source": k.source, "note": k.note} for n, k in KNOWN_MODELS.items()]
        print(json.dumps({"models": rows, "pipelines": list(FAMILIES)}))
        return EXIT_DONE
    table = Table("name", "what", "where from", box=None)
    for name, known in KNOWN_MODELS.items():
        shipped = Path(known.source).is_absolute()
        table.add_row(name, known.note, "in the package" if shipped else known.source)
    Console().print(table)
    print(f"\nAny diffusers folder or hub id works whose pipeline is one of: {', '.join(FAMILIES)}.")
    return EXIT_DONE


def run(arguments: list[str] | None = None) -> None:
    """Runs the command line and ends the process: 0 done, 1 some clips failed, 2 bad input, 130 interrupted."""
    sys.exit(_run(sys.argv[1:] if arguments is None else arguments))


def _run(arguments: list[str]) -> int:
    try:
        code = cineray.main(arguments, prog_name="cineray", standalone_mode=False)
        return code if isinstance(code, int) else EXIT_DONE
    except click.UsageError as error:
        command = error.ctx.command_path if error.ctx else "cineray"
        print(f"{command}: {error.format_message()} See: {command} --help", file=sys.stderr)
        return EXIT_BAD_INPUT
    except (KeyboardInterrupt, click.Abort):
        print("cineray: interrupted; finished clips are kept, run the same command again to go on", file=sys.stderr)
        return EXIT_INTERRUPTED
    except ValueError as error:
        from cineray.pipeline.request import InputError

        if not isinstance(error, InputError):
            raise
        print("\n".join(f"cineray: {line}" for line in str(error).splitlines()), file=sys.stderr)
        return EXIT_BAD_INPUT
