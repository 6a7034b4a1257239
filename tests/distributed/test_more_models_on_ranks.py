"""A gang of two renders the pictures and clips of more models as one process does."""

from dataclasses import replace

import pytest
import torch
from gang_renders import render_alone, render_on
from more_models import clip_of

from cineray.caching.policies.smoothcache import LayerSchedule, dump_schedule
from cineray.pipeline.gang import MIN_TOKENS_PER_RANK
from cineray.pipeline.loading.checkpoint import open_checkpoint

CACHE = "dicache(threshold=0.5)"
# relative to the largest: a ring adds up in another order; 4e-7 was measured for Wan after 50 steps
RING_BOUND = 1e-4


def requests_of(name, new_request, tmp_path):
    def clip(**changes):
        sizes = {"width": 128, "height": 64} if "ti2v" in name else {}
        if name == "open_sora":  # 16 places of five latent frames
            return new_request(width=16, height=16, num_frames=17, guidance_scale=7.0, fps=24, **changes)
        return clip_of(name, new_request, tmp_path, **sizes, **changes)

    return [clip(num_inference_steps=8), clip(num_inference_steps=8, cache=CACHE, seed=5)]


NAMES = (
    "flux",
    "hunyuan_concat",
    "hunyuan_replace",
    "hunyuan15",
    "hunyuan15_image",
    "wan22",
    "wan22_image",
    "ti2v",
    "ti2v_image",
    "vace",
    "dit",
    "stable_audio",
    "open_sora",
)


ALIKE = ("hunyuan_concat", "hunyuan15_image", "wan22_image", "ti2v")  # another of NAMES runs the same code on ranks


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.exhaustive) if name in ALIKE else name for name in NAMES]
)
def test_two_ranks_make_the_bits_of_one(ranks, checkpoint_folder, new_request, tmp_path, name):
    folder, requests = checkpoint_folder(name), requests_of(name, new_request, tmp_path)
    # of fewer tokens every rank holds all
    assert open_checkpoint(str(folder)).num_shared_tokens(requests[0]) >= 2 * MIN_TOKENS_PER_RANK
    alone = render_alone(ranks, folder, requests)
    assert any(not entry.compute for entry in alone[1].entries)
    for theirs, ours in zip(alone, render_on(ranks, "ulysses2", folder, requests), strict=True):
        assert torch.equal(theirs.latents, ours.latents)
        assert theirs.decisions == ours.decisions
        assert (theirs.frames == ours.frames).all()
    (ring,) = render_on(ranks, "ring2", folder, requests[:1])
    assert (ring.latents - alone[0].latents).abs().max() < RING_BOUND * alone[0].latents.abs().max()
    if any(family in name for family in ("wan", "ti2v", "vace", "hunyuan15")):
        (half,) = render_on(ranks, "cfg2", folder, requests[:1])
        assert torch.equal(half.latents, alone[0].latents)


STACKED = ("dit", "stable_audio", "open_sora")  # both branches in the batch of one call


@pytest.mark.parametrize("name", STACKED)
def test_four_ranks_skip_layers_and_whole_steps_alike(ranks, checkpoint_folder, new_request, tmp_path, name):
    """By policies that look at no probe. TaylorSeer's authors have no settings for these models."""
    folder, num_steps = checkpoint_folder(name), 30
    layers = open_checkpoint(str(folder)).model.layout.layers
    rows = {layer: tuple(step % 3 == 0 for step in range(num_steps)) for layer in layers}
    (tmp_path / "smooth.json").write_text(dump_schedule(LayerSchedule(rows=rows)))
    policies = (f"smoothcache:{tmp_path / 'smooth.json'}", "fitted(speedup=2)")
    first = requests_of(name, new_request, tmp_path)[0]
    requests = [replace(first, cache=policy, num_inference_steps=num_steps) for policy in policies]
    alone = render_alone(ranks, folder, requests)
    for theirs, ours, policy in zip(alone, render_on(ranks, "ulysses4", folder, requests), policies, strict=True):
        assert any(not entry.compute for entry in theirs.entries), policy
        assert theirs.decisions == ours.decisions
        assert torch.equal(theirs.latents, ours.latents)


@pytest.mark.parametrize(
    ("layout", "sizes"),
    [
        ("ulysses4", {"num_frames": 1, "width": 16, "height": 16}),  # 16 places of one frame
        ("ulysses4", {"num_frames": 17, "width": 20, "height": 16}),  # 20, each of five frames: 5 for each rank
        ("ulysses2", {"num_frames": 17, "width": 18, "height": 16}),  # 20 as well, of which the last are half empty
        ("ulysses4", {"num_frames": 17, "width": 8, "height": 8}),  # 4, which every rank holds
    ],
)
def test_open_sora_in_other_sizes(ranks, checkpoint_folder, new_request, layout, sizes):
    request = new_request(num_inference_steps=4, guidance_scale=7.0, fps=24, cache="interval(interval=2)", **sizes)
    folder = checkpoint_folder("open_sora")
    (theirs,), (ours,) = render_alone(ranks, folder, [request]), render_on(ranks, layout, folder, [request])
    assert theirs.decisions == ours.decisions
    assert torch.equal(theirs.latents, ours.latents)
