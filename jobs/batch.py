"""The loop over clips in one process."""

import importlib.metadata
import platform
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import cineray
from cineray.distributed.layout import Layout
from cineray.jobs.output_folder import OutputError, OutputFolder
from cineray.jobs.progress import RenderProgress
from cineray.pipeline.loading import LoadedModel
from cineray.pipeline.render import RenderedClip, render_clip
from cineray.pipeline.request import ClipRequest, fingerprint
from cineray.pipeline.video import VideoError, write_video

Status = Literal["done", "existing", "failed", "quarantined"]


@dataclass(frozen=True, kw_only=True, slots=True)
class ClipResult:
    """One clip of `render --json`; `cost` is the share of the uncached block evaluations that ran."""

    id: str
    status: Status
    video: str | None
    steps: int
    computed_steps: int
    skipped_steps: int
    wall_s: float
    cost: float
    error: str | None = None


def render_batch(
    requests: Iterable[ClipRequest],
    model: LoadedModel,
    folder: OutputFolder,
    progress: RenderProgress,
    lossless: bool,
) -> list[ClipResult]:
    """Renders what is not there yet, one clip after the other; a clip that fails does not stop the others.

    Raises:
        OutputError: the output folder is full or gone.
    """
    options = render_options(model, lossless)
    results = []
    for request in requests:
        began = time.monotonic()
        mark = fingerprint(request, model.digest, options)
        video = folder.video_path(request, mark)
        if video.exists():
            status, error = "existing", None
        else:
            progress.begin_clip(request.id, request.num_inference_steps)
            error = _render_one(request, mark, video, model, folder, progress, lossless, options)
            status = "failed" if error else "done"
        wall_s = round(time.monotonic() - began, 3)
        steps = request.num_inference_steps if status != "failed" else 0
        results.append(
            ClipResult(
                id=request.id,
                status=status,
                video=None if error else str(video),
                steps=steps,
                computed_steps=steps,
                skipped_steps=0,
                wall_s=wall_s,
                cost=1.0,
                error=error,
            )
        )
        folder.log_event(status, id=request.id, fingerprint=mark, wall_s=wall_s, **({"error": error} if error else {}))
        progress.end_clip(f"{request.id}: {status} in {wall_s:.1f} s" + (f": {error}" if error else f" -> {video}"))
    return results


def render_options(model: LoadedModel, lossless: bool) -> dict[str, object]:
    """What is common to a run and changes pixels."""
    return {"dtype": model.options.dtype_name, "vae_tiling": model.options.vae_tiling, "lossless": lossless}


def _render_one(
    request: ClipRequest,
    mark: str,
    video: Path,
    model: LoadedModel,
    folder: OutputFolder,
    progress: RenderProgress,
    lossless: bool,
    options: dict[str, object],
) -> str | None:
    """Renders and commits one clip; returns why it failed, or None."""
    try:
        clip = render_clip(model, request, progress.step)
    except (RuntimeError, ValueError, OSError) as error:  # out of memory, a shape a model cannot take, an image
        return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    record = clip_record(request, mark, model, options)
    encoding = time.monotonic()
    try:
        with folder.new_video(request, video) as temporary:
            write_video(clip.frames, temporary, request.fps, record, lossless)
    except OutputError:
        raise
    except (VideoError, OSError) as error:
        if folder.is_full_for(clip.frames.nbytes):
            raise folder.full(f"writing clip {request.id}") from None
        return str(error)
    timings = clip_timings(clip, time.monotonic() - encoding)
    folder.write_json(video.with_suffix(".json").name, record | {"timings": timings})
    return None


def clip_timings(clip: RenderedClip, write_s: float) -> dict[str, float]:
    seconds = {
        "encode_s": clip.encode_s,
        "denoise_s": clip.denoise_s,
        "decode_s": clip.decode_s,
        "write_s": write_s,
    }
    return {name: round(value, 3) for name, value in seconds.items()}


def clip_record(request: ClipRequest, mark: str, model: LoadedModel, options: dict[str, object]) -> dict[str, Any]:
    """All that is known about a clip; stands in the sidecar and in the video's comment tag."""
    steps = request.num_inference_steps
    return {
        "id": request.id,
        "fingerprint": mark,
        "prompt": request.prompt,
        "negative_prompt": request.negative_prompt,
        "seed": request.seed,
        "width": request.width,
        "height": request.height,
        "frames": request.num_frames,
        "fps": request.fps,
        "steps": steps,
        "guidance": request.guidance_scale,
        "image": request.image,
        "model": {
            "name": model.checkpoint.name,
            "pipeline": model.checkpoint.pipeline_class,
            "digest": model.digest,
            "revision": model.revision,
        },
        "cache": request.cache,
        "trace": {"steps": steps, "computed_steps": steps, "skipped_steps": 0, "cost": 1.0},
        "layout": asdict(Layout()),
        "options": options,
        "device": model.options.device,
        "versions": software_versions(),
    }


def software_versions() -> dict[str, str]:
    names = ("torch", "diffusers", "transformers", "imageio-ffmpeg")
    return {
        "cineray": cineray.__version__,
        "python": platform.python_version(),
    } | {name: importlib.metadata.version(name) for name in names}
