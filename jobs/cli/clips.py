"""Turns what was typed into checked requests and load options."""

import os
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from cineray.jobs.cli.options import ClipArguments

if TYPE_CHECKING:  # torch and diffusers take seconds to import; `--help` should not wait for them
    from cineray.jobs.manifest.check import RunDefaults
    from cineray.pipeline.loading.checkpoint import Checkpoint
    from cineray.pipeline.loading.options import LoadOptions
    from cineray.pipeline.request import ClipRequest


LONG_BYTES = 4_000_000  # 40,000 lines of 100 bytes: a fifth of a second


def run_defaults(asked: ClipArguments, checkpoint: "Checkpoint", cache: str, fps: int | None) -> "RunDefaults":
    """What a clip gets that says nothing itself: what was typed, else the model's own."""
    from cineray.jobs.manifest.check import RunDefaults

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
        image=None if asked.image is None else os.path.realpath(asked.image),
        image_fit=asked.image_fit,
    )


def load_options(asked: ClipArguments) -> "LoadOptions":
    """How the weights are to be loaded."""
    from cineray.pipeline.loading.device import default_device
    from cineray.pipeline.loading.options import LoadOptions

    return LoadOptions(
        device=asked.device or default_device(),
        dtype=asked.dtype,
        offload=asked.offload,  # type: ignore[arg-type]  # LoadOptions checks it
        vae_tiling=asked.vae_tiling,
    )


def _given(value: Any, default: Any) -> Any:
    return default if value is None else value


def takes_long_to_check(asked: ClipArguments) -> bool:
    """Whether there are so many lines that something should be done meanwhile."""
    try:
        return asked.manifest is not None and asked.manifest.stat().st_size >= LONG_BYTES
    except OSError:
        return False  # the check says what is wrong


def read_requests(
    asked: ClipArguments, defaults: "RunDefaults", checkpoint: "Checkpoint", num_ranks: int = 1
) -> tuple[int, Iterable["ClipRequest"]]:
    """(number of clips, the clips as a stream), all of them checked.

    Args:
        num_ranks: that share a clip's tokens.

    Raises:
        InputError: bad lines of the manifest, bad prompts, or both given.
    """
    from cineray.jobs.console.progress import checking_lines
    from cineray.jobs.console.terminal import tell
    from cineray.jobs.manifest.check import check_manifest, check_prompts
    from cineray.pipeline.request import InputError

    if asked.manifest is None:
        requests = check_prompts(list(asked.prompts), defaults, checkpoint, num_ranks)
        return len(requests), requests
    if asked.prompts:
        raise InputError("give prompts or --manifest, not both")
    with checking_lines(asked.manifest.name) as on_row:
        checked = check_manifest(asked.manifest, defaults, checkpoint, on_row, num_ranks)
    tell(*(f"cineray: {note}" for note in checked.notes))
    return checked.num_clips, checked.requests()
