"""Makes good, at a computed step, what the skipped steps before it were wrong by.

A skipped step can only look ahead: its output is a forecast from earlier steps. Once the next step is computed, the
skipped ones lie between two that are known, and what lies between is known better than what lies ahead: on the tiny
models the clean latents that a step predicts are interpolated over five steps to within 1.1 % where a forecast is off
by 3 %. So the scheduler goes back to where the skipping began, takes the skipped steps again with interpolated outputs,
and goes on from there with the computed one. It costs some arithmetic on latents, no call of the transformer.

Between computed steps lies a straight line; or, as far as `curvature` says, the cubic through the newest four. What was
skipped before the last computed step then has a known point more behind it, and is taken again once more.

This is the corrector of a predictor-corrector method, evaluated once per computed step (UniPC, arXiv 2302.04867,
section 3.2, corrects one step back; this corrects a run of skipped ones, whatever the scheduler).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import torch

from cineray.caching.trace import StepOutcome
from cineray.pipeline.linear_runs import LinearRuns, is_linear, weighted_sum, with_own_lists


def is_flow(scheduler: Any) -> bool:
    """Whether it steps along a flow: the clean latents are `sample - sigma * output` at each step. Others are not
    corrected."""
    return (
        "FlowMatch" in type(scheduler).__name__
        or getattr(scheduler.config, "prediction_type", None) == "flow_prediction"
    )


@dataclass(frozen=True, slots=True)
class _Before:
    """What a step began with: the scheduler's state, the latents and the model's output [B, ...]."""

    state: dict[str, Any]
    sample: torch.Tensor
    output: torch.Tensor


@dataclass(frozen=True, slots=True)
class _Step:
    """A step as it was taken: its place among the steps, and all that some row may need to take it again as before.

    One row alone begins again behind a computed step, and takes all that follow anew: there that is enough.
    """

    index: int
    timestep: Any
    before: _Before | None


@dataclass(frozen=True, slots=True)
class _Computed:
    """A computed step of one row: its place, and the clean latents that its output says lie at the end [...]."""

    index: int
    clean: torch.Tensor


def _weights_at(places: Sequence[int], index: int, curvature: float) -> list[float]:
    """What computed steps at these places count for in the clean latents of a step at or between them.

    Those of the straight line between its neighbours, moved by the share `curvature` towards those of the polynomial
    through all.
    """
    if index in places:
        return [float(place == index) for place in places]
    after = next(number for number, place in enumerate(places) if place > index)
    share = (index - places[after - 1]) / (places[after] - places[after - 1])
    straight = [0.0] * len(places)
    straight[after - 1 : after + 1] = [1 - share, share]
    if curvature == 0:
        return straight
    others = [[other for other in places if other != place] for place in places]
    curve = [  # Lagrange's form
        math.prod((index - other) / (place - other) for other in rest)
        for place, rest in zip(places, others, strict=True)
    ]
    return [(1 - curvature) * line + curvature * cubic for line, cubic in zip(straight, curve, strict=True)]


def _clean_at(points: Sequence[_Computed], index: int, curvature: float) -> torch.Tensor:
    """Clean latents [...] of a step at or between these computed ones."""
    weights = _weights_at([point.index for point in points], index, curvature)
    return weighted_sum(weights, [point.clean for point in points])


@dataclass(slots=True)
class Stepper:
    """What stands around a scheduler and steps in its place; everything else is the inner scheduler's."""

    inner: Any

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # what copy and pickle look for on an empty instance
            raise AttributeError(name)
        return getattr(self.inner, name)


