"""The bar over a batch's clips, on a terminal; plain lines where there is none. Always on stderr."""

import sys
from collections.abc import Sequence
from typing import Self

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from cineray.jobs.console.terminal import new_console, tell
from cineray.text import printable

MAX_BAR_TEXT = 60  # beside a bar, which has a line of the terminal
MAX_TOLD = 1000  # warnings that are not told again


class ClipBars:
    """A context manager; whoever renders adds bars of its own to `bars`.

    Args:
        num_clips: of the whole run.
        num_done: of them, in earlier waves.
    """

    def __init__(self, num_clips: int, num_done: int = 0) -> None:
        self.num_clips = num_clips
        self.num_done = num_done
        self._console = new_console(sys.stderr)
        self.is_terminal = self._console.is_terminal
        self.bars = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self._console,
            disable=not self.is_terminal,
            transient=True,
        )
        self._told: set[str] = set()
        self._clips = self.bars.add_task("clips", total=num_clips, completed=num_done)

    def __enter__(self) -> Self:
        self.bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bars.stop()

    def say(self, message: str) -> None:
        """A line above the bars."""
        message = printable(message)
        if self.is_terminal:
            self._console.print(printable(message), markup=False, emoji=False, highlight=False, soft_wrap=True)
        else:  # rich would take 0.3 ms
            tell(message)

    def warn(self, clip_id: str, warnings: Sequence[str]) -> None:
        """Says what holds for a clip; what holds for many alike, once."""
        for warning in warnings:
            if warning not in self._told:
                self.say(f"{clip_id}: {warning}")
            if len(self._told) < MAX_TOLD:
                self._told.add(warning)

    def count_clip(self, message: str | None) -> None:
        """One clip more is over; says so unless there is nothing to say."""
        self.num_done += 1
        self.bars.update(self._clips, completed=self.num_done)
        if message is not None:
            self.say(f"[{self.num_done}/{self.num_clips}] {message}")
