"""`cineray plan --simulate`: the plan's best layouts in simulated time, with start-ups and losses."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import click

from cineray.jobs.console.terminal import print_lines, print_table
from cineray.pipeline.request import ClipRequest, InputError

if TYPE_CHECKING:
    from cineray.distributed.layout import Layout
    from cineray.jobs.planning.evidence import ClipKind, Evidence
    from cineray.jobs.planning.layouts import Fleet
    from cineray.jobs.planning.plan import Batch, Plan, Row
    from cineray.jobs.simulate.assumptions import Assumptions, PlannedClip
    from cineray.jobs.simulate.ledger import Simulated

_SECONDS = click.FloatRange(min=0)
_OPTIONS = [  # by the names of `Losses`
    click.option("--start-up-s", "start_s", type=_SECONDS, default=0.0, metavar="S", help="Of a gang, for --simulate."),
    click.option(
        "--spot-loss-per-gpu-hour",
        "spot_losses",
        type=_SECONDS,
        default=0.0,
        metavar="X",
        help="How often a GPU is taken, with its whole node, for --simulate.",
    ),
    click.option(
        "--preempt-notice-s", "notice_s", type=_SECONDS, default=0.0, metavar="S", help="Before that, for --simulate."
    ),
    click.option(
        "--replace-s", type=_SECONDS, default=0.0, metavar="S", help="Until another node is there, for --simulate."
    ),
    click.option("--elastic-tail", is_flag=True, help="Gangs grow at the end, as of render, for --simulate."),
]


@dataclass(frozen=True, kw_only=True, slots=True)
class Losses:
    """What a plan leaves out and a simulation has."""

    start_s: float = 0.0
    spot_losses: float = 0.0
    notice_s: float = 0.0
    replace_s: float = 0.0
    elastic_tail: bool = False

    def refuse_without_simulation(self) -> None:
        """
        Raises:
            InputError: something of it was given.
        """
        if self != Losses():
            raise InputError(
                "--start-up-s, --spot-loss-per-gpu-hour, --preempt-notice-s, --replace-s and --elastic-tail are "
                "about a simulated batch alone; give --simulate, too"
            )


def simulation_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Adds the options to a command, which receives them as its argument `losses`."""
    names = [field.name for field in fields(Losses)]

    @functools.wraps(command)
    def with_losses(*arguments: Any, **values: Any) -> Any:
        losses = Losses(**{name: values.pop(name) for name in names})
        return command(*arguments, losses=losses, **values)

    return functools.reduce(lambda wrapped, option: option(wrapped), reversed(_OPTIONS), with_losses)


@dataclass(frozen=True, kw_only=True, slots=True)
class SimulatedRow:
    """One row of the plan in simulated time."""

    row: Row
    assumed: Assumptions
    found: Simulated

    def content(self) -> dict[str, Any]:
        """For `--json`."""
        return {
            "layout": self.row.layout.text,
            "decode": self.row.decode,
            "assumed": asdict(self.assumed),
            "simulated": self.found.content(),
        }


def simulate_plan(
    found: Plan,
    fleet: Fleet,
    batch: Batch,
    evidence: Evidence,
    requests: Iterable[ClipRequest] | None,
    kind_of: Callable[[ClipRequest], ClipKind],
    layouts: Iterable[Layout],
    losses: Losses,
) -> list[SimulatedRow]:
    """The best row of each number of ranks, those that fit and can be run; in the plan's order.

    Args:
        requests: of a manifest, once for each row; None: equal clips.
        layouts: of the whole fleet, whatever fits.

    Raises:
        InputError: the clips are a stream without an end.
    """
    if not batch.is_counted:
        raise InputError("--simulate needs a batch with an end; give --manifest or --num-clips")
    rows: dict[int, Row] = {}
    for row in found.rows:
        if row.fits and row.is_runnable and row.forecasted is not None:
            rows.setdefault(row.layout.ranks_per_gang, row)
    gangs = [replace(layout, gangs=1) for layout in layouts]
    return [_simulated(row, fleet, batch, evidence, requests, kind_of, gangs, losses) for row in rows.values()]


