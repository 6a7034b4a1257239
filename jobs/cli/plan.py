"""The command `plan`: from what was typed to a forecast of every layout, on paper alone."""

from __future__ import annotations

import re
import sys
from collections import Counter
from dataclasses import asdict, dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cineray.jobs.cli.exit_codes import EXIT_BAD_INPUT, EXIT_DONE
from cineray.jobs.cli.options import json_option
from cineray.jobs.cli.plan_simulated import Losses, SimulatedRow, show_simulated, simulate_plan, simulation_options
from cineray.jobs.console.terminal import print_json, tell, write

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from cineray.distributed.layout import Layout
    from cineray.jobs.planning.evidence import ClipKind
    from cineray.jobs.planning.layouts import Fleet
    from cineray.jobs.planning.plan import Batch, Plan
    from cineray.jobs.planning.sidecars import PastClips
    from cineray.pipeline.loading.checkpoint import Checkpoint
    from cineray.pipeline.request import ClipRequest

_PATH = click.Path(path_type=Path)
_UNITS_S = {"s": 1, "m": 60, "h": 3600, "d": 86400}


class Duration(click.ParamType):
    """`8h`, `90m`, `1.5d`; a number alone is seconds."""

    name = "duration"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        match = re.fullmatch(r"(\d{1,9}(?:\.\d{1,6})?)([smhd]?)", str(value).strip().lower())
        if match is None or float(match[1]) == 0:
            self.fail(f"must be a time such as 8h, 90m or 3600s, got {str(value)[:40]!r}.", param, ctx)
        return float(match[1]) * _UNITS_S[match[2] or "s"]


@dataclass(frozen=True, kw_only=True, slots=True)
class PlanArguments:
    """What was typed; None means the model's own value, or nothing."""

    manifest: Path | None
    model: str
    width: int | None
    height: int | None
    frames: int | None
    steps: int | None
    guidance: float | None
    cache: str
    num_clips: int | None
    computed_share: float | None
    layout: str | None


