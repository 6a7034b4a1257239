"""What is written about a clip: the sidecar JSON, and the same in the video's comment tag."""

import importlib.metadata
import platform
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

import cineray
from cineray.caching.trace import StepCounts
from cineray.distributed.layout import Layout
from cineray.files import read_json, shaped
from cineray.pipeline.caches.memory import forecast_cache_bytes
from cineray.pipeline.loading.checkpoint import Checkpoint
from cineray.pipeline.loading.options import QUANTIZED_ATTENTION, LoadOptions
from cineray.pipeline.media.output import FLAC, format_of
from cineray.pipeline.media.picture import fit_warning
from cineray.pipeline.request import ClipRequest, fingerprint

MAX_RECORD_BYTES = 4 * 2**20  # the longest prompts take a tenth of it
_Count = Annotated[int, Field(ge=0, le=10**6)]


class _Summary(BaseModel):
    """What is read back of a trace's summary."""

    model_config = ConfigDict(strict=True)

    policy: str
    steps: _Count
    computed_steps: _Count
    skipped_steps: _Count
    cost: Annotated[float, Field(ge=0, allow_inf_nan=False)]


class _Proof(BaseModel):
    """The committed video, as `commit` remembers it."""

    model_config = ConfigDict(strict=True)

    bytes: Annotated[int, Field(ge=0)]
    mtime_ns: int
    sha256: str


class _Record(BaseModel):
    """What is read back of a record; those of earlier versions have no `version`."""

    model_config = ConfigDict(strict=True)

    version: Literal[1] = 1
    id: str
    fingerprint: str
    trace: _Summary
    resumed_at: list[_Count] = []
    warning: str = ""
    video: _Proof | None = None


_RECORD = TypeAdapter(_Record)

if TYPE_CHECKING:  # a driver on Ray reads records, and does without torch
    from cineray.pipeline.loading.model import LoadedModel
    from cineray.pipeline.render import RenderedClip


def read_record(sidecar: Path) -> dict[str, Any]:
    """Reads a sidecar; all that it says, not only what is checked.

    Raises:
        OSError: it is not there, no regular file, a link, too long, or cannot be read.
        ValueError: as `checked_record`.
    """
    return checked_record(read_json(sidecar, MAX_RECORD_BYTES, follow_links=False), sidecar)


def checked_record(content: Any, sidecar: Path) -> dict[str, Any]:
    """A record that has the shape of one, and is of the clip that the sidecar's name says.

    Raises:
        ValueError: it is not.
    """
    record = shaped(content, _RECORD)
    if sidecar.name != f"{record.id}.{record.fingerprint}.json":
        raise ValueError("it is of another clip")
    return content


def render_options(options: LoadOptions, lossless: bool) -> dict[str, object]:
    """What is common to a run and changes pixels; what the first versions did not have is named where it is used alone.

    Exact attention kernels and compilation differ in the last bits, as GPUs do, and do not count.
    """
    chosen: dict[str, object] = {"dtype": options.dtype_name, "vae_tiling": options.vae_tiling, "lossless": lossless}
    if options.vae_dtype != "auto":
        chosen["vae_dtype"] = options.vae_dtype
    if options.attention in QUANTIZED_ATTENTION:
        chosen["attention"] = options.attention
    if options.quantize != "none":
        chosen["quantize"] = options.quantize
    if options.scheduler != "auto":
        chosen["scheduler"] = options.scheduler
    if options.lora:
        chosen["lora"] = [lora.text for lora in options.lora]
    return chosen


def policy_text(request: ClipRequest, checkpoint: Checkpoint) -> str:
    """The clip's cache policy with all its options."""
    plan = checkpoint.plan_cache(request.cache)
    return "none" if plan is None else plan.text


def fingerprint_of(request: ClipRequest, checkpoint: Checkpoint, digest: str, options: dict[str, object]) -> str:
    """The clip's fingerprint.

    Args:
        digest: of the weights.
        options: as `render_options` gives them.

    Raises:
        OSError: the image cannot be read any more.
        ValueError: nor can the file of its cache policy.
    """
    policy, pixel_fields = policy_text(request, checkpoint), checkpoint.model.pixel_fields
    if checkpoint.model.output == FLAC:  # the same samples, but one sidecar cannot tell of two files
        options = {**options, "format": format_of(FLAC)}
    return fingerprint(checkpoint.adapter.effective(request), policy, digest, options, pixel_fields)


