"""The options that say which clips and which model, shared by every command that renders."""

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, get_args

import click

from cineray.jobs.run_options import Decode, RunOptions
from cineray.pipeline.loading.options import Attention, LoadOptions, Quantize, TextEncoders


@dataclass(frozen=True, kw_only=True, slots=True)
class ClipArguments:
    """What was typed about clips and their model.

    Args:
        clip: by the names of `ClipRequest`; None means the model's own value.
        loading: by the names of `LoadOptions`; device None means CUDA if there is one.
    """

    prompts: tuple[str, ...]
    manifest: Path | None
    model: str
    clip: dict[str, Any]
    loading: dict[str, Any]


json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object as the last line of stdout.")
_PATH = click.Path(path_type=Path)
_LOADING, _RUN = LoadOptions(), RunOptions()  # their defaults


class FolderPath(click.Path):
    """A folder that the user names; an empty name, as of a variable that is not set, is not the folder one is in."""

    def __init__(self) -> None:
        super().__init__(path_type=Path)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if value == "":
            self.fail("must not be empty; give a folder.", param, ctx)
        return super().convert(value, param, ctx)


_PROMPTS = click.argument("prompts", nargs=-1, metavar="PROMPT...")
_SOURCE_OPTIONS = [
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
]
_CLIP_OPTIONS = {  # by the names of ClipRequest
    "num_inference_steps": click.option(
        "--steps", "num_inference_steps", type=int, metavar="N", help="Denoising steps.  [default: 50]"
    ),
    "seed": click.option(
        "--seed", type=int, default=0, show_default=True, metavar="N", help="Seed of each clip's noise, below 2^32."
    ),
    "width": click.option("--width", type=int, metavar="W", help="Pixels.  [default: the model's]"),
    "height": click.option("--height", type=int, metavar="H", help="Pixels.  [default: the model's]"),
    "num_frames": click.option(
        "--frames", "num_frames", type=int, metavar="F", help="4k+1; Open-Sora 1 or 17k.  [default: the model's]"
    ),
    "guidance_scale": click.option(
        "--guidance", "guidance_scale", type=float, metavar="G", help="Guidance scale.  [default: the model's]"
    ),
    "guidance_scale_2": click.option(
        "--guidance-2",
        "guidance_scale_2",
        type=float,
        metavar="G",
        help="Guidance of the second expert (Wan 2.2).  [default: the model's]",
    ),
    "seconds": click.option(
        "--seconds", type=float, metavar="S", help="Length of a sound.  [default: the model's longest]"
    ),
    "negative_prompt": click.option("--negative-prompt", metavar="TEXT", help="What to avoid (Wan)."),
    "image": click.option("--image", type=_PATH, metavar="FILE", help="First frame, for image-to-video models."),
    "image_fit": click.option(
        "--image-fit",
        type=click.Choice(("stretch", "crop", "pad")),
        default="stretch",
        show_default=True,
        help="For an image or control video of another shape than the clip: stretch it, cut it, or put it on black.",
    ),
    "reference_images": click.option(
        "--reference-image",
        "reference_images",
        multiple=True,
        type=_PATH,
        metavar="FILE",
        help="A picture of what the clip is to show (Wan VACE); may be repeated.",
    ),
    "control_video": click.option(
        "--control-video",
        type=_PATH,
        metavar="FILE",
        help="A video to follow (Wan VACE), or to go on from (Open-Sora).",
    ),
    "control_mask": click.option(
        "--control-mask",
        type=_PATH,
        metavar="FILE",
        help="A video or picture: black keeps the control video, white is made anew (Wan VACE).",
    ),
    "conditioning_scale": click.option(
        "--conditioning-scale",
        type=float,
        metavar="X",
        help="How much of the references and the control is added (Wan VACE).  [default: 1]",
    ),
    "flow_shift": click.option(
        "--flow-shift", type=float, metavar="X", help="Shift of the steps towards the noise.  [default: the authors']"
    ),
}
_LOAD_OPTIONS = {  # by the names of LoadOptions
    "device": click.option("--device", default="", metavar="cpu|cuda", help="[default: cuda if there is one]"),
    "dtype": click.option(
        "--dtype", default=_LOADING.dtype, show_default=True, metavar="NAME", help="float32, bfloat16 or float16."
    ),
    "offload": click.option(
        "--offload",
        default=_LOADING.offload,
        show_default=True,
        metavar="none|model|sequential|group",
        help="Keep idle weights in CPU memory (CUDA).",
    ),
    "vae_tiling": click.option(
        "--vae-tiling/--no-vae-tiling",
        default=None,
        help="Decode in tiles: less memory, slightly other pixels.  [default: HunyuanVideo on GPUs]",
    ),
    "vae_dtype": click.option(
        "--vae-dtype", default=_LOADING.vae_dtype, metavar="NAME", help="The VAE's type.  [default: its authors']"
    ),
    "text_encoders": click.option(
        "--text-encoders",
        type=click.Choice(get_args(TextEncoders)),
        default=_LOADING.text_encoders,
        show_default=True,
        help="Where they stay; host: on the GPU layer by layer, auto: so beside a rank.",
    ),
    "attention": click.option(
        "--attention",
        type=click.Choice(get_args(Attention)),
        default=_LOADING.attention,
        show_default=True,
        help="Attention kernel; auto is the fastest exact one that is installed (CUDA).",
    ),
    "quantize": click.option(
        "--quantize",
        type=click.Choice(get_args(Quantize)),
        default=_LOADING.quantize,
        show_default=True,
        help="Hold the transformer's weights in 8 bits (torchao): half the memory, other pixels.",
    ),
    "compile": click.option("--compile", is_flag=True, help="Compile the transformer's blocks; a slow first step."),
    "scheduler": click.option(
        "--scheduler",
        default=_LOADING.scheduler,
        metavar="NAME",
        help="A scheduler's class in diffusers, such as FlowMatchEulerDiscreteScheduler.  [default: the checkpoint's]",
    ),
    "lora": click.option(
        "--lora",
        multiple=True,
        metavar="PATH[:SCALE]",
        help="Fuse a LoRA into the transformer; may be repeated. Of Wan 2.2's two: high:PATH, low:PATH or both:PATH.",
    ),
}


