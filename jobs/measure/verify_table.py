"""What `cineray verify` shows: a row as soon as it is known."""

import math
import sys
from collections.abc import Iterator
from typing import TypeVar

from rich.progress import Progress

from cineray.jobs.console.terminal import new_console, tell
from cineray.jobs.measure.verify import Verified
from cineray.jobs.measure.verify_steps import VerifiedSteps
from cineray.text import printable

CLIP_NAMES = ("clip", "layout", "max error", "PSNR dB", "decisions", "skipped steps", "")
STEP_NAMES = ("clip", "layout", "step error", "may be", "of step", "PSNR dB", "decisions", "")
_STEP_FORM = "{:>4}  {:<20} {:<12} {:<12} {:<10} {:<9} {:<24} {}"
_Row = TypeVar("_Row", Verified, VerifiedSteps)


def show_verified(rows: Iterator[_Row], num_rows: int, names: tuple[str, ...]) -> list[_Row]:
    """Prints each row as it comes, with a bar on a terminal; returns them all.

    Args:
        names: `CLIP_NAMES` or `STEP_NAMES`, whichever the rows are of.
    """
    console = new_console(sys.stderr)
    form = "{:>4}  {:<20} {:<12} {:<12} {:<24} {:<14} {}" if len(names) == len(CLIP_NAMES) else _STEP_FORM
    tell(form.format(*names))
    seen = []
    with Progress(console=console, disable=not console.is_terminal, transient=True) as bars:
        bar = bars.add_task("clips", total=num_rows)
        for row in rows:
            seen.append(row)
            bars.advance(bar)
            line = form.format(row.id, row.layout, *_cells(row), "ok" if row.ok else "NOT THE SAME")
            if console.is_terminal:
                console.print(printable(line), markup=False, emoji=False, highlight=False, soft_wrap=True)
            else:
                tell(line)
    return seen


def _cells(row: Verified | VerifiedSteps) -> tuple[object, ...]:
    psnr = "equal" if math.isinf(row.psnr_db) else f"{row.psnr_db:.1f}"
    if isinstance(row, VerifiedSteps):
        step = row.worst_step
        said = f"{row.num_near} of {len(row.decisions)} near" if row.num_near else "equal"
        said = f"apart at {row.apart[0].text}" if row.apart else said
        return f"{row.errors[step]:.2g}", f"{row.bounds[step]:.2g}", f"{step} of {len(row.errors)}", psnr, said
    decisions = "equal" if row.first_difference is None else f"differ at {row.first_difference}"
    return f"{row.max_error:.2g}", psnr, decisions, row.skipped_steps
