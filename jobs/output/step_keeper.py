"""Keeps a clip's step states in the output folder: at an interval, and when the gang is asked to stop."""

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from cineray.jobs.console.terminal import tell
from cineray.pipeline.gang import Gang
from cineray.pipeline.render import DenoisedClip
from cineray.pipeline.resume.step_state import (
    Beginning,
    StepNotes,
    StepState,
    StepStateError,
    read_step_state,
    save_step_state,
)

# a state holds the latents, and a scheduler's few tensors of their size: UniPC's are four of order 3
MAX_STATE_PER_LATENTS = 16
MAX_NOTES_BYTES = 64 * 2**20


class ClipPreempted(Exception):
    """The clip was preempted between two steps; `step` are done, and `kept` says whether their state is on disk."""

    def __init__(self, step: int, kept: bool) -> None:
        super().__init__(step, kept)
        self.step = step
        self.kept = kept


class StepKeeper:
    """One per clip and rank. The first rank writes; all ranks stop after the same step.

    Args:
        path: of the clip's state; the same file for every rank.
        clip: the clip's fingerprint; a state of another one is not used.
        gang: `SOLO` for one process.
        every_s: seconds between two saves.
        is_stop_requested: of this rank; one rank that is asked is enough.
    """

    def __init__(
        self, path: Path, clip: str, gang: Gang, every_s: float, is_stop_requested: Callable[[], bool]
    ) -> None:
        self._path = path
        self._clip = clip
        self._gang = gang
        self._every_s = every_s
        self._is_asked_to_stop = is_stop_requested
        self._saved_s = time.monotonic()
        self._began_s = time.monotonic()
        self._earlier = StepNotes()  # of the processes before this one, but for their traces

    @property
    def resumed_at(self) -> tuple[int, ...]:
        """Steps at which the clip went on, here and in earlier processes."""
        return self._earlier.resumed_at

    def begin(self, beginning: Beginning) -> StepState | None:
        """Where all ranks begin: at the state on disk, if each finds the same one and it fits the clip."""
        state, doubt = self._find(beginning)
        # a rank may find none, or another one's: a slow disk, a gang that was thought dead
        if len(set(self._gang.exchange_text("none" if state is None else state.digest))) > 1:
            doubt = doubt or "not every rank finds the same one"
        if doubt is not None and self._gang.is_leader:
            tell(f"cineray: clip {self._path.name.rsplit('.', 2)[0]} begins anew; its step state is not used: {doubt}")
        if state is None or doubt is not None:
            return None
        resumed_at = (*state.notes.resumed_at, *([state.step] if state.step < state.num_steps else []))
        self._earlier = replace(state.notes, resumed_at=resumed_at, entries=(), finished=None)
        return state

    def _find(self, beginning: Beginning) -> tuple[StepState | None, str | None]:
        """What lies on disk and fits the clip; else why not, or nothing at all where there is no state."""
        latents = beginning.latents
        max_bytes = MAX_STATE_PER_LATENTS * latents.numel() * latents.element_size() + MAX_NOTES_BYTES
        try:
            state = read_step_state(self._path, self._clip, max_bytes)
        except StepStateError as error:
            return None, str(error)
        doubt = None if state is None else beginning.misfit(state)
        return (state, None) if doubt is None else (None, doubt)

    def after_step(self, take: Callable[[], StepState]) -> None:
        is_due = time.monotonic() - self._saved_s >= self._every_s
        rows = self._gang.exchange([float(self._is_asked_to_stop()), float(is_due)])
        stops = any(stop for stop, _ in rows)
        if not (stops or rows[0][1]):
            return
        kept, step = False, -1
        try:
            state = take()
            step = state.step
            if self._gang.is_leader:
                save_step_state(self._noted(state), self._path)
            kept = True
        except (OSError, StepStateError) as reason:  # a state saves work; a clip can do without
            tell(f"cineray: no step state was kept: {reason}")
        self._saved_s = time.monotonic()
        if stops:
            raise ClipPreempted(step, kept)

    def save_finished(self, clip: DenoisedClip, num_steps: int) -> None:
        """Writes the denoised latents; whoever decodes them reads them from there.

        Raises:
            OSError: not writable, or full.
        """
        notes = replace(
            self._earlier,
            encode_s=self._earlier.encode_s + clip.encode_s,
            denoise_s=self._earlier.denoise_s + clip.denoise_s,
            finished=clip.trace,
        )
        state = StepState(step=num_steps, num_steps=num_steps, latents=clip.latents, scheduler={}, notes=notes)
        save_step_state(replace(state, clip=self._clip), self._path)

    def _noted(self, state: StepState) -> StepState:
        seconds = self._earlier.denoise_s + time.monotonic() - self._began_s
        notes = replace(self._earlier, denoise_s=seconds, entries=state.notes.entries)
        return replace(state, clip=self._clip, notes=notes)
