"""A cache's trace goes with the step states, so that a clip that was rendered in two parts tells of both."""

from collections.abc import Callable
from dataclasses import replace

from cineray.caching.trace import Trace, TraceEntry
from cineray.pipeline.resume.step_state import Beginning, Keeper, StepState


class TraceKeeper:
    """Puts the trace so far into each state of another keeper.

    A cache always begins empty, also in the middle of a clip: what it remembered is not saved, so it computes first.

    Args:
        whole: brings the entries of all ranks together; called on every rank.
    """

    def __init__(self, keeper: Keeper, trace: Trace | None, whole: Callable[[Trace], Trace] = lambda trace: trace):
        self._keeper = keeper
        self._trace = trace
        self._whole = whole
        self._earlier: list[TraceEntry] = []

    def begin(self, beginning: Beginning) -> StepState | None:
        state = self._keeper.begin(beginning)
        if state is not None:
            self._earlier = state.notes.all_entries
        return state

    def after_step(self, take: Callable[[], StepState]) -> None:
        def take_with_trace() -> StepState:
            state = take()
            if self._trace is None:
                return state
            entries = self.with_earlier(self._whole(self._trace)).entries
            return replace(state, notes=replace(state.notes, entries=tuple(entries)))

        self._keeper.after_step(take_with_trace)

    def with_earlier(self, trace: Trace) -> Trace:
        """The trace with the entries of the steps before this process began."""
        return replace(trace, entries=self._earlier + trace.entries)
