"""What `cineray render --dry-run` prints."""

import sys
from typing import TYPE_CHECKING

from cineray.jobs.cli.clips import survey_requests
from cineray.jobs.cli.exit_codes import EXIT_BAD_INPUT, EXIT_DONE
from cineray.jobs.cli.options import ClipArguments
from cineray.jobs.console.terminal import print_json, print_lines, tell

if TYPE_CHECKING:
    from cineray.jobs.manifest.check import RunDefaults
    from cineray.jobs.run import RunPlan


def print_survey(asked: ClipArguments, plan: "RunPlan", defaults: "RunDefaults", as_json: bool) -> int:
    """Says what a run would do; reads the output folder by its names, loads no weights, writes nothing.

    Returns:
        The exit code: 2 where rows are refused, as the run's would be.
    """
    from cineray.jobs.survey import survey

    num_ranks = plan.options.layout.sequence_ranks
    requests, refused, num_refused = survey_requests(asked, defaults, plan.checkpoint, num_ranks)
    found = survey(requests, refused, num_refused, plan.out, plan.checkpoint, plan.load_options, lossless=plan.lossless)
    tell(*(f"cineray: {line}" for line in found.refused))
    counts = found.to_dict()
    said = ", ".join(f"{number} {status}" for status, number in counts.items())
    if as_json:
        print_json(counts)
    else:
        print_lines(sys.stdout, f"{said}; nothing was rendered")
    return EXIT_BAD_INPUT if found.num_refused else EXIT_DONE
