"""`cineray render` with models whose clips are pictures and sounds, of two experts, or begin with a picture."""

import itertools
import json
import wave
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import EDMDPMSolverMultistepScheduler
from more_models import CLIPS
from PIL import Image
from safetensors.torch import save_file

from cineray.jobs.cli.main import main
from cineray.jobs.output.folder import OutputFolder
from cineray.jobs.output.record import fingerprint_of, render_options
from cineray.pipeline.adapters import KNOWN_MODELS, MODELS
from cineray.pipeline.footprint.fit import published_like
from cineray.pipeline.footprint.published import published_checkpoint
from cineray.pipeline.loading.checkpoint import open_checkpoint
from cineray.pipeline.loading.options import LoadOptions
from cineray.pipeline.loading.prepare import other_scheduler
from cineray.pipeline.media.ffmpeg import VideoError
from cineray.pipeline.media.flac import read_flac, write_flac
from cineray.pipeline.media.output import FLAC, OUTPUTS, PICTURE, SOUND, VIDEO
from cineray.pipeline.media.sound import read_wav, write_wav

pytestmark = pytest.mark.slow


def options_of(name, **more):
    """The command line's options for a clip of `CLIPS`."""
    named = {"width": 32, "height": 32, "num_frames": 5, "num_inference_steps": 3} | CLIPS[name] | more
    named.pop("reference_images", None)
    flags = {"num_frames": "frames", "num_inference_steps": "steps", "guidance_scale_2": "guidance-2"}
    fixed = ("image", "prompt", *(("fps", "num_frames", "width", "height") if "fps" in CLIPS[name] else ()))
    if name == "flux":
        fixed = ("fps", "num_frames")
    return [
        word
        for key, value in named.items()
        if key not in fixed
        for word in (f"--{flags.get(key, key).replace('_', '-')}", str(value))
    ]


def render(folder, out, *arguments):
    return main(["render", "--model", str(folder), "--out", str(out), *arguments, "--json"])


def said(capsys):
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_a_picture_is_written_known_again_and_reported(checkpoint_folder, tmp_path, capsys):
    folder, out = checkpoint_folder("flux"), tmp_path / "out"
    arguments = [
        "a red circle \N{SNOWMAN}",
        *options_of("flux", num_inference_steps=10),
        "--cache",
        "interval(interval=2)",
    ]
    assert render(folder, out, *arguments) == 0
    (clip,) = said(capsys)["clips"]
    assert clip["video"].endswith(".png")
    sidecar = json.loads(next(out.glob("1.*.json")).read_text())
    with Image.open(clip["video"]) as picture:
        assert picture.size == (32, 32)
        assert json.loads(picture.info["comment"]).items() <= sidecar.items()
        assert picture.info["Description"] == "a red circle \N{SNOWMAN}"
    assert sidecar["trace"]["skipped_steps"] == clip["skipped_steps"] > 0
    assert render(folder, out, *arguments) == 0
    assert said(capsys)["clips"][0]["status"] == "existing"
    assert main(["status", str(out), "--json"]) == 0
    assert said(capsys)["done"] == 1
    assert render(folder, out, *arguments, "--dry-run") == 0
    assert said(capsys)["done"] == 1
    assert main(["report", str(out), "--out", str(tmp_path / "page.html")]) == 0
    assert clip["video"].rpartition("/")[2] in (tmp_path / "page.html").read_text()


def test_a_broken_picture_is_rendered_again(checkpoint_folder, tmp_path, capsys):
    folder, out = checkpoint_folder("flux"), tmp_path / "out"
    assert render(folder, out, "a", *options_of("flux")) == 0
    path = next(out.glob("*.png"))
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    capsys.readouterr()
    assert render(folder, out, "a", *options_of("flux")) == 0
    assert said(capsys)["clips"][0]["status"] == "done"
    assert path.read_bytes() == whole
    next(out.glob("1.*.json")).unlink()  # the picture tells of itself
    assert render(folder, out, "a", *options_of("flux")) == 0
    assert said(capsys)["clips"][0]["status"] == "existing"