@click.command()
@click.option("--manifest", type=_PATH, metavar="FILE|-", help="The batch; else give its clips' size below.")
@click.option("--model", required=True, metavar="NAME", help="A name of `cineray models`.")
@click.option("--width", type=int, metavar="W", help="Pixels.  [default: the model's]")
@click.option("--height", type=int, metavar="H", help="Pixels.  [default: the model's]")
@click.option("--frames", type=int, metavar="F", help="4k+1 frames.  [default: the model's]")
@click.option("--steps", type=int, metavar="N", help="Denoising steps.  [default: the model's]")
@click.option("--guidance", type=float, metavar="G", help="Guidance scale; 1 is one branch.  [default: the model's]")
@click.option("--num-clips", type=int, metavar="K", help="How many such clips.  [default: a stream of them]")
@click.option("--gpu", required=True, metavar="NAME", help="h100, h200, a100, b200, l40s, rtx4090, h20, mi300x, ...")
@click.option("--num-gpus", type=int, default=1, show_default=True, metavar="N", help="All of them.")
@click.option("--nodes", type=int, metavar="N", help="That they stand on.  [default: 8 GPUs on each]")
@click.option("--cache", default="none", show_default=True, metavar="SPEC", help="Cache policy; see docs/caching.md.")
@click.option("--computed-share", type=float, metavar="X", help="Of the steps, that the cache computes.")
@click.option("--layout", metavar="LAYOUT", help="This one alone, as cfg2xulysses4 or gangs2xulysses4.")
@click.option("--deadline", type=Duration(), metavar="T", help="For the whole batch: 8h, 90m.")
@click.option("--price", type=float, metavar="USD", help="Of a GPU and hour.")
@click.option("--study", type=_PATH, multiple=True, metavar="FILE", help="Of `cineray study`; several times.")
@click.option("--out", type=_PATH, metavar="DIR", help="Folder of an earlier run, whose clips' times count.")
@click.option("--simulate", is_flag=True, help="Then run the batch in simulated time; see docs/simulation.md.")
@simulation_options
@json_option
@click.option("--csv", "as_csv", is_flag=True, help="Print every layout as CSV instead of the table.")
@click.pass_context
def plan(
    context: click.Context,
    gpu: str,
    num_gpus: int,
    nodes: int | None,
    deadline: float | None,
    price: float | None,
    study: tuple[Path, ...],
    out: Path | None,
    simulate: bool,
    losses: Losses,
    as_json: bool,
    as_csv: bool,
    **asked: Any,
) -> int:
    """Forecasts a batch on every layout of the GPUs: memory, time, cost, and which to take. No GPU needed.

    Nothing is measured: seconds come from study files, an earlier run's sidecars, published tables, or operations over
    the card's rate, in this order, and the source of each number stands beside it. The last line is the command that
    renders so. See docs/scaling.md.

    \b
    Examples:
      cineray plan --model wan2.1-t2v-14b --width 1280 --height 720 --gpu h100 --num-gpus 8 --num-clips 10
      cineray plan --manifest m.jsonl --model wan2.1-t2v-14b --gpu h100 --num-gpus 16 --deadline 8h --price 2.5
      cineray plan --model hunyuan-video --gpu h20 --num-gpus 8 --cache dicache --json
      cineray plan --manifest m.jsonl --model wan2.1-t2v-14b --gpu h100 --num-gpus 64 --simulate --start-up-s 60 \\
          --spot-loss-per-gpu-hour 0.05 --replace-s 300
    """
    from cineray.jobs.cli.plan_table import print_csv, show_plan
    from cineray.jobs.planning.anchors import published
    from cineray.jobs.planning.evidence import Evidence, num_branches_of
    from cineray.jobs.planning.exchange import WorkOf
    from cineray.jobs.planning.gpus import find_gpu
    from cineray.jobs.planning.layouts import fleet_of
    from cineray.jobs.planning.plan import make_plan
    from cineray.jobs.planning.sidecars import read_sidecars
    from cineray.jobs.planning.study_file import read_study
    from cineray.pipeline.footprint.forecast import forecast
    from cineray.pipeline.footprint.laws import forecast_checkpoint
    from cineray.pipeline.request import InputError

    arguments = PlanArguments(**asked)
    if as_json and as_csv:
        raise InputError("give --json or --csv, not both")
    if not simulate:
        losses.refuse_without_simulation()
    fleet = fleet_of(find_gpu(gpu), num_gpus, nodes, price)
    checkpoint = forecast_checkpoint(arguments.model)
    studies = [read_study(path, arguments.model) for path in study]
    past = () if out is None else read_sidecars(out, num_branches_of(arguments.model))
    batch, notes, requests, kind_of = _batch(arguments, checkpoint, past)
    evidence = Evidence(fleet.gpu, WorkOf(forecast), published().tables, studies, past)
    render = _render_options(context)
    layouts = _layouts(arguments, fleet, batch, checkpoint)
    found = make_plan(
        fleet,
        batch,
        layouts,
        evidence,
        lambda layout, decode: _is_runnable(layout, decode, render),
        deadline,
    )
    if arguments.layout is not None and not found.rows[0].fits:
        raise InputError(_does_not_fit(arguments.layout, found, fleet))
    line = _command(arguments, found, fleet, render)
    content = _content(arguments, fleet, found, notes, line)
    simulated: list[SimulatedRow] = []
    if simulate:
        simulated = simulate_plan(found, fleet, batch, evidence, requests, kind_of, layouts, losses)
        content["simulated"] = [row.content() for row in simulated]
    if as_csv:
        print_csv(found, fleet)
    else:
        show_plan(found, fleet, batch, notes, deadline)
        if simulated:
            show_simulated(simulated)
        if line:
            write(sys.stdout, line + "\n")
    if as_json:
        print_json(content)
    if found.recommended is None:
        tell(f"cineray plan: {_nothing_fits(found, fleet)}")
        return EXIT_BAD_INPUT
    return EXIT_DONE


