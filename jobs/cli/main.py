"""The command line: what a person types, and what the process answers."""

import functools
import os
import sys
import traceback
from collections.abc import Iterable
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from cineray import __version__
from cineray.jobs.cli.batch import status, submit
from cineray.jobs.cli.clips import load_options, read_requests, run_defaults, takes_long_to_check
from cineray.jobs.cli.compare import compare
from cineray.jobs.cli.convert import convert
from cineray.jobs.cli.dry_run import print_survey
from cineray.jobs.cli.exit_codes import EXIT_BAD_INPUT, EXIT_DONE, EXIT_FAILED_CLIPS, EXIT_INTERRUPTED, EXIT_LEASED
from cineray.jobs.cli.measure import bench, calibrate, verify
from cineray.jobs.cli.options import ClipArguments, FolderPath, clip_options, json_option, run_options
from cineray.jobs.cli.plan import plan
from cineray.jobs.cli.report import report
from cineray.jobs.cli.settle import settle
from cineray.jobs.cli.simulate import simulate
from cineray.jobs.cli.study import study
from cineray.jobs.console.terminal import (
    UndeliveredError,
    begin_printing,
    print_json,
    print_lines,
    print_table,
    silence,
    tell,
)
from cineray.jobs.run_options import RunOptions
from cineray.jobs.stopping import Stopped, ending_on_signals

if TYPE_CHECKING:
    from cineray.pipeline.request import ClipRequest

_INTERRUPTED = "cineray: interrupted; finished clips are kept, run the same command again to resume"
TRACEBACK = "CINERAY_TRACEBACK"


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, message="%(prog)s %(version)s")
def cineray() -> None:
    """Renders batches of clips: videos with Wan and HunyuanVideo, pictures with FLUX.1 and DiT, sounds."""