def clip_record(
    request: ClipRequest,
    fingerprint: str,
    model: "LoadedModel",
    options: dict[str, object],
    clip: "RenderedClip",
    layout: Layout | None = None,
    resumed_at: Sequence[int] = (),
    warnings: Sequence[str] = (),
) -> dict[str, Any]:
    """All that is known about a rendered clip but its timings.

    Args:
        resumed_at: steps at which the clip went on after a stop.
        warnings: what was asked for and the pixels do not show.
    """
    shift = model.adapter.effective(request).flow_shift
    counts = step_counts(request, clip)
    record: dict[str, Any] = {
        "version": 1,
        "id": request.id,
        "fingerprint": fingerprint,
        "prompt": request.prompt,
        "negative_prompt": request.negative_prompt,
        "seed": request.seed,
        "width": request.width,
        "height": request.height,
        "frames": request.num_frames,
        "fps": request.fps,
        "steps": request.num_inference_steps,
        "guidance": request.guidance_scale,
        "image": request.image,
        **({} if shift is None else {"flow_shift": shift}),
        **({} if request.guidance_scale_2 is None else {"guidance_2": request.guidance_scale_2}),
        **({} if request.seconds is None else {"seconds": request.seconds}),
        **({} if request.conditioning_scale is None else {"conditioning_scale": request.conditioning_scale}),
        "model": {
            "name": model.checkpoint.name,
            "pipeline": model.checkpoint.pipeline_class,
            "digest": model.digest,
            "revision": model.revision,
        },
        "cache": counts["policy"],
        "trace": {**counts, "forecast_bytes": cache_bytes(request, model)},
        "layout": asdict(layout or Layout()),
        "options": options,
        "device": model.options.device,
        "versions": software_versions(),
    }
    if resumed_at:
        record["resumed_at"] = list(resumed_at)
    if request.image is not None or request.control_video is not None:
        record["image_fit"] = request.image_fit
    for name in ("reference_images", "control_video", "control_mask"):
        if getattr(request, name):
            record[name] = getattr(request, name)
    if warnings:
        record["warnings"] = list(warnings)
    warning = cache_warning(counts)
    return record | ({"warning": warning} if warning else {})


def clip_warnings(request: ClipRequest) -> list[str]:
    """What was asked for and the pixels do not show, each in one line."""
    found = list(request.picture.notes) if request.picture is not None else []
    if stretched := fit_warning(request):
        found.append(stretched)
    return found


def cache_bytes(request: ClipRequest, model: "LoadedModel") -> int | None:
    """What the clip's cache will hold on one rank; None if it is not known beforehand."""
    from cineray.pipeline.loading.model import DTYPES

    element_bytes = DTYPES[model.options.dtype_name].itemsize
    return forecast_cache_bytes(model.checkpoint, request, element_bytes)


def step_counts(request: ClipRequest, clip: "RenderedClip") -> StepCounts:
    """The summary of the clip's trace, or what stands for it where the clip has no cache."""
    steps = request.num_inference_steps
    if clip.trace is None:
        return {"policy": "none", "steps": steps, "computed_steps": steps, "skipped_steps": 0, "cost": 1.0}
    return clip.trace.summary()


def cache_warning(trace: StepCounts) -> str | None:
    """A cache that never skipped cost something and saved nothing: worth saying."""
    if trace["policy"] == "none" or trace["skipped_steps"]:
        return None
    return f"the cache never skipped a step in {trace['steps']}; raise its threshold, or leave it out"


def clip_timings(clip: "RenderedClip", write_s: float) -> dict[str, float]:
    seconds = {
        "encode_s": clip.encode_s,
        "denoise_s": clip.denoise_s,
        "decode_s": clip.decode_s,
        "write_s": write_s,
    }
    return {name: round(value, 3) for name, value in seconds.items()}


def software_versions() -> dict[str, str]:
    names = ("torch", "diffusers", "transformers", "imageio-ffmpeg")
    return {
        "cineray": cineray.__version__,
        "python": platform.python_version(),
    } | {name: importlib.metadata.version(name) for name in names}