def test_a_class_has_one_picture_by_all_its_names(checkpoint_folder, new_request):
    checkpoint = open_checkpoint(str(checkpoint_folder("dit")))
    chosen = render_options(LoadOptions(), lossless=False)

    def mark(**changes):
        request = new_request(**{**CLIPS["dit"], **changes})
        return fingerprint_of(request, checkpoint, "0" * 16, chosen)

    assert mark(prompt="tench") == mark(prompt=" Tinca tinca") == mark(prompt="0") == mark(prompt="000")
    assert mark(prompt="0") != mark(prompt="1")
    assert mark(guidance_scale=0.5) == mark(guidance_scale=1.0) != mark(guidance_scale=2.0)


def test_a_manifest_of_classes_is_checked_row_by_row(checkpoint_folder, tmp_path, capsys):
    rows = [{"prompt": "cock"}, {"prompt": "999"}, {"prompt": "cok"}, {"prompt": "1000"}]
    manifest = tmp_path / "m.jsonl"
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert render(checkpoint_folder("dit"), tmp_path / "out", "--manifest", str(manifest)) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if "line" in line]
    assert len(lines) == 2
    assert "got 'cok'; did you mean 'cock'?" in lines[0]
    assert "a number from 0 to 999" in lines[1]
    assert not (tmp_path / "out").exists()


def test_a_sound_is_as_long_as_asked_and_has_its_record(checkpoint_folder, tmp_path, capsys):
    manifest, out = tmp_path / "m.jsonl", tmp_path / "out"
    manifest.write_text('{"id": "short", "prompt": "rain", "seconds": 0.5}\n{"id": "long", "prompt": "rain"}\n')
    folder = checkpoint_folder("stable_audio")
    assert render(folder, out, "--manifest", str(manifest), "--steps", "3") == 0
    clips = said(capsys)["clips"]
    records = [SOUND.metadata(out / clip["video"]) for clip in clips]
    assert [(record["id"], record["prompt"], record["seconds"]) for record in records] == [
        ("short", "rain", 0.5),
        ("long", "rain", 2.0),
    ]
    for clip, num_samples in zip(clips, (32, 128), strict=True):
        with wave.open(clip["video"]) as file:
            assert (file.getnframes(), file.getframerate(), file.getnchannels()) == (num_samples, 64, 2)
    assert render(folder, out, "--manifest", str(manifest), "--steps", "3") == 0
    assert {clip["status"] for clip in said(capsys)["clips"]} == {"existing"}
    assert main(["compare", clips[0]["video"], clips[1]["video"]]) == 2
    assert "has 32 samples of 2 channels at 64 Hz" in capsys.readouterr().err


def test_a_sound_as_flac_has_the_samples_and_the_record_of_the_wav(checkpoint_folder, tmp_path, capsys):
    folder, out = checkpoint_folder("stable_audio"), tmp_path / "out"
    arguments = ["rain \N{SNOWMAN} = ; # \\", "--seconds", "1.5", "--steps", "3"]
    assert render(folder, out, *arguments) == 0
    (wav,) = said(capsys)["clips"]
    assert render(folder, out, *arguments, "--format", "flac") == 0
    (flac,) = said(capsys)["clips"]
    assert flac["status"] == "done"
    assert flac["video"].endswith(".flac")
    assert np.array_equal(FLAC.read(out / flac["video"]), SOUND.read(out / wav["video"]))
    record, of_wav = FLAC.metadata(out / flac["video"]), SOUND.metadata(out / wav["video"])
    differs = ("fingerprint", "options")  # one sidecar cannot tell of two files
    assert {name: value for name, value in record.items() if name not in differs} == {
        name: value for name, value in of_wav.items() if name not in differs
    }
    assert record["prompt"] == arguments[0]
    for kind in ("wav", "flac"):
        assert render(folder, out, *arguments, "--format", kind) == 0
        assert said(capsys)["clips"][0]["status"] == "existing"
    next(out.glob(f"1.{record['fingerprint']}.json")).unlink()  # the file tells of itself
    assert render(folder, out, *arguments, "--format", "flac") == 0
    assert said(capsys)["clips"][0]["status"] == "existing"
    path = out / flac["video"]
    path.write_bytes(path.read_bytes()[:-20])
    assert render(folder, out, *arguments, "--format", "flac") == 0
    assert said(capsys)["clips"][0]["status"] == "done"
    assert main(["status", str(out), "--json"]) == 0
    assert said(capsys)["done"] == 2
    assert main(["compare", str(out / wav["video"]), str(path), "--json"]) == 0
    assert said(capsys)["clips"][0]["equal"]