def _simulated(
    row: Row,
    fleet: Fleet,
    batch: Batch,
    evidence: Evidence,
    requests: Iterable[ClipRequest] | None,
    kind_of: Callable[[ClipRequest], ClipKind],
    gangs: list[Layout],
    losses: Losses,
) -> SimulatedRow:
    from cineray.jobs.planning.choice import larger_gangs
    from cineray.jobs.planning.machines import Machines
    from cineray.jobs.simulate.assumptions import Assumptions
    from cineray.jobs.simulate.world import SimulatedBatch

    gang = replace(row.layout, gangs=1)
    speedups: Mapping[int, float] = {}
    if losses.elastic_tail:
        machines = Machines(device="cuda", card=fleet.gpu.name, places=(fleet.gpus_per_node,) * fleet.num_nodes)
        larger = larger_gangs(gang, machines, dict(batch.kinds), gangs, evidence)
        speedups = {larger_gang.num_gangs: larger_gang.speedup for larger_gang in larger}
    assumed = Assumptions(
        num_gpus=fleet.num_gpus,
        gpus_per_node=fleet.gpus_per_node,
        ranks_per_gang=gang.ranks_per_gang,
        num_gangs=row.layout.gangs,
        start_s=losses.start_s,
        finisher_start_s=losses.start_s,
        spot_losses=losses.spot_losses,
        notice_s=losses.notice_s,
        replace_s=losses.replace_s,
        larger=speedups,
    )
    clips = _clips(row, gang, batch, evidence, requests, kind_of)
    return SimulatedRow(row=row, assumed=assumed, found=SimulatedBatch(assumed, clips).run())


def _clips(
    row: Row,
    gang: Layout,
    batch: Batch,
    evidence: Evidence,
    requests: Iterable[ClipRequest] | None,
    kind_of: Callable[[ClipRequest], ClipKind],
) -> Iterator[PlannedClip]:
    """The batch with the plan's seconds: what a clip takes beside its steps is the finishers', or the gang's own."""
    from cineray.jobs.simulate.assumptions import ClipSeconds
    from cineray.jobs.simulate.clips import equal_clips, planned_requests

    @lru_cache(maxsize=1000)
    def seconds(kind: ClipKind) -> ClipSeconds:
        estimate = evidence.estimate(kind, gang, row.decode)
        beside_s = max(0.0, estimate.clip_s - kind.steps * estimate.step_s)
        at = {"begin_s": beside_s} if row.decode == "gang" else {"finish_s": beside_s}
        return ClipSeconds(num_steps=kind.steps, step_s=estimate.step_s, **at)

    if requests is not None:
        return planned_requests(requests, lambda request: seconds(kind_of(request)))
    ((kind, count),) = batch.kinds
    return equal_clips(count, seconds(kind))


def show_simulated(rows: list[SimulatedRow]) -> None:
    """A table whose every figure says that it is simulated."""
    from rich.table import Table

    from cineray.jobs.simulate.ledger import Use
    from cineray.jobs.simulate.shown import clips, duration

    print_lines(sys.stdout, "", "Simulated, not measured: the same rules as of a run on Ray, with the plan's seconds")
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("layout", no_wrap=True)
    for name in ("forecast", "simulated", "clips, simulated", "GPU-h lost", "idle tail", "nodes lost"):
        table.add_column(name, justify="right", no_wrap=True)
    for each in rows:
        found, gang = each.found, replace(each.row.layout, gangs=1)
        hours = sum(found.gpu_hours.values())
        table.add_row(
            f"{each.row.layout.gangs} x {gang.text}",
            "-" if each.row.makespan_s is None else duration(each.row.makespan_s),
            duration(found.makespan_s),
            ", ".join(f"{number:,} {status}" for status, number in clips(found)),
            f"{found.gpu_hours[Use.LOST]:,.1f}",
            f"{found.gpu_hours[Use.TAIL] / hours if hours else 0.0:.0%}",
            f"{found.num_nodes_lost:,}",
        )
    print_table(table)
    for each in rows:
        if each.found.aborted is not None:
            print_lines(sys.stdout, f"{each.row.layout.text}: the simulated run ends early: {each.found.aborted}")
    print_lines(sys.stdout, "")
