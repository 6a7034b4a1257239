"""What a person sees while gangs render: a bar per gang on a terminal, plain lines in a job's log. Always on stderr."""

import sys
import time
from collections.abc import Sequence

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from cineray.jobs.gang_slot import GangSlot
from cineray.jobs.results import ClipResult

LINE_S = 30.0  # between two lines about running clips where there is no terminal


class GangProgress:
    """A context manager; `update` in each turn of the driver's loop."""

    def __init__(self, num_clips: int) -> None:
        self._console = Console(file=sys.stderr)
        self._num_clips = num_clips
        self._num_done = 0
        self._num_existing = 0
        self._bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self._console,
            disable=not self._console.is_terminal,
            transient=True,
        )
        self._clips = self._bars.add_task("clips", total=num_clips)
        self._gangs = {}
        self._next_line_s = time.monotonic() + LINE_S

    def __enter__(self) -> "GangProgress":
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    def say(self, message: str) -> None:
        self._console.print(message, markup=False, highlight=False, soft_wrap=True)

    def end_clip(self, result: ClipResult, warning: str | None) -> None:
        self._num_done += 1
        self._bars.update(self._clips, completed=self._num_done)
        if result.status == "existing":
            self._num_existing += 1
            if self._num_existing > 10:  # a rerun of a large batch: its lines would say nothing
                return
        said = f": {result.error}" if result.error else f" -> {result.video}" + (f": {warning}" if warning else "")
        seconds = "" if result.status == "existing" else f" in {result.wall_s:.1f} s"
        self.say(f"[{self._num_done}/{self._num_clips}] {result.id}: {result.status}{seconds}{said}")

    def update(self, gangs: Sequence[GangSlot]) -> None:
        for gang in gangs:
            bar = self._gangs.get(gang.number)
            if bar is None:
                bar = self._gangs[gang.number] = self._bars.add_task(gang.name, total=None)
            pulse = gang.pulse
            said = gang.stage if gang.task is None else f"clip {gang.task.request.id}"
            self._bars.update(
                bar,
                description=f"{gang.name} {said}",
                completed=0 if pulse is None else pulse.step,
                total=None if pulse is None else pulse.num_steps,
            )
        if self._console.is_terminal or time.monotonic() < self._next_line_s:
            return
        self._next_line_s = time.monotonic() + LINE_S
        at = [
            f"{gang.name} clip {gang.task.request.id} step {gang.pulse.step} of {gang.pulse.num_steps}"
            if gang.task is not None and gang.pulse is not None
            else f"{gang.name} {gang.stage}"
            for gang in gangs
        ]
        self.say(f"{self._num_done} of {self._num_clips} clips; {', '.join(at)}")