@cineray.command()
@clip_options
@click.option("--out", type=FolderPath(), metavar="DIR", required=True, help="Folder for the clips.")
@click.option("--cache", default="none", show_default=True, metavar="SPEC", help="Cache policy; see docs/caching.md.")
@click.option("--fps", type=int, metavar="N", help="Frames per second of the MP4.  [default: the model's]")
@click.option("--lossless", is_flag=True, help="MP4s whose decoded RGB frames are exactly the rendered ones.")
@click.option("--format", "file_format", metavar="NAME", help="Of sounds: wav or flac.  [default: wav]")
@click.option(
    "--audit", type=float, metavar="SHARE", help="Render that share of the clips again uncached, and compare."
)
@click.option(
    "--audit-adapt", is_flag=True, help="And set the speed of the clips to come by it, where they have a floor."
)
@click.option("--dry-run", is_flag=True, help="Say what is done, new, changed and refused; render nothing.")
@click.option("--price", type=click.FloatRange(min=0), metavar="USD", help="Of a GPU for an hour, for --dry-run.")
@click.option(
    "--study",
    "studies",
    type=click.Path(path_type=Path),
    multiple=True,
    metavar="FILE",
    help="Of `cineray study`, for --layout auto and --elastic-tail; several times.",
)
@run_options
@json_option
def render(
    asked: ClipArguments,
    run: RunOptions,
    out: Path,
    cache: str,
    fps: int | None,
    lossless: bool,
    file_format: str | None,
    audit: float | None,
    audit_adapt: bool,
    dry_run: bool,
    price: float | None,
    studies: tuple[Path, ...],
    as_json: bool,
) -> int:
    """Renders clips from prompts or from a manifest.

    A clip that is in the output folder already is not rendered again: the same command continues an interrupted
    batch, also in the middle of a clip. With --sp, --gangs or --address the clips render on Ray; see docs/ray.md.

    \b
    Examples:
      cineray render "a red circle moving left on a navy background" --out out/first
      cineray render --manifest examples/demo.jsonl --out out/demo --steps 30 --json
      cineray render --manifest examples/demo.jsonl --out out/two --sp 2
      cineray render --manifest examples/demo.jsonl --out out/demo --steps 30 --dry-run
      cineray render --manifest m.jsonl --cache "auto(psnr>=40)" --audit 0.05 --audit-adapt --out out/m
      cineray render "a cat walks" --model wan2.1-t2v-1.3b --device cuda --offload model --out out/cat
      cineray render --manifest m.jsonl --model wan2.1-t2v-14b --address auto --sp 4 --gangs 2 --out /nfs/m
    """
    from cineray.jobs.adapting import check_adapting, render_adapting
    from cineray.jobs.audit import audit_run, check_share
    from cineray.jobs.idle_cache import WithoutIdleCaches
    from cineray.jobs.memory_check import memory_check
    from cineray.jobs.outlook import Outlook
    from cineray.jobs.output.lease import LeasedError
    from cineray.jobs.run import RunPlan, render_run
    from cineray.pipeline.loading.checkpoint import open_checkpoint

    checkpoint = open_checkpoint(asked.model).written_as(file_format)
    share = None if audit is None else check_share(audit, checkpoint)
    if audit_adapt:
        check_adapting(share, run)
    defaults = run_defaults(asked, checkpoint, cache, fps)
    options = load_options(asked, checkpoint, run.decode)
    run.check_goes_with(options)
    memory = None if run.picks_layout else memory_check(checkpoint, options, run)  # a choice looks itself
    outlook = Outlook(memory)
    plan = RunPlan(
        checkpoint=checkpoint, load_options=options, options=run, out=out, lossless=lossless, outlook=outlook
    )
    if dry_run:
        return print_survey(asked, plan, defaults, price, studies, as_json, share if audit_adapt else None)
    about = {"defaults": asdict(defaults)}
    num_ranks = 1 if run.picks_layout else run.layout.sequence_ranks

    @functools.cache
    def check() -> tuple[int, Iterable["ClipRequest"]]:
        num_clips, requests = read_requests(asked, defaults, checkpoint, num_ranks, plan.outlook)
        tell(*(f"cineray: {warning}" for warning in plan.outlook.warnings))
        return num_clips, WithoutIdleCaches(requests)

    try:
        if run.picks_layout or run.elastic_tail:
            num_clips, requests = check()
            settled = settle(plan, requests, studies)
            plan = replace(plan, options=settled.options, larger=settled.larger)
            about |= settled.about
            report = render_run(plan, lambda: (num_clips, settled.requests), False, about)
        elif audit_adapt and share is not None:
            report = render_adapting(plan, check, share, about)
        else:
            report = render_run(plan, check, takes_long_to_check(asked), about)
        if report.audit is not None:
            tell(report.audit.line)
        elif share is not None and report.has_ended:
            tell(audit_run(plan, lambda: check()[1], share, about).line)
    except LeasedError as error:
        tell(f"cineray: {error}")
        return EXIT_LEASED
    counts, content = report.results.counts, report.to_dict()
    said = ", ".join(f"{number} {status}" for status, number in counts.items()) or "no clip"
    busy = "" if report.gangs_busy is None else f", gangs busy {report.gangs_busy:.0%}"
    speed = f"{content['clips_per_hour']:.0f} clips per hour{busy}"
    tell(f"{said} in {report.wall_s:.1f} s ({speed}), in {out}")
    if as_json:
        report.results.print_json(content, sys.stdout)
    if report.abort_reason:
        tell(f"cineray: {report.abort_reason}; finished clips are kept")
        return EXIT_FAILED_CLIPS
    if report.stopped_by is not None:
        tell(_INTERRUPTED)
        return 128 + report.stopped_by
    if report.num_missing:
        tell(f"cineray: {report.num_missing} clips were asked for, and nothing became of them; finished clips are kept")
        return EXIT_FAILED_CLIPS
    return EXIT_FAILED_CLIPS if counts["failed"] or counts["quarantined"] else EXIT_DONE


