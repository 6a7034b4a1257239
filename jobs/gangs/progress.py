"""What a person sees while gangs render: a bar per gang on a terminal, plain lines in a job's log. Always on stderr."""

import time
from collections.abc import Sequence

from cineray.jobs.console.bars import MAX_BAR_TEXT, ClipBars
from cineray.jobs.gangs.gang_slot import GangSlot
from cineray.jobs.gangs.members import GangState
from cineray.jobs.output.results import ClipResult
from cineray.text import printable

LINE_S = 30.0  # between two lines about running clips where there is no terminal
MAX_EXISTING = 10  # told one by one: those of a large batch that is run again would say nothing


class GangProgress(ClipBars):
    """`update` it now and then."""

    def __init__(self, num_clips: int, num_done: int = 0) -> None:
        super().__init__(num_clips, num_done)
        self._num_existing = 0
        self._gangs = {}
        self._next_line_s = time.monotonic() + LINE_S

    def end_clip(self, result: ClipResult, warning: str | None) -> None:
        if result.status == "existing":
            self._num_existing += 1
            if self._num_existing > MAX_EXISTING:
                self.count_clip(None)
                return
        self.count_clip(result.line(warning))

    def update(self, slots: Sequence[GangSlot], gangs: Sequence[GangState]) -> None:
        """Shows what each gang does; `slots` know how far its clip is."""
        for slot, gang in zip(slots, gangs, strict=True):
            bar = self._gangs.get(gang.number)
            if bar is None:
                bar = self._gangs[gang.number] = self.bars.add_task(gang.name, total=None)
            pulse = slot.step_count
            said = gang.stage.value if slot.task is None else f"clip {printable(slot.task.request.id, MAX_BAR_TEXT)}"
            self.bars.update(
                bar,
                description=f"{gang.name} {said}",
                completed=0 if pulse is None else pulse.step,
                total=None if pulse is None else pulse.num_steps,
            )
        if self.is_terminal or time.monotonic() < self._next_line_s:
            return
        self._next_line_s = time.monotonic() + LINE_S
        at = [
            f"{gang.name} clip {slot.task.request.id} step {slot.step_count.step} of {slot.step_count.num_steps}"
            if slot.task is not None and slot.step_count is not None
            else f"{gang.name} {gang.stage.value}"
            for slot, gang in zip(slots, gangs, strict=True)
        ]
        self.say(f"{self.num_done} of {self.num_clips} clips; {', '.join(at)}")
