"""What a person sees while clips render: bars on a terminal, plain lines in a log. Always on stderr."""

import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.progress import Progress
from rich.text import Text

from cineray.jobs.clip_bars import MAX_BAR_TEXT, ClipBars
from cineray.jobs.terminal import new_console, tell
from cineray.text import printable

if TYPE_CHECKING:
    from cineray.jobs.verify import Verified


class RenderProgress(ClipBars):
    """A bar over clips and a bar over the steps of the current clip."""

    def __init__(self, num_clips: int) -> None:
        super().__init__(num_clips)
        self._steps = self.bars.add_task("steps", total=None, visible=False)

    def begin_clip(self, clip_id: str, num_steps: int) -> None:
        described = f"clip {printable(clip_id, MAX_BAR_TEXT)}"
        self.bars.reset(self._steps, total=num_steps, description=described, visible=True)

    def step(self, done: int, total: int) -> None:
        self.bars.update(self._steps, completed=done, total=total)


def show_verified(rows: "Iterator[Verified]", num_rows: int) -> "list[Verified]":
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


@contextmanager
def checking_lines(name: str) -> Iterator[Callable[[int], None]]:
    """Shows on a terminal how far a manifest has been checked; yields the callback that takes line numbers."""
    console, checking = new_console(sys.stderr), f"checking {printable(name, MAX_BAR_TEXT)}"
    with console.status(Text(checking)) as status:

        def on_line(number: int) -> None:
            if number % 10_000 == 0:
                status.update(Text(f"{checking}: {number} lines"))

        yield on_line
