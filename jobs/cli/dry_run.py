"""What `cineray render --dry-run` prints."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cineray.jobs.cli.clips import survey_requests
from cineray.jobs.cli.exit_codes import EXIT_BAD_INPUT, EXIT_DONE
from cineray.jobs.cli.options import ClipArguments
from cineray.jobs.cli.settle import settle
from cineray.jobs.console.terminal import print_json, print_lines, tell

if TYPE_CHECKING:
    from cineray.jobs.manifest.check import RunDefaults
    from cineray.jobs.run import RunPlan
    from cineray.jobs.survey import Remaining


def print_survey(
    asked: ClipArguments,
    plan: "RunPlan",
    defaults: "RunDefaults",
    price: float | None,
    studies: Sequence[Path],
    as_json: bool,
    adapted_share: float | None = None,
) -> int:
    """Says what a run would do; reads the output folder by its names, loads no weights, writes nothing.

    Args:
        price: of a GPU for an hour.
        studies: files of `cineray study`, for `--layout auto`.
        adapted_share: of the clips that `--audit-adapt` goes by: clips have the settings that it has given them.

    Returns:
        The exit code: 2 where rows are refused, as the run's would be.
    """
    from cineray.jobs.adapting import with_recorded_settings
    from cineray.jobs.idle_cache import WithoutIdleCaches
    from cineray.jobs.survey import by_plan, forecast, survey

    picks_layout = plan.options.picks_layout
    num_ranks = 1 if picks_layout else plan.options.layout.sequence_ranks
    requests, refused, num_refused = survey_requests(asked, defaults, plan.checkpoint, num_ranks, plan.outlook)
    requests = WithoutIdleCaches(requests)
    if adapted_share is not None:
        requests = with_recorded_settings(plan, requests, adapted_share)()
    found = survey(requests, refused, num_refused, plan.out, plan.checkpoint, plan.load_options, lossless=plan.lossless)
    tell(*(f"cineray: {line}" for line in found.refused))
    run, choice = plan.options, None
    if picks_layout:
        settled = settle(plan, requests, studies)
        run, choice = settled.options, settled.choice
    if choice is None:
        rest = forecast(found, plan.out, plan.load_options.device, run.layout, run.num_gangs, price)
    else:
        rest = by_plan(choice, price)
    counts = found.to_dict()
    demands = plan.outlook.demands()
    tell(*(f"cineray: {warning}" for warning in plan.outlook.warnings))
    if as_json:
        gpus = [{"place": d.place, "bytes": d.tensor_bytes, "parts": dict(d.parts)} for d in demands]
        print_json({**counts, "forecast": rest.to_dict(), **({"memory": gpus} if gpus else {})})
    else:
        said = ", ".join(f"{number} {status}" for status, number in counts.items())
        memory_lines = (f"memory, by forecast: {demand.text}" for demand in demands)
        print_lines(sys.stdout, f"{said}; nothing was rendered", *memory_lines, _time_left(rest))
    return EXIT_BAD_INPUT if found.num_refused else EXIT_DONE


def _time_left(rest: "Remaining") -> str:
    if rest.wall_s is None or rest.gpu_hours is None:
        return f"no forecast: {rest.source}"
    cost = "" if rest.cost is None else f", cost {rest.cost:g}"
    hours = f"{rest.wall_s / 3600:.2f} h" if rest.wall_s >= 600 else f"{rest.wall_s:.0f} s"
    return f"{hours}, {rest.gpu_hours:.2f} rank-hours{cost} ({rest.source})"