@pytest.mark.parametrize("num_channels", [1, 2])
@pytest.mark.parametrize("rate", [64, 44100, 96000])
def test_a_flac_is_heard_as_it_was_and_cut_ones_are_not(tmp_path, rate, num_channels):
    tone_hz, path = rate // 8, tmp_path / "a.flac"
    seconds = np.arange(2 * rate) / rate
    samples = (np.stack([np.sin(2 * np.pi * tone_hz * seconds)] * num_channels, axis=1) * 20000).astype(np.int16)
    write_flac(samples, path, rate, {"prompt": "a tone"})
    heard, at = read_flac(path)
    assert (at, heard.dtype, heard.shape) == (rate, np.int16, samples.shape)
    assert np.array_equal(heard, samples)
    assert np.abs(np.fft.rfft(heard[:, 0])).argmax() == 2 * tone_hz  # bins of half a hertz
    assert FLAC.metadata(path) == {"prompt": "a tone"}
    whole = path.read_bytes()
    write_flac(samples, tmp_path / "b.flac", rate, {"prompt": "a tone"})
    assert (tmp_path / "b.flac").read_bytes() == whole
    for broken in (whole[: len(whole) // 2], whole[:-1], whole[:-40] + bytes(40), b"fLaC", whole[:30]):
        path.write_bytes(broken)
        with pytest.raises(VideoError):
            read_flac(path)


def test_what_a_tone_was_is_what_is_heard(tmp_path):
    """A file's spectrum has its peak where the samples' had it."""
    rate, tone_hz = 44100, 440
    seconds = np.arange(rate) / rate
    samples = (np.stack([np.sin(2 * np.pi * tone_hz * seconds)] * 2, axis=1) * 20000).astype(np.int16)
    write_wav(samples, tmp_path / "a.wav", rate, {b"ICMT": "odd"})
    heard, at = read_wav(tmp_path / "a.wav")
    assert at == rate
    assert np.array_equal(heard, samples)
    assert np.abs(np.fft.rfft(heard[:, 0])).argmax() == tone_hz
    whole = (tmp_path / "a.wav").read_bytes()
    assert int.from_bytes(whole[4:8], "little") == len(whole) - 8
    assert len(whole) % 2 == 0
    (tmp_path / "cut.wav").write_bytes(whole[:1000])
    with pytest.raises(VideoError):
        read_wav(tmp_path / "cut.wav")


@pytest.mark.parametrize("content", [b"", b"RIFF", b"\x89PNG\r\n", b"RIFF\xff\xff\xff\xffWAVEfmt ", b"x" * 4096])
def test_what_is_no_such_file_has_no_record(tmp_path, new_request, content):
    (tmp_path / "x").write_bytes(content)
    for output in OUTPUTS[1:]:
        assert output.metadata(tmp_path / "x") == {}
        assert output.fault(tmp_path / "x", new_request(seconds=1.0)) is not None


BAD = [
    ("flux", ["--frames", "5"], "frames cannot be used: this model's clips have no frames, got 5"),
    ("flux", ["--fps", "8"], "fps cannot be used"),
    ("flux", ["--image", "x.png"], "image cannot be used"),
    ("flux", ["--width", "31"], "width must be a multiple of 2, got 31"),
    ("flux", ["--seconds", "3"], "seconds cannot be used: this model makes no sound"),
    ("dit", ["--width", "16"], "width must be 8, the only one of this model, got 16"),
    ("dit", ["--negative-prompt", "x"], "negative_prompt cannot be used: the other branch"),
    ("dit", ["--sp", "3"], "ulysses must divide the model's 4 attention heads (1, 2, 4), got 3"),
    ("dit", ["--layout", "ring17"], "a clip of 16 tokens cannot be shared by 17 ranks; each needs one"),
    ("dit", ["--cfg-parallel"], "cfg 2 needs two guidance branches, this clip has 1"),
    ("stable_audio", ["--seconds", "3"], "seconds must be 0.1 to 2, got 3.0"),
    ("stable_audio", ["--seconds", "nan"], "seconds must be 0.1 to 2, got nan"),
    ("stable_audio", ["--width", "8"], "width cannot be used: this model's clips have no pixels, got 8"),
    ("stable_audio", ["--sp", "3"], "ulysses must divide the model's 4 attention heads (1, 2, 4), got 3"),
    ("hunyuan_concat", [], "image is required: this model animates a first frame"),
    ("hunyuan_replace", ["--guidance-2", "3"], "guidance_2 cannot be used: this model has one expert"),
    ("hunyuan15", ["--image", "x.png"], "image cannot be used: this model renders from text alone"),
    ("hunyuan15_image", [], "image is required: this model animates a first frame"),
    ("hunyuan15", ["--height", "44"], "height must be a multiple of 8, got 44; nearest: 40 or 48"),
    ("hunyuan15", ["--frames", "6"], "frames must be 4k+1, got 6; nearest: 5 or 9"),
    ("hunyuan15", ["--guidance-2", "3"], "guidance_2 cannot be used: this model has one expert"),
    ("hunyuan15", ["--decode", "gang"], "its decoder cannot be shared by ranks; leave --decode gang out"),
    ("hunyuan15", ["--sp", "3"], "ulysses must divide the model's 2 attention heads (1, 2), got 3"),
    ("hunyuan15", ["--cache", "dicache-paper"], "dicache-paper has no preset for hunyuan-video-1.5"),
    ("wan22", ["--image", "x.png"], "image cannot be used"),
    ("wan22_image", [], "image is required"),
    ("vace", ["--sp", "3"], "ulysses must divide the model's 4 attention heads (1, 2, 4), got 3"),
    ("vace", ["--shard-weights"], "--shard-weights needs ranks that share a clip's tokens"),
    ("vace", ["--image", "x.png"], "image cannot be used"),
    ("vace", ["--reference-image", "none.png"], "none.png' cannot be used: No such file or directory"),
    ("vace", ["--reference-image", "a.mp4"], "its name does not end as a picture's"),
    ("vace", ["--control-video", "none.mp4"], "none.mp4' cannot be used: No such file or directory"),
    ("vace", ["--control-mask", "m.png"], "control_mask needs a control_video"),
    ("vace", ["--conditioning-scale", "nan"], "conditioning_scale must be 0 to 10, got nan"),
    ("wan22", ["--conditioning-scale", "1"], "conditioning_scale cannot be used: this model takes no control"),
    ("vace", ["--reference-image", "a.png"] * 17, "reference_images must be at most 16, got 17"),
    ("vace", ["--cache", "dicache(probe_depth=2)"], "probe_depth"),
    ("vace", ["--cache", "teacache"], "teacache has no preset for wan-vace"),
    ("flux", ["--control-video", "x.mp4"], "control_video cannot be used: this model takes none"),
    ("wan22", ["--reference-image", "x.png"], "reference_images cannot be used: this model takes none"),
    ("stable_audio", ["--cfg-parallel"], "cfg 2 needs two guidance branches, this clip has 1"),
    ("ti2v", ["--sp", "3"], "ulysses must divide the model's 4 attention heads (1, 2, 4), got 3"),
    ("ti2v_image", [], "image is required"),
    ("flux", ["--negative-prompt", "x"], "negative_prompt cannot be used: this model's guidance is embedded"),
    ("flux", ["--flow-shift", "3"], "flow_shift cannot be used"),
    ("flux", ["--decode", "gang"], "its decoder cannot be shared by ranks; leave --decode gang out"),
    ("flux", ["--shard-weights"], "--shard-weights needs ranks that share a clip's tokens"),
    ("flux", ["--offload", "group"], "offload group moves weights between CPU and GPU; it needs --device cuda"),
    ("flux", ["--sp", "3"], "ulysses must divide the model's 2 attention heads (1, 2), got 3"),
    ("flux", ["--image-fit", "crop"], "image_fit cannot be used: this model renders from text alone"),
    ("hunyuan_replace", ["--negative-prompt", "x"], "negative_prompt cannot be used"),
    ("hunyuan_concat", ["--seconds", "1"], "seconds cannot be used: this model makes no sound"),
    ("dit", ["--shard-weights"], "--shard-weights needs ranks that share a clip's tokens"),
    ("dit", ["--cache", "teacache"], "teacache"),
    ("stable_audio", ["--cache", "dicache-paper"], "dicache-paper"),
    ("stable_audio", ["--cache", "magcache"], "magcache"),
    ("stable_audio", ["--cache", "smoothcache"], "smoothcache takes a file, as smoothcache:SCHEDULE.json"),
    ("stable_audio", ["--vae-tiling"], "its decoder cannot work in tiles; leave --vae-tiling out"),
    ("stable_audio", ["--image", "x.png"], "image cannot be used"),
    ("stable_audio", ["--frames", "5"], "frames cannot be used"),
    ("wan22", ["--guidance-2", "nan"], "guidance"),
    ("stable_audio", ["--format", "mp3"], "--format must be wav or flac for a sound, got mp3"),
    ("flux", ["--format", "flac"], "--format must be png for a picture, got flac"),
    ("stable_audio", ["--format", "flac", "--audit", "0.5"], "makes sounds, and quality is measured in pixels"),
    ("wan22", ["--shard-weights"], "--shard-weights needs ranks that share a clip's tokens"),
]


@pytest.mark.parametrize(
    ("name", "arguments", "reason"), BAD, ids=lambda value: value if isinstance(value, str) else None
)
def test_bad_input_is_one_line_and_leaves_nothing(checkpoint_folder, tmp_path, capsys, name, arguments, reason):
    given = [word for word in options_of(name) if name != "dit" or word]
    folder, prompt = checkpoint_folder(name), CLIPS[name].get("prompt", "a")
    capsys.readouterr()  # of making it
    assert render(folder, tmp_path / "out", prompt, *given, *arguments) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    assert reason in lines[0]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("dit", "diffusers fuses no LoRA into its transformer; leave --lora out"),
        ("stable_audio", "diffusers fuses no LoRA into its transformer; leave --lora out"),
        ("hunyuan15", "diffusers fuses no LoRA into its transformer; leave --lora out"),
        ("wan22", "it has two experts, so say whose each LoRA is: --lora high:PATH for the noisy steps, low:PATH for"),
        ("flux", "does not fit: Target modules"),
    ],
)
def test_a_lora_that_cannot_be_fused_is_one_line(checkpoint_folder, tmp_path, capfd, name, reason):
    path, prompt = tmp_path / "a.safetensors", CLIPS[name].get("prompt", "a")
    row = "transformer.nowhere.to_q.lora_"
    save_file({f"{row}A.weight": torch.zeros(4, 8), f"{row}B.weight": torch.zeros(8, 4)}, path)
    folder = checkpoint_folder(name)
    capfd.readouterr()  # of making it
    assert render(folder, tmp_path / "out", prompt, *options_of(name), "--lora", str(path)) == 2
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    assert reason in lines[0]
    assert not (tmp_path / "out").exists()


