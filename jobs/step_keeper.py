"""Keeps a clip's step states in the output folder: at an interval, and when the gang is asked to stop."""

import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from cineray.distributed.exchange import gather_numbers
from cineray.pipeline.gang import Gang
from cineray.pipeline.render import DenoisedClip
from cineray.pipeline.step_state import StepState, StepStateError, load_step_state, save_step_state


class Yielded(Exception):
    """The clip was put down between two steps; `step` are done, and `kept` says whether their state is on disk."""

    def __init__(self, step: int, kept: bool) -> None:
        super().__init__(step, kept)
        self.step = step
        self.kept = kept


class StepKeeper:
    """One per clip and rank. The first rank writes; all ranks stop after the same step.

    Args:
        path: of the clip's state; the same file for every rank.
        every_s: seconds between two saves.
        is_asked_to_stop: of this rank; one rank that is asked is enough.
    """

    def __init__(self, path: Path, gang: Gang | None, every_s: float, is_asked_to_stop: Callable[[], bool]) -> None:
        self._path = path
        self._gang = gang
        self._every_s = every_s
        self._is_asked_to_stop = is_asked_to_stop
        self._saved_s = time.monotonic()
        self._began_s = time.monotonic()
        self._earlier: dict[str, Any] = {"resumed_at": [], "denoise_s": 0.0, "encode_s": 0.0}

    @property
    def resumed_at(self) -> list[int]:
        return self._earlier["resumed_at"]

    def begin(self) -> StepState | None:
        state = load_step_state(self._path)
        found = -1 if state is None else state.step
        rows = self._exchange([float(found)])
        # a rank may find none, or another one's: a slow disk, a gang that was thought dead
        if state is None or any(row != [found] for row in rows):
            return None
        self._earlier = {
            "resumed_at": [*state.notes["resumed_at"], *([state.step] if state.step < state.num_steps else [])],
            "denoise_s": state.notes["denoise_s"],
            "encode_s": state.notes["encode_s"],
        }
        return state

    def after_step(self, take: Callable[[], StepState]) -> None:
        is_due = time.monotonic() - self._saved_s >= self._every_s
        rows = self._exchange([float(self._is_asked_to_stop()), float(is_due)])
        stops = any(stop for stop, _ in rows)
        if not (stops or rows[0][1]):
            return
        kept, step = False, -1
        try:
            state = take()
            step = state.step
            if self._leads:
                save_step_state(self._noted(state), self._path)
            kept = True
        except (OSError, StepStateError) as reason:  # a state saves work; a clip can do without
            print(f"cineray: no step state was kept: {reason}", file=sys.stderr)
        self._saved_s = time.monotonic()
        if stops:
            raise Yielded(step, kept)

    def save_finished(self, clip: DenoisedClip, num_steps: int) -> None:
        """Writes the denoised latents; whoever decodes them reads them from there.

        Raises:
            OSError: not writable, or full.
        """
        trace = clip.trace
        notes = {
            "resumed_at": self.resumed_at,
            "encode_s": self._earlier["encode_s"] + clip.encode_s,
            "denoise_s": self._earlier["denoise_s"] + clip.denoise_s,
            "finished": None if trace is None else trace.content(),
            "trace": [] if trace is None else trace.content()["entries"],
        }
        state = StepState(step=num_steps, num_steps=num_steps, latents=clip.latents, scheduler={}, notes=notes)
        save_step_state(state, self._path)

    def _noted(self, state: StepState) -> StepState:
        seconds = self._earlier["denoise_s"] + time.monotonic() - self._began_s
        return replace(state, notes={**state.notes, **self._earlier, "denoise_s": seconds})

    @property
    def _leads(self) -> bool:
        return self._gang is None or self._gang.mesh.leads

    def _exchange(self, numbers: list[float]) -> list[list[float]]:
        if self._gang is None:
            return [numbers]
        return gather_numbers(numbers, self._gang.mesh.gang, self._gang.device)
