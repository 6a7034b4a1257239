"""Open-Sora 1.2 from its published files to a video: converted, judged, encoded, denoised, decoded."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from open_sora_files import convert, publish
from PIL import Image
from safetensors.torch import save_file

from cineray.jobs.cli.main import main
from cineray.jobs.output.record import fingerprint_of, render_options
from cineray.jobs.output.step_keeper import ClipPreempted, StepKeeper
from cineray.pipeline.adapters.open_sora import prompt_text, time_shift
from cineray.pipeline.adapters.open_sora_configs import num_latent_frames
from cineray.pipeline.adapters.open_sora_pipeline import OpenSoraPipeline, clean_prompt
from cineray.pipeline.adapters.open_sora_transformer import STDiT3
from cineray.pipeline.adapters.open_sora_vae import OpenSoraVAE
from cineray.pipeline.gang import SOLO
from cineray.pipeline.loading.checkpoint import open_checkpoint
from cineray.pipeline.loading.model import LoadOptions, load_model
from cineray.pipeline.media.inputs import Pictures
from cineray.pipeline.media.video import read_video, write_video
from cineray.pipeline.render import denoise_clip, render_clip
from cineray.pipeline.request import InputError, problems

pytestmark = pytest.mark.slow

MARK = "0123456789ab"
CLIP = {"width": 16, "height": 16, "num_frames": 17, "num_inference_steps": 4, "guidance_scale": 7.0, "fps": 24}
FLAGS = ["--width", "16", "--height", "16", "--frames", "17"]


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    return publish(tmp_path_factory.mktemp("published"))


@pytest.fixture(scope="module")
def folder(published, tmp_path_factory):
    out = tmp_path_factory.mktemp("converted") / "open-sora"
    assert convert(published, out) == 0
    return out


@pytest.fixture(scope="module")
def model(folder):
    return load_model(open_checkpoint(str(folder)), LoadOptions())


@pytest.fixture
def clip(new_request):
    return lambda **changes: new_request(**{**CLIP, **changes})


def test_a_converted_folder_has_the_published_weights(published, model):
    assert isinstance(model.pipe, OpenSoraPipeline)
    for name, kind in (("transformer", STDiT3), ("vae", OpenSoraVAE)):
        held = getattr(model.pipe, name).state_dict()
        for key, tensor in kind.from_open_sora(published / name).state_dict().items():
            assert torch.equal(held[key], tensor), key


def test_what_cannot_be_converted_is_one_line_and_leaves_nothing(published, folder, tmp_path, capsys):
    pickled, other, odd = tmp_path / "pt", tmp_path / "other", tmp_path / "odd"
    for place in (pickled, other, odd):
        place.mkdir()
        (place / "config.json").write_text((published / "vae" / "config.json").read_text())
    (pickled / "pytorch_model.bin").write_bytes(b"")
    for place in (other, odd):
        save_file({"odd": torch.zeros(1)}, place / "model.safetensors")
    (odd / "config.json").write_text('{"filters": "many"}')
    capsys.readouterr()
    for changes, line in (
        ({"vae": pickled}, "must hold *.safetensors: weights are read from nothing else, got pytorch_model.bin"),
        ({"vae": other}, "do not fit its config.json"),
        ({"text_encoder": tmp_path / "none"}, "is not a folder"),
        ({"tokenizer": pickled}, "must hold spiece.model or tokenizer.json"),
        ({"text_encoder": other}, "text_encoder"),
        ({"vae": odd}, "config.json.filters: "),
    ):
        assert convert(published, tmp_path / "out", **changes) == 2
        said = capsys.readouterr().err
        assert len(said.splitlines()) == 1
        assert line in said
    assert convert(published, folder) == 2
    assert "is there already" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["odd", "other", "pt"]


def test_a_clip_renders_is_cached_and_is_known_again(folder, tmp_path, capsys):
    arguments = ["render", "A red circle!", "--model", str(folder), *FLAGS, "--steps", "10", "--json"]
    arguments += ["--cache", "interval(interval=2)", "--out", str(tmp_path / "out")]
    assert main(arguments) == 0
    (made,) = json.loads(capsys.readouterr().out.splitlines()[-1])["clips"]
    assert made["skipped_steps"] > 0
    assert main(arguments) == 0
    (again,) = json.loads(capsys.readouterr().out.splitlines()[-1])["clips"]
    assert again["status"] == "existing"


def test_ranks_share_the_places_of_a_frame(folder, tmp_path, capsys):
    """Of 16 x 16 pixels there are 16, in each of five latent frames."""
    arguments = ["render", "a", "--model", str(folder), *FLAGS, "--out", str(tmp_path / "out")]
    assert main([*arguments, "--layout", "ring16", "--dry-run"]) == 0
    assert main([*arguments, "--layout", "ring17"]) == 2
    assert "a clip of 16 tokens a frame cannot be shared by 17 ranks; each needs one" in capsys.readouterr().err
    assert main([*arguments, "--cfg-parallel"]) == 2
    assert "cfg 2 needs two guidance branches, this clip has 1" in capsys.readouterr().err


def test_clips_go_on_where_the_last_one_ended(model, folder, clip, tmp_path, capsys):
    """Upstream's loop over files: a clip begins with the last 17 frames of the one before, which it does not show."""
    first, command = tmp_path / "out", ["render", "a", "--model", str(folder), *FLAGS, "--steps", "3", "--json"]
    assert main([*command, "--lossless", "--out", str(first)]) == 0
    before = first / json.loads(capsys.readouterr().out.splitlines()[-1])["clips"][0]["video"]
    frames = read_video(before)
    longer = tmp_path / "longer.mp4"
    write_video(np.concatenate([255 - frames[:9], frames]), longer, 24, {}, lossless=True)
    request = clip(prompt="a", num_inference_steps=3, control_video=str(longer))
    given = model.adapter.encode(model.pipe, request)["given"]
    pixels = torch.from_numpy(frames).permute(3, 0, 1, 2)[None].float() / 127.5 - 1
    with torch.no_grad():
        torch.testing.assert_close(given, model.pipe.vae.encode(pixels), atol=1e-5, rtol=1e-5)
    rendered = render_clip(model, request, lambda done, total: None)
    assert rendered.frames.shape == (17, 16, 16, 3)
    assert rendered.latents.shape[2] == 10
    assert torch.equal(rendered.latents[:, :, :5], given)
    assert model.adapter.num_tokens(model.checkpoint.configs, request) == 2 * model.adapter.num_tokens(
        model.checkpoint.configs, clip()
    )
    assert main([*command, "--control-video", str(longer), "--lossless", "--out", str(tmp_path / "on")]) == 0
    video = json.loads(capsys.readouterr().out.splitlines()[-1])["clips"][0]["video"]
    assert np.array_equal(read_video(tmp_path / "on" / video), rendered.frames)