def test_a_pair_of_loras_changes_a_clip_and_a_swapped_pair_another(checkpoint_folder, tmp_path, capsys):
    torch.manual_seed(0)
    for name in ("high", "low"):
        row = "transformer.blocks.0.attn1.to_q.lora_"
        pair = {f"{row}A.weight": torch.randn(2, 48), f"{row}B.weight": torch.randn(48, 2)}
        save_file(pair, tmp_path / f"{name}.safetensors")

    def clip(*loras):
        options = [word for lora in loras for word in ("--lora", lora)]
        folder = checkpoint_folder("wan22")
        assert (
            render(folder, tmp_path / "out", "a", *options_of("wan22", num_inference_steps=2), *options, "--lossless")
            == 0
        )
        return VIDEO.read(tmp_path / "out" / said(capsys)["clips"][0]["video"])

    high, low = f"{tmp_path}/high.safetensors", f"{tmp_path}/low.safetensors"
    clips = [clip(), clip(f"high:{high}", f"low:{low}"), clip(f"high:{low}", f"low:{high}"), clip(f"both:{high}")]
    assert all(not np.array_equal(a, b) for a, b in itertools.combinations(clips, 2))
    assert render(checkpoint_folder("flux"), tmp_path / "none", "a", *options_of("flux"), "--lora", f"low:{low}") == 2
    assert "it has one expert; leave low: out, got 'low.safetensors'" in capsys.readouterr().err