def _batch(
    asked: PlanArguments, checkpoint: Checkpoint, past: tuple[PastClips, ...]
) -> tuple[Batch, list[str], Iterable[ClipRequest] | None, Callable[[ClipRequest], ClipKind]]:
    """(the clips by kind, what is assumed of them, a manifest's requests, the kind of one).

    Raises:
        InputError: bad lines of the manifest, or a size that the model does not render.
    """
    from cineray.jobs.console.progress import checking_lines
    from cineray.jobs.manifest.check import RunDefaults, check_manifest
    from cineray.jobs.planning.cache_share import computed_share_of
    from cineray.jobs.planning.plan import Batch
    from cineray.pipeline.footprint.published import FROM_FOLDERS
    from cineray.pipeline.request import InputError

    share = asked.computed_share
    if share is not None and not 0 < share <= 1:
        raise InputError(f"--computed-share must be above 0 and at most 1, got {share:g}")
    if asked.num_clips is not None and not 1 <= asked.num_clips <= 10**9:
        raise InputError(f"--num-clips must be 1 to {10**9}, got {asked.num_clips}")
    typed = {
        "width": asked.width,
        "height": asked.height,
        "num_frames": asked.frames,
        "num_inference_steps": asked.steps,
        "guidance_scale": asked.guidance,
    }
    sizes = asdict(checkpoint.defaults) | {name: value for name, value in typed.items() if value is not None}
    requests: Iterable[ClipRequest] | None = None
    known_kind = lru_cache(maxsize=1000)(partial(_kind, checkpoint))  # a million clips have a few sizes

    def plain_kind(r: ClipRequest) -> ClipKind:
        return known_kind(r.width, r.height, r.num_frames, r.num_inference_steps, r.guidance_scale, r.cache)

    if asked.manifest is None:
        kinds = Counter({_kind_of_sizes(checkpoint, sizes, asked.cache): asked.num_clips or 1})
    elif asked.num_clips is not None:
        raise InputError("give --manifest or --num-clips, not both: a manifest says how many clips it has")
    else:
        defaults = RunDefaults(
            **sizes, negative_prompt=None, seed=0, cache=asked.cache, image=None, image_fit="stretch"
        )
        with checking_lines(asked.manifest.name) as on_row:
            requests = check_manifest(asked.manifest, defaults, checkpoint, on_row)
        kinds = Counter(map(plain_kind, requests))
    notes: dict[str, None] = {}
    if asked.model in FROM_FOLDERS:
        notes[f"{asked.model} renders from a folder in diffusers' layout, not by this name (docs/models.md)"] = None
    known: dict[ClipKind, ClipKind] = {}
    for kind in kinds:
        found, note = computed_share_of(kind.policy, asked.model, past, share)
        notes |= {note: None} if note else {}
        known[kind] = replace(kind, computed_share=found)
    is_counted = asked.manifest is not None or asked.num_clips is not None
    batch = Batch(tuple((known[kind], count) for kind, count in kinds.items()), is_counted)
    return batch, list(notes), requests, lambda request: known[plain_kind(request)]


def _kind_of_sizes(checkpoint: Checkpoint, sizes: dict[str, Any], cache: str) -> ClipKind:
    """The kind of one clip whose numbers alone are known; a first frame is taken as given.

    Raises:
        InputError: the model has no such clip.
    """
    from cineray.pipeline.request import ClipRequest, InputError, problems

    rule = checkpoint.size_rule
    image = "first frame" if rule.takes_image else None
    found = problems(ClipRequest(id="plan", prompt="plan", image=image, cache=cache, **sizes), rule)
    if found:
        raise InputError(*(f"{checkpoint.name}: {problem}" for problem in found))
    return _kind(
        checkpoint,
        sizes["width"],
        sizes["height"],
        sizes["num_frames"],
        sizes["num_inference_steps"],
        sizes["guidance_scale"],
        cache,
    )


def _kind(
    checkpoint: Checkpoint, width: int, height: int, frames: int, steps: int, guidance: float, cache: str
) -> ClipKind:
    from cineray.jobs.planning.evidence import ClipKind, num_branches_of
    from cineray.jobs.planning.exchange import Shape
    from cineray.pipeline.request import InputError

    try:
        policy = checkpoint.plan_cache(cache)
    except (ValueError, OSError) as error:
        raise InputError(str(error)) from None
    return ClipKind(
        shape=Shape(checkpoint.name, width, height, frames),
        steps=steps,
        num_branches=min(num_branches_of(checkpoint.name), 1 + (guidance > 1)),
        cache="none" if policy is None else cache,
        policy="none" if policy is None else policy.text,
    )


