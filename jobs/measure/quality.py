"""Quality against cost: the same clips with and without a cache."""

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import numpy as np

from cineray.pipeline.loading.checkpoint import Checkpoint
from cineray.pipeline.loading.model import LoadedModel
from cineray.pipeline.media.compare import EQUAL_CLIPS_DB, psnr_db, ssim
from cineray.pipeline.media.output import SOUND
from cineray.pipeline.render import render_clip
from cineray.pipeline.request import ClipRequest, InputError

FEWER_STEPS = re.compile(r"fewer-steps\((?P<steps>\d+)\)")

ClipDone = Callable[[str, int, int], None]  # (policy, clips done, clips)


@dataclass(frozen=True, kw_only=True, slots=True)
class QualityRow:
    """One policy over all clips.

    Args:
        text: the policy with all its options.
        cost: block evaluations as a share of those of the uncached clip, probes included; mean over clips.
        speedup: 1 / cost.
        psnr_db, ssim: mean over clips, against the uncached clips; `worst_psnr_db` is the worst clip's.
        denoise_s: seconds that denoising a clip took here, mean over clips.
    """

    policy: str
    text: str
    num_clips: int
    cost: float
    speedup: float
    psnr_db: float
    worst_psnr_db: float
    ssim: float
    denoise_s: float


def refuse_sounds(checkpoint: Checkpoint, command: str) -> None:
    """
    Raises:
        InputError: the model's clips have no pixels to be compared.
    """
    if checkpoint.model.output == SOUND:
        raise InputError(f"{command}: {checkpoint.name} makes sounds, and quality is measured in pixels")


def policy_text(policy: str, model: LoadedModel) -> str:
    """A policy's whole text; `fewer-steps(N)` is its own.

    Raises:
        InputError: the model cannot run it.
    """
    if FEWER_STEPS.fullmatch(policy):
        return policy
    try:
        plan = model.checkpoint.plan_cache(policy)
    except ValueError as error:
        raise InputError(str(error)) from None
    return "none" if plan is None else plan.text


@dataclass(slots=True)
class QualityMeter:
    """Renders clips with policies and compares them with the uncached ones, which are rendered once.

    Frames are compared before any encoding.

    Args:
        on_clip: told of every clip that is rendered.
    """

    model: LoadedModel
    requests: list[ClipRequest]
    on_clip: ClipDone
    _reference: list[np.ndarray] = field(default_factory=list)
    _rows: dict[str, QualityRow] = field(default_factory=dict)  # by policy: nothing is measured twice
    _speedups: dict[tuple[str, int], float] = field(default_factory=dict)

    def measure(self, policy: str) -> QualityRow:
        """Renders with one policy and returns its row of the table.

        Args:
            policy: as `--cache`, or `fewer-steps(N)`: N uncached steps.
        """
        if policy in self._rows:
            return self._rows[policy]
        if not self._reference:
            self._reference = [clip.frames for clip in self._render("none", self.requests)]
        psnr, similar, cost, seconds = [], [], [], []
        for clip, original in zip(self._render(policy, self.requests), self._reference, strict=True):
            psnr.append(min(psnr_db(clip.frames, original), EQUAL_CLIPS_DB))
            similar.append(ssim(clip.frames, original))
            cost.append(clip.cost)
            seconds.append(clip.denoise_s)
        self._rows[policy] = QualityRow(
            policy=policy,
            text=policy_text(policy, self.model),
            num_clips=len(psnr),
            cost=round(_mean(cost), 4),
            speedup=round(1 / _mean(cost), 3),
            psnr_db=round(_mean(psnr), 2),
            worst_psnr_db=round(min(psnr), 2),
            ssim=round(_mean(similar), 4),
            denoise_s=round(_mean(seconds), 3),
        )
        return self._rows[policy]

    def speedup(self, policy: str, num_clips: int) -> float:
        """1 / cost over the first clips."""
        place = (policy, num_clips)
        if place not in self._speedups:
            self._speedups[place] = 1 / _mean([clip.cost for clip in self._render(policy, self.requests[:num_clips])])
        return self._speedups[place]

    def _render(self, policy: str, requests: list[ClipRequest]) -> Iterator["_Clip"]:
        fewer = FEWER_STEPS.fullmatch(policy)
        for number, request in enumerate(requests, 1):
            steps = int(fewer["steps"]) if fewer else request.num_inference_steps
            changed = replace(request, cache="none" if fewer else policy, num_inference_steps=steps)
            clip = render_clip(self.model, changed, lambda *_: None)
            cost = clip.trace.summary()["cost"] if clip.trace else 1.0
            self.on_clip(policy, number, len(requests))
            yield _Clip(clip.frames, cost * steps / request.num_inference_steps, clip.denoise_s)


@dataclass(frozen=True, slots=True)
class _Clip:
    frames: np.ndarray
    cost: float
    denoise_s: float


def _mean(values: list[float]) -> float:
    return math.fsum(values) / len(values)
