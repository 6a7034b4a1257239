"""The options that say which clips and which model, shared by every command that renders."""

import functools
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import click


@dataclass(frozen=True, kw_only=True, slots=True)
class ClipArguments:
    """What was typed; None means the model's own value."""

    prompts: tuple[str, ...]
    manifest: Path | None
    model: str
    steps: int | None
    seed: int
    width: int | None
    height: int | None
    frames: int | None
    guidance: float | None
    negative_prompt: str | None
    image: Path | None
    image_fit: str
    device: str
    dtype: str
    offload: str
    vae_tiling: bool


json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object as the last line of stdout.")
_PATH = click.Path(path_type=Path)


class FolderPath(click.Path):
    """A folder that the user names; an empty name, as of a variable that is not set, is not the folder one is in."""

    def __init__(self) -> None:
        super().__init__(path_type=Path)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if value == "":
            self.fail("must not be empty; give a folder.", param, ctx)
        return super().convert(value, param, ctx)


_PROMPTS = click.argument("prompts", nargs=-1, metavar="PROMPT...")
_OPTIONS = [
    click.option(
        "--manifest",
        type=_PATH,
        metavar="FILE|-",
        help="Clips instead of prompts: .jsonl, .json, .csv or .txt, or - for stdin; see docs/manifest.md.",
    ),
    click.option(
        "--model",
        default="tiny-wan",
        show_default=True,
        metavar="NAME|DIR",
        help="A name of `cineray models`, a diffusers folder or a hub id.",
    ),
    click.option("--steps", type=int, metavar="N", help="Denoising steps.  [default: 50]"),
    click.option(
        "--seed", type=int, default=0, show_default=True, metavar="N", help="Seed of each clip's noise, below 2^32."
    ),
    click.option("--width", type=int, metavar="W", help="Pixels.  [default: the model's]"),
    click.option("--height", type=int, metavar="H", help="Pixels.  [default: the model's]"),
    click.option("--frames", type=int, metavar="F", help="4k+1 frames.  [default: the model's]"),
    click.option("--guidance", type=float, metavar="G", help="Guidance scale.  [default: the model's]"),
    click.option("--negative-prompt", metavar="TEXT", help="What to avoid (Wan)."),
    click.option("--image", type=_PATH, metavar="FILE", help="First frame, for image-to-video models."),
    click.option(
        "--image-fit",
        type=click.Choice(("stretch", "crop", "pad")),
        default="stretch",
        show_default=True,
        help="For an image of another shape than the clip: stretch it, cut it, or put it on black.",
    ),
    click.option("--device", default="", metavar="cpu|cuda", help="[default: cuda if there is one]"),
    click.option("--dtype", default="auto", show_default=True, metavar="NAME", help="float32, bfloat16 or float16."),
    click.option(
        "--offload",
        default="none",
        show_default=True,
        metavar="none|model|sequential",
        help="Keep idle weights in CPU memory (CUDA).",
    ),
    click.option("--vae-tiling", is_flag=True, help="Decode in tiles: less memory, slightly other pixels."),
]


def clip_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Adds the options to a command, which receives them as its first argument, an `ClipArguments`."""
    return _PROMPTS(manifest_options(command))


def manifest_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The same for a command that takes its clips from a manifest alone."""
    names = [field.name for field in fields(ClipArguments)]

    @functools.wraps(command)
    def with_clip_arguments(**values: Any) -> Any:
        values.setdefault("prompts", ())
        asked = ClipArguments(**{name: values.pop(name) for name in names})
        return command(asked, **values)

    return functools.reduce(lambda wrapped, option: option(wrapped), reversed(_OPTIONS), with_clip_arguments)


@dataclass(frozen=True, kw_only=True, slots=True)
class RunArguments:
    """How to carry a run out, as typed; `RunOptions` checks it."""

    sp: int
    cfg_parallel: bool
    num_gangs: int
    address: str | None
    num_finishers: int | None
    hang_s: float
    checkpoint_s: float
    lease_s: float


_RUN_OPTIONS = [
    click.option("--sp", type=int, default=1, show_default=True, metavar="N", help="Ranks that share one clip."),
    click.option("--cfg-parallel", is_flag=True, help="The guidance branches on two halves of a gang (Wan)."),
    click.option(
        "--gangs", "num_gangs", type=int, default=1, show_default=True, metavar="N", help="Clips rendered at a time."
    ),
    click.option("--address", metavar="local|auto|HOST:PORT", help="Ray to render on.  [default: local if need be]"),
    click.option(
        "--finishers", "num_finishers", type=int, metavar="N", help="Actors that decode.  [default: 1 per 4 gangs]"
    ),
    click.option(
        "--hang-timeout",
        "hang_s",
        type=float,
        default=300.0,
        show_default=True,
        metavar="S",
        help="A gang whose step takes longer is killed; the clip tries again.",
    ),
    click.option(
        "--checkpoint-every",
        "checkpoint_s",
        type=float,
        default=60.0,
        show_default=True,
        metavar="S",
        help="Seconds between two saves of a clip's latents.",
    ),
    click.option(
        "--lease-timeout",
        "lease_s",
        type=float,
        default=30.0,
        show_default=True,
        metavar="S",
        help="A driver that is silent for so long loses the folder.",
    ),
]


def run_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Adds the options of a run to a command, which receives them as its argument `run_asked`."""
    names = [field.name for field in fields(RunArguments)]

    @functools.wraps(command)
    def with_run(*arguments: Any, **values: Any) -> Any:
        run_asked = RunArguments(**{name: values.pop(name) for name in names})
        return command(*arguments, run_asked=run_asked, **values)

    return functools.reduce(lambda wrapped, option: option(wrapped), reversed(_RUN_OPTIONS), with_run)
