"""Quality against cost: the same clips with and without a cache."""

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from cineray.jobs.measure import peers
from cineray.jobs.measure.clip_scores import Scorer, mean, scorer_of
from cineray.jobs.measure.fewer_steps import FewerSteps, parse_fewer_steps
from cineray.pipeline.loading.model import LoadedModel
from cineray.pipeline.render import DenoisedClip, decode_clip, denoise_prepared, prepare_clip
from cineray.pipeline.request import ClipRequest, InputError

NUM_TIMED_CLIPS = 3  # of each policy, in turn with the uncached ones

ClipDone = Callable[[str, int, int], None]  # (policy, clips done, clips)


@dataclass(frozen=True, kw_only=True, slots=True)
class QualityRow:
    """One policy over all clips.

    Args:
        text: the policy with all its options.
        cost: block evaluations as a share of those of the uncached clip, probes included; mean over clips.
        speedup: 1 / cost.
        denoise_s: seconds that denoising a clip took here, mean over clips.
        psnr_db, ssim: mean over clips, against the uncached clips; `worst_psnr_db` is the worst clip's. None for
            sounds, as all of pixels.
        psnr_ci95: 95 % interval of the mean PSNR, bootstrap over clips; None for one clip.
        vmaf, xpsnr_db: the same; None where ffmpeg has no libvmaf or xpsnr.
        motion_psnr_db: the same of what changes from frame to frame; None for pictures.
        clips_psnr_db, clips_vmaf: of each clip, in order, to compare policies pair by pair.
        snr_db, worst_snr_db, snr_ci95, clips_snr_db: of sounds, as those of PSNR.
        log_stft_db, stft_convergence: distances of sounds' spectra (`pipeline/media/spectra.py`), mean over clips.
        wall_ratio, cpu_ratio: denoising time over that of the uncached clip, which was rendered right before or after
            it in this process; median over the first `num_timed` clips.
    """

    policy: str
    text: str
    num_clips: int
    cost: float
    speedup: float
    denoise_s: float
    psnr_db: float | None = None
    worst_psnr_db: float | None = None
    ssim: float | None = None
    psnr_ci95: tuple[float, float] | None = None
    clips_psnr_db: tuple[float, ...] = ()
    wall_ratio: float | None = None
    cpu_ratio: float | None = None
    num_timed: int = 0
    vmaf: float | None = None
    xpsnr_db: float | None = None
    motion_psnr_db: float | None = None
    clips_vmaf: tuple[float, ...] = ()
    snr_db: float | None = None
    worst_snr_db: float | None = None
    snr_ci95: tuple[float, float] | None = None
    clips_snr_db: tuple[float, ...] = ()
    log_stft_db: float | None = None
    stft_convergence: float | None = None

    @property
    def is_of_sounds(self) -> bool:
        return self.psnr_db is None

    @property
    def kept_db(self) -> float:
        """What rows are ranked by: PSNR, or of sounds SNR."""
        kept = self.snr_db if self.is_of_sounds else self.psnr_db
        assert kept is not None
        return kept

    @property
    def worst_kept_db(self) -> float:
        """The worst clip's."""
        kept = self.worst_snr_db if self.is_of_sounds else self.worst_psnr_db
        assert kept is not None
        return kept

    @property
    def kept_ci95(self) -> tuple[float, float] | None:
        return self.snr_ci95 if self.is_of_sounds else self.psnr_ci95


def policy_text(policy: str, model: LoadedModel) -> str:
    """A policy's whole text; that of `fewer-steps(N)` is its own, a rival's its options.

    Raises:
        InputError: the model cannot run it.
    """
    if peers.is_peer(policy):
        return repr(peers.parse_peer(policy))
    fewer = parse_fewer_steps(policy)
    if fewer is not None:
        return fewer.text(model)
    try:
        plan = model.checkpoint.plan_cache(policy)
    except ValueError as error:
        raise InputError(str(error)) from None
    return "none" if plan is None else plan.text


