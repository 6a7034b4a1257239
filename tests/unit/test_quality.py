"""Quality against cost, on random weights: what must hold whatever the model."""

import numpy as np
import pytest
import torch
from more_models import clip_of

from cineray.caching.forecast import places_of
from cineray.caching.policies.fitted import place_steps
from cineray.caching.profile import FittedProfile, generic_profile
from cineray.jobs.measure.fewer_steps import FewerSteps, parse_fewer_steps
from cineray.jobs.measure.quality import QualityMeter, policy_text
from cineray.pipeline.denoise import denoise
from cineray.pipeline.media.compare import motion_psnr_db, psnr_db, ssim
from cineray.pipeline.render import prepare_clip
from cineray.pipeline.request import InputError


def test_psnr_of_known_errors():
    black = np.zeros((2, 4, 4, 3), np.uint8)
    assert psnr_db(black, black) == float("inf")
    assert psnr_db(black, black + 255) == 0.0
    assert psnr_db(black + 10, black) == pytest.approx(28.13, abs=0.01)


def test_ssim_of_flat_and_of_opposed_frames():
    """Flat frames have only the luminance term (2ab + c1) / (a^2 + b^2 + c1); opposed ones a negative covariance."""
    flat = np.full((2, 16, 16, 3), 100, np.uint8)
    assert ssim(flat, flat) == pytest.approx(1)
    c1 = 2.55**2
    assert ssim(flat, flat + 50) == pytest.approx((2 * 100 * 150 + c1) / (100**2 + 150**2 + c1))
    noise = np.random.default_rng(0).integers(0, 256, (1, 32, 32, 3), np.uint8)
    assert ssim(noise, 255 - noise) < -0.8


def test_ssim_is_that_of_a_plain_loop_over_windows():
    rng = np.random.default_rng(1)
    a = rng.integers(0, 256, (1, 14, 13, 3), np.uint8)
    b = np.clip(a.astype(int) + rng.integers(-30, 30, a.shape), 0, 255).astype(np.uint8)
    line = np.exp(-((np.arange(11) - 5) ** 2) / (2 * 1.5**2))
    weight = np.outer(line, line) / line.sum() ** 2
    values = []
    for top, left, channel in np.ndindex(4, 3, 3):
        x, y = (f[0, top : top + 11, left : left + 11, channel].astype(float) for f in (a, b))
        mx, my = (weight * x).sum(), (weight * y).sum()
        vx, vy, cov = ((weight * p).sum() for p in ((x - mx) ** 2, (y - my) ** 2, (x - mx) * (y - my)))
        c1, c2 = 2.55**2, 7.65**2
        values.append((2 * mx * my + c1) * (2 * cov + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2)))
    assert ssim(a, b) == pytest.approx(np.mean(values))


@pytest.mark.slow  # starts ffmpeg
def test_rows_compare_with_the_uncached_clip(loaded, new_request):
    model = loaded("wan")
    requests = [new_request(num_inference_steps=12, seed=s) for s in (1, 2)]
    seen = []
    meter = QualityMeter(model, requests, lambda *args: seen.append(args))
    off, cached, fewer = map(meter.measure, ["dicache(threshold=0)", "dicache(threshold=0.5)", "fewer-steps(6)"])
    assert (off.speedup, off.psnr_db, off.worst_psnr_db, off.ssim) == (1.0, 100.0, 100.0, 1.0)
    assert cached.speedup > 1.1
    assert cached.worst_psnr_db <= cached.psnr_db < 100
    assert cached.ssim < 1
    assert cached.vmaf is not None
    assert off.vmaf is not None
    assert 0 < cached.vmaf < off.vmaf <= 100
    assert len(cached.clips_vmaf) == 2
    assert (off.xpsnr_db, off.motion_psnr_db) == (100.0, 100.0)
    assert cached.xpsnr_db is not None
    assert 0 < cached.xpsnr_db < 100
    assert cached.text.startswith("dicache(threshold=0.5,probe_depth=1,")
    assert (fewer.cost, fewer.speedup, fewer.num_clips, fewer.text) == (0.5, 2.0, 2, "fewer-steps(6)")
    assert len(seen) == 8
    assert meter.measure("fewer-steps(6)") == fewer
    assert meter.speedup("fewer-steps(6)", num_clips=1) == meter.speedup("fewer-steps(6)", num_clips=1) == 2
    assert len(seen) == 9  # what is known is not rendered again


def test_an_unknown_policy_is_bad_input(loaded):
    model = loaded("wan")
    assert [policy_text(p, model) for p in ("fewer-steps(6)", "none")] == ["fewer-steps(6)", "none"]
    with pytest.raises(InputError, match="unknown policy 'dicash'"):
        policy_text("dicash", model)


def test_an_error_that_stays_is_no_flicker():
    random = np.random.default_rng(0)
    clip = random.integers(50, 200, (5, 12, 12, 3), dtype=np.uint8)
    error = random.integers(-20, 20, (1, 12, 12, 3))
    assert motion_psnr_db((clip + error).astype(np.uint8), clip) == float("inf")
    flickering = clip + error * np.array([1, -1, 1, -1, 1]).reshape(5, 1, 1, 1)
    steady_db, flicker_db = (
        psnr_db((clip + error).astype(np.uint8), clip),
        motion_psnr_db(flickering.astype(np.uint8), clip),
    )
    assert flicker_db is not None
    assert flicker_db == pytest.approx(steady_db - 20 * np.log10(2))  # each change is off by twice as much
    assert motion_psnr_db(clip[:1], clip[:1]) is None


@pytest.mark.parametrize("name", ["wan", "hunyuan", "wan22"])
def test_fewer_steps_at_chosen_times(loaded, new_request, name):
    """The scheduler steps from each of the chosen steps to the next, and ends where the whole schedule does."""
    model, request = loaded(name), new_request(num_inference_steps=20)
    fewer = parse_fewer_steps("fewer-steps(8,profile=generic)")
    assert fewer is not None
    whole = prepare_clip(model, fewer.request(request)).denoising
    clip = fewer.clip(whole, model)
    places = places_of(20, whole.scheduler.sigmas[:-1].tolist())
    kept = place_steps(generic_profile(FittedProfile).density, 8, places)
    assert clip.timesteps.tolist() == whole.timesteps[kept].tolist()
    assert clip.scheduler.sigmas.tolist() == [*whole.scheduler.sigmas[kept].tolist(), 0.0]
    for index, step in enumerate(kept):
        assert clip.expert_at(index).transformer is whole.expert_at(step).transformer
    latents = denoise(clip, lambda *_: None)
    assert latents.isfinite().all()
    all_steps = FewerSteps(20, "generic").clip(whole, model)
    assert torch.equal(denoise(all_steps, lambda *_: None), denoise(whole, lambda *_: None))


def test_times_can_be_chosen_of_a_flow_alone(loaded, new_request, tmp_path):
    model = loaded("dit")
    clip = prepare_clip(model, clip_of("dit", new_request, tmp_path, num_inference_steps=8)).denoising
    with pytest.raises(InputError, match="DDIMScheduler has no times to choose from"):
        FewerSteps(4, "generic").clip(clip, model)
    with pytest.raises(InputError, match="nor a file"):
        policy_text("fewer-steps(4,profile=nowhere.json)", model)
    assert policy_text("fewer-steps(4,profile=generic)", model).startswith("fewer-steps(4,profile=sha256=")
