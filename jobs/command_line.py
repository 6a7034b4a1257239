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
@click.argument("prompts", nargs=-1, metavar="PROMPT...")
@click.option("--out", type=click.Path(path_type=Path), metavar="DIR", required=True, help="Folder for the clips.")
@click.option(
    "--manifest",
    type=click.Path(path_type=Path),
    metavar="FILE.jsonl",
    help="One JSON object per line instead of prompts; see docs/manifest.md.",
)
@click.option(
    "--model",
    default="tiny-wan",
    show_default=True,
    metavar="NAME|DIR",
    help="A name of `cineray models`, a diffusers folder or a hub id.",
)
@click.option("--cache", default="none", show_default=True, metavar="SPEC", help="Cache policy; none computes all.")
@click.option("--steps", type=int, metavar="N", help="Denoising steps.  [default: 50]")
@click.option("--seed", type=int, default=0, show_default=True, metavar="N", help="Seed of each clip's noise.")
@click.option("--width", type=int, metavar="W", help="Pixels.  [default: the model's]")
@click.option("--height", type=int, metavar="H", help="Pixels.  [default: the model's]")
@click.option("--frames", type=int, metavar="F", help="4k+1 frames.  [default: the model's]")
@click.option("--fps", type=int, metavar="N", help="Frames per second of the MP4.  [default: the model's]")
@click.option("--guidance", type=float, metavar="G", help="Guidance scale.  [default: the model's]")
@click.option("--negative-prompt", metavar="TEXT", help="What to avoid (Wan).")
@click.option(
    "--image", type=click.Path(path_type=Path), metavar="FILE", help="First frame, for image-to-video models."
)
@click.option("--device", default="", metavar="cpu|cuda", help="[default: cuda if there is one]")
@click.option("--dtype", default="auto", show_default=True, metavar="NAME", help="float32, bfloat16 or float16.")
@click.option(
    "--offload",
    default="none",
    show_default=True,
    metavar="none|model|sequential",
    help="Keep idle weights in CPU memory (CUDA).",
)
@click.option("--vae-tiling", is_flag=True, help="Decode in tiles: less memory, slightly other pixels.")
@click.option("--lossless", is_flag=True, help="MP4s whose decoded RGB frames are exactly the rendered ones.")
@_json
def render(
    prompts: tuple[str, ...],
    out: Path,
    manifest: Path | None,
    model: str,
    cache: str,
    steps: int | None,
    seed: int,
    width: int | None,
    height: int | None,
    frames: int | None,
    fps: int | None,
    guidance: float | None,
    negative_prompt: str | None,
    image: Path | None,
    device: str,
    dtype: str,
    offload: str,
    vae_tiling: bool,
    lossless: bool,
    as_json: bool,
) -> int:
    """Renders clips from prompts or from a manifest.

    A clip that is in the output folder already is not rendered again: the same command continues an interrupted
    batch.

    \b
    Examples:
      cineray render "a red circle moving left on a navy background" --out out/first
      cineray render --manifest examples/demo.jsonl --out out/demo --steps 30 --json
      cineray render "a cat walks" --model wan2.1-t2v-1.3b --device cuda --offload model --out out/cat
    """
    from cineray.jobs.manifest import RunDefaults
    from cineray.pipeline.checkpoint import open_checkpoint
    from cineray.pipeline.loading import LoadOptions, default_device

    checkpoint = open_checkpoint(model)
    sizes = checkpoint.defaults
    defaults = RunDefaults(
        negative_prompt=negative_prompt,
        seed=seed,
        width=_given(width, sizes.width),
        height=_given(height, sizes.height),
        num_frames=_given(frames, sizes.num_frames),
        num_inference_steps=_given(steps, sizes.num_inference_steps),
        guidance_scale=_given(guidance, sizes.guidance_scale),
        fps=_given(fps, sizes.fps),
        cache=cache,
        image=None if image is None else str(image.resolve()),
    )
    options = LoadOptions(
        device=device or default_device(),
        dtype=dtype,
        offload=offload,  # type: ignore[arg-type]  # LoadOptions checks it
        vae_tiling=vae_tiling,
    )
    num_clips, requests = _requests(prompts, manifest, defaults, checkpoint)
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


def _given(value: Any, default: Any) -> Any:
    return default if value is None else value


def _requests(
    prompts: tuple[str, ...], manifest: Path | None, defaults: "RunDefaults", checkpoint: "Checkpoint"
) -> tuple[int, Iterable["ClipRequest"]]:
    """(number of clips, the clips as a stream), all of them checked."""
    from cineray.jobs.manifest import check_manifest, check_prompts, stream_requests
    from cineray.jobs.progress import checking_lines
    from cineray.pipeline.request import InputError

    if manifest is None:
        requests = check_prompts(list(prompts), defaults, checkpoint)
        return len(requests), requests
    if prompts:
        raise InputError("give prompts or --manifest, not both")
    with checking_lines(manifest.name) as on_line:
        num_clips = check_manifest(manifest, defaults, checkpoint, on_line)
    return num_clips, stream_requests(manifest, defaults)


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
