"""Wan VACE: reference images, control videos and masks; a cache that leaves out what makes hints."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from every_model import build, call
from more_models import build_vace, clip_of
from PIL import Image

import cineray
from cineray.caching.policies.taylorseer import TaylorSeerConfig
from cineray.jobs.cli.main import main
from cineray.jobs.output.record import fingerprint_of, render_options
from cineray.pipeline.adapters import MODELS
from cineray.pipeline.adapters.cache_plan import plan_cache
from cineray.pipeline.caches.layers import layers_of
from cineray.pipeline.loading.options import LoadOptions
from cineray.pipeline.media.control import control_frames, mask_frames
from cineray.pipeline.media.inputs import Pictures
from cineray.pipeline.media.picture import PictureError
from cineray.pipeline.media.video import write_video
from cineray.pipeline.render import denoise_clip, render_clip

pytestmark = pytest.mark.slow
KIND = "WanVACETransformer3DModel"


def quiet(_done, _total):
    """Tells nobody."""


def noise(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


@pytest.fixture
def control(tmp_path):
    """A control video of 7 frames of another size than the clip, a mask of as many, and a still mask."""
    write_video(noise(7, 40, 48, 3), tmp_path / "control.mp4", 8, {}, lossless=True)
    half = np.zeros((7, 40, 48, 3), np.uint8)
    half[:, :, 24:] = 255
    write_video(half, tmp_path / "mask.mp4", 8, {}, lossless=True)
    Image.fromarray(half[0]).save(tmp_path / "mask.png")
    return tmp_path


def request_of(new_request, folder, **changes):
    files = {"control_video": str(folder / "control.mp4"), "control_mask": str(folder / "mask.mp4")}
    return clip_of("vace", new_request, folder, **{"num_inference_steps": 3, **files, **changes})


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"control_mask": None, "reference_images": ()},
        {"image_fit": "crop", "guidance_scale": 1.0},
        {"conditioning_scale": 0.5},
        {"control_video": None, "control_mask": None, "reference_images": ()},
    ],
    ids=["all", "video", "cropped", "scaled", "text"],
)
def test_a_controlled_clip_has_the_bits_of_diffusers_pipeline(loaded, new_request, control, changes):
    model, request = loaded("vace"), request_of(new_request, control, **changes)
    if not changes.get("reference_images", True):
        request = replace(request, reference_images=())
    ours = render_clip(model, request, quiet)
    arguments = {
        "prompt": request.prompt,
        "video": control_frames(request),
        "mask": mask_frames(request),
        "reference_images": [Image.open(path) for path in request.reference_images] or None,
        "height": request.height,
        "width": request.width,
        "num_frames": request.num_frames,
        "num_inference_steps": 3,
        "guidance_scale": request.guidance_scale,
        "conditioning_scale": 1.0 if request.conditioning_scale is None else request.conditioning_scale,
        "return_dict": False,
    }
    seed = torch.Generator().manual_seed(request.seed)
    theirs = model.pipe(**arguments, generator=seed, output_type="latent")[0]
    assert torch.equal(ours.latents, theirs)
    frames = model.pipe(**arguments, generator=torch.Generator().manual_seed(request.seed), output_type="np")[0][0]
    assert np.array_equal(ours.frames, (np.clip(frames, 0, 1) * 255).round().astype(np.uint8))
    assert ours.frames.shape == (5, 32, 32, 3)


def test_each_file_changes_the_clip_and_a_still_mask_is_that_of_each_frame(loaded, new_request, control):
    model, request = loaded("vace"), request_of(new_request, control)

    def latents(**changes):
        return denoise_clip(model, replace(request, **changes), quiet).latents

    whole = latents()
    for changes in ({"control_mask": None}, {"control_mask": None, "control_video": None}, {"image_fit": "pad"}):
        assert not torch.equal(latents(**changes), whole)
    assert torch.equal(latents(conditioning_scale=1.0), whole)
    assert not torch.equal(latents(conditioning_scale=0.9), whole)
    assert latents(reference_images=()).shape[2] == whole.shape[2] - 1
    assert torch.equal(latents(control_mask=str(control / "mask.png")), whole)


def test_fingerprints_follow_what_the_files_hold_and_not_their_names(loaded, new_request, control):
    model, pictures = loaded("vace"), Pictures()
    chosen, request = render_options(LoadOptions(), lossless=False), request_of(new_request, control)

    def mark(**changes):
        pinned = pictures.pinned(replace(request, **changes))
        return fingerprint_of(pinned, model.checkpoint, model.digest, chosen)

    shutil.copy(control / "control.mp4", control / "copy.mp4")
    write_video(noise(7, 40, 48, 3, seed=1), control / "other.mp4", 8, {}, lossless=True)
    whole = mark()
    assert mark(control_video=str(control / "copy.mp4")) == mark(conditioning_scale=1.0) == whole
    marks = [
        mark(control_video=str(control / "other.mp4")),
        mark(control_mask=None),
        mark(conditioning_scale=0.5),
        mark(reference_images=()),
        mark(reference_images=request.reference_images * 2),
        mark(image_fit="crop"),
        mark(reference_images=(), control_video=None, control_mask=None),
        whole,
    ]
    assert len(set(marks)) == len(marks)
    with pytest.raises(ValueError, match="no fingerprint before its control files were looked at"):
        fingerprint_of(request, model.checkpoint, model.digest, chosen)


def test_a_file_that_was_changed_since_is_not_rendered_from(loaded, new_request, control):
    pinned = Pictures().pinned(request_of(new_request, control))
    write_video(noise(7, 40, 48, 3, seed=2), control / "control.mp4", 8, {}, lossless=True)
    with pytest.raises(PictureError, match=r"control\.mp4' was changed after it was checked"):
        denoise_clip(loaded("vace"), pinned, quiet)


def test_what_cannot_be_a_control_is_a_line(new_request, control):
    (control / "text.mp4").write_text("no video")
    write_video(noise(3, 40, 48, 3), control / "short.mp4", 8, {})
    pictures = Pictures()

    def problems(**changes):
        return pictures.control_problems(request_of(new_request, control, **changes), 5)

    assert problems() == []
    (said,) = problems(control_video=str(control / "short.mp4"))
    assert "short.mp4' has 3 frames, 5 are needed" in said
    (said,) = problems(control_mask=str(control / "text.mp4"))
    assert "text.mp4' cannot be used: " in said
    (said,) = problems(control_video=str(control / "mask.png"))
    assert "control_video must be a video, got the picture" in said


def test_a_manifest_names_files_from_its_folder(checkpoint_folder, control, capsys):
    Image.fromarray(noise(20, 20, 3)).save(control / "a.png")
    Image.fromarray(noise(30, 20, 3, seed=1)).save(control / "b.png")
    rows = [
        {"id": "both", "prompt": "a", "reference_images": ["a.png", "b.png"], "control_video": "control.mp4"},
        {"id": "half", "prompt": "a", "reference_images": "a.png", "conditioning_scale": 0.5},
        {"id": "one", "prompt": "a", "reference_images": "a.png"},
    ]
    manifest = control / "m.jsonl"
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    sizes = ["--width", "32", "--height", "32", "--frames", "5", "--steps", "2", "--fps", "8"]
    command = ["render", "--model", str(checkpoint_folder("vace")), "--manifest", str(manifest), *sizes]
    assert main([*command, "--out", str(control / "out"), "--json"]) == 0
    record = json.loads(next((control / "out").glob("both.*[0-9a-f].json")).read_text())
    assert [path.rpartition("/")[2] for path in record["reference_images"]] == ["a.png", "b.png"]
    assert record["control_video"] == str(control / "control.mp4")
    assert "control_mask" not in record
    assert "conditioning_scale" not in record
    (half,) = (control / "out").glob("half.*[0-9a-f].json")
    assert json.loads(half.read_text())["conditioning_scale"] == 0.5
    manifest.write_text(json.dumps({"prompt": "a", "reference_images": ["a.png", 3]}) + "\n")
    capsys.readouterr()
    assert main([*command, "--out", str(control / "none")]) == 2
    assert "line 1: reference_images must be a text or a list of texts, got a list" in capsys.readouterr().err
    assert not (control / "none").exists()


@pytest.mark.parametrize("policy", ["dicache(threshold=1e6)", "interval(interval=3)"])
def test_blocks_that_make_hints_run_with_the_deep_blocks_and_not_before(policy):
    pipe = build("vace")
    order = []
    for name in ("blocks", "vace_blocks"):
        for number, block in enumerate(getattr(pipe.transformer, name)):
            block.register_forward_pre_hook(lambda *_, place=(name, number): order.append(place))
    with cineray.enable_cache(pipe, policy) as handle:
        call(pipe)
    entries = handle.trace.entries
    num_computed = sum(entry.compute for entry in entries)
    assert 0 < num_computed < len(entries) == 24
    counts = {place: order.count(place) for place in order}
    assert counts["vace_blocks", 0] == counts["vace_blocks", 1] == counts["blocks", 3] == num_computed
    num_run = sum(counts.values())
    assert handle.trace.summary()["cost"] == pytest.approx(num_run / 24 / 6, abs=1e-6)


def test_a_probe_is_refused_where_it_would_need_hints_and_a_hint_behind_the_last_block_too():
    config = build_vace().transformer.config
    with pytest.raises(ValueError, match="probe_depth must be at most 1 for this model, got 2"):
        plan_cache("dicache(probe_depth=2)", KIND, config)
    pipe = build_vace(vace_layers=[0, 3])
    with pytest.raises(ValueError, match="vace_layers names the last block, behind which no cache can work"):
        cineray.enable_cache(pipe, "dicache")


def test_layers_of_blocks_that_make_hints_have_schedules_too():
    pipe = build("vace")
    plain = call(pipe, steps=6)
    names = {(layer, number) for layer, number, _ in layers_of(pipe.transformer, MODELS[KIND].layout)}
    assert names == {(layer, number) for layer in ("attn1", "attn2", "ffn") for number in range(6)}
    with cineray.enable_cache(pipe, TaylorSeerConfig(interval=1)):
        assert torch.equal(call(pipe, steps=6), plain)
    with cineray.enable_cache(pipe, TaylorSeerConfig(interval=3)) as handle:
        assert not torch.equal(call(pipe, steps=6), plain)
    assert handle.trace.summary()["skipped_steps"] > 0