def changed(folder, to, **entries):
    """A copy of a checkpoint whose model_index.json says something else."""
    import shutil

    shutil.copytree(folder, to)
    index = json.loads((to / "model_index.json").read_text())
    (to / "model_index.json").write_text(json.dumps(index | entries))
    return to


@pytest.mark.parametrize(
    ("name", "entries", "reason"),
    [
        (
            "wan22",
            {"transformer_2": [None, None]},
            "boundary_ratio is 0.875, so it is of two experts, and transformer_2",
        ),
        ("vace", {"boundary_ratio": 0.875}, "it is a VACE of two experts (Wan 2.2), which is not rendered"),
        ("wan22", {"boundary_ratio": 1.5}, "boundary_ratio must be above 0 and below 1, got 1.5"),
        ("wan22", {"boundary_ratio": "x"}, "boundary_ratio must be above 0 and below 1, got 'x'"),
        ("wan22", {"expand_timesteps": True}, "boundary_ratio and expand_timesteps cannot both be set"),
        ("wan22", {"boundary_ratio": None}, "'transformer_2' is not a component of this pipeline"),
        ("hunyuan15", {"guider": None}, 'guider must be ["diffusers", "ClassifierFreeGuidance"], got None'),
        ("hunyuan15", {"guider": ["diffusers", "AutoGuidance"]}, "guider must be ["),
        ("hunyuan15", {"text_encoder_2": [None, None]}, "text_encoder_2 must be ["),
        (
            "hunyuan15_image",
            {"image_encoder": [None, None]},
            'image_encoder must be ["transformers", "SiglipVisionModel',
        ),
        ("dit", {"id2label": {"1000": "x"}}, "id2label must hold names by the numbers of classes, 0 to 999"),
        ("dit", {"id2label": ["x"]}, "id2label must hold names"),
    ],
)
def test_a_checkpoint_that_is_not_whole_is_refused_in_one_line(
    checkpoint_folder, tmp_path, capsys, name, entries, reason
):
    folder = changed(checkpoint_folder(name), tmp_path / "changed", **entries)
    assert render(folder, tmp_path / "out", "7") == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    assert reason in lines[0]


