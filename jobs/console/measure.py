"""What a person sees while a long measurement runs: a bar on a terminal, a line now and then in a log. On stderr."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from cineray.jobs.console.bars import MAX_BAR_TEXT
from cineray.jobs.console.terminal import new_console, tell
from cineray.text import printable

LINE_S = 30.0  # between two lines where there is no terminal

OnDone = Callable[..., None]  # (number done, what stands beside the count)


@contextmanager
def progress_bar(what: str, total: int) -> Iterator[OnDone]:
    """Yields the callback that takes how many are done, and optionally a remark on them."""
    console = new_console(sys.stderr)
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    next_line_s = time.monotonic()

    def on_done(done: int, remark: str = "") -> None:
        nonlocal next_line_s
        said = f"{what}, {remark}" if remark else what
        bars.update(bar, completed=done, description=printable(said, 2 * MAX_BAR_TEXT))
        if console.is_terminal or (time.monotonic() < next_line_s and done < total):
            return
        next_line_s = time.monotonic() + LINE_S
        tell(f"{said}: {done} of {total}")

    with Progress(
        *columns, TimeRemainingColumn(), console=console, disable=not console.is_terminal, transient=True
    ) as bars:
        bar = bars.add_task(what, total=total)
        yield on_done
