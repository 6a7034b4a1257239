"""Calibrates `fitted`: how the blocks' residuals of a model move over the steps, from a few uncached clips."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from cineray.caching.call import CallPlan, StepContext
from cineray.caching.forecast import Forecasting
from cineray.caching.observation import BRANCH_ORDER, Observation
from cineray.caching.plan import CachePlan
from cineray.caching.policies.fitted import Numbers, forecasts
from cineray.caching.policy import Decision, Reason, Signal
from cineray.caching.profile import FittedProfile
from cineray.caching.token_sums import SignalValues
from cineray.pipeline.adapters import by_transformer
from cineray.pipeline.caches.blocks import BlockRunner
from cineray.pipeline.caches.enable import attach_cache, step_tracker_of, transformers_of
from cineray.pipeline.loading.model import LoadedModel
from cineray.pipeline.render import denoise_prepared, prepare_clip
from cineray.pipeline.request import ClipRequest

# Where over the steps single skips are tried: dense at both ends, where they cost most
PLACES = (0.04, 0.08, 0.12, 0.18, 0.26, 0.38, 0.52, 0.66, 0.78, 0.86, 0.92, 0.96)
NUM_WEIGHED = 2  # clips on which they are
# Tokens of a clip that are kept, spread evenly: of Wan 14B 50 steps of two branches are 4 GB. All of the tiny models'.
MAX_TOKENS = 2048


class ResidualRecorder:
    """Stands in a controller's place: computes every step and keeps what the blocks added to some tokens."""

    def __init__(self) -> None:
        self._kept: dict[str, list[torch.Tensor]] = {}  # branch -> residual of each step

    def begin_clip(self) -> None:
        self._kept.clear()

    def free(self) -> None:
        """What is measured outlives the clip."""

    def is_planned(self, _context: StepContext, /) -> bool:
        return False

    def begin_call(self, _context: StepContext, _blocks_input: torch.Tensor, /) -> list[int]:
        return []

    def decide(
        self,
        context: StepContext,
        blocks_input: torch.Tensor,
        _probe: torch.Tensor,
        _signal_values: SignalValues | None = None,
        /,
    ) -> CallPlan:
        return CallPlan(context=context, compute_rows=list(range(blocks_input.shape[0])), skip_rows=[], gammas=[])

    def remember(self, plan: CallPlan, blocks_input: torch.Tensor, blocks_output: torch.Tensor) -> None:
        every = math.ceil(blocks_input.shape[1] / MAX_TOKENS)
        residual = (blocks_output[:, ::every] - blocks_input[:, ::every]).float().cpu()
        for row in plan.compute_rows:
            branch, _ = plan.context.origin(row)
            self._kept.setdefault(branch, []).append(residual[row])

    def forecast(self, _plan: CallPlan, _blocks_input: torch.Tensor, /) -> torch.Tensor:
        raise AssertionError("the recorder skips nothing")

    def products(self, guidance_scale: float) -> Numbers:
        """Inner products of the last clip's residuals [T, T], of the branches as guidance combines them: forecasts of
        both take the same gammas, so that is what an error is made of."""
        cond, *uncond = (
            torch.stack([residual.flatten() for residual in self._kept[branch]]).double()
            for branch in BRANCH_ORDER
            if branch in self._kept
        )
        guided = uncond[0] + guidance_scale * (cond - uncond[0]) if uncond else cond
        return (guided @ guided.T).numpy()


@dataclass(frozen=True, slots=True)
class OneSkip:
    """Skips one step of a clip and computes the others."""

    step: int
    gamma: float
    signal: Signal = "none"
    plans_ahead: bool = False

    def decide(self, observation: Observation) -> Decision:
        if observation.step_index != self.step or observation.num_pairs < 2:
            return Decision.compute_because(Reason.INTERVAL)
        return Decision(compute=False, accumulated=0.0, reason=Reason.SKIP, gamma=self.gamma)


