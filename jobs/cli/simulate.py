"""`cineray simulate`: a batch in simulated time."""

import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cineray.jobs.cli.exit_codes import EXIT_DONE
from cineray.jobs.cli.options import json_option
from cineray.jobs.console.terminal import print_json, print_lines, print_table, tell
from cineray.jobs.simulate.assumptions import Assumptions

if TYPE_CHECKING:
    from cineray.jobs.simulate.assumptions import PlannedClip
    from cineray.jobs.simulate.ledger import Simulated

_DEFAULTS = {field.name: field.default for field in fields(Assumptions)}
SHOWN = 200  # steps of the bar: a bar that moves with each clip takes longer than the clip


class Speedups(click.ParamType):
    """`2=1.9,4=3.6`: gangs in the room of 2 and of 4 are so many times as fast."""

    name = "speedups"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> dict[int, float]:
        pairs = [part.strip().split("=") for part in str(value).split(",")]
        try:
            return {int(room): float(speedup) for room, speedup in pairs}
        except ValueError:
            self.fail(f"must be such as 2=1.9,4=3.6 (room in gangs = how much faster), got {value!r}.", param, ctx)


def _option(name: str, to: str, text: str, metavar: str = "S", kind: type = float):
    """An option that is a field of `Assumptions`, with that field's default."""
    default = _DEFAULTS.get(to)
    shown = default is not None
    return click.option(name, to, type=kind, default=default, show_default=shown, metavar=metavar, help=text)


