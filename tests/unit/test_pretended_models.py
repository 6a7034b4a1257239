"""Models that are one class and one line of a registry: they render, resume, are cached and are shared by stages."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from pretended import LESS_GUIDANCE, PRETENDED

from cineray.jobs.output.record import fingerprint_of, render_options
from cineray.jobs.output.step_keeper import ClipPreempted, StepKeeper
from cineray.pipeline.adapters import MODELS
from cineray.pipeline.gang import SOLO
from cineray.pipeline.loading.checkpoint import open_checkpoint
from cineray.pipeline.loading.model import LoadOptions, load_model
from cineray.pipeline.render import decode_clip, denoise_clip, prepare_clip, render_clip
from cineray.pipeline.request import InputError
from cineray.pipeline.resume.encoded_prompts import encode_prompt, read_encoded

pytestmark = pytest.mark.slow

STEPS = 8
CLIP = "0123456789ab"


def quiet(done, total):
    """Tells nobody."""


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Name -> checkpoint, each opened with a registry of its own."""
    found = {}
    for name, (build, models) in PRETENDED.items():
        folder = tmp_path_factory.mktemp(name)
        build().save_pretrained(folder)
        found[name] = open_checkpoint(str(folder), models)
    return found


@pytest.fixture(scope="module")
def pretended(checkpoints):
    return {name: load_model(checkpoint, LoadOptions()) for name, checkpoint in checkpoints.items()}


@pytest.fixture
def request_(new_request):
    return new_request(num_inference_steps=STEPS)


def boundary_of(model, request):
    return prepare_clip(model, request).denoising.experts[-1].first_step


def test_two_experts_render_what_their_pipeline_renders(pretended, request_):
    model = pretended["experts"]
    assert 0 < boundary_of(model, request_) < STEPS
    theirs = model.pipe(
        prompt=request_.prompt,
        width=request_.width,
        height=request_.height,
        num_frames=request_.num_frames,
        num_inference_steps=STEPS,
        guidance_scale=request_.guidance_scale,
        guidance_scale_2=request_.guidance_scale - LESS_GUIDANCE,
        generator=torch.Generator("cpu").manual_seed(request_.seed),
        output_type="latent",
    ).frames
    assert torch.equal(render_clip(model, request_, quiet).latents, theirs)


def test_a_model_that_is_not_in_the_registry_is_refused(checkpoints):
    wan_alone = {"WanTransformer3DModel": MODELS["WanTransformer3DModel"]}
    with pytest.raises(InputError, match=r"it is a Wan 2\.2 checkpoint"):
        open_checkpoint(checkpoints["experts"].source, wan_alone)
    with pytest.raises(InputError, match="pipeline 'WanPipeline' is not supported; supported: HunyuanVideoPipeline"):
        open_checkpoint(checkpoints["paced"].source, {k: m for k, m in MODELS.items() if "Hunyuan" in k})


def keeper(path, num_steps):
    """Stops after so many more steps."""
    asked = iter([False] * (num_steps - 1))
    return StepKeeper(path, CLIP, SOLO, 1e9, lambda: next(asked, True))


@pytest.mark.parametrize("name", PRETENDED)
def test_they_resume_bit_for_bit_on_either_side_of_a_boundary(pretended, request_, tmp_path, name):
    model, path = pretended[name], tmp_path / f"1.{CLIP}.safetensors"
    whole = denoise_clip(model, request_, quiet).latents
    boundary = boundary_of(model, request_)
    for stop_at in {1, max(1, boundary - 1), max(1, boundary), boundary + 1}:
        with pytest.raises(ClipPreempted):
            denoise_clip(model, request_, quiet, keeper=keeper(path, stop_at))
        steps = []
        clip = denoise_clip(model, request_, lambda done, total, s=steps: s.append(done), keeper=keeper(path, 99))
        assert steps == list(range(stop_at + 1, STEPS + 1))
        assert torch.equal(clip.latents, whole)
        path.unlink()


@pytest.mark.parametrize("name", PRETENDED)
@pytest.mark.parametrize("cache", ["interval(interval=2)", "taylorseer(interval=2)", "dicache(threshold=1.0)"])
def test_they_are_cached_and_off_again(pretended, request_, name, cache):
    model = pretended[name]
    request = replace(request_, num_inference_steps=20)
    plain = render_clip(model, request, quiet)
    cached = render_clip(model, replace(request, cache=cache), quiet)
    trace = cached.trace
    assert [e.step for e in trace.entries if e.branch == "cond"] == list(range(20))
    skipped, boundary = {e.step for e in trace.entries if not e.compute}, boundary_of(model, request)
    assert boundary not in skipped  # an expert that takes over has nothing to forecast from
    assert any(step > boundary for step in skipped)
    assert boundary == 0 or any(step < boundary for step in skipped)
    assert not torch.equal(cached.latents, plain.latents)
    assert torch.equal(render_clip(model, request, quiet).latents, plain.latents)


def test_the_frame_rate_is_in_the_fingerprint_of_the_model_that_names_it(pretended, request_):
    options = render_options(LoadOptions(), lossless=False)
    for name, is_covered in (("experts", False), ("paced", True)):
        model, requests = pretended[name], [replace(request_, fps=fps) for fps in (8, 24)]
        marks = {fingerprint_of(request, model.checkpoint, model.digest, options) for request in requests}
        assert len(marks) == 1 + is_covered
        slow, fast = (render_clip(model, request, quiet).frames for request in requests)
        assert np.array_equal(slow, fast) != is_covered
    again = render_clip(pretended["paced"], requests[0], quiet).frames
    assert np.array_equal(again, render_clip(pretended["paced"], requests[0], quiet).frames)


@pytest.mark.parametrize("name", ["wan_i2v", "hunyuan", *PRETENDED])
def test_stages_that_hold_only_their_parts_make_the_same_clip(
    checkpoint_folder, checkpoints, new_request, tmp_path, name
):
    """A finisher has no transformer; a rank has neither encoders nor VAE, for a picture's condition neither."""
    from PIL import Image

    Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 56, 3), dtype=np.uint8)).save(tmp_path / "1.png")
    image = {"image": str(tmp_path / "1.png")} if name == "wan_i2v" else {}
    request = new_request(num_inference_steps=2, **image)
    checkpoint = checkpoints[name] if name in PRETENDED else open_checkpoint(str(checkpoint_folder(name)))
    known, options = checkpoint.model, LoadOptions()
    whole = render_clip(load_model(checkpoint, options), request, quiet)
    finisher = load_model(checkpoint, options, skip_components=known.denoiser_parts)
    rank = load_model(checkpoint, options, skip_components=(*known.encoder_parts, *known.decoder_parts))
    assert [part for part in known.denoiser_parts if getattr(finisher.pipe, part) is not None] == []
    parts = (*known.encoder_parts, *known.decoder_parts)
    assert [part for part in parts if getattr(rank.pipe, part, None) is not None] == []
    encode_prompt(finisher, request, tmp_path / "p.safetensors")
    encoded = read_encoded(tmp_path / "p.safetensors").tensors
    clip = denoise_clip(rank, request, quiet, encoded=encoded)
    assert torch.equal(clip.latents, whole.latents)
    assert np.array_equal(decode_clip(finisher, clip, request).frames, whole.frames)