def fit_residuals(
    model: LoadedModel,
    requests: Sequence[ClipRequest],
    family: str,
    transformer: dict[str, object],
    source: str,
    on_clip: Callable[[int], None],
) -> FittedProfile:
    """Denoises the clips uncached and writes down how their residuals move, then what an error of each step costs.

    Args:
        requests: all with the same number of steps.
        on_clip: called with the number of clips done, of `num_renders`.
    """
    products, references = _mean_products(model, requests, on_clip)
    weights = _weights(model, requests, products, references, on_clip)
    return FittedProfile(
        family=family,
        transformer=transformer,
        source=source,
        # eight digits: forecasts rest on differences of neighbours
        products=tuple(tuple(float(f"{v:.8g}") for v in row[: number + 1]) for number, row in enumerate(products)),
        weights=tuple(float(f"{w:.4g}") for w in weights / weights.max()),
    )


def num_renders(num_clips: int, num_steps: int) -> int:
    """Clips that `fit_residuals` denoises."""
    return num_clips + len(_places(num_steps)) * min(NUM_WEIGHED, num_clips)


def _mean_products(
    model: LoadedModel, requests: Sequence[ClipRequest], on_clip: Callable[[int], None]
) -> tuple[Numbers, list[torch.Tensor]]:
    """(products [T, T] in units of the last step's, latents of the clips)."""
    recorder, known = ResidualRecorder(), model.checkpoint.model
    products, latents = [], []
    tracker = step_tracker_of(model.pipe.transformer, known, None, None)
    tracker.attach(BlockRunner(model.pipe.transformer, known.layout, recorder, 0, None, tracker.where))
    try:
        for number, request in enumerate(requests, 1):
            latents.append(_denoise(model, request))
            moved = recorder.products(request.guidance_scale)
            products.append(moved / moved[-1, -1])
            on_clip(number)
    finally:
        tracker.detach()
    return np.mean(products, axis=0), latents


def _weights(
    model: LoadedModel,
    requests: Sequence[ClipRequest],
    products: Numbers,
    references: Sequence[torch.Tensor],
    on_clip: Callable[[int], None],
) -> Numbers:
    """Error of the final latents over error of the residual, where one step alone is forecast [T].

    Measured at a few places of a few clips, and on lines between their logarithms.
    """
    num_steps, transformers = len(products), transformers_of(model.pipe)
    gammas, errors = forecasts(products)
    places, num_done = _places(num_steps), len(requests)
    found = np.zeros(len(places))
    for request, reference in list(zip(requests, references, strict=True))[:NUM_WEIGHED]:
        for number, step in enumerate(places):
            plan = CachePlan(
                text="one-skip",
                policy=OneSkip(step, float(gammas[step - 1, 1, 1])),
                forecasting=Forecasting(alignment="plan", gamma_clip=(0.0, 10.0)),
                probe_depth=0,
                num_blocks=1,
            )
            with attach_cache(transformers, plan, models=by_transformer(model.checkpoint.model)):
                latents = _denoise(model, request)
            found[number] += float((latents - reference).square().mean().sqrt())
            num_done += 1
            on_clip(num_done)
    local = np.sqrt([max(errors[step - 1, 1, 1], np.finfo(float).tiny) for step in places])
    least = np.finfo(np.float32).tiny  # an error that is no number of the latents'
    return np.exp(np.interp(np.arange(num_steps), places, np.log(np.maximum(found / local, least))))


def _places(num_steps: int) -> list[int]:
    """Steps that are skipped alone: two must have been computed before, and the last one always is."""
    wanted = {round(place * num_steps) for place in PLACES}
    return sorted(step for step in wanted if 2 <= step < num_steps - 1)


def _denoise(model: LoadedModel, request: ClipRequest) -> torch.Tensor:
    return denoise_prepared(model, request, prepare_clip(model, request), lambda *_: None).latents.float().cpu()
