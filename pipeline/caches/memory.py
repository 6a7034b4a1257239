"""How much memory a cache will hold, told before a clip is rendered."""

import math
from collections.abc import Mapping
from typing import Any

from cineray.caching.plan import CachePlan
from cineray.pipeline.adapters.model import hidden_size
from cineray.pipeline.loading.checkpoint import Checkpoint
from cineray.pipeline.request import ClipRequest


def held_tensors(plan: CachePlan) -> float:
    """Token tensors [S, D] that a branch of a clip holds at most; TeaCache's timestep embeddings are not counted."""
    forecasting, signal, part = plan.forecasting, plan.policy.signal, 1 / plan.forecasting.keep_every
    pair = 1 + part * forecasting.keeps_probe_residual(signal)
    return part + (signal == "modulated-input") + forecasting.num_pairs * pair


def forecast_cache_bytes(
    checkpoint: Checkpoint, request: ClipRequest, element_bytes: int, num_ranks: int = 1
) -> int | None:
    """Bytes that each rank's cache holds at most during the clip; None for policies by layer, which are not forecast.

    Args:
        element_bytes: of the transformer's type.
        num_ranks: that share the clip's tokens; the first ones hold a token more where it does not divide.
    """
    plan = checkpoint.plan_cache(request.cache)
    if plan is None:
        return 0
    if not isinstance(plan, CachePlan):
        return None
    config = checkpoint.configs.transformer
    if plan.forecasting.target == "clean_latents":  # of two steps, whole on every rank, in float32
        return 2 * checkpoint.adapter.num_tokens(checkpoint.configs, request) * _latents_per_token(config) * 4
    num_branches = len(checkpoint.model.branches) if request.guidance_scale > 1 else 1
    num_tokens = checkpoint.tokens_here(request, num_ranks)
    return round(held_tensors(plan) * num_tokens * hidden_size(config) * element_bytes * num_branches)


def _latents_per_token(config: Mapping[str, Any]) -> int:
    """Numbers of the latents that a token stands for: a patch's, of the channels that are not beside the latents."""
    patch = config.get("patch_size") or 1
    volume = math.prod(patch) if not isinstance(patch, int) else patch**2 * (config.get("patch_size_t") or 1)
    return volume * min(config["in_channels"], config.get("out_channels") or config["in_channels"])
