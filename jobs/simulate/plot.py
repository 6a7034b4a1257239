"""A simulation as a picture: where GPU time went, and clips done in each hour."""

from io import BytesIO
from pathlib import Path

from cineray.jobs.simulate.ledger import HOUR_S, Simulated
from cineray.jobs.simulate.shown import uses
from cineray.pipeline.request import InputError

FORMATS = ("png", "svg")
DPI = 150


def plot_format(path: Path) -> str:
    """The format that a file's name asks for.

    Raises:
        InputError: another one.
    """
    suffix = path.suffix.removeprefix(".").lower()
    if suffix not in FORMATS:
        raise InputError(f"simulate: --plot must be a file named .png or .svg, got {path}")
    return suffix


def draw(found: Simulated, title: str, file_format: str) -> bytes:
    """The picture as a file's content."""
    from matplotlib import rc_context  # takes half a second
    from matplotlib.figure import Figure  # without pyplot no display is asked for

    figure = Figure(figsize=(9, 6), layout="constrained")
    where, when = figure.subplots(2, 1)
    figure.suptitle(title, fontsize=10)
    rows = sorted(uses(found), key=lambda row: row[1])
    bars = where.barh([what for what, _, _ in rows], [hours for _, hours, _ in rows], color="tab:blue")
    where.bar_label(bars, [f"{hours:,.1f} h, {share:.1%}" for _, hours, share in rows], padding=3, fontsize=8)
    where.set_xlabel("GPU hours (simulated)")
    where.set_xlim(right=1.25 * max(hours for _, hours, _ in rows))  # room for the labels
    where.xaxis.set_major_formatter("{x:,.0f}" if rows[-1][1] > 10 else "{x:g}")
    where.tick_params(axis="y", labelsize=8)
    ends = [min(hour + 1.0, found.makespan_s / HOUR_S) for hour in range(len(found.per_hour))]
    widths = [end - hour for hour, end in enumerate(ends)]
    rates = [number / width if width else 0.0 for number, width in zip(found.per_hour, widths, strict=True)]
    when.bar(range(len(rates)), rates, widths, align="edge", color="tab:green", edgecolor="white", linewidth=0.3)
    when.set_xlabel("hours since the start (simulated)")
    when.set_ylabel("clips done per hour (simulated)")
    for axes in (where, when):
        axes.spines[["top", "right"]].set_visible(False)
    content = BytesIO()
    about = {"Title": title} | ({"Date": None} if file_format == "svg" else {})
    with rc_context({"svg.hashsalt": "cineray"}):  # the same simulation gives the same file
        figure.savefig(content, format=file_format, dpi=DPI, metadata=about)
    return content.getvalue()
