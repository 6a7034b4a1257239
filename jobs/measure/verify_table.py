"""What `cineray verify` shows: a row as soon as it is known."""

import math
import sys
from collections.abc import Iterator

from rich.progress import Progress

from cineray.jobs.console.terminal import new_console, tell
from cineray.jobs.measure.verify import Verified
from cineray.text import printable


def show_verified(rows: Iterator[Verified], num_rows: int) -> list[Verified]:
    """Prints each row as it comes, with a bar on a terminal; returns them all."""
    console = new_console(sys.stderr)
    form = "{:>4}  {:<20} {:<12} {:<10} {:<24} {:<14} {}"
    names = ("clip", "layout", "max error", "PSNR dB", "decisions", "skipped steps", "")
    tell(form.format(*names))
    seen = []
    with Progress(console=console, disable=not console.is_terminal, transient=True) as bars:
        bar = bars.add_task("clips", total=num_rows)
        for row in rows:
            seen.append(row)
            bars.advance(bar)
            line = form.format(
                row.id,
                row.layout,
                f"{row.max_error:.2g}",
                "equal" if math.isinf(row.psnr_db) else f"{row.psnr_db:.1f}",
                "equal" if row.first_difference is None else f"differ at {row.first_difference}",
                row.skipped_steps,
                "ok" if row.ok else "NOT THE SAME",
            )
            if console.is_terminal:
                console.print(printable(line), markup=False, emoji=False, highlight=False, soft_wrap=True)
            else:
                tell(line)
    return seen
