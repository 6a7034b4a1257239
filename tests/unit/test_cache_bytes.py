"""The forecast of a cache's memory equals what it holds."""

import pytest
from more_models import MORE_MODELS, clip_of

from cineray.pipeline.caches.memory import forecast_cache_bytes
from cineray.pipeline.loading.checkpoint import open_checkpoint
from cineray.pipeline.render import denoise_clip, render_clip

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("name", ["wan", "hunyuan"])
@pytest.mark.parametrize(
    "cache",
    [
        "dicache(threshold=0.5)",
        "dicache(threshold=0.5,keep_every=2)",
        "dicache-paper(threshold=0.05)",
        "dicache(threshold=0.5,alignment=none)",
        "fbcache",
        "interval(interval=2)",
        "interval(interval=2,alignment=l1,probe_depth=1)",
        "none",
    ],
)
def test_forecast_equals_what_is_held(loaded, new_request, name, cache):
    model = loaded(name)
    for guidance_scale in (4.0, 1.0):
        request = new_request(cache=cache, guidance_scale=guidance_scale, num_inference_steps=8, width=64)
        clip = render_clip(model, request, lambda done, total: None)
        held = clip.trace.held_bytes if clip.trace else 0
        assert forecast_cache_bytes(model.checkpoint, request, element_bytes=4) == held


@pytest.mark.parametrize("name", ["wan", "hunyuan", *MORE_MODELS])
def test_of_whole_steps_the_latents_are_held(loaded, new_request, tmp_path, name):
    model, changes = loaded(name), {"cache": "fitted(speedup=2)", "num_inference_steps": 16}
    request = clip_of(name, new_request, tmp_path, **changes) if name in MORE_MODELS else new_request(**changes)
    clip = denoise_clip(model, request, lambda done, total: None)
    held, forecast = clip.trace.held_bytes, forecast_cache_bytes(model.checkpoint, request, 2, num_ranks=2)
    # a given first frame is a token's latents that no step makes, and one token of a sound says how long it is
    assert 0 < forecast / 2 <= held <= forecast
    assert held == forecast or name in ("hunyuan_replace", "stable_audio")


def test_teacache_holds_its_signal_where_it_has_tokens(loaded, new_request):
    request = new_request(cache="teacache(threshold=0.5,coefficients=1:0)", num_inference_steps=8)
    model = loaded("hunyuan")
    clip = render_clip(model, request, lambda done, total: None)
    assert forecast_cache_bytes(model.checkpoint, request, element_bytes=4) == clip.trace.held_bytes


def test_a_rank_holds_its_share_and_layers_are_not_forecast(tmp_path, new_request):
    checkpoint = open_checkpoint("tiny-wan")
    clip = new_request(cache="dicache", width=64, height=64, num_frames=17)
    assert forecast_cache_bytes(checkpoint, clip, 2, num_ranks=1) == 2 * 5 * 80 * 128 * 2
    assert forecast_cache_bytes(checkpoint, clip, 2, num_ranks=3) == 2 * 5 * 27 * 128 * 2
    path = tmp_path / "schedule.json"
    path.write_text('{"attn1": [1, 0, 1, 1]}')
    assert forecast_cache_bytes(checkpoint, new_request(cache=f"smoothcache:{path}"), 2) is None
