"""Keeps a clip's step states in the output folder: at an interval, and when the gang is asked to stop."""

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from cineray.caching.trace import entries_from, trace_from
from cineray.files import shaped
from cineray.jobs.console.terminal import tell
from cineray.pipeline.gang import Gang
from cineray.pipeline.render import DenoisedClip
from cineray.pipeline.resume.step_state import Beginning, StepState, StepStateError, read_step_state, save_step_state

# a state holds the latents, and a scheduler's few tensors of their size: UniPC's are four of order 3
MAX_STATE_PER_LATENTS = 16
MAX_NOTES_BYTES = 64 * 2**20
_Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class StepNotes(BaseModel):
    """What a state says of the steps so far.

    Args:
        resumed_at: steps at which the clip went on.
        trace: `Trace.to_dict`'s entries so far; empty without a cache.
        finished: the whole `Trace.to_dict`, where all steps are done and there is a cache.
    """

    model_config = ConfigDict(frozen=True)

    resumed_at: list[int]
    denoise_s: _Seconds
    encode_s: _Seconds
    trace: Any = []
    finished: Any = None

    @classmethod
    def of(cls, state: StepState) -> "StepNotes":
        """The notes in a step state.

        Raises:
            ValueError: they are of another shape, or tell of steps that the clip does not have.
        """
        notes = shaped(state.notes, _NOTES)
        steps = notes.resumed_at
        if steps != sorted(set(steps)) or not all(0 < step <= state.step for step in steps):
            raise ValueError("resumed_at: not steps of the clip")
        entries = entries_from(notes.trace)
        if notes.finished is not None:
            entries = entries + trace_from(notes.finished).entries
        if any(entry.step >= state.step for entry in entries):
            raise ValueError("trace: not steps of the clip")
        return notes


_NOTES = TypeAdapter(StepNotes)


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
        self._earlier: dict[str, Any] = {"resumed_at": [], "denoise_s": 0.0, "encode_s": 0.0}

    @property
    def resumed_at(self) -> list[int]:
        return self._earlier["resumed_at"]

    def begin(self, beginning: Beginning) -> StepState | None:
        """Where all ranks begin: at the state on disk, if each finds the same one and it fits the clip."""
        state, notes, doubt = self._find(beginning)
        # a rank may find none, or another one's: a slow disk, a gang that was thought dead
        if len(set(self._gang.exchange_text("none" if state is None else state.digest))) > 1:
            doubt = doubt or "not every rank finds the same one"
        if doubt is not None and self._gang.is_leader:
            tell(f"cineray: clip {self._path.name.rsplit('.', 2)[0]} begins anew; its step state is not used: {doubt}")
        if state is None or notes is None or doubt is not None:
            return None
        self._earlier = {
            "resumed_at": [*notes.resumed_at, *([state.step] if state.step < state.num_steps else [])],
            "denoise_s": notes.denoise_s,
            "encode_s": notes.encode_s,
        }
        return state

    def _find(self, beginning: Beginning) -> tuple[StepState | None, StepNotes | None, str | None]:
        """What lies on disk and fits the clip; else why not, or nothing at all where there is no state."""
        latents = beginning.latents
        max_bytes = MAX_STATE_PER_LATENTS * latents.numel() * latents.element_size() + MAX_NOTES_BYTES
        try:
            state = read_step_state(self._path, self._clip, max_bytes)
            if state is None:
                return None, None, None
            doubt = beginning.misfit(state)
            return (state, StepNotes.of(state), None) if doubt is None else (None, None, doubt)
        except StepStateError as error:
            return None, None, str(error)
        except ValueError as error:
            return None, None, f"its notes are not ours: {error}"

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
        trace = clip.trace
        notes = {
            "resumed_at": self.resumed_at,
            "encode_s": self._earlier["encode_s"] + clip.encode_s,
            "denoise_s": self._earlier["denoise_s"] + clip.denoise_s,
            "finished": None if trace is None else trace.to_dict(),
            "trace": [] if trace is None else trace.to_dict()["entries"],
        }
        state = StepState(step=num_steps, num_steps=num_steps, latents=clip.latents, scheduler={}, notes=notes)
        save_step_state(replace(state, clip=self._clip), self._path)

    def _noted(self, state: StepState) -> StepState:
        seconds = self._earlier["denoise_s"] + time.monotonic() - self._began_s
        return replace(state, clip=self._clip, notes={**state.notes, **self._earlier, "denoise_s": seconds})