@dataclass(slots=True)
class QualityMeter:
    """Renders clips with policies and compares them with the uncached ones, which are rendered once.

    Args:
        on_clip: told of every clip that is rendered.
    """

    model: LoadedModel
    requests: list[ClipRequest]
    on_clip: ClipDone
    num_timed: int = NUM_TIMED_CLIPS
    _reference: list[np.ndarray] = field(default_factory=list)
    _rows: dict[str, QualityRow] = field(default_factory=dict)  # by policy: nothing is measured twice
    _speedups: dict[tuple[str, int], float] = field(default_factory=dict)
    _products: float | None = None
    _scorer: Scorer = field(init=False)

    def __post_init__(self) -> None:
        self._scorer = scorer_of(self.model.checkpoint.model.output)

    def measure(self, policy: str) -> QualityRow:
        """Renders with one policy and returns its row of the table.

        Args:
            policy: as `--cache`, a rival, or `fewer-steps(N)`: N uncached steps.
        """
        if policy in self._rows:
            return self._rows[policy]
        if not self._reference:
            self._reference = [self._frames(clip, r) for clip, r in self._render("none", self.requests)]
        scores, timed, pairs = [], [], []
        for (clip, request), original in zip(self._render(policy, self.requests), self._reference, strict=True):
            scores.append(self._scorer.score(self._frames(clip, request), original))
            timed.append(clip)
            if len(pairs) < min(self.num_timed, len(self.requests)):
                pairs.append((clip, self._denoise("none", self.requests[len(pairs)])))
        cost = mean([clip.cost for clip in timed])
        self._rows[policy] = QualityRow(
            policy=policy,
            text=policy_text(policy, self.model),
            num_clips=len(timed),
            cost=round(cost, 4),
            speedup=round(1 / cost, 3),
            denoise_s=round(mean([clip.denoised.denoise_s for clip in timed]), 3),
            wall_ratio=_median_ratio([(c.denoised.denoise_s, bare.denoised.denoise_s) for c, bare in pairs]),
            cpu_ratio=_median_ratio([(c.cpu_s, bare.cpu_s) for c, bare in pairs]),
            num_timed=len(pairs),
            **self._scorer.columns(scores),
        )
        return self._rows[policy]

    def speedup(self, policy: str, num_clips: int) -> float:
        """1 / cost over the first clips."""
        place = (policy, num_clips)
        if place not in self._speedups:
            found = [clip.cost for clip, _ in self._render(policy, self.requests[:num_clips])]
            self._speedups[place] = 1 / mean(found)
        return self._speedups[place]

    def _render(self, policy: str, requests: list[ClipRequest]) -> Iterator[tuple["_Clip", ClipRequest]]:
        for number, request in enumerate(requests, 1):
            clip = self._denoise(policy, request)
            self.on_clip(policy, number, len(requests))
            yield clip, request

    def _frames(self, clip: "_Clip", request: ClipRequest) -> np.ndarray:
        return decode_clip(self.model, clip.denoised, request).frames

    def _denoise(self, policy: str, request: ClipRequest) -> "_Clip":
        if peers.is_peer(policy):
            full = self._products_of(request)
            with peers.attached(policy, self.model, request, full) as attached:
                clip = self._timed(replace(request, cache="none"))
            return replace(clip, cost=attached.cost)
        fewer = parse_fewer_steps(policy)
        if fewer is None:
            return self._timed(replace(request, cache=policy))
        clip = self._timed(fewer.request(request), fewer)
        return replace(clip, cost=fewer.steps / request.num_inference_steps)

    def _timed(self, request: ClipRequest, fewer: FewerSteps | None = None) -> "_Clip":
        prepared = prepare_clip(self.model, request)
        if fewer is not None:
            prepared = replace(prepared, denoising=fewer.clip(prepared.denoising, self.model))
        began = time.process_time()
        denoised = denoise_prepared(self.model, request, prepared, lambda *_: None)
        cost = denoised.trace.summary()["cost"] if denoised.trace else 1.0
        return _Clip(denoised, cost, time.process_time() - began)

    def _products_of(self, request: ClipRequest) -> float:
        """Products of the blocks' layers in an uncached call of the transformer, by which rivals' costs are counted."""
        if self._products is None:
            short = replace(request, cache="none", num_inference_steps=2)
            self._products = peers.products_per_call(self.model, lambda: self._timed(short))
        return self._products


def _median_ratio(pairs: Sequence[tuple[float, float]]) -> float | None:
    return round(statistics.median(one / other for one, other in pairs), 4) if pairs else None


@dataclass(frozen=True, slots=True)
class _Clip:
    denoised: DenoisedClip
    cost: float
    cpu_s: float
