"""The rows of `cineray bench quality` as files: CSV, Markdown, and quality against time as PNG and SVG."""

import csv
import re
from collections.abc import Sequence
from io import BytesIO, StringIO

from cineray.jobs.measure import peers
from cineray.jobs.measure.quality import QualityRow
from cineray.jobs.measure.study_plots import COLOURS, DPI, FORMATS, MARKERS

_NUMBER = re.compile(r"[-+]?[\d.]+(e[-+]?\d+)?")
_COLUMNS = (
    *("policy", "num_clips", "speedup", "wall_ratio", "cpu_ratio", "num_timed"),
    *("psnr_db", "psnr_ci95", "worst_psnr_db", "ssim", "vmaf", "xpsnr_db", "motion_psnr_db", "best", "text"),
)


def best_rows(rows: Sequence[QualityRow]) -> set[str]:
    """Policies that no other beats in both mean PSNR and cost: the Pareto front. Cost is time where it was measured."""

    def cost(row: QualityRow) -> float:
        return row.cpu_ratio if has_times and row.cpu_ratio is not None else row.cost

    has_times = all(row.cpu_ratio is not None for row in rows)
    beaten = {
        row.policy
        for row in rows
        for other in rows
        if cost(other) <= cost(row)
        and other.psnr_db >= row.psnr_db
        and (cost(other), other.psnr_db) != (cost(row), row.psnr_db)
    }
    return {row.policy for row in rows} - beaten


def files_of(rows: Sequence[QualityRow], title: str) -> dict[str, bytes]:
    """Every file's content by its name."""
    pictures = {f"quality.{kind}": _draw(rows, title, kind) for kind in FORMATS}
    return {"quality.csv": _csv(rows).encode(), "quality.md": markdown(rows, title).encode(), **pictures}


def _csv(rows: Sequence[QualityRow]) -> str:
    content, best = StringIO(), best_rows(rows)
    writer = csv.writer(content, lineterminator="\n")
    writer.writerow(_COLUMNS)
    for row in rows:
        low, high = row.psnr_ci95 or ("", "")
        values = {"psnr_ci95": f"{low}:{high}" if row.psnr_ci95 else "", "best": row.policy in best}
        writer.writerow([values[name] if name in values else getattr(row, name) for name in _COLUMNS])
    return content.getvalue()


def markdown(rows: Sequence[QualityRow], title: str) -> str:
    """Sorted by speed-up; the Pareto front in bold, rivals before cineray's own where they are as fast."""
    best = best_rows(rows)
    lines = [
        f"{title}; **bold**: no other row is both faster and better",
        "",
        "| policy | clips | speed-up by blocks | by CPU time | by wall time | PSNR dB, mean [95 %] | worst | SSIM | "
        "VMAF | XPSNR dB | frame to frame, dB |",
        f"|{'---|' * 11}",
    ]
    for row in sorted(rows, key=lambda row: (round(row.speedup, 1), not peers.is_peer(row.policy), -row.psnr_db)):
        mark = "**" if row.policy in best else ""
        interval = "" if row.psnr_ci95 is None else f" [{row.psnr_ci95[0]:.1f}, {row.psnr_ci95[1]:.1f}]"
        lines.append(
            f"| {mark}{row.policy}{mark} | {row.num_clips} | {row.speedup:.2f}x | {_times(row.cpu_ratio)} | "
            f"{_times(row.wall_ratio)} | {row.psnr_db:.1f}{interval} | {row.worst_psnr_db:.1f} | {row.ssim:.4f} | "
            f"{_shown(row.vmaf)} | {_shown(row.xpsnr_db)} | {_shown(row.motion_psnr_db)} |"
        )
    return "\n".join(lines) + "\n"


def _times(ratio: float | None) -> str:
    return f"{1 / ratio:.2f}x" if ratio else ""


def _shown(score: float | None) -> str:
    return "" if score is None else f"{score:.1f}"


def _family(policy: str) -> str:
    """A policy and its options less their numbers: what makes one line."""
    name, _, options = policy.rstrip(")").partition("(")
    kept = [option for option in options.split(",") if option and not _NUMBER.fullmatch(option.rpartition("=")[2])]
    return f"{name}({','.join(kept)})" if kept else name


def _draw(rows: Sequence[QualityRow], title: str, kind: str) -> bytes:
    from matplotlib import rc_context  # takes half a second
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 4.6), layout="constrained")
    axes = figure.subplots()
    families = list(dict.fromkeys(_family(row.policy) for row in rows))
    for number, family in enumerate(families):
        own = sorted((r for r in rows if _family(r.policy) == family), key=lambda r: r.speedup)
        x = [1 / (row.cpu_ratio or row.cost) for row in own]
        y = [row.psnr_db for row in own]
        spread = [row.psnr_ci95 or (row.psnr_db, row.psnr_db) for row in own]
        errors = [[max(0, v - low) for v, (low, _) in zip(y, spread, strict=True)]]
        errors.append([max(0, high - v) for v, (_, high) in zip(y, spread, strict=True)])
        axes.errorbar(
            x,
            y,
            yerr=errors,
            label=family,
            markersize=4,
            linewidth=1,
            capsize=2,
            linestyle="--" if peers.is_peer(family) else "-",
            color=COLOURS[number % len(COLOURS)],
            marker=MARKERS[(number + number // len(COLOURS)) % len(MARKERS)],  # another one where colours come again
        )
    axes.set_xlabel("speed-up of denoising, by CPU time where it was measured, else by blocks")
    axes.set_ylabel("PSNR against the uncached clip, dB, mean")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=7)
    figure.suptitle(title, fontsize=9)
    content = BytesIO()
    with rc_context({"svg.hashsalt": "cineray"}):  # the same rows give the same file
        figure.savefig(
            content, format=kind, dpi=DPI, metadata={"Title": title} | ({"Date": None} if kind == "svg" else {})
        )
    return content.getvalue()
