"""The command `study`: from what was typed to timed clips, tables, pictures and a file for `cineray plan`."""

from __future__ import annotations

from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cineray.jobs.cli.clips import load_options, read_requests, run_defaults
from cineray.jobs.cli.exit_codes import EXIT_DONE, EXIT_FAILED_CLIPS
from cineray.jobs.cli.options import ClipArguments, FolderPath, json_option, models_options
from cineray.jobs.console.terminal import print_json, print_table, tell

if TYPE_CHECKING:  # torch and matplotlib take seconds to import; `--help` should not wait for them
    from cineray.jobs.measure.study import StudyPlan
    from cineray.jobs.measure.study_rows import TimedClip
    from cineray.jobs.measure.study_tables import Measured


@click.command()
@models_options
@click.option(
    "--layouts",
    default="1,2",
    show_default=True,
    metavar="LIST",
    help="As 1,2,4,cfg2,gangs2; a number means ulysses, gangs2 two clips at a time.",
)
@click.option(
    "--cache",
    "caches",
    multiple=True,
    default=("none",),
    show_default=True,
    metavar="SPEC",
    help="Once for each policy; {model} in it stands for each model's name, as in smoothcache:{model}.json.",
)
@click.option("--num-clips", type=int, default=1, show_default=True, metavar="K", help="The first K clips are timed.")
@click.option("--repeats", type=int, default=2, show_default=True, metavar="R", help="Of each clip on each layout.")
@click.option("--price", type=float, metavar="USD", help="Of a rank and hour: adds the cost of a clip.")
@click.option("--out", type=FolderPath(), required=True, metavar="DIR", help="Folder for rows, tables and pictures.")
@json_option
def study(
    asked: tuple[ClipArguments, ...],
    layouts: str,
    caches: tuple[str, ...],
    num_clips: int,
    repeats: int,
    price: float | None,
    out: Path,
    as_json: bool,
) -> int:
    """Times the same clips on several layouts, models and caches, on the ranks of this machine.

    Each row is kept when it is measured, and the same command goes on; layouts, caches, models and repeats may be
    added. Writes study.md (tables), study.csv (rows), pictures as .png and .svg, and study.json, which
    `cineray plan --study` reads. Nothing else should run meanwhile. See docs/scaling.md.

    \b
    Examples:
      cineray study "a red circle moving left on a navy background" --cache none --cache dicache --out out/study
      cineray study --manifest m.jsonl --model wan2.1-t2v-14b --device cuda --layouts 1,2,4,8 --price 2.5 --out out/h100
    """
    from cineray.jobs.measure.local_ranks import RankFailed
    from cineray.jobs.measure.study import check_plan, run_study

    plan = _plan(asked, layouts, caches, num_clips, repeats, price)
    check_plan(plan)
    try:
        rows = run_study(plan, out)
    except RankFailed as error:
        tell(f"cineray study: {error}", "cineray study: the rows before are kept; the same command goes on")
        return EXIT_FAILED_CLIPS
    found = _measured(plan, rows, price)
    files = _write(found, rows, out)
    _show(found)
    tell(f"{len(rows)} rows in {out}: {', '.join(files)}")
    if as_json:
        print_json(_content(found, out, files))
    return EXIT_DONE


def _plan(
    asked: tuple[ClipArguments, ...],
    layouts: str,
    caches: tuple[str, ...],
    num_clips: int,
    repeats: int,
    price: float | None,
) -> StudyPlan:
    """Everything that was typed, checked as far as one model's clips go.

    Raises:
        InputError: no clips, bad clips, or a number that cannot be.
    """
    from cineray.jobs.measure.study import StudyPlan, cache_of, parse_layouts, take_sample
    from cineray.pipeline.loading.checkpoint import open_checkpoint
    from cineray.pipeline.request import InputError

    if price is not None and not 0 <= price <= 1e6:
        raise InputError(f"study: --price must be 0 to 1000000, got {price:g}")
    if len(asked) > 1 and asked[0].manifest == Path("-"):
        raise InputError("study: standard input can be read for one --model only; give the manifest as a file")
    wanted = parse_layouts(layouts)
    most = max(layout.sequence_ranks for layout in wanted)
    samples = []
    for clips in asked:
        checkpoint = open_checkpoint(clips.model)
        requests = []
        for cache in caches[-1:] if clips.manifest == Path("-") else caches:  # a schedule may be of other steps
            defaults = run_defaults(clips, checkpoint, cache_of(cache, checkpoint.name), None)
            _, checked = read_requests(clips, defaults, checkpoint, most)
            requests = list(checked)
        samples.append(take_sample(checkpoint, load_options(clips, checkpoint), requests, num_clips))
    return StudyPlan(samples=tuple(samples), layouts=wanted, caches=caches, repeats=repeats)


