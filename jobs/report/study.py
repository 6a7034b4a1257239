"""The page of a study: its pictures, its tables, and every row that was measured."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cineray.files import parse_json, read_regular
from cineray.jobs.report.page import Page, ProgressBar, fill_page
from cineray.pipeline.request import InputError

ROWS_FILE = "rows.jsonl"  # of `cineray study`: a folder that has one, and no run.json, is a study's
TABLES_FILE = "study.md"
PICTURES = {
    "latency": "Seconds of a clip against ranks",
    "throughput": "Clips per hour against ranks",
    "stages": "Where a rank's seconds go",
    "cache_gain": "What a cache gains on more ranks",
}
MAX_PICTURE_BYTES = 600_000  # four of them, a third larger as text, leave a page below 4 MB; one has some 50 kB
MAX_TABLES_BYTES = 4 * 2**20
MAX_ROWS_BYTES = 64 * 2**20
MAX_ROWS = 5_000  # on the page; the rest is named and left out


@dataclass(frozen=True, slots=True)
class Block:
    """A part of the tables' file.

    Args:
        kind: "heading", "text" or "table".
        lines: its text, or the table's rows, the head first.
    """

    kind: str
    lines: tuple[Any, ...]


def is_study(folder: Path) -> bool:
    return (folder / ROWS_FILE).is_file() and not (folder / "run.json").exists()


def study_page(folder: Path, _out: Path, progress_bar: ProgressBar) -> Page:
    """Reads a study's folder and changes nothing in it.

    Raises:
        InputError: its rows cannot be read, or there are none.
    """
    columns, rows = _rows(folder / ROWS_FILE)
    if not rows:
        raise InputError(f"report: {folder / ROWS_FILE} has no row yet; let `cineray study` measure some")
    remarks: list[str] = []
    blocks = _blocks(folder / TABLES_FILE, remarks)
    # before the first heading stands where it was measured, and of which clips
    num_before = next((n for n, block in enumerate(blocks) if block.kind != "text"), len(blocks))
    pictures = []
    with progress_bar("pictures", len(PICTURES)) as on_done:
        for number, (name, title) in enumerate(PICTURES.items()):
            on_done(number)
            if source := _picture(folder, name):
                pictures.append({"title": title, "source": source})
        on_done(len(PICTURES))
    if len(rows) > MAX_ROWS:
        remarks.append(f"{len(rows) - MAX_ROWS} rows are left out; all are in {ROWS_FILE}")
    models = list(dict.fromkeys(row[columns.index("model")] for row in rows)) if "model" in columns else []
    tiles = [("rows", f"{len(rows):,}")]
    for name in ("model", "cache", "layout"):
        if name in columns:
            tiles.append((f"{name}s", str(len({row[columns.index(name)] for row in rows}))))
    values = {
        "title": f"{folder.resolve().name} - study",
        "name": folder.resolve().name,
        "summary": [line for block in blocks[:num_before] for line in block.lines],
        "tiles": tiles,
        "remarks": remarks,
        "pictures": pictures,
        "blocks": blocks[num_before:],
        "columns": columns,
        "num_rows": len(rows),
    }
    shown = [[_shown(value) for value in row] for row in rows[:MAX_ROWS]]
    html = fill_page("study.html", "study.js", values, {"columns": columns, "rows": shown})
    return Page(html=html, facts={"rows": len(rows), "models": models}, remarks=tuple(remarks))


def _rows(path: Path) -> tuple[list[str], list[list[Any]]]:
    """(names of columns, rows): of whole lines; torn ones and setups are no rows."""
    try:
        lines = read_regular(path, MAX_ROWS_BYTES, follow_links=False).split(b"\n")
    except OSError as error:
        raise InputError(f"report: {path} cannot be read: {error.strerror}") from None
    found = []
    for line in lines:
        try:
            content = parse_json(line)
        except ValueError:
            continue
        if isinstance(content, dict) and isinstance(content.get("row"), dict):
            found.append(content["row"])
    columns = list(dict.fromkeys(name for row in found for name in row))
    return columns, [[row.get(name) for name in columns] for row in found]


def _shown(value: Any) -> str | float | None:
    """A cell: numbers as numbers, which sort; all else as text."""
    if value is None or (isinstance(value, int | float) and not isinstance(value, bool)):
        return value
    return str(value)


def _blocks(path: Path, remarks: list[str]) -> list[Block]:
    try:
        text = read_regular(path, MAX_TABLES_BYTES, follow_links=False).decode("utf-8", "replace")
    except OSError:
        remarks.append("The tables and pictures are not there yet: a study writes them at its end; these are its rows.")
        return []
    return list(read_blocks(text))


def read_blocks(text: str) -> Iterator[Block]:
    """The parts of `study.md`, which has headings, paragraphs and tables alone; the title is left out."""
    for part in text.split("\n\n"):
        lines = part.strip("\n").split("\n")  # no other line end: a name may have one
        if not lines[0] or lines[0].startswith("# "):
            continue
        if lines[0].startswith("## "):
            yield Block("heading", (lines[0].removeprefix("## "),))
        elif all(line.startswith("|") for line in lines):
            cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
            yield Block(
                "table", tuple(row for row in cells if not all(set(cell) <= set("-: ") and cell for cell in row))
            )
        else:
            yield Block("text", tuple(line.removeprefix("- ") for line in lines))


def _picture(folder: Path, name: str) -> str | None:
    """A picture as a URL that holds it; None where there is none."""
    for suffix, kind in ((".svg", "image/svg+xml"), (".png", "image/png")):
        try:
            content = read_regular(folder / f"{name}{suffix}", MAX_PICTURE_BYTES, follow_links=False)
        except OSError:
            continue
        return f"data:{kind};base64,{base64.b64encode(content).decode()}"
    return None
