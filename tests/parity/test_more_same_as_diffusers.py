"""More of cineray's loops against the pipelines' `__call__`: the same seed gives the same bits (float32, CPU)."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from more_models import MORE_MODELS, clip_of
from PIL import Image

from cineray.jobs.output.step_keeper import ClipPreempted, StepKeeper
from cineray.pipeline.gang import SOLO
from cineray.pipeline.loading.checkpoint import open_checkpoint
from cineray.pipeline.loading.model import LoadOptions, load_model
from cineray.pipeline.media.control import control_frames, mask_frames
from cineray.pipeline.render import decode_clip, denoise_clip, render_clip
from cineray.pipeline.resume.encoded_prompts import encode_prompt, read_encoded

STEPS = 6
MARK = "0123456789ab"
ALIKE = ("hunyuan_concat", "hunyuan15_image", "wan22_image", "ti2v_image")  # cached as their text-to-video kin are
SOME_AND_ALIKE = [pytest.param(name, marks=pytest.mark.exhaustive) if name in ALIKE else name for name in MORE_MODELS]


def _is_dear(cache, name):
    """HunyuanVideo 1.5's 1,985 tokens of text take longest, with one cache as with the next."""
    return name in ALIKE or (name == "hunyuan15" and not cache.startswith("dicache"))


# latent frames that `output_type="latent"` leaves out, frames that the pipeline makes and leaves out
NOT_SHOWN = {"hunyuan_concat": (1, 4)}


def quiet(done, total):
    """Tells nobody."""


def theirs(name, model, request, output_type):
    """What the model's own pipeline makes of a request."""
    arguments = {
        "prompt": request.prompt,
        "width": request.width,
        "height": request.height,
        "num_frames": request.num_frames + NOT_SHOWN.get(name, (0, 0))[1],
        "num_inference_steps": request.num_inference_steps,
        "guidance_scale": request.guidance_scale,
        "negative_prompt": request.negative_prompt,
        "generator": torch.Generator("cpu").manual_seed(request.seed),
        "output_type": output_type,
    }
    if request.image is not None:
        arguments["image"] = Image.open(request.image).convert("RGB")
    if name == "vace":
        arguments["reference_images"] = [Image.open(path).convert("RGB") for path in request.reference_images] or None
        arguments["video"], arguments["mask"] = control_frames(request), mask_frames(request)
    if request.guidance_scale_2 is not None:
        arguments["guidance_scale_2"] = request.guidance_scale_2
    for argument in {
        "flux": ["num_frames", "negative_prompt"],
        "dit": ["num_frames", "negative_prompt", "width", "height", "prompt"],
        "stable_audio": ["num_frames", "width", "height"],
        "hunyuan15": ["guidance_scale"],
        "hunyuan15_image": ["guidance_scale", "width", "height"],  # the size is the picture's
    }.get(name, []):
        del arguments[argument]
    if name == "dit":
        arguments["class_labels"] = model.pipe.get_label_ids([request.prompt])
    if name.startswith("hunyuan15"):
        model.pipe.guider = model.pipe.guider.new(guidance_scale=request.guidance_scale)
    if name == "stable_audio":
        arguments["audio_end_in_s"] = request.seconds
    return model.pipe(**arguments, return_dict=False)[0]


@pytest.fixture(params=MORE_MODELS)
def name(request):
    return request.param


def pixels_of(name, model, request):
    """Their frames as ours are."""
    if name == "dit":
        made = theirs(name, model, request, "np")
    elif name == "stable_audio":
        sound = theirs(name, model, request, "np")[0]
        return (np.clip(sound, -1, 1) * np.float32(32767)).round().astype(np.int16).T
    else:
        made = theirs(name, model, request, "np")
        made = made if name == "flux" else made[0]
    return (np.clip(made, 0, 1) * 255).round().astype(np.uint8)


def test_the_same_bits(loaded, new_request, tmp_path, name):
    model = loaded(name)
    request = clip_of(name, new_request, tmp_path, num_inference_steps=STEPS, seed=11)
    ours = render_clip(model, request, quiet)
    assert ours.latents.abs().max() > 0.1  # a loop that did nothing would agree too
    assert np.array_equal(ours.frames, pixels_of(name, model, request))
    assert model.checkpoint.model.output.misfit(ours.frames, request) is None
    if name != "dit":  # it gives no latents
        shown = ours.latents[:, :, NOT_SHOWN.get(name, (0, 0))[0] :] if ours.latents.ndim == 5 else ours.latents
        assert torch.equal(shown, theirs(name, model, request, "latent"))


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("flux", {"width": 48, "guidance_scale": 2.0, "num_inference_steps": 1}),
        ("dit", {"guidance_scale": 1.0, "prompt": "hen"}),
        ("stable_audio", {"guidance_scale": 1.0, "seconds": 0.5}),
        ("stable_audio", {"negative_prompt": "noise"}),
        ("wan22", {"guidance_scale_2": None, "negative_prompt": "gray"}),
        ("wan22", {"guidance_scale": 1.0}),
        ("hunyuan15", {"prompt": "a red circle", "guidance_scale": 1.0, "num_frames": 1}),
        ("hunyuan15", {"negative_prompt": 'white "no"', "width": 48}),
        ("hunyuan15_image", {"guidance_scale": 2.0, "negative_prompt": "white"}),
    ],
)
def test_the_same_bits_with_other_settings(loaded, new_request, tmp_path, name, changes):
    model = loaded(name)
    request = clip_of(name, new_request, tmp_path, **{"num_inference_steps": 3, **changes})
    assert np.array_equal(render_clip(model, request, quiet).frames, pixels_of(name, model, request))


