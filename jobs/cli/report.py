"""The command that makes a page of what lies in a folder."""

from pathlib import Path

import click

from cineray.jobs.cli.exit_codes import EXIT_DONE
from cineray.jobs.cli.options import json_option
from cineray.jobs.console.terminal import print_json, tell


@click.command()
@click.argument("folder", type=click.Path(path_type=Path), metavar="DIR")
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    metavar="FILE.html",
    help="The page; replaced.  [default: DIR/report.html]",
)
@json_option
def report(folder: Path, out: Path | None, as_json: bool) -> int:
    """Makes one HTML page of a batch: its clips, what ran when, what the cache decided, what failed and why.

    Of the folder of a study it makes a page of its pictures, tables and rows.
    Reads the folder alone, while a driver runs or after. The page needs no network; its videos are the files in
    DIR, so keep it beside them, or where the relative path to them stays the same.

    \b
    Examples:
      cineray report out/demo
      cineray report /nfs/batch --out /nfs/pages/batch.html --json
      cineray report out/study
    """
    from cineray.jobs.console.measure import progress_bar
    from cineray.jobs.report.report import write_report

    written = write_report(folder, out, progress_bar)
    tell(*(f"cineray report: {remark}" for remark in written.page.remarks))
    what = "clips" if "clips" in written.page.facts else "rows"
    tell(f"{written.path}: {written.page.facts[what]} {what}, {written.num_bytes:,} bytes")
    if as_json:
        print_json({"page": str(written.path), "bytes": written.num_bytes} | written.page.facts)
    return EXIT_DONE
