"""Calibrates DiCache's skip costs: where over the steps the computed ones do most for the frames.

The schedule is searched offline on a few clips (SmoothCache, arXiv 2411.10510, has the idea of a calibrated schedule);
the probe corrects it online, clip by clip (DiCache, arXiv 2508.17356). The search renders the clips with fixed
schedules at a few speed-ups and compares frames with the uncached ones: a random coordinate search over the logarithm
of the skip costs at a few places, which keeps what raises the mean PSNR.
"""

import math
from collections.abc import Callable, MutableMapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

import numpy as np

from cineray.caching.plan import CachePlan
from cineray.caching.policies.dicache import DiCachePolicy, expected_cost
from cineray.caching.profile import DiCacheProfile, generic_profile, shipped_profile
from cineray.pipeline.loading.model import LoadedModel
from cineray.pipeline.media.compare import EQUAL_CLIPS_DB, psnr_db
from cineray.pipeline.render import RenderedClip, render_clip
from cineray.pipeline.request import ClipRequest

# Places of the knots over the steps, 0 to 1: dense at both ends, where single skips cost most (docs/caching.md)
KNOTS = (0.04, 0.1, 0.17, 0.26, 0.4, 0.6, 0.8, 0.9, 0.96, 1.0)
_WIDTHS = (0.3, 1.0, 2.0)  # of a trial's bump, in knots
_HEIGHTS = (0.25, 0.5, 1.0)  # of a trial's bump, in log weight
SPEEDUPS = (2.0, 2.75, 3.5)  # at which skip costs are compared
CURVE = (1.5, 1.75, 2.0, 2.25, 2.5, 2.75, 3.0, 3.5, 4.0)  # at which the result is measured
MIN_STEPS = 10  # fewer leave nothing to weigh: two computed steps at the start, one at the end
_CLIPS = ((1.0, 1.5), (1.0, 2.0), (1.0, 3.0))  # of gamma: HunyuanVideo and FLUX, Wan, in the official code; and wider

OnTrial = Callable[[int, float], None]  # (trials done, best mean PSNR so far in dB)


@dataclass(frozen=True, kw_only=True, slots=True)
class CurvePoint:
    """What a threshold gives on the calibration's clips."""

    threshold: float
    speedup: float
    psnr_db: float
    worst_psnr_db: float