def _measured(plan: StudyPlan, rows: list[TimedClip], price: float | None) -> Measured:
    from cineray.jobs.measure.study import studied_clips, where
    from cineray.jobs.measure.study_law import study_of
    from cineray.jobs.measure.study_rows import cells_of, full_cells
    from cineray.jobs.measure.study_tables import Measured

    clips = {sample.checkpoint.name: studied_clips(sample) for sample in plan.samples}
    cells = cells_of(rows)
    return Measured(
        cells=cells,
        where=where(plan.samples[0]),
        num_units=next(iter(clips.values())).num_units,
        sizes={sample.checkpoint.name: sample.size for sample in plan.samples},
        study=study_of(full_cells(cells), clips, f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}"),
        price=price,
    )


def _write(found: Measured, rows: list[TimedClip], out: Path) -> list[str]:
    """Writes all files, each in one step; their names.

    Raises:
        InputError: one cannot be written.
    """
    from cineray.jobs.measure.study_log import COMMAND
    from cineray.jobs.measure.study_plots import draw_all
    from cineray.jobs.measure.study_rows import csv_text
    from cineray.jobs.measure.study_tables import markdown
    from cineray.jobs.out_file import replace_bytes

    files = {"study.md": markdown(found).encode(), "study.csv": csv_text(rows).encode(), **draw_all(found)}
    if found.study is not None:
        files["study.json"] = (found.study.model_dump_json(indent=1) + "\n").encode()
    else:
        (out / "study.json").unlink(missing_ok=True)  # of fewer layouts than before
        tell("study.json is left out: a law needs two numbers of ranks that run side by side")
    for name, content in files.items():
        replace_bytes(out / name, content, COMMAND)
    return list(files)


def _show(found: Measured) -> None:
    from rich.table import Table

    from cineray.jobs.measure.study_rows import cache_gain, efficiency

    table = Table("model", "layout", "s per clip", "clips per hour", "efficiency", "cache gain", box=None)
    table.add_column("cache", overflow="fold")
    for cell in found.full:
        share, gain = efficiency(cell, found.full), cache_gain(cell, found.full)
        table.add_row(
            cell.model,
            cell.layout.text,
            f"{cell.clip_s:.3g}",
            f"{cell.clips_per_hour:,.0f}",
            "" if share is None else f"{share:.0%}",
            "" if gain is None else f"{gain:.2f}x",
            cell.cache,
        )
    print_table(table)


def _content(found: Measured, out: Path, files: list[str]) -> dict[str, Any]:
    """For `--json`: every cell, and what was written."""
    from cineray.jobs.measure.study_rows import cache_gain, efficiency

    def content(cell: Any) -> dict[str, Any]:
        return asdict(cell) | {
            "layout": cell.layout.text,
            "ranks": cell.ranks,
            "clips_per_hour": cell.clips_per_hour,
            "efficiency": efficiency(cell, found.full),
            "cache_gain": cache_gain(cell, found.full),
            "usd_per_clip": None if found.price is None else cell.cost(found.price),
        }

    laws = [] if found.study is None else [fit.model_dump(exclude={"rows"}) for fit in found.study.fits]
    return {
        "measured_on": found.where,
        "out": str(out),
        "files": files,
        "cells": [content(cell) for cell in found.full],
        "laws": laws,
    }
