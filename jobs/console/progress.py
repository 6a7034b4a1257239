"""What a person sees while clips render: bars on a terminal, plain lines in a log. Always on stderr."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.text import Text

from cineray.jobs.console.bars import MAX_BAR_TEXT, ClipBars
from cineray.jobs.console.terminal import new_console
from cineray.text import printable


class RenderProgress(ClipBars):
    """A bar over clips and a bar over the steps of the current clip."""

    def __init__(self, num_clips: int, num_done: int = 0) -> None:
        super().__init__(num_clips, num_done)
        self._steps = self.bars.add_task("steps", total=None, visible=False)

    def begin_clip(self, clip_id: str, num_steps: int) -> None:
        described = f"clip {printable(clip_id, MAX_BAR_TEXT)}"
        self.bars.reset(self._steps, total=num_steps, description=described, visible=True)

    def step(self, done: int, total: int) -> None:
        self.bars.update(self._steps, completed=done, total=total)


@contextmanager
def checking_lines(name: str) -> Iterator[Callable[[int], None]]:
    """Shows on a terminal how far a manifest has been checked; yields the callback that takes line numbers."""
    console, checking = new_console(sys.stderr), f"checking {printable(name, MAX_BAR_TEXT)}"
    with console.status(Text(checking)) as status:

        def on_line(number: int) -> None:
            if number % 10_000 == 0:
                status.update(Text(f"{checking}: {number} lines"))

        yield on_line
