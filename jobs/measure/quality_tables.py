"""The rows of `cineray bench quality` as files: CSV, Markdown, and quality against time as PNG and SVG."""

import csv
import re
from collections.abc import Sequence
from io import BytesIO, StringIO

from cineray.jobs.measure import peers
from cineray.jobs.measure.quality import QualityRow
from cineray.jobs.measure.study_plots import COLOURS, DPI, FORMATS, MARKERS

_NUMBER = re.compile(r"[-+]?[\d.]+(e[-+]?\d+)?")
_RUN = ("policy", "num_clips", "speedup", "wall_ratio", "cpu_ratio", "num_timed")
_OF_FRAMES = ("psnr_db", "psnr_ci95", "worst_psnr_db", "ssim", "vmaf", "xpsnr_db", "motion_psnr_db")
_OF_SOUNDS = ("snr_db", "snr_ci95", "worst_snr_db", "log_stft_db", "stft_convergence")
_FRAME_HEADS = ("PSNR dB, mean [95 %]", "worst", "SSIM", "VMAF", "XPSNR dB", "frame to frame, dB")
_SOUND_HEADS = ("SNR dB, mean [95 %]", "worst", "log STFT, dB apart", "spectral convergence")


def best_rows(rows: Sequence[QualityRow]) -> set[str]:
    """Policies that no other beats in both what they keep and cost: the Pareto front. Cost is time where it was
    measured."""

    def cost(row: QualityRow) -> float:
        return row.cpu_ratio if has_times and row.cpu_ratio is not None else row.cost

    has_times = all(row.cpu_ratio is not None for row in rows)
    beaten = {
        row.policy
        for row in rows
        for other in rows
        if cost(other) <= cost(row)
        and other.kept_db >= row.kept_db
        and (cost(other), other.kept_db) != (cost(row), row.kept_db)
    }
    return {row.policy for row in rows} - beaten


def files_of(rows: Sequence[QualityRow], title: str) -> dict[str, bytes]:
    """Every file's content by its name."""
    pictures = {f"quality.{kind}": _draw(rows, title, kind) for kind in FORMATS}
    return {"quality.csv": _csv(rows).encode(), "quality.md": markdown(rows, title).encode(), **pictures}


def _csv(rows: Sequence[QualityRow]) -> str:
    content, best = StringIO(), best_rows(rows)
    writer = csv.writer(content, lineterminator="\n")
    columns = (*_RUN, *(_OF_SOUNDS if rows[0].is_of_sounds else _OF_FRAMES), "best", "text")
    writer.writerow(columns)
    for row in rows:
        low, high = row.kept_ci95 or ("", "")
        interval = f"{low}:{high}" if row.kept_ci95 else ""
        values = {"psnr_ci95": interval, "snr_ci95": interval, "best": row.policy in best}
        writer.writerow([values[name] if name in values else getattr(row, name) for name in columns])
    return content.getvalue()


def markdown(rows: Sequence[QualityRow], title: str) -> str:
    """Sorted by speed-up; the Pareto front in bold, rivals before cineray's own where they are as fast."""
    best, heads = best_rows(rows), _SOUND_HEADS if rows[0].is_of_sounds else _FRAME_HEADS
    lines = [
        f"{title}; **bold**: no other row is both faster and better",
        "",
        f"| policy | clips | speed-up by blocks | by CPU time | by wall time | {' | '.join(heads)} |",
        f"|{'---|' * (5 + len(heads))}",
    ]
    for row in sorted(rows, key=lambda row: (round(row.speedup, 1), not peers.is_peer(row.policy), -row.kept_db)):
        mark = "**" if row.policy in best else ""
        lines.append(
            f"| {mark}{row.policy}{mark} | {row.num_clips} | {row.speedup:.2f}x | {_times(row.cpu_ratio)} | "
            f"{_times(row.wall_ratio)} | {' | '.join(_scores(row))} |"
        )
    return "\n".join(lines) + "\n"


def kept_text(row: QualityRow) -> str:
    """What it keeps, as 45.3 [44.1, 46.6]."""
    interval = "" if row.kept_ci95 is None else f" [{row.kept_ci95[0]:.1f}, {row.kept_ci95[1]:.1f}]"
    return f"{row.kept_db:.1f}{interval}"


def _scores(row: QualityRow) -> tuple[str, ...]:
    both = (kept_text(row), f"{row.worst_kept_db:.1f}")
    if row.is_of_sounds:
        return (*both, f"{row.log_stft_db:.2f}", f"{row.stft_convergence:.3f}")
    return (*both, f"{row.ssim:.4f}", _shown(row.vmaf), _shown(row.xpsnr_db), _shown(row.motion_psnr_db))


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
        y = [row.kept_db for row in own]
        spread = [row.kept_ci95 or (row.kept_db, row.kept_db) for row in own]
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
    axes.set_ylabel(f"{'SNR' if rows[0].is_of_sounds else 'PSNR'} against the uncached clip, dB, mean")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=7)
    figure.suptitle(title, fontsize=9)
    content = BytesIO()
    with rc_context({"svg.hashsalt": "cineray"}):  # the same rows give the same file
        figure.savefig(
            content, format=kind, dpi=DPI, metadata={"Title": title} | ({"Date": None} if kind == "svg" else {})
        )
    return content.getvalue()
