"""A plan as people read it: a table of layouts, what is best for what, where each number comes from."""

from __future__ import annotations

import csv
import io
import sys
import textwrap
from typing import TYPE_CHECKING

from cineray.jobs.console.terminal import print_lines, print_table, write
from cineray.text import printable

if TYPE_CHECKING:
    from cineray.jobs.planning.layouts import Fleet
    from cineray.jobs.planning.plan import Batch, Plan, Row

MAX_COLUMNS = 100
_LETTERS = "abcdefghijklmnopqrstuvwxyz"


def show_plan(found: Plan, fleet: Fleet, batch: Batch, notes: list[str], deadline_s: float | None) -> None:
    """Prints it to stdout, at most 100 columns wide."""
    from rich.table import Table

    nodes = "" if fleet.num_nodes == 1 else f" on {fleet.num_nodes} nodes"
    clips = f"{batch.num_clips} clips" if batch.is_counted else "a stream of clips"
    print_lines(sys.stdout, f"Forecast, not measured: {clips} on {fleet.num_gpus} x {fleet.gpu.title}{nodes}")
    for kind, count in batch.kinds[:5]:
        print_lines(sys.stdout, f"  {count if batch.is_counted else 'each'}: {printable(kind.text)}")
    if len(batch.kinds) > 5:
        print_lines(sys.stdout, f"  and {len(batch.kinds) - 5} other kinds of clips")
    sources = _sources(found)
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("layout", no_wrap=True)
    table.add_column("decode", no_wrap=True)
    for name in ("GB/card", "step s", "clip s", "clips/h"):
        table.add_column(name, justify="right", no_wrap=True)
    if batch.is_counted:
        table.add_column("batch", justify="right", no_wrap=True)
    table.add_column("GPU-h" if batch.is_counted else "GPU-h/clip", justify="right", no_wrap=True)
    if fleet.usd_per_gpu_hour is not None:
        table.add_column("USD", justify="right", no_wrap=True)
    table.add_column("from", no_wrap=True)
    for row in _one_a_layout(found):
        table.add_row(*_cells(row, fleet, batch, sources))
    print_table(table)
    _explain(found, fleet, sources, notes)
    _best(found, fleet, deadline_s)


def print_csv(found: Plan, fleet: Fleet) -> None:
    """Prints every row, nested fields with a dot."""
    rows = []
    for row in found.rows:
        content = row.content(fleet.usd_per_gpu_hour)
        memory = content.pop("memory_bytes")
        content |= {f"memory_bytes.{part}": size for part, size in memory.items()}
        content["sources"] = "; ".join(content["sources"])
        rows.append({"unknown": "", **content})
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write(sys.stdout, text.getvalue())


def _one_a_layout(found: Plan) -> list[Row]:
    """Each layout once, decoded where it is best: the rows come best first."""
    seen: dict[str, Row] = {}
    for row in sorted(found.rows, key=lambda r: not r.is_runnable):
        seen.setdefault(row.layout.text, row)
    chosen = {id(row) for row in seen.values()}
    return [row for row in found.rows if id(row) in chosen]


def _cells(row: Row, fleet: Fleet, batch: Batch, sources: dict[str, str]) -> list[str]:
    mark = "* " if row.is_pareto else "  "
    gang = "x".join(f"{a}{n}" for a, n in zip(("cfg", "ring", "ulysses"), _degrees(row), strict=True) if n > 1) or "1"
    cells = [f"{mark}{row.layout.gangs} x {gang}", row.decode, _memory(row)]
    known = row.forecasted
    if known is None:
        cells += ["", "", ""] + ([""] if batch.is_counted else []) + [""]
        cells += [""] if fleet.usd_per_gpu_hour is not None else []
        return [*cells, "unknown"]
    cells += [f"{known.step_s:.2f}", f"{known.clip_s:.1f}", f"{row.clips_per_hour:.2f}"]
    cells += [] if row.makespan_s is None else [duration(row.makespan_s)]
    cells.append(f"{row.gpu_hours:.2f}")
    if fleet.usd_per_gpu_hour is not None:
        cells.append(f"{(row.gpu_hours or 0) * fleet.usd_per_gpu_hour:.2f}")
    return [*cells, " ".join(sources[source] for source in known.sources) + ("" if row.is_runnable else " (no render)")]