@click.command()
@click.option("--num-gpus", type=int, required=True, metavar="N", help="GPUs in all.")
@click.option("--sp", type=int, default=1, show_default=True, metavar="N", help="Ranks that share one clip.")
@click.option("--cfg-parallel", is_flag=True, help="Twice as many ranks a gang, for both guidance branches.")
@click.option("--gangs", "num_gangs", type=int, metavar="N", help="[default: as many as the GPUs have room for]")
@_option("--gpus-per-node", "gpus_per_node", "A gang stays on one node.", "N", int)
@click.option("--finishers", "num_finishers", type=int, metavar="N", help="[default: 1 per 4 gangs, as of render]")
@click.option("--num-clips", type=int, metavar="N", help="Equal clips, each with a prompt of its own.")
@click.option(
    "--manifest", type=click.Path(path_type=Path), metavar="FILE|-", help="Clips instead; see docs/manifest.md."
)
@click.option("--clip-s", type=float, metavar="S", help="Seconds a gang denoises a clip of --steps steps.  [required]")
@click.option("--steps", type=int, default=50, show_default=True, metavar="N", help="Where a manifest's row has none.")
@click.option(
    "--encode-s", type=float, default=0.0, show_default=True, metavar="S", help="Seconds a finisher encodes a prompt."
)
@click.option(
    "--finish-s",
    type=float,
    default=0.0,
    show_default=True,
    metavar="S",
    help="Seconds a finisher decodes, writes and commits a clip.",
)
@_option("--start-up-s", "start_s", "Seconds a gang starts and loads its weights.")
@click.option("--finisher-start-up-s", "finisher_start_s", type=float, metavar="S", help="[default: as --start-up-s]")
@_option("--checkpoint-interval-s", "checkpoint_s", "Seconds between two saves of a clip's latents; inf for never.")
@_option("--save-s", "save_s", "Seconds a gang stands still for a save.")
@_option("--hang-timeout", "hang_s", "A gang whose step takes longer is killed.")
@_option("--spot-loss-per-gpu-hour", "spot_losses", "How often a GPU is taken, with its whole node.", "X")
@_option("--preempt-notice-s", "notice_s", "Seconds of notice before that; gangs preempt their clips.")
@_option("--replace-s", "replace_s", "Seconds until another node stands there.")
@_option("--straggler-share", "straggler_share", "Of nodes, 0 to 1.", "X")
@_option("--straggler-factor", "straggler_factor", "Stragglers are slower by so much.", "Y")
@click.option(
    "--elastic-tail",
    "larger",
    type=Speedups(),
    metavar="N=X,...",
    help="As --elastic-tail of render; a gang in the room of N gangs is X times as fast.",
)
@_option("--seed", "seed", "Of losses and stragglers.", "N", int)
@click.option("--plot", type=click.Path(path_type=Path), metavar="FILE.png|.svg", help="A picture; replaced.")
@json_option
def simulate(
    num_clips: int | None,
    manifest: Path | None,
    clip_s: float | None,
    steps: int,
    encode_s: float,
    finish_s: float,
    plot: Path | None,
    as_json: bool,
    sp: int,
    cfg_parallel: bool,
    finisher_start_s: float | None,
    larger: dict[int, float] | None,
    **assumed_of: float,
) -> int:
    """Runs a batch in simulated time: how long it takes and where the GPUs' time goes, losses included.

    The rules are those of `cineray render` on Ray, in the same code; how long things take is what you say. Nothing is
    rendered, no GPU and no Ray is needed, and no figure is measured. See docs/simulation.md.

    \b
    Examples:
      cineray simulate --num-gpus 1024 --sp 8 --num-clips 100000 --clip-s 300 --start-up-s 120
      cineray simulate --num-gpus 64 --sp 4 --manifest m.jsonl --clip-s 290 --finish-s 20 --json
      cineray simulate --num-gpus 256 --sp 8 --num-clips 10000 --clip-s 300 --start-up-s 120 \\
          --spot-loss-per-gpu-hour 0.05 --preempt-notice-s 120 --replace-s 300 --plot spot.png
    """
    from cineray.jobs.console.measure import progress_bar
    from cineray.jobs.out_file import check_out, replace_bytes
    from cineray.jobs.simulate.plot import draw, plot_format
    from cineray.jobs.simulate.shown import headline
    from cineray.jobs.simulate.world import SimulatedBatch

    file_format = None if plot is None else plot_format(plot)
    if plot is not None:
        check_out(plot, "simulate", "--plot")
    assumed = Assumptions(
        ranks_per_gang=sp * (2 if cfg_parallel else 1),
        finisher_start_s=assumed_of["start_s"] if finisher_start_s is None else finisher_start_s,
        larger=larger or {},
        **assumed_of,  # type: ignore[arg-type]  # by the names of its fields
    )
    number, planned = _clips(num_clips, manifest, clip_s, steps, encode_s, finish_s)
    began = time.perf_counter()
    with progress_bar("simulated clips", number) as on_done:
        every = max(1, number // SHOWN)
        batch = SimulatedBatch(assumed, planned, on_end=lambda ended: None if ended % every else on_done(ended))
        found = batch.run()
    took_s = time.perf_counter() - began
    said = headline(assumed, number, len(batch.state.finishers))
    if plot is not None and file_format is not None:
        replace_bytes(plot, draw(found, said, file_format), "simulate")
    _show(said, found)
    tell(f"{found.num_events:,} events simulated in {took_s:.1f} s")
    if as_json:
        given = {"num_clips": number, "clip_s": clip_s, "steps": steps, "encode_s": encode_s, "finish_s": finish_s}
        fleet = {"num_gangs": assumed.gangs, "num_finishers": len(batch.state.finishers)}
        print_json({"simulated": found.content(), "assumed": given | asdict(assumed) | fleet})
    return EXIT_DONE


def _clips(
    num_clips: int | None, manifest: Path | None, clip_s: float | None, steps: int, encode_s: float, finish_s: float
) -> "tuple[int, Iterator[PlannedClip]]":
    """(number of clips, the clips as a stream)."""
    from cineray.jobs.manifest.row import Row
    from cineray.jobs.simulate.assumptions import MAX_CLIPS, ClipSeconds
    from cineray.jobs.simulate.clips import equal_clips, planned_rows, read_manifest
    from cineray.pipeline.request import MAX_STEPS, InputError

    if (num_clips is None) == (manifest is None):
        raise InputError("simulate: give --num-clips N or --manifest FILE, one of them")
    if clip_s is None:
        raise InputError("simulate: give --clip-s, the seconds in which a gang denoises a clip")
    if not 1 <= steps <= MAX_STEPS:
        raise InputError(f"simulate: --steps must be 1 to {MAX_STEPS}, got {steps}")
    step_s = clip_s / steps
    seconds = ClipSeconds(num_steps=steps, step_s=step_s, encode_s=encode_s, finish_s=finish_s)
    if manifest is None:
        assert num_clips is not None
        if not 1 <= num_clips <= MAX_CLIPS:
            raise InputError(f"simulate: --num-clips must be 1 to {MAX_CLIPS}, got {num_clips}")
        return num_clips, equal_clips(num_clips, seconds)

    def seconds_of(row: Row) -> ClipSeconds:
        return seconds if row.steps is None else replace(seconds, num_steps=row.steps)

    notes: list[str] = []
    number, rows = read_manifest(manifest, notes.append)
    tell(*(f"cineray: {note}" for note in notes))
    return number, planned_rows(rows, seconds_of)


def _show(said: str, found: "Simulated") -> None:
    from rich.table import Table

    from cineray.jobs.simulate.shown import figures, uses

    print_lines(sys.stdout, said, "")
    table = Table("", "simulated", box=None)
    for what, figure in figures(found):
        table.add_row(what, figure)
    print_table(table)
    print_lines(sys.stdout, "")
    table = Table("GPU time", box=None)
    for column in ("hours, simulated", "share"):
        table.add_column(column, justify="right", no_wrap=True)
    for what, hours, share in uses(found):
        table.add_row(what, f"{hours:,.1f}", f"{share:.2%}")
    print_table(table)
    if found.aborted is not None:
        tell(f"cineray: the simulated run ends early: {found.aborted}")
