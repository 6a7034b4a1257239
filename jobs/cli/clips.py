"""Turns what was typed into checked requests and load options."""

import os
from collections.abc import Iterable
from dataclasses import asdict
from typing import TYPE_CHECKING

from cineray.jobs.cli.options import ClipArguments
from cineray.text import shorten

if TYPE_CHECKING:  # torch and diffusers take seconds to import; `--help` should not wait for them
    from cineray.jobs.manifest.check import MoreCheck, RunDefaults
    from cineray.pipeline.loading.checkpoint import Checkpoint
    from cineray.pipeline.loading.options import LoadOptions, Lora
    from cineray.pipeline.request import ClipRequest


LONG_BYTES = 4_000_000  # 40,000 lines of 100 bytes: a fifth of a second


def run_defaults(asked: ClipArguments, checkpoint: "Checkpoint", cache: str, fps: int | None) -> "RunDefaults":
    """What a clip gets that says nothing itself: what was typed, else the model's own."""
    from cineray.jobs.manifest.check import RunDefaults

    typed = {name: value for name, value in {**asked.clip, "fps": fps}.items() if value is not None}
    for name in ("image", "control_video", "control_mask"):
        if asked.clip[name] is not None:
            typed[name] = os.path.realpath(asked.clip[name])
    typed["reference_images"] = tuple(map(os.path.realpath, asked.clip["reference_images"]))
    return RunDefaults(**{**asdict(checkpoint.defaults), **typed, "cache": cache})


def load_options(asked: ClipArguments, checkpoint: "Checkpoint", decode: str = "auto") -> "LoadOptions":
    """How the weights of a checkpoint are to be loaded.

    Args:
        decode: as `RunOptions` has it; a gang's bands of rows are not tiled.

    Raises:
        InputError: options that cannot be, or do not go together.
    """
    from cineray.pipeline.loading.device import default_device
    from cineray.pipeline.loading.options import LoadOptions, Lora
    from cineray.pipeline.request import InputError

    device, tiles = asked.loading["device"] or default_device(), asked.loading["vae_tiling"]
    if decode == "gang" and not checkpoint.model.row_convolutions:
        raise InputError(f"model {checkpoint.name}: its decoder cannot be shared by ranks; leave --decode gang out")
    if decode == "gang" and tiles:
        raise InputError(
            "--decode gang decodes by bands of rows, not in tiles; leave --vae-tiling or --decode gang out"
        )
    if decode == "gang":
        tiles = False
    if tiles and not checkpoint.model.can_tile:
        raise InputError(f"model {checkpoint.name}: its decoder cannot work in tiles; leave --vae-tiling out")
    loras = tuple(Lora.parse(text) for text in asked.loading["lora"])
    if loras and (reason := _takes_no_lora(checkpoint, loras)):
        raise InputError(f"model {checkpoint.name}: {reason}")
    chosen = {
        "device": device,
        "vae_tiling": device == "cuda" and checkpoint.adapter.tiles_on_gpus if tiles is None else tiles,
        "scheduler": checkpoint.scheduler_named(asked.loading["scheduler"]),
        "lora": loras,
    }
    return LoadOptions(**{**asked.loading, **chosen})


def _takes_no_lora(checkpoint: "Checkpoint", loras: tuple["Lora", ...]) -> str | None:
    if not checkpoint.model.takes_lora:
        return "diffusers fuses no LoRA into its transformer; leave --lora out"
    has_two = checkpoint.num_experts > 1
    wrong = next((lora for lora in loras if (lora.expert is not None) != has_two), None)
    if wrong is None:
        return None
    name = shorten(os.path.basename(wrong.path), 100)
    if has_two:
        return (
            f"it has two experts, so say whose each LoRA is: --lora high:PATH for the noisy steps, low:PATH for the "
            f"others, both:PATH; got {name}"
        )
    return f"it has one expert; leave {wrong.expert}: out, got {name}"


def takes_long_to_check(asked: ClipArguments) -> bool:
    """Whether there are so many lines that something should be done meanwhile."""
    try:
        return asked.manifest is not None and asked.manifest.stat().st_size >= LONG_BYTES
    except OSError:
        return False  # the check says what is wrong


def read_requests(
    asked: ClipArguments,
    defaults: "RunDefaults",
    checkpoint: "Checkpoint",
    num_ranks: int = 1,
    more: "MoreCheck | None" = None,
) -> tuple[int, Iterable["ClipRequest"]]:
    """(number of clips, the clips as a stream that can be read again), all of them checked.

    Args:
        num_ranks: that share a clip's tokens.
        more: a further check, as `RequestCheck` takes it.

    Raises:
        InputError: bad lines of the manifest, bad prompts, or both given.
    """
    from cineray.jobs.console.progress import checking_lines
    from cineray.jobs.console.terminal import tell
    from cineray.jobs.manifest.check import check_manifest, check_prompts

    _refuse_both(asked)
    if asked.manifest is None:
        requests = check_prompts(list(asked.prompts), defaults, checkpoint, num_ranks, more)
        return len(requests), requests
    with checking_lines(asked.manifest.name) as on_row:
        checked = check_manifest(asked.manifest, defaults, checkpoint, on_row, num_ranks, more)
    tell(*(f"cineray: {note}" for note in checked.notes))
    return checked.num_clips, checked


def survey_requests(
    asked: ClipArguments,
    defaults: "RunDefaults",
    checkpoint: "Checkpoint",
    num_ranks: int = 1,
    more: "MoreCheck | None" = None,
) -> tuple[Iterable["ClipRequest"], tuple[str, ...], int]:
    """(the clips that can be rendered, what is wrong with the first others, how many those are).

    Args:
        num_ranks, more: as `read_requests` takes them.

    Raises:
        InputError: prompts and a manifest, or nothing to render, or the manifest cannot be read.
    """
    from cineray.jobs.console.progress import checking_lines
    from cineray.jobs.manifest.check import survey_manifest, survey_prompts
    from cineray.pipeline.request import InputError

    _refuse_both(asked)
    if asked.manifest is None:
        if not asked.prompts:
            raise InputError("nothing to render: give prompts or --manifest FILE")
        requests, refused = survey_prompts(list(asked.prompts), defaults, checkpoint, num_ranks, more)
        return requests, tuple(refused), len(refused)
    with checking_lines(asked.manifest.name) as on_row:
        checked, bad = survey_manifest(asked.manifest, defaults, checkpoint, on_row, num_ranks, more)
    return checked, tuple(bad.lines()), bad.num_rows


def _refuse_both(asked: ClipArguments) -> None:
    from cineray.pipeline.request import InputError

    if asked.prompts and asked.manifest is not None:
        raise InputError("give prompts or --manifest, not both")