def _degrees(row: Row) -> tuple[int, int, int]:
    return row.layout.cfg, row.layout.ring, row.layout.ulysses


def _memory(row: Row) -> str:
    return f"{row.memory.total / 1e9:.1f}{'' if row.fits else ' !'}"


def _sources(found: Plan) -> dict[str, str]:
    """source -> letter."""
    named = dict.fromkeys(s for row in found.rows if row.forecasted for s in row.forecasted.sources)
    return {source: _LETTERS[i % 26] for i, source in enumerate(named)}


def _explain(found: Plan, fleet: Fleet, sources: dict[str, str], notes: list[str]) -> None:
    lines = [f"{letter}   {source}" for source, letter in sources.items()]
    lines += [f"    {note}" for note in notes]
    if any(not row.fits for row in found.rows):
        lines.append(f"!   does not fit into {fleet.gpu.memory_bytes / 1e9:.1f} GB")
    if any(row.is_pareto for row in found.rows):
        lines.append("*   no other layout is better in clips per hour, first clip or batch and no worse in the others")
    if any(not row.is_runnable and row.forecasted for row in _one_a_layout(found)):
        lines.append("    (no render): `cineray render` does not take this layout yet")
    lines += list(dict.fromkeys(f"    unknown: {row.unknown}" for row in found.rows if row.unknown))[:3]
    print_lines(sys.stdout, *(part for line in lines for part in _wrapped(line, "    ")))


def _wrapped(line: str, indent: str = "  ") -> list[str]:
    """At most MAX_COLUMNS wide; the text's first columns stay."""
    return textwrap.wrap(printable(line), MAX_COLUMNS, subsequent_indent=indent, drop_whitespace=True) or [""]


def _best(found: Plan, fleet: Fleet, deadline_s: float | None) -> None:
    lines: list[str] = []
    if found.for_throughput:
        lines.append(f"most clips per hour: {_name(found.for_throughput)}, {found.for_throughput.clips_per_hour:.2f}")
    if found.for_first_clip and found.for_first_clip.forecasted:
        first_s = found.for_first_clip.forecasted.first_clip_s
        lines.append(f"first clip soonest: {_name(found.for_first_clip)}, after {duration(first_s)}")
    if found.for_makespan and found.for_makespan.makespan_s is not None:
        lines.append(
            f"batch done soonest: {_name(found.for_makespan)}, after {duration(found.for_makespan.makespan_s)}"
        )
    if deadline_s is not None:
        lines.append(_on_time(found, fleet, deadline_s))
    if found.recommended:
        m = found.recommended.memory
        parts = {"weights": m.weights, "step": m.activations, "cache": m.cache, "VAE": m.vae, "text": m.text_encoder}
        text = ", ".join(f"{name} {size / 1e9:.1f}" for name, size in parts.items() if size)
        lines.append(f"memory of {_name(found.recommended)}: {text}, in all {m.total / 1e9:.1f} GB with overheads")
    print_lines(sys.stdout, *(part for line in lines for part in _wrapped(line)))


def _on_time(found: Plan, fleet: Fleet, deadline_s: float) -> str:
    if found.on_time is None:
        return f"by the deadline of {duration(deadline_s)}: no layout is done"
    on_time = found.on_time
    cost = "" if fleet.usd_per_gpu_hour is None else f", USD {on_time.gpu_hours * fleet.usd_per_gpu_hour:.2f}"
    return (
        f"by the deadline of {duration(deadline_s)}: {on_time.layout.gangs} x {_gang(on_time.row)} on "
        f"{on_time.layout.world_size} GPUs, done after {duration(on_time.makespan_s)}, "
        f"{on_time.gpu_hours:.1f} GPU-hours{cost}"
    )


def _name(row: Row) -> str:
    return f"{row.layout.gangs} x {_gang(row)}"


def _gang(row: Row) -> str:
    cfg, ring, ulysses = _degrees(row)
    return "x".join(f"{a}{n}" for a, n in (("cfg", cfg), ("ring", ring), ("ulysses", ulysses)) if n > 1) or "1"


def duration(seconds: float) -> str:
    """`1 d 03:25:00`, `0:41:25`."""
    whole = round(seconds)
    days, rest = divmod(whole, 86400)
    clock = f"{rest // 3600}:{rest % 3600 // 60:02d}:{rest % 60:02d}"
    return f"{days} d {clock}" if days else clock