@cineray.group(invoke_without_command=True)
@json_option
@click.pass_context
def models(context: click.Context, as_json: bool) -> int:
    """Lists what can be rendered by name, and what can be cached.

    \b
    Example:
      cineray models
      cineray models --json
    """
    if context.invoked_subcommand is not None:
        return EXIT_DONE
    from rich.table import Table

    from cineray.pipeline.adapters import KNOWN_MODELS, MODELS, PIPELINES
    from cineray.pipeline.adapters.cache_plan import policies_for

    if as_json:
        rows = [{"name": n, "source": k.source, "note": k.note} for n, k in KNOWN_MODELS.items()]
        cached = [
            {
                "transformer": model.transformer,
                "family": model.family,
                "pipelines": list(model.pipelines),
                "renders": [pipeline for pipeline in model.pipelines if pipeline in PIPELINES],
                "output": model.output.noun,
                "policies": policies_for(model),
            }
            for model in MODELS.values()
        ]
        print_json({"models": rows, "pipelines": PIPELINES, "cached": cached})
        return EXIT_DONE
    table = Table("name", "what", "where from", box=None)
    for name, known in KNOWN_MODELS.items():
        shipped = Path(known.source).is_absolute()
        table.add_row(name, known.note, "in the package" if shipped else known.source)
    print_table(table)
    fits = f"Any diffusers folder or hub id works whose pipeline is one of: {', '.join(PIPELINES)}."
    print_lines(sys.stdout, "", fits, "")
    table = Table(box=None)
    for column in ("pipeline or transformer", "renders", "policies for --cache and enable_cache"):
        table.add_column(column, no_wrap=column != "policies for --cache and enable_cache")
    for model in MODELS.values():
        for kind in model.pipelines or (model.transformer,):
            renders = "-" if kind not in PIPELINES else model.output.noun
            table.add_row(f"{kind} ({model.family})", renders, ", ".join(policies_for(model)))
    print_table(table)
    own = "What is not rendered here is cached in your own Python, cineray.enable_cache(pipe, policy): docs/models.md."
    print_lines(sys.stdout, "", own)
    return EXIT_DONE


models.add_command(convert)
for command in (status, report, compare, submit, calibrate, bench, verify, study, plan, simulate):
    cineray.add_command(command)


def run(arguments: list[str] | None = None) -> None:
    """Runs the command line and ends the process: 0 done, 1 some clips failed, 2 bad input, 130 interrupted."""
    begin_printing()
    try:
        with ending_on_signals():
            code = main(sys.argv[1:] if arguments is None else arguments)
    except KeyboardInterrupt as again:  # while the first one was being told
        code = _interrupted(again)
    except Exception as error:  # noqa: BLE001  # the top of the process
        code = _unexpected(error)
    for stream in filter(None, (sys.stdout, sys.stderr)):
        try:
            stream.flush()
        except OSError:
            silence(stream)  # or Python ends with a traceback of its own
    sys.exit(code)


def main(arguments: list[str]) -> int:
    """Runs one command in this process and returns its exit code; what a person is told goes to stdout and stderr.

    Signals stay as they are, and an error that no part of cineray has a sentence for is raised: `run` sees to both.
    """
    try:
        code = cineray.main(arguments, prog_name="cineray", standalone_mode=False)
        return code if isinstance(code, int) else EXIT_DONE
    except click.ClickException as error:
        context = error.ctx if isinstance(error, click.UsageError) else None
        command = context.command_path if context else "cineray"
        tell(f"{command}: {error.format_message()} See: {command} --help")
        return EXIT_BAD_INPUT
    except click.Abort as abort:
        return _interrupted(abort.__cause__ or abort)
    except KeyboardInterrupt as interrupt:
        return _interrupted(interrupt)
    except UndeliveredError as error:
        tell(f"cineray: {error}; what was done is kept")
        return EXIT_BAD_INPUT
    except OSError as error:
        if error.filename is None:
            raise
        tell(f"cineray: {error.strerror}: {os.fsdecode(error.filename)}")  # no permission, too long a name
        return EXIT_BAD_INPUT
    except ValueError as error:
        from cineray.pipeline.finite import NotFiniteError
        from cineray.pipeline.request import InputError

        if not isinstance(error, InputError | NotFiniteError):
            raise
        tell(*(f"cineray: {line}" for line in error.lines))
        return EXIT_BAD_INPUT


def _interrupted(reason: BaseException) -> int:
    tell(_INTERRUPTED)
    return 128 + reason.number if isinstance(reason, Stopped) else EXIT_INTERRUPTED


def _unexpected(error: Exception) -> int:
    """An error that no part of cineray has a sentence for: one line, and more for who asks."""
    if os.environ.get(TRACEBACK):
        traceback.print_exception(error)
    else:
        said = " ".join(f"{type(error).__name__}: {error}".split())
        tell(f"cineray: unexpected error: {said}; {TRACEBACK}=1 shows where; finished clips are kept")
    return EXIT_FAILED_CLIPS
