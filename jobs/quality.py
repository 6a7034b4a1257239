"""Quality against cost: the same clips with and without a cache."""

import math
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

import numpy as np

from cineray.pipeline.compare import psnr_db
from cineray.pipeline.loading import LoadedModel
from cineray.pipeline.render import render_clip
from cineray.pipeline.request import ClipRequest, InputError

_FEWER_STEPS = re.compile(r"fewer-steps\((?P<steps>\d+)\)")
EQUAL_CLIPS_DB = 100.0  # stands for infinity in means; 8-bit frames that differ in one value are at about 90 dB


@dataclass(frozen=True, kw_only=True, slots=True)
class QualityRow:
    """One policy over all clips.

    Args:
        speedup: 1 / cost; cost is block evaluations as a share of those of the uncached clip, probes included.
        psnr_db: mean over clips, against the uncached clips; `worst_psnr_db` is the worst clip's.
    """

    policy: str
    num_clips: int
    cost: float
    speedup: float
    psnr_db: float
    worst_psnr_db: float


def check_policies(policies: Iterable[str], model: LoadedModel) -> None:
    """Raises InputError for a policy that the model cannot run."""
    for policy in policies:
        if not _FEWER_STEPS.fullmatch(policy):
            try:
                model.checkpoint.plan_cache(policy)
            except ValueError as error:
                raise InputError(str(error)) from None


def measure_quality(
    model: LoadedModel, requests: list[ClipRequest], policies: list[str], on_clip: Callable[[str, int, int], None]
) -> Iterator[QualityRow]:
    """Renders every clip uncached once and then with each policy; frames are compared before any encoding.

    Args:
        policies: as `--cache`, or `fewer-steps(N)`: N uncached steps.
        on_clip: called with (policy, clips done, clips).
    """
    reference = [frames for frames, _ in _render(model, requests, "none", on_clip)]
    for policy in policies:
        rendered = list(_render(model, requests, policy, on_clip))
        psnr = [
            min(psnr_db(frames, original), EQUAL_CLIPS_DB)
            for (frames, _), original in zip(rendered, reference, strict=True)
        ]
        cost = math.fsum(cost for _, cost in rendered) / len(rendered)
        yield QualityRow(
            policy=policy,
            num_clips=len(rendered),
            cost=round(cost, 4),
            speedup=round(1 / cost, 3),
            psnr_db=round(math.fsum(psnr) / len(psnr), 2),
            worst_psnr_db=round(min(psnr), 2),
        )


def _render(
    model: LoadedModel, requests: list[ClipRequest], policy: str, on_clip: Callable[[str, int, int], None]
) -> Iterator[tuple[np.ndarray, float]]:
    """(frames, cost) of each clip."""
    for number, request in enumerate(requests, 1):
        fewer = _FEWER_STEPS.fullmatch(policy)
        steps = int(fewer["steps"]) if fewer else request.num_inference_steps
        changed = replace(request, cache="none" if fewer else policy, num_inference_steps=steps)
        clip = render_clip(model, changed, lambda done, total: None)
        cost = clip.trace.summary()["cost"] if clip.trace else 1.0
        on_clip(policy, number, len(requests))
        yield clip.frames, cost * steps / request.num_inference_steps