def _layouts(asked: PlanArguments, fleet: Fleet, batch: Batch, checkpoint: Checkpoint) -> list[Layout]:
    """All that the fleet has, or the one that was asked for.

    Raises:
        InputError: that one is no layout, or fits neither the model nor the fleet.
    """
    from cineray.distributed.layout import check_layout, parse_layout
    from cineray.jobs.planning.layouts import layouts_of
    from cineray.pipeline.request import InputError

    num_heads = checkpoint.num_heads
    num_branches = min(kind.num_branches for kind, _ in batch.kinds)
    if asked.layout is None:
        return list(layouts_of(fleet, num_heads, num_branches))
    try:
        layout = parse_layout(asked.layout)
        check_layout(replace(layout, gangs=1), num_heads, num_branches)
    except ValueError as error:
        raise InputError(f"--layout: {error}") from None
    most = fleet.num_nodes * (fleet.gpus_per_node // layout.ranks_per_gang)
    if layout.gangs > max(1, most) or most == 0:
        raise InputError(
            f"--layout {layout.text} takes {layout.gangs} x {layout.ranks_per_gang} GPUs, there are "
            f"{fleet.num_nodes} x {fleet.gpus_per_node} (a gang stands on one node); take another layout or --num-gpus"
        )
    return [layout if layout.gangs > 1 else replace(layout, gangs=most)]


def _render_options(context: click.Context) -> frozenset[str]:
    """What `cineray render` can be told, by the options that it has."""
    root = context.find_root().command
    assert isinstance(root, click.Group)
    return frozenset(option for parameter in root.commands["render"].params for option in parameter.opts)


def _is_runnable(layout: Layout, decode: str, render: frozenset[str]) -> bool:
    return ("--layout" in render or layout.ring == 1) and (decode != "gang" or "--decode" in render)


def _command(asked: PlanArguments, found: Plan, fleet: Fleet, render: frozenset[str]) -> str | None:
    """The command that renders as the recommended row says; None where none fits."""
    import shlex

    from cineray.pipeline.footprint.published import FROM_FOLDERS

    row = found.recommended
    if row is None:
        return None
    layout = row.layout
    words = ["cineray", "submit" if fleet.num_nodes > 1 else "render"]
    words += ["--manifest", "MANIFEST.jsonl" if asked.manifest is None else str(asked.manifest)]
    words += ["--model", "FOLDER" if asked.model in FROM_FOLDERS else asked.model, "--device", "cuda"]
    for name in ("width", "height", "frames", "steps", "guidance"):
        value = getattr(asked, name)
        words += [] if value is None else [f"--{name}", f"{value:g}"]
    words += [] if asked.cache == "none" else ["--cache", asked.cache]
    if layout.ring > 1 or "--layout" in render:
        words += [] if layout.ranks_per_gang == 1 else ["--layout", replace(layout, gangs=1).text]
    else:
        words += [] if layout.ulysses == 1 else ["--sp", str(layout.ulysses)]
        words += ["--cfg-parallel"] if layout.cfg > 1 else []
    words += [] if layout.gangs == 1 else ["--gangs", str(layout.gangs)]
    words += ["--vae-tiling"] if row.decode == "tiled" else []
    words += ["--decode", row.decode] if "--decode" in render and row.decode != "tiled" else []
    return shlex.join([*words, "--out", "OUT"])


def _content(asked: PlanArguments, fleet: Fleet, found: Plan, notes: list[str], line: str | None) -> dict[str, Any]:
    """As the contract of `--json` has it, and more."""
    price = fleet.usd_per_gpu_hour
    best = {"throughput": found.for_throughput, "first_clip": found.for_first_clip, "makespan": found.for_makespan}
    recommended = None
    if found.recommended is not None:
        recommended = found.recommended.content(price) | {"command": line}
    on_time = None
    if found.on_time is not None:
        on_time = found.on_time.row.content(price) | {
            "gangs": found.on_time.layout.gangs,
            "makespan_s": round(found.on_time.makespan_s, 1),
            "gpu_hours": round(found.on_time.gpu_hours, 4),
        }
    return {
        "forecast": True,
        "model": asked.model,
        "gpu": fleet.gpu.name,
        "num_gpus": fleet.num_gpus,
        "nodes": fleet.num_nodes,
        "assumptions": notes,
        "layouts": [row.content(price) for row in found.rows],
        "recommended": recommended,
        "best": {name: None if row is None else row.content(price) for name, row in best.items()}
        | {"deadline": on_time},
    }


def _does_not_fit(layout: str, found: Plan, fleet: Fleet) -> str:
    least = min(found.rows, key=lambda row: row.memory.total)
    return (
        f"--layout {layout} does not fit: it needs {least.memory.total / 1e9:.1f} GB on the fullest of its cards, "
        f"{fleet.gpu.title} has {fleet.gpu.memory_bytes / 1e9:.1f} GB; leave --layout away to see what fits"
    )


def _nothing_fits(found: Plan, fleet: Fleet) -> str:
    fitting = [row for row in found.rows if row.fits]
    if fitting:
        return "no layout that `cineray render` takes both fits and has known times; the table says why"
    least = min(found.rows, key=lambda row: row.memory.total)
    return (
        f"no layout fits: the smallest needs {least.memory.total / 1e9:.1f} GB on the fullest card, "
        f"{fleet.gpu.title} has {fleet.gpu.memory_bytes / 1e9:.1f} GB; take a larger --gpu or smaller clips"
    )