def clip_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Adds the options to a command, which receives them as its first argument, `ClipArguments`."""
    return _PROMPTS(manifest_options(command))


def manifest_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The same for a command that takes its clips from a manifest alone."""

    @functools.wraps(command)
    def with_clip_arguments(**values: Any) -> Any:
        asked = _taken(values, values.pop("model"))
        return command(asked, **values)

    return _added([*_SOURCE_OPTIONS, *_CLIP_OPTIONS.values(), *_LOAD_OPTIONS.values()], with_clip_arguments)


def models_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """As `clip_options` for one model or several: the command receives a `ClipArguments` for each, as a tuple."""

    @functools.wraps(command)
    def with_each_model(models: tuple[str, ...], **values: Any) -> Any:
        first = _taken(values, models[0])
        return command(tuple(replace(first, model=model) for model in models), **values)

    several = click.option(
        "--model",
        "models",
        multiple=True,
        default=("tiny-wan",),
        show_default=True,
        metavar="NAME|DIR",
        help="A name of `cineray models`, a diffusers folder or a hub id; once for each model.",
    )
    return _PROMPTS(
        _added([_SOURCE_OPTIONS[0], several, *_CLIP_OPTIONS.values(), *_LOAD_OPTIONS.values()], with_each_model)
    )


def _taken(values: dict[str, Any], model: str) -> ClipArguments:
    """The clips' options, out of all that were typed."""
    return ClipArguments(
        prompts=values.pop("prompts", ()),
        manifest=values.pop("manifest"),
        model=model,
        clip={name: values.pop(name) for name in _CLIP_OPTIONS},
        loading={name: values.pop(name) for name in _LOAD_OPTIONS},
    )


_RUN_OPTIONS = [  # by the names of RunOptions
    click.option("--sp", type=int, default=_RUN.sp, show_default=True, metavar="N", help="Ranks that share one clip."),
    click.option("--cfg-parallel", is_flag=True, help="The guidance branches on two halves of a gang (Wan)."),
    click.option(
        "--layout",
        "layout_name",
        metavar="LAYOUT",
        help="How a gang shares a clip, as ring2xulysses4; instead of --sp and --cfg-parallel. auto: what the plan "
        "says is best for these clips, gangs included.",
    ),
    click.option(
        "--gangs",
        "num_gangs",
        type=int,
        default=_RUN.num_gangs,
        show_default=True,
        metavar="N",
        help="Clips rendered at a time.",
    ),
    click.option("--address", metavar="local|auto|HOST:PORT", help="Ray to render on.  [default: local if need be]"),
    click.option(
        "--finishers", "num_finishers", type=int, metavar="N", help="Actors that decode.  [default: 1 per 4 gangs]"
    ),
    click.option(
        "--decode",
        type=click.Choice(get_args(Decode)),
        default=_RUN.decode,
        show_default=True,
        help="Who decodes: each rank of a gang a band of rows, or a finisher.",
    ),
    click.option(
        "--shard-weights",
        is_flag=True,
        help="Each rank of a clip holds a part of the transformer: less memory, more exchange.",
    ),
    click.option(
        "--hang-timeout",
        "hang_s",
        type=float,
        default=_RUN.hang_s,
        show_default=True,
        metavar="S",
        help="A gang whose step takes longer is killed; the clip tries again.",
    ),
    click.option(
        "--checkpoint-every",
        "checkpoint_s",
        type=float,
        default=_RUN.checkpoint_s,
        show_default=True,
        metavar="S",
        help="Seconds between two saves of a clip's latents.",
    ),
    click.option(
        "--lease-timeout",
        "lease_s",
        type=float,
        default=_RUN.lease_s,
        show_default=True,
        metavar="S",
        help="A driver that is silent for so long loses the folder.",
    ),
    click.option("--elastic-tail", is_flag=True, help="Let gangs grow when there are fewer clips than gangs."),
]


def run_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Adds the options of a run to a command, which receives them as its argument `run`, a checked `RunOptions`."""
    names = [field.name for field in fields(RunOptions)]

    @functools.wraps(command)
    def with_run(*arguments: Any, **values: Any) -> Any:
        run = RunOptions(**{name: values.pop(name) for name in names})
        return command(*arguments, run=run, **values)

    return _added(_RUN_OPTIONS, with_run)


def _added(options: Iterable[Callable[..., Any]], command: Callable[..., Any]) -> Callable[..., Any]:
    return functools.reduce(lambda wrapped, option: option(wrapped), reversed(list(options)), command)