@pytest.mark.parametrize(
    ("file", "entries", "reason"),
    [
        ("guider/guider_config.json", {"guidance_rescale": 0.7}, "guider/guider_config.json: guidance_rescale: "),
        ("guider/guider_config.json", {"guidance_scale": "x"}, "guider/guider_config.json: guidance_scale: "),
        ("guider/guider_config.json", {"start": 0.2}, "guider/guider_config.json: start: "),
        ("guider/guider_config.json", None, "guider/guider_config.json is missing"),
        (
            "transformer/config.json",
            {"in_channels": 8},
            "in_channels must be 9, twice the VAE's latent_channels and one",
        ),
        ("transformer/config.json", {"image_embed_dim": 8}, "image_embed_dim must be 16, as the image encoder's"),
        ("transformer/config.json", {"num_layers": 4}, "num_layers is 4, but the weights are of 3 such layers"),
        ("vae/config.json", {"spatial_compression_ratio": 16}, "block_out_channels must have more than 4 entries"),
        ("vae/config.json", {"block_out_channels": [8, 8, 8, 12]}, "block_out_channels must be a multiple of twice"),
    ],
)
def test_parts_of_hunyuan_video_15_that_do_not_fit_are_refused_in_one_line(
    checkpoint_folder, tmp_path, capsys, file, entries, reason
):
    folder = changed(checkpoint_folder("hunyuan15_image"), tmp_path / "changed")
    if entries is None:
        (folder / file).unlink()
    else:
        (folder / file).write_text(json.dumps(json.loads((folder / file).read_text()) | entries))
    capsys.readouterr()
    assert render(folder, tmp_path / "out", "a") == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    assert reason in lines[0]
    assert not (tmp_path / "out").exists()


def test_a_folder_without_its_second_expert_or_with_another_one_is_refused(checkpoint_folder, tmp_path, capsys):
    folder = changed(checkpoint_folder("wan22"), tmp_path / "changed")
    config = folder / "transformer_2" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"num_layers": 2}))
    assert render(folder, tmp_path / "out", "a") == 2
    assert "transformer_2/config.json: it must say what transformer/config.json says" in capsys.readouterr().err
    (folder / "transformer_2").rename(tmp_path / "elsewhere")
    assert render(folder, tmp_path / "out", "a") == 2
    assert "transformer_2/config.json is missing" in capsys.readouterr().err


def test_the_second_experts_guidance_is_in_the_fingerprint_where_it_shows(checkpoint_folder, new_request):
    checkpoint = open_checkpoint(str(checkpoint_folder("wan22")))
    chosen = render_options(LoadOptions(), lossless=False)

    def mark(**changes):
        return fingerprint_of(new_request(**changes), checkpoint, "0" * 16, chosen)

    assert mark() == mark(guidance_scale_2=4.0) != mark(guidance_scale_2=3.0)
    assert mark(guidance_scale=1.0) == mark(guidance_scale=1.0, guidance_scale_2=3.0)
    assert mark() == mark(flow_shift=12.0) != mark(flow_shift=5.0)