class StepCostSearch:
    """Renders the calibration's clips over and over.

    Args:
        requests: all with the same number of steps.
        folder: for the profiles that are tried.
        known: points that need not be measured; new ones are put there.
    """

    def __init__(
        self, model: LoadedModel, requests: Sequence[ClipRequest], folder: Path, known: MutableMapping[str, CurvePoint]
    ) -> None:
        self._model = model
        self._requests = list(requests)
        self._trial = folder / "trial.json"
        self._known = known
        self._num_steps = requests[0].num_inference_steps
        self._reference = [self._render(request, "none").frames for request in self._requests]

    def first_guess(self, family: str, transformer: dict[str, object], source: str) -> DiCacheProfile:
        """The shipped skip costs, else the generic ones, with the best clip of gamma, corrected or not."""
        known = shipped_profile(DiCacheProfile, family, transformer) or generic_profile(DiCacheProfile)
        skip_costs, _ = known.at(self._num_steps)
        guess = DiCacheProfile(
            family=family,
            transformer=transformer,
            source=source,
            skip_costs=tuple(skip_costs),
            expected_change=self.expected_change(),
            gamma_clip=_CLIPS[0],
            threshold=known.threshold,
        )
        choices = product(_CLIPS, (False, True))
        guesses = [guess.model_copy(update={"gamma_clip": clip, "corrector": corrects}) for clip, corrects in choices]
        return max(guesses, key=lambda g: self._score(g, SPEEDUPS))

    def expected_change(self) -> tuple[float, ...]:
        """Relative change of the probe's output at each step, mean over the clips, conditional branch."""
        changes: list[list[float]] = [[] for _ in range(self._num_steps)]
        for request in self._requests:
            trace = self._render(request, "dicache(threshold=1e-12,look=step,profile=none)").trace
            assert trace is not None  # there is a cache
            for entry in trace.entries:
                if entry.branch == "cond" and entry.statistic is not None:
                    changes[entry.step].append(entry.statistic)
        means = [math.fsum(row) / len(row) if row else math.nan for row in changes]
        return tuple(float(f"{mean:.4g}") for mean in (means[1], *means[1:]))  # before the first step there is none

    def run(
        self, profile: DiCacheProfile, speedups: Sequence[float], num_trials: int, on_trial: OnTrial
    ) -> DiCacheProfile:
        """The best skip costs that were found, from those of `profile` on; the same ones each time."""
        return search_step_costs(profile, lambda tried: self._score(tried, speedups), num_trials, on_trial)

    def threshold_for(self, profile: DiCacheProfile, speedup: float) -> float:
        """The threshold at which clips that change as expected are so much faster."""
        low, high = 0.0, 64.0 * max(profile.expected_change)
        for _ in range(40):
            middle = (low + high) / 2
            low, high = (middle, high) if self._expected_speedup(profile, middle) < speedup else (low, middle)
        return float(f"{high:.4g}")

    def point(self, profile: DiCacheProfile, threshold: float, adaptivity: float = 1.0) -> CurvePoint:
        """Quality and speed of the clips with this profile."""
        key = f"{profile.digest} {threshold!r} {adaptivity!r}"
        if key not in self._known:
            self._known[key] = self._measure(profile, threshold, adaptivity)
        return self._known[key]

    def _measure(self, profile: DiCacheProfile, threshold: float, adaptivity: float) -> CurvePoint:
        policy = self._policy(profile, threshold, adaptivity)
        psnr, costs = [], []
        for request, reference in zip(self._requests, self._reference, strict=True):
            clip = self._render(request, policy)
            assert clip.trace is not None  # there is a cache
            psnr.append(min(psnr_db(clip.frames, reference), EQUAL_CLIPS_DB))
            costs.append(clip.trace.summary()["cost"])
        return CurvePoint(
            threshold=threshold,
            speedup=round(len(costs) / math.fsum(costs), 3),
            psnr_db=round(math.fsum(psnr) / len(psnr), 2),
            worst_psnr_db=round(min(psnr), 2),
        )

    def _score(self, profile: DiCacheProfile, speedups: Sequence[float]) -> float:
        points = [self.point(profile, self.threshold_for(profile, speedup), adaptivity=0.0) for speedup in speedups]
        return math.fsum(point.psnr_db for point in points) / len(points)

    def _policy(self, profile: DiCacheProfile, threshold: float, adaptivity: float) -> str:
        self._trial.write_text(profile.model_dump_json())
        return f"dicache(profile={self._trial},threshold={threshold!r},adaptivity={adaptivity})"

    def _expected_speedup(self, profile: DiCacheProfile, threshold: float) -> float:
        plan = self._model.checkpoint.plan_cache(self._policy(profile, threshold, 1.0))
        assert isinstance(plan, CachePlan)
        assert isinstance(plan.policy, DiCachePolicy)
        return 1 / expected_cost(plan.policy, self._num_steps, plan.probe_depth / plan.num_blocks)

    def _render(self, request: ClipRequest, cache: str) -> RenderedClip:
        return render_clip(self._model, replace(request, cache=cache), lambda *_: None)


def search_step_costs(
    profile: DiCacheProfile, score: Callable[[DiCacheProfile], float], num_trials: int, on_trial: OnTrial
) -> DiCacheProfile:
    """The profile with the skip costs of the highest score that a random coordinate search found.

    Each trial adds a bump to the logarithm of the best skip costs so far, and is kept if that raises the score.

    Args:
        profile: where the search begins.
        num_trials: bumps to try; the same ones each time.
        on_trial: called for the start, as trial 0, and after each trial.
    """
    random = np.random.default_rng(0)
    knots = np.interp(KNOTS, np.linspace(0, 1, len(profile.skip_costs)), np.log(profile.skip_costs))
    best = score(with_step_costs(profile, knots))
    on_trial(0, best)
    for trial in range(1, num_trials + 1):
        place, width = random.integers(len(KNOTS)), random.choice(_WIDTHS)
        bump = np.exp(-0.5 * ((np.arange(len(KNOTS)) - place) / width) ** 2)
        changed = knots + bump * random.choice(_HEIGHTS) * random.choice((-1, 1))
        changed_score = score(with_step_costs(profile, changed))
        if changed_score > best:
            best, knots = changed_score, changed
        on_trial(trial, best)
    return with_step_costs(profile, knots)


def with_step_costs(profile: DiCacheProfile, knots: np.ndarray) -> DiCacheProfile:
    """The profile with these log skip costs at `KNOTS`, scaled so that the expected clip's total change is kept."""
    expected = np.array(profile.expected_change)
    skip_costs = np.exp(np.interp(np.linspace(0, 1, len(expected)), KNOTS, knots))
    skip_costs *= expected.sum() / (skip_costs * expected).sum()
    return profile.model_copy(update={"skip_costs": tuple(float(f"{w:.4g}") for w in skip_costs)})
