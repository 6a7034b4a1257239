"""Holds `cineray plan`'s law of a clip's time against what was published, and writes the tables of docs/scaling.md.

    python scripts/planner_truth.py            # print them
    python scripts/planner_truth.py --write    # put them into docs/scaling.md, between its two marks

No GPU, no network: the published seconds are in jobs/planning/data/anchors.json.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from pathlib import Path

from cineray.jobs.planning import truth
from cineray.jobs.planning.anchors import LawOf, published
from cineray.jobs.planning.cost_model import SERIAL_SHARE
from cineray.jobs.planning.exchange import WorkOf
from cineray.jobs.planning.truth import Checked, Miss
from cineray.pipeline.footprint.forecast import forecast

PAGE = Path(__file__).resolve().parents[1] / "docs" / "scaling.md"
BEGIN, END = "<!-- scripts/planner_truth.py writes from here -->", "<!-- to here -->"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="into docs/scaling.md")
    text = report()
    if not parser.parse_args().write:
        print(text)
        return
    page = PAGE.read_text(encoding="utf-8")
    before, rest = page.split(BEGIN)
    _, after = rest.split(END)
    PAGE.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}", encoding="utf-8")


def report() -> str:
    """All tables as Markdown."""
    law_of = LawOf(WorkOf(forecast))
    tables = published().tables
    checked = truth.check(tables, law_of)
    by_id = {table.id: table for table in tables}
    cached = truth.cached_from(by_id["precisecache-base"], by_id["precisecache-cached"], law_of)
    fitted = truth.fit_serial_share(truth.undoubted(truth.scaling_tables(tables)), law_of)
    return "\n".join(
        [
            *_errors(checked),
            "",
            *_summary(checked),
            "",
            f"The serial share fitted to all tables without (doubt) is {fitted:.4f}; the code has {SERIAL_SHARE}.",
            f"PreciseCache's cached table from its uncached one and its share of steps: {_list(cached)}.",
            "",
            *_pairs(tables, law_of),
            "",
            *_makespans(by_id),
        ]
    )


def _errors(checked: Iterable[Checked]) -> list[str]:
    lines = [
        "| table (source) | left out | from both ends | from the smallest alone | most clips per hour |",
        "|---|---|---|---|---|",
    ]
    for c in checked:
        doubt = " (doubt)" if c.table.doubt else ""
        says = f"{c.published_best}" + (
            "" if c.published_best == c.predicted_best else f", law says {c.predicted_best}"
        )
        lines.append(
            f"| {c.table.title}{doubt} ({c.table.source}, {c.table.published or 'no date'}) | {_list(c.left_out)} "
            f"| {_list(c.from_ends)} | {_list(c.from_one)} | {says} |"
        )
    return lines


def _summary(checked: Sequence[Checked]) -> list[str]:
    lines = ["| | left out | from both ends | from the smallest alone | best gang named |", "|---|---|---|---|---|"]
    for name, rows in (("without doubt", [c for c in checked if not c.table.doubt]), ("all", list(checked))):
        cells = [f"{name}, {len(rows)} tables"]
        for column in ("left_out", "from_ends", "from_one"):
            misses: list[Miss] = [miss for row in rows for miss in getattr(row, column)]
            cells.append(f"median {truth.median(misses):.1%}, worst {truth.worst(misses):.1%} of {len(misses)}")
        cells.append(f"{sum(c.published_best == c.predicted_best for c in rows)} of {len(rows)}")
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def _pairs(tables, law_of: LawOf) -> list[str]:
    lines = ["| one card and one larger gang | from the one card |", "|---|---|"]
    for table in truth.pairs(tables):
        misses = truth.single_cell(table, law_of, SERIAL_SHARE)
        lines.append(f"| {table.title} ({table.source}, {table.published or 'no date'}) | {_list(misses)} |")
    return lines


def _makespans(by_id) -> list[str]:
    wan, hunyuan = by_id["wan-t2v-14b-h100"], by_id["hunyuan-h100"]
    lines = ["| 8 H100, clips | 8 x 1 | 4 x 2 | 2 x 4 | 1 x 8 |", "|---|---|---|---|---|"]
    for name, table, count in (("Wan 14B 720p", wan, 10), ("Wan 14B 720p", wan, 20), ("HunyuanVideo", hunyuan, 10)):
        seconds = [f"{truth.node_makespan_s(table, count, ranks):.0f} s" for ranks in (1, 2, 4, 8)]
        lines.append(f"| {count} of {name} | " + " | ".join(seconds) + " |")
    return lines


def _list(misses: Iterable[Miss]) -> str:
    return ", ".join(f"{miss.cell.layout.text} {miss.error:+.1%}" for miss in misses)


if __name__ == "__main__":
    main()