@dataclass(slots=True)
class CorrectedScheduler(Stepper):
    """A scheduler whose `step` corrects.

    Each row of a batch is corrected as if it were alone. What it is given is the same on every rank of a gang, latents
    and outcomes alike, so that all correct alike. Latents that are not those of its last step, such as a callback's,
    begin anew: nothing before them is corrected.

    Args:
        inner: steps; its state is put back when steps are taken again.
        outcomes: what the cache did at the step that is now taken, by row of the latents.
        curvature: 0 for straight lines between computed steps, 1 for a cubic.
        runs: takes steps of one clip again at once, in float32; None: one by one.
    """

    outcomes: Callable[[], list[StepOutcome]]
    curvature: float = 0.0
    runs: LinearRuns | None = None
    _num_steps: int = 0  # taken
    _computed: dict[int, tuple[_Computed, ...]] = field(default_factory=dict[int, tuple[_Computed, ...]])  # by row
    _open: list[_Step] = field(default_factory=list[_Step])  # from the first on that may be taken again
    _made: torch.Tensor | None = None  # latents that the last step led to

    def step(self, model_output: torch.Tensor, timestep: Any, sample: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """The inner scheduler's step, from corrected latents where the steps before were skipped."""
        now = self._look(model_output, timestep, sample)
        index = self._num_steps
        before = {row: (*self._computed.get(row, ()), computed) for row, computed in now.items()}
        ended = {row: points for row, points in before.items() if self._has_skipped(points)}
        if ended:
            # in 16 bits each step rounds, as outputs of fewer bits than the latents do
            is_exact = sample.dtype == model_output.dtype and wide(sample) is sample
            if self.runs is not None and len(sample) == 1 and is_exact and is_linear(self.inner):
                sample = self._take_runs_again(self.runs, ended[0], *args, **kwargs)
            else:
                sample = self._take_again(ended, *args, **kwargs)
            clean = {row: points[-1].clean for row, points in ended.items()}
            model_output = self._leading_to(clean, model_output, timestep, sample)
        follows_computed = any(points[-1].index == index - 1 for points in self._computed.values())
        self._computed |= {row: points[-self._num_kept :] for row, points in before.items()}
        settled = min((self._behind(points).index for points in self._computed.values()), default=index)
        self._open = [step for step in self._open if step.index > settled]
        if index > settled:
            is_needed = len(sample) > 1 or follows_computed or not self._open
            state = self._now_before(sample, model_output) if is_needed else None
            self._open.append(_Step(index, timestep, state))
        result = self.inner.step(model_output, timestep, sample, *args, **kwargs)
        self._made = result[0]
        self._num_steps += 1
        return result

    def _now_before(self, sample: torch.Tensor, output: torch.Tensor) -> _Before:
        """A step that begins now with these."""
        return _Before(with_own_lists(vars(self.inner)), sample, output)

    @property
    def _num_kept(self) -> int:
        """Computed steps before the newest that some skipped step is interpolated by."""
        return 1 if self.curvature == 0 else 3

    def _behind(self, points: tuple[_Computed, ...]) -> _Computed:
        """The step behind which a row begins again when its next step is computed.

        A straight line begins at the newest one; the cubic moves what was skipped before that too.
        """
        return points[-1] if self.curvature == 0 else points[-2:][0]

    def _has_skipped(self, points: tuple[_Computed, ...]) -> bool:
        """Whether there is something to take again before the newest of these."""
        if len(points) == 1:
            return False
        begin = self._behind(points[:-1]).index
        return points[-1].index - begin > sum(point.index > begin for point in points)

    def _look(self, model_output: torch.Tensor, timestep: Any, sample: torch.Tensor) -> dict[int, _Computed]:
        """The rows that were computed at this step; forgets what must not be gone by."""
        outcomes = self.outcomes()
        if not _same(sample, self._made):
            self._computed, self._open = {}, []
        if len(outcomes) != len(sample):  # the cache's samples are not the latents' rows
            outcomes = ["begun"] * len(sample)
        sigma, found = sigma_now(self.inner, timestep), dict[int, _Computed]()
        for row, outcome in enumerate(outcomes):
            if outcome == "begun":
                self._computed.pop(row, None)
            if outcome != "skipped":
                found[row] = _Computed(self._num_steps, wide(sample[row]) - sigma * wide(model_output[row]))
        return found

    def _take_again(self, ended: dict[int, tuple[_Computed, ...]], *args: Any, **kwargs: Any) -> torch.Tensor:
        """Latents before this step, after the rows `ended` have taken the steps that they skipped with interpolated
        outputs; the other rows take them as before."""
        steps, self._open = self._open, []
        assert steps[0].before is not None
        vars(self.inner).update(steps[0].before.state)
        sample = steps[0].before.sample
        for step in steps:
            clean = {
                row: _clean_at(points, step.index, self.curvature)
                for row, points in ended.items()
                if step.index > self._behind(points[:-1]).index
            }
            old = (
                torch.empty_like(sample, dtype=steps[0].before.output.dtype)
                if step.before is None
                else step.before.output
            )
            output = self._leading_to(clean, old, step.timestep, sample)
            if step.before is not None:
                step = replace(step, before=self._now_before(sample, output))
            self._open.append(step)
            sample = self.inner.step(output, step.timestep, sample, *args, **kwargs)[0]
        return sample

    def _take_runs_again(
        self, runs: LinearRuns, points: tuple[_Computed, ...], *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        """As `_take_again`, of one row: at once the steps from each that it may begin at again to the next such."""
        begins = [number for number, step in enumerate(self._open) if step.before is not None]
        first = self._open[0].before
        assert first is not None
        vars(self.inner).update(first.state)
        sample, places = first.sample, [point.index for point in points]
        terms = [point.clean.unsqueeze(0) for point in points]
        for begin, end in pairwise([*begins, len(self._open)]):
            steps = self._open[begin:end]
            # nobody reads the output: this row is alone
            self._open[begin] = replace(steps[0], before=self._now_before(sample, first.output))
            weights = [_weights_at(places, step.index, self.curvature) for step in steps]
            sample = runs.take(self.inner, sample, [step.timestep for step in steps], weights, terms, *args, **kwargs)
        return sample

    def _leading_to(
        self, clean: dict[int, torch.Tensor], output: torch.Tensor, timestep: Any, sample: torch.Tensor
    ) -> torch.Tensor:
        """The output, in these rows exchanged for that which says that these latents lie at the end."""
        sigma, output = sigma_now(self.inner, timestep), output.clone()
        for row, end in clean.items():
            output[row] = ((wide(sample[row]) - end) / sigma).to(output.dtype)
        return output


def sigma_now(scheduler: Any, timestep: Any) -> torch.Tensor:
    """Of the step that comes now [], where the scheduler keeps it: a number on the CPU makes no GPU wait."""
    index = scheduler.step_index
    if index is None:
        index = scheduler.begin_index
    if index is None:
        index = scheduler.index_for_timestep(timestep)
    return wide(scheduler.sigmas[index])


def wide(values: torch.Tensor) -> torch.Tensor:
    """In float32 or more."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def _same(one: torch.Tensor, other: torch.Tensor | None) -> bool:
    """Whether they are the same values; without waiting for a GPU where they are the same tensor."""
    if one is other:
        return True
    return other is not None and one.shape == other.shape and one.dtype == other.dtype and torch.equal(one, other)