@pytest.mark.parametrize("name", SOME_AND_ALIKE)
def test_a_clip_resumes_bit_for_bit(loaded, new_request, tmp_path, name):
    model, path = loaded(name), tmp_path / f"1.{MARK}.safetensors"
    request = clip_of(name, new_request, tmp_path, num_inference_steps=STEPS)
    whole = denoise_clip(model, request, quiet).latents
    for stop_at in (1, 4):
        asked = iter([False] * (stop_at - 1))
        with pytest.raises(ClipPreempted):
            denoise_clip(
                model, request, quiet, keeper=StepKeeper(path, MARK, SOLO, 1e9, lambda asked=asked: next(asked, True))
            )
        steps = []
        keeper = StepKeeper(path, MARK, SOLO, 1e9, lambda: False)
        clip = denoise_clip(model, request, lambda done, total, s=steps: s.append(done), keeper=keeper)
        assert steps == list(range(stop_at + 1, STEPS + 1))
        assert torch.equal(clip.latents, whole)
        path.unlink()


def test_stable_audio_with_its_own_scheduler(loaded, new_request, tmp_path):
    """Its noise comes from torchsde, an optional package."""
    from diffusers import CosineDPMSolverMultistepScheduler

    model, path = loaded("stable_audio"), tmp_path / f"1.{MARK}.safetensors"
    pipe = type(model.pipe)(**{**model.pipe.components, "scheduler": CosineDPMSolverMultistepScheduler()})
    pipe.set_progress_bar_config(disable=True)
    model = replace(model, pipe=pipe)
    request = clip_of("stable_audio", new_request, tmp_path, num_inference_steps=STEPS, seed=7)
    whole = render_clip(model, request, quiet)
    assert np.array_equal(whole.frames, pixels_of("stable_audio", model, request))
    asked = iter([False] * 2)
    with pytest.raises(ClipPreempted):
        denoise_clip(model, request, quiet, keeper=StepKeeper(path, MARK, SOLO, 1e9, lambda: next(asked, True)))
    steps = []
    keeper = StepKeeper(path, MARK, SOLO, 1e9, lambda: False)
    assert torch.equal(
        denoise_clip(model, request, lambda done, _: steps.append(done), keeper=keeper).latents, whole.latents
    )
    assert steps == [4, 5, 6]


def test_stages_that_hold_only_their_parts_make_the_same_clip(checkpoint_folder, new_request, tmp_path, name):
    request = clip_of(name, new_request, tmp_path, num_inference_steps=2)
    checkpoint, options = open_checkpoint(str(checkpoint_folder(name))), LoadOptions()
    known = checkpoint.model
    whole = render_clip(load_model(checkpoint, options), request, quiet)
    finisher = load_model(checkpoint, options, skip_components=known.denoiser_parts)
    rank = load_model(checkpoint, options, skip_components=(*known.encoder_parts, *known.decoder_parts))
    assert all(getattr(finisher.pipe, part, None) is None for part in known.denoiser_parts)
    assert all(getattr(rank.pipe, part, None) is None for part in (*known.encoder_parts, *known.decoder_parts))
    encode_prompt(finisher, request, tmp_path / "p.safetensors")
    clip = denoise_clip(rank, request, quiet, encoded=read_encoded(tmp_path / "p.safetensors").tensors)
    assert torch.equal(clip.latents, whole.latents)
    assert np.array_equal(decode_clip(finisher, clip, request).frames, whole.frames)


@pytest.mark.parametrize(
    ("cache", "name"),
    [
        pytest.param(cache, name, marks=pytest.mark.exhaustive) if _is_dear(cache, name) else (cache, name)
        for cache in ("dicache(threshold=1.0)", "interval(interval=2)", "fitted(speedup=2)")
        for name in MORE_MODELS
    ],
)
def test_a_clip_is_cached_and_as_before_without(loaded, new_request, tmp_path, monkeypatch, name, cache):
    model = loaded(name)
    if name.startswith("hunyuan15"):  # whose 1,000 tokens of text take longest
        monkeypatch.setattr(model.pipe, "tokenizer_max_length", 16)
    request = clip_of(name, new_request, tmp_path, num_inference_steps=16)
    plain = denoise_clip(model, request, quiet).latents
    cached = denoise_clip(model, replace(request, cache=cache), quiet)
    assert cached.trace is not None
    assert cached.trace.summary()["skipped_steps"] > 0
    assert {entry.branch for entry in cached.trace.entries} == set(model.checkpoint.model.branches)
    assert {entry.sample for entry in cached.trace.entries} == {0}
    assert not torch.equal(cached.latents, plain)
    assert torch.equal(denoise_clip(model, request, quiet).latents, plain)
