"""Calibrates `fitted`: how the blocks' residuals of a model move over the steps, from a few uncached clips."""

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch

from cineray.caching.call import CallPlan
from cineray.caching.observation import BRANCH_ORDER
from cineray.caching.policies.fitted import Numbers, step_weights
from cineray.caching.profile import FittedProfile
from cineray.pipeline.adapters import Denoising
from cineray.pipeline.caches.blocks import BlockRunner
from cineray.pipeline.caches.enable import step_tracker_of
from cineray.pipeline.calibrate.recorder import Recorder
from cineray.pipeline.loading.model import LoadedModel
from cineray.pipeline.render import denoise_prepared, prepare_clip
from cineray.pipeline.request import ClipRequest

# Tokens of a clip that are kept, spread evenly: of Wan 14B 50 steps of two branches are 2 GB. All of the tiny models'.
MAX_TOKENS = 512


class ResidualRecorder(Recorder):
    """Keeps what the blocks added to some tokens."""

    def __init__(self) -> None:
        self._kept: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {}  # branch -> (residual, output) by step

    def begin_clip(self) -> None:
        self._kept.clear()

    def remember(self, plan: CallPlan, blocks_input: torch.Tensor, blocks_output: torch.Tensor) -> None:
        every = math.ceil(blocks_input.shape[1] / MAX_TOKENS)
        before, after = (values[:, ::every].float().cpu() for values in (blocks_input, blocks_output))
        for row in plan.compute_rows:
            branch, _ = plan.context.origin(row)
            self._kept.setdefault(branch, []).append((after[row] - before[row], after[row].clone()))

    def clip(self, guidance_scale: float) -> tuple[Numbers, Numbers]:
        """(inner products of the last clip's residuals [T, T], norms of the blocks' output [T]), of the branches as
        guidance combines them: forecasts of both take the same gammas, so that is what an error is made of."""
        residuals, outputs = (self._guided(part, guidance_scale) for part in (0, 1))
        return (residuals @ residuals.T).numpy(), outputs.norm(dim=1).numpy()

    def _guided(self, part: int, scale: float) -> torch.Tensor:
        cond, *uncond = (
            torch.stack([kept[part].flatten() for kept in self._kept[branch]]).double()
            for branch in BRANCH_ORDER
            if branch in self._kept
        )
        return uncond[0] + scale * (cond - uncond[0]) if uncond else cond


def fit_residuals(
    model: LoadedModel,
    requests: Sequence[ClipRequest],
    family: str,
    transformer: dict[str, object],
    source: str,
    on_clip: Callable[[int], None],
) -> FittedProfile:
    """Denoises the clips uncached and writes down how their residuals move.

    Args:
        requests: all with the same number of steps.
        on_clip: called with the number of clips done.
    """
    recorder, known = ResidualRecorder(), model.checkpoint.model
    products, sizes, steps = [], [], np.ones(1)
    tracker = step_tracker_of(model.pipe.transformer, known, None, None)
    tracker.attach(BlockRunner(model.pipe.transformer, known.layout, recorder, 0, None, tracker.where))
    try:
        for number, request in enumerate(requests, 1):
            prepared = prepare_clip(model, request)
            steps = _step_sizes(prepared.denoising)
            denoise_prepared(model, request, prepared, lambda *_: None)
            moved, size = recorder.clip(request.guidance_scale)
            products.append(moved / moved[-1, -1])
            sizes.append(size / math.sqrt(moved[-1, -1]))
            on_clip(number)
    finally:
        tracker.detach()
    weights = step_weights(np.mean(sizes, axis=0), steps)
    return FittedProfile(
        family=family,
        transformer=transformer,
        source=source,
        # eight digits: forecasts rest on differences of neighbours
        products=tuple(
            tuple(float(f"{v:.8g}") for v in row[: number + 1]) for number, row in enumerate(np.mean(products, axis=0))
        ),
        weights=tuple(float(f"{w:.4g}") for w in weights / weights.max()),
    )


def _step_sizes(clip: Denoising) -> Numbers:
    """What the scheduler's sigma falls by at each step; all alike where it has none."""
    sigmas = getattr(clip.scheduler, "sigmas", None)
    return np.ones(clip.num_steps) if sigmas is None else np.abs(np.diff(np.asarray(sigmas, dtype=np.float64)))