def test_what_a_clip_cannot_go_on_from_is_a_line(folder, tmp_path, capsys):
    write_video(np.zeros((16, 16, 16, 3), np.uint8), tmp_path / "short.mp4", 8, {})
    Image.new("RGB", (16, 16)).save(tmp_path / "a.png")
    short, picture = str(tmp_path / "short.mp4"), str(tmp_path / "a.png")
    for arguments, reason in (
        (["--control-video", short], "short.mp4' has 16 frames, 17 are needed"),
        (["--control-video", picture], "control_video must be a video, got the picture"),
        (["--control-video", short, "--image", picture], "image and control_video cannot both be given"),
        (["--control-video", short, "--frames", "1"], "frames must be 17k where a clip goes on"),
        (["--control-video", short, "--control-mask", picture], "control_mask cannot be used: this model takes none"),
        (["--reference-image", picture], "reference_images cannot be used: this model takes none"),
    ):
        assert main(["render", "a", "--model", str(folder), *FLAGS, *arguments, "--out", str(tmp_path / "out")]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert reason in line
    assert not (tmp_path / "out").exists()


def test_nothing_is_forecast_of_it_and_a_line_says_so(folder, capsys):
    assert main(["plan", "--model", str(folder), "--gpu", "h100", "--num-gpus", "8", *FLAGS]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "has no forecast here; these have: wan2.1-t2v-1.3b" in line


@pytest.mark.parametrize("cache", ["none", "interval(interval=2)"])
@pytest.mark.parametrize("is_given", [False, True], ids=["text", "picture"])
def test_a_clip_goes_on_in_its_middle_bit_for_bit(model, clip, tmp_path, cache, is_given):
    """Its step state is the whole batch's: with a picture the first latent frame is not to be noise again."""
    changes = {}
    if is_given:
        Image.new("RGB", (16, 16), "teal").save(tmp_path / "first.png")
        changes["image"] = str(tmp_path / "first.png")
    request = clip(num_inference_steps=9, cache=cache, **changes)
    whole, path = denoise_clip(model, request, lambda done, total: None), tmp_path / f"1.{MARK}.safetensors"
    asked = iter([False] * 3)
    stopping = StepKeeper(path, MARK, SOLO, 1e9, lambda: next(asked, True))
    with pytest.raises(ClipPreempted):
        denoise_clip(model, request, lambda done, total: None, keeper=stopping)
    steps: list[int] = []
    keeper = StepKeeper(path, MARK, SOLO, 1e9, lambda: False)
    resumed = denoise_clip(model, request, lambda done, total: steps.append(done), keeper=keeper)
    assert steps == [5, 6, 7, 8, 9]
    if cache == "none":
        assert torch.equal(resumed.latents, whole.latents)
        return
    assert resumed.trace is not None
    assert [entry.step for entry in resumed.trace.entries if entry.branch == "cond"] == list(range(9))
    first_after = next(entry for entry in resumed.trace.entries if entry.step == 4)
    assert first_after.compute  # what was cached is not kept: doubt computes


def test_frames_come_in_groups(model, clip):
    rule = model.checkpoint.size_rule
    for num_frames, num_latents in ((1, 1), (17, 5), (51, 15), (102, 30)):
        assert problems(clip(num_frames=num_frames), rule) == []
        assert num_latent_frames(num_frames) == num_latents
    assert problems(clip(num_frames=18), rule) == ["frames must be 1 or 17k, got 18; nearest: 17 or 34"]
    assert problems(clip(negative_prompt="x"), rule)[0].startswith("negative_prompt cannot be used")


def test_what_changes_pixels_has_a_fingerprint_of_its_own(model, clip):
    chosen = render_options(LoadOptions(), lossless=False)

    def mark(**changes):
        return fingerprint_of(clip(**changes), model.checkpoint, "0" * 16, chosen)

    assert mark(fps=8) != mark(fps=24)
    assert mark(fps=8, num_frames=1) == mark(fps=24, num_frames=1)  # pictures have a rate of their own
    assert mark(guidance_scale=0.5) == mark(guidance_scale=1.0) != mark()


def test_prompts_are_cleaned_as_upstream_does():
    """What upstream's text_preprocessing at v1.2.0 made of these."""
    for text, wanted in (
        ("A Cat, walking.  aesthetic score: 6.5.", "a cat, walking. aesthetic score: 6.5."),
        ("See http://example.com/a?b=1 &amp; <b>bold</b> text", "see ?b=1 bold text"),
        ("“Wow”—it's  a 10x20 photo_of_a_big_dog.png", '"wow"-it\'s a'),
        (
            "the café isn't (really) open… yes. aesthetic score: 6.5.",
            "the café isn't really open… yes. aesthetic score: 6.5.",
        ),
    ):
        assert clean_prompt(text) == wanted
    assert prompt_text("A cat.") == "a cat. aesthetic score: 6.5."
    assert prompt_text("A cat. Aesthetic score: 5 aesthetic score: 4.0.").count("score") == 2


def test_a_folder_that_does_not_fit_is_refused_before_it_loads(folder, tmp_path):
    import shutil

    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    path = broken / "transformer" / "config.json"
    whole = json.loads(path.read_text())
    for name, value, line in (
        ("depth", 2, "depth"),
        ("caption_channels", 999, "caption_channels must be"),
        ("patch_size", [2, 2, 2], "patch_size must be of one frame"),
    ):
        path.write_text(json.dumps({**whole, name: value}))
        with pytest.raises(InputError, match=line):
            open_checkpoint(str(broken))


def test_a_first_frame_stays_what_it_is_and_changes_the_rest(model, clip, tmp_path):
    Image.new("RGB", (16, 16), "green").save(tmp_path / "a.png")
    request = Pictures().pinned(clip(image=str(tmp_path / "a.png")))
    pixels = model.pipe.video_processor.preprocess(Image.open(tmp_path / "a.png"), 16, 16)
    with torch.no_grad():
        given = model.pipe.vae.encode(pixels.unsqueeze(2))
    made = denoise_clip(model, request, lambda done, total: None).latents
    assert torch.equal(made[:, :, :1], given)
    free = denoise_clip(model, replace(request, image=None, picture=None), lambda done, total: None).latents
    assert not torch.allclose(made[:, :, 1:], free[:, :, 1:])


def test_steps_are_moved_by_size_and_length(clip):
    assert time_shift(clip(width=512, height=512, num_frames=1)) == 1.0
    assert time_shift(clip(width=1024, height=1024, num_frames=1)) == 2.0
    assert time_shift(clip(width=512, height=512, num_frames=51)) == pytest.approx(15**0.5)