@pytest.mark.parametrize(
    ("name", "family", "sizes"),
    [
        ("wan22", "wan2.2", {"guidance_scale": 4.0, "guidance_scale_2": 3.0, "num_inference_steps": 40}),
        ("wan22_image", "wan2.2", {"guidance_scale": 3.5, "guidance_scale_2": 3.5, "flow_shift": 5.0}),
        ("ti2v", "wan2.2-ti2v", {"fps": 24, "num_frames": 121, "height": 704}),
        ("hunyuan_concat", "hunyuan-video-i2v", {"num_frames": 125, "guidance_scale": 1.0}),
        ("hunyuan_replace", "hunyuan-video-i2v", {"num_frames": 129, "guidance_scale": 6.0}),
        ("hunyuan15", "hunyuan-video-1.5", {"num_frames": 121, "fps": 24, "guidance_scale": 6.0}),
        ("flux", "flux", {"num_inference_steps": 50, "guidance_scale": 3.5, "num_frames": 1}),
        ("dit", "dit", {"width": 8, "height": 8}),
        ("stable_audio", "stable-audio", {"seconds": 2.0, "fps": 64}),
    ],
)
def test_a_checkpoint_gets_its_authors_defaults(checkpoint_folder, name, family, sizes):
    checkpoint = open_checkpoint(str(checkpoint_folder(name)))
    assert checkpoint.model.family == family
    assert {field: getattr(checkpoint.defaults, field) for field in sizes} == sizes


def test_hunyuan_video_15_takes_size_and_guidance_from_its_parts(checkpoint_folder, tmp_path):
    folder = changed(checkpoint_folder("hunyuan15"), tmp_path / "changed")
    for file, entries in (
        ("guider/guider_config.json", {"guidance_scale": 1.0}),
        ("transformer/config.json", {"target_size": 960}),
    ):
        (folder / file).write_text(json.dumps(json.loads((folder / file).read_text()) | entries))
    defaults = open_checkpoint(str(folder)).defaults
    assert (defaults.width, defaults.height, defaults.guidance_scale) == (1280, 720, 1.0)


def test_two_experts_are_not_taken_for_the_one_of_the_same_size():
    known = published_checkpoint("wan2.1-t2v-14b")
    assert published_like(replace(known, name="mine")) == known
    two = published_checkpoint("wan2.2-t2v-a14b")
    assert published_like(replace(two, name="mine")) == two
    assert dict(two.configs.transformer) == dict(known.configs.transformer)


def test_latents_of_a_sound_may_be_counted_by_a_fraction():
    """As in the published file, 1024.0, and in those of its finetunes; the pipeline rounds down."""
    known = published_checkpoint("stable-audio-open-1.0")
    configs = replace(known.configs, transformer={**known.configs.transformer, "sample_size": 430.6640625})
    assert known.adapter.for_checkpoint(configs).defaults.seconds == round(430 * 2048 / 44100, 2)
    assert known.adapter.num_tokens(configs, None) == 431


def test_another_scheduler_predicts_what_the_models_own_does():
    own = EDMDPMSolverMultistepScheduler(prediction_type="v_prediction", sigma_min=0.3, sigma_max=500)
    other = other_scheduler(own, "EDMEulerScheduler")
    assert (other.config.prediction_type, other.config.sigma_min) == ("v_prediction", 0.3)


def test_every_pipeline_class_has_an_owner_and_every_checkpoint_a_name_of_its_own():
    families = [model.family for model in MODELS.values()]
    assert len(set(families)) == len(families)
    assert len(KNOWN_MODELS) == sum(len(model.checkpoints) for model in MODELS.values())


def test_a_folder_of_pictures_is_swept_and_told_as_one_of_videos_is(tmp_path, new_request):
    folder = OutputFolder(tmp_path / "out", PICTURE)
    request = new_request(num_frames=1, fps=1)
    with folder.new_video(request) as temporary:
        assert temporary.suffix == ".png"
        left = temporary.with_name("1." + "0" * 32 + ".png")
        left.write_bytes(b"left by a process that was killed")
        folder.remove_leftovers()
        assert not left.exists()
