"""`cineray render` in this process: what it answers, writes and refuses. Random weights, real classes."""

import json

import imageio_ffmpeg
import numpy as np
import pytest
from PIL import Image

from cineray.jobs.cli import clips as clip_arguments
from cineray.jobs.cli.main import main
from cineray.jobs.idle_cache import is_idle
from cineray.pipeline.media.video import read_metadata, read_video
from cineray.pipeline.render import render_clip
from cineray.pipeline.request import ClipRequest

pytestmark = pytest.mark.process

SMALL = ["--width", "32", "--height", "32", "--frames", "5", "--steps", "3", "--fps", "8"]


@pytest.fixture
def render(checkpoint_folder, tmp_path, capsys):
    """Runs `cineray render` with the small model: (exit code, stdout, stderr, output folder)."""

    def run(*arguments: str, model: str = "wan", small: bool = True):
        out = tmp_path / "out"
        command = ["render", "--out", str(out), "--model", str(checkpoint_folder(model)), *(SMALL if small else [])]
        capsys.readouterr()  # whoever asks for a folder first sees it being written
        code = main([*command, *arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err, out

    return run


def test_prompts_become_playable_clips_with_sidecars(render):
    code, stdout, stderr, out = render("a red circle", "a blue square", "--seed", "5", "--json")
    assert code == 0
    summary = json.loads(stdout.splitlines()[-1])
    assert [c["id"] for c in summary["clips"]] == ["1", "2"]
    assert {"id", "status", "video", "steps", "computed_steps", "skipped_steps", "wall_s", "cost"} == set(
        summary["clips"][0]
    )
    assert summary["clips_per_hour"] > 0
    for clip in summary["clips"]:
        assert clip["status"] == "done"
        assert (clip["steps"], clip["computed_steps"], clip["skipped_steps"], clip["cost"]) == (3, 3, 0, 1.0)
        num_frames, seconds = imageio_ffmpeg.count_frames_and_secs(clip["video"])
        assert num_frames == 5
        assert seconds == pytest.approx(5 / 8, abs=0.05)
    record = read_metadata(out / summary["clips"][0]["video"].split("/")[-1])
    assert (record["prompt"], record["seed"], record["cache"]) == ("a red circle", 5, "none")
    assert record["model"]["pipeline"] == "WanPipeline"
    sidecar = json.loads(next(out.glob("1.*.json")).read_text())
    assert sidecar.pop("timings").keys() == {"encode_s", "denoise_s", "decode_s", "write_s"}
    assert sidecar.pop("hardware").keys() == {"host", "cpu", "peak_bytes"}
    assert sidecar.pop("video").keys() == {"bytes", "mtime_ns", "sha256"}
    assert sidecar == record
    assert "[2/2]" in stderr
    assert not (out / ".tmp").exists()
    assert len((out / "events.jsonl").read_text().splitlines()) == 2


def test_moov_stands_in_front_so_that_browsers_start_at_once(render):
    _, _, _, out = render("a red circle")
    content = next(out.glob("*.mp4")).read_bytes()
    assert 0 < content.index(b"moov") < content.index(b"mdat")
    meta = next(imageio_ffmpeg.read_frames(str(next(out.glob("*.mp4")))))
    assert meta["codec"] == "h264"
    assert meta["pix_fmt"].startswith("yuv420p")


def test_a_second_run_renders_nothing_and_a_changed_one_beside_it(render):
    _, _, _, out = render("a red circle")
    before = {p: p.read_bytes() for p in out.glob("*.mp4")}
    code, stdout, _, _ = render("a red circle", "--json")
    assert code == 0
    assert [c["status"] for c in json.loads(stdout)["clips"]] == ["existing"]
    assert {p: p.read_bytes() for p in out.glob("*.mp4")} == before
    render("a red circle", "--fps", "12")  # same pixels: same fingerprint
    assert len(list(out.glob("*.mp4"))) == 1
    render("a red circle", "--seed", "1")
    assert len(list(out.glob("*.mp4"))) == 2


def test_the_same_command_writes_the_same_bytes(render):
    _, _, _, out = render("a red circle")
    (video,) = out.glob("*.mp4")
    first = video.read_bytes()
    video.unlink()
    render("a red circle")
    assert video.read_bytes() == first


def test_lossless_decodes_to_exactly_the_rendered_frames(render, loaded, new_request):
    _, _, _, out = render("a red circle", "--lossless", "--guidance", "4")
    expected = render_clip(loaded("wan"), new_request(prompt="a red circle", num_inference_steps=3), lambda i, n: None)
    assert np.array_equal(read_video(next(out.glob("*.mp4"))), expected.frames)


@pytest.mark.parametrize(
    "prompt", ["-v; rm -rf / $(id) `id` %s\n'\"=;#\\", "\u2603 \U0001f600 grüße", "title=x\nmajor_brand=y"]
)
def test_any_text_survives_in_the_metadata(render, prompt):
    code, _, _, out = render("--", prompt)
    assert code == 0
    assert read_metadata(next(out.glob("*.mp4")))["prompt"] == prompt


def test_a_cached_clip_tells_what_was_skipped(render):
    code, stdout, _, out = render("a red circle", "--steps", "12", "--cache", "dicache(threshold=0.5)", "--json")
    assert code == 0
    (clip,) = json.loads(stdout)["clips"]
    assert clip["computed_steps"] + clip["skipped_steps"] == 12
    assert clip["skipped_steps"] > 0
    assert clip["computed_steps"] / 12 < clip["cost"] < 1  # a probe is one of three blocks
    sidecar = json.loads(out.joinpath(clip["video"].split("/")[-1]).with_suffix(".json").read_text())
    assert sidecar["cache"].startswith("dicache(threshold=0.5,probe_depth=1,")
    assert sidecar["trace"]["skipped_steps"] == clip["skipped_steps"]
    assert sidecar["trace"]["forecast_bytes"] == sidecar["trace"]["held_bytes"] > 0
    (trace,) = out.glob("*.trace.json")
    code, stdout, _, _ = render("a red circle", "--steps", "12", "--cache", f"replay:{trace}", "--json")
    assert code == 0
    assert json.loads(stdout)["clips"][0]["skipped_steps"] == clip["skipped_steps"]
    first, second = (read_video(path) for path in sorted(out.glob("*.mp4")))
    assert np.array_equal(first, second)
    _, stdout, _, _ = render("a red circle", "--steps", "12", "--cache", "dicache(threshold=0.5)", "--json")
    assert json.loads(stdout)["clips"][0] | {"wall_s": 0} == clip | {"status": "existing", "wall_s": 0}


def test_a_cache_that_never_skips_says_so(render):
    _, _, stderr, out = render("a red circle", "--steps", "9", "--cache", "dicache(threshold=0.000001)")
    assert "the cache never skipped a step in 9; raise its threshold" in stderr
    assert (
        "never skipped"
        in json.loads(next(p for p in out.glob("1.*.json") if "trace" not in p.name).read_text())["warning"]
    )


def test_a_cache_that_cannot_help_is_off_unless_it_is_insisted_on(render, tmp_path):
    (tmp_path / "m.jsonl").write_text(
        '{"prompt": "a"}\n{"prompt": "b", "steps": 9}\n{"prompt": "c", "cache": "interval(interval=2,short=true)"}\n'
    )
    manifest = ("--manifest", str(tmp_path / "m.jsonl"), "--steps", "6", "--cache", "interval(interval=2)")
    code, stdout, stderr, out = render(*manifest, "--json")
    assert code == 0
    skipped = [clip["skipped_steps"] for clip in json.loads(stdout.splitlines()[-1])["clips"]]
    assert skipped[0] == 0
    assert min(skipped[1:]) > 0
    said = "--cache interval(interval=2) is off for clips of 6 steps: with 8 or fewer each is needed"
    assert stderr.count(said) == 1
    assert "on all the same" in stderr
    (sidecar,) = out.glob("1.*.json")
    assert json.loads(sidecar.read_text())["cache"] == "none"
    _, stdout, stderr, _ = render(*manifest, "--dry-run", "--json")
    assert json.loads(stdout.splitlines()[-1])["done"] == 3
    assert said in stderr


def test_the_preset_stands_back_from_short_clips_and_a_threshold_of_ones_own_does_not():
    def idle(cache, steps):
        size = {"width": 64, "height": 64, "num_frames": 17, "guidance_scale": 5.0, "fps": 8}
        return is_idle(ClipRequest(id="a", prompt="a", cache=cache, num_inference_steps=steps, **size))

    assert [idle("dicache", steps) for steps in (8, 12, 15, 16)] == [True, True, True, False]
    assert [idle("dicache(threshold=0.1)", steps) for steps in (8, 12)] == [True, False]
    assert [idle("interval", steps) for steps in (8, 12)] == [True, False]
    assert not idle("dicache(short=true)", 12)


def test_a_manifest_with_hunyuan_video(render, tmp_path):
    (tmp_path / "m.jsonl").write_text('{"prompt": "a", "id": "x"}\n\n{"prompt": "b", "seed": 3}\n')
    code, stdout, _, out = render("--manifest", str(tmp_path / "m.jsonl"), "--json", model="hunyuan")
    assert code == 0
    assert [c["id"] for c in json.loads(stdout)["clips"]] == ["x", "3"]
    assert len(list(out.glob("*.mp4"))) == 2


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "nothing to render: give prompts or --manifest"),
        (["a", "--manifest", "m.jsonl"], "give prompts or --manifest, not both"),
        (["--manifest", "none.jsonl"], "manifest none.jsonl cannot be read: No such file"),
        ([""], "prompt 1: prompt must not be empty"),
        (["x" * 10_000_000], "prompt 1: prompt must have at most 20000 characters, got 10000000"),
        (["a", "--frames", "16"], "frames must be 4k+1, got 16; nearest: 13 or 17"),
        (["a", "--width", "60"], "width must be a multiple of 16, got 60"),
        (["a", "--steps", "0"], "steps must be 1 to 1000, got 0"),
        (["a", "--seed", "-1"], "seed must be 0 to"),
        (["a", "--seed", str(2**63)], "seed must be 0 to"),
        (["a", "--guidance", "abc"], "'abc' is not a valid float"),
        (["a", "--guidance", "nan"], "guidance must be 0 to 100, got nan"),
        (["a", "--cache", "dicash"], "unknown policy 'dicash'; valid: none"),
        (["a", "--cache", "none(x=1)"], "unknown option 'x=1' of none"),
        (["a", "--cache", "none("], "not of the form"),
        (["a", "--device", "tpu"], "device must be cpu or cuda, got 'tpu'"),
        (["a", "--dtype", "int8"], "dtype must be auto or one of float32, bfloat16, float16"),
        (["a", "--offload", "model", "--device", "cpu"], "it needs --device cuda"),
        (["a", "--image", "x.png"], "image cannot be used"),
        (["a", "--image-fit", "crop"], "image_fit cannot be used: this model renders from text alone"),
        (["a", "--image-fit", "zoom"], "'zoom' is not one of 'stretch', 'crop', 'pad'"),
        (["a", "--model", "no-such-model"], "neither a folder nor a hub id owner/name nor one of those"),
        (["a", "--typo"], "No such option '--typo'"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(render, arguments, said):
    code, stdout, stderr, out = render(*arguments)
    assert code == 2
    assert stdout == ""
    (line,) = stderr.strip().splitlines()
    assert line.startswith("cineray")
    assert said in line
    assert len(line) < 500
    assert not out.exists()


def test_an_output_folder_that_cannot_be_made(render, tmp_path):
    (tmp_path / "file").write_text("")
    for bad in (tmp_path / "file", tmp_path / "file" / "deeper", "/proc/nothing/here"):
        code, _, stderr, _ = render("a", "--out", str(bad))
        assert code == 2
        (line,) = stderr.strip().splitlines()
        assert f"output folder {bad} cannot be written" in line


def test_loading_problems_are_one_line_each(render, checkpoint_folder, tmp_path):
    import shutil

    def said(folder) -> str:
        code, _, stderr, out = render("a", "--model", str(folder))
        assert code == 2
        assert not out.exists()
        (line,) = stderr.strip().splitlines()
        return line

    (tmp_path / "empty").mkdir()
    assert "model_index.json is missing, so this is not a diffusers folder" in said(tmp_path / "empty")
    broken = tmp_path / "broken"
    shutil.copytree(checkpoint_folder("wan"), broken)
    weights = broken / "transformer" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    assert f"{broken}: transformer/diffusion_pytorch_model.safetensors: it is cut" in said(broken)
    weights.unlink()
    assert f"{broken}: transformer/diffusion_pytorch_model.safetensors is missing" in said(broken)
    (broken / "tokenizer" / "tokenizer.json").write_text("{")
    shutil.copy(checkpoint_folder("wan") / "transformer" / weights.name, weights)
    assert f"loading from {broken} failed" in said(broken)
    (broken / "vae" / "config.json").write_text("{")
    assert "vae/config.json cannot be read" in said(broken)
    index = broken / "model_index.json"
    index.write_text(index.read_text().replace("WanPipeline", "StableDiffusionPipeline"))
    assert "pipeline 'StableDiffusionPipeline' is not supported; supported: WanPipeline" in said(broken)
    index.write_text('{"_class_name": "WanPipeline", "boundary_ratio": 0.9}')
    (broken / "vae" / "config.json").write_text("{}")
    assert "so it is of two experts, and transformer_2 is missing" in said(broken)


def test_a_hub_id_without_network_is_one_line(render, monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    code, _, stderr, out = render("a", "--model", "wan2.1-t2v-1.3b")
    assert code == 2
    assert "the hub cannot be reached; check the network" in stderr
    assert len(stderr.strip().splitlines()) == 1
    assert not out.exists()


@pytest.fixture
def pictures(tmp_path):
    """A manifest of two clips, each with a picture of its own: (manifest, first picture, second picture)."""
    manifest, first, second = tmp_path / "m.jsonl", tmp_path / "first.png", tmp_path / "second.png"
    Image.new("RGB", (32, 32), "red").save(first)
    Image.new("RGB", (96, 32), "red").save(second)
    rows = [{"prompt": "a", "image": path.name, "id": path.stem} for path in (first, second)]
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return manifest, first, second


def test_a_broken_picture_is_a_bad_line(render, pictures):
    manifest, first, _ = pictures
    first.write_bytes(first.read_bytes()[:60])
    code, stdout, stderr, out = render("--manifest", str(manifest), model="wan_i2v")
    assert (code, stdout) == (2, "")
    (line,) = stderr.strip().splitlines()
    assert f"{manifest} line 1: image" in line
    assert not out.exists()


def test_a_clip_that_fails_does_not_stop_the_others(render, pictures, monkeypatch):
    """A picture that is changed between the check of its line and its turn."""
    manifest, first, _ = pictures
    check = clip_arguments.read_requests

    def checked_then_broken(*arguments):
        found = check(*arguments)
        first.write_bytes(b"no image")
        return found

    monkeypatch.setattr("cineray.jobs.cli.main.read_requests", checked_then_broken)
    code, stdout, stderr, out = render("--manifest", str(manifest), "--json", model="wan_i2v")
    assert code == 1
    assert [(c["id"], c["status"]) for c in json.loads(stdout)["clips"]] == [("first", "failed"), ("second", "done")]
    assert "first: failed in " in stderr
    assert "s: image '" in stderr
    assert [p.name.split(".")[0] for p in out.glob("*.mp4")] == ["second"]


def test_a_stretched_picture_is_said_and_can_be_fitted(render, pictures):
    manifest, _, second = pictures
    said = "image 'second.png' is 96x32 and was stretched to 32x32; --image-fit crop or pad"
    code, stdout, stderr, out = render("--manifest", str(manifest), "--json", model="wan_i2v")
    assert code == 0
    square, wide = json.loads(stdout)["clips"]
    assert "warnings" not in square
    assert wide["warnings"][0].startswith(said)
    assert said in " ".join(stderr.split())
    (sidecar,) = out.glob("second.*.json")
    assert json.loads(sidecar.read_text())["warnings"] == wide["warnings"]
    assert json.loads(sidecar.read_text())["image_fit"] == "stretch"
    for fit in ("crop", "pad"):
        code, stdout, stderr, _ = render("a", "--image", str(second), "--image-fit", fit, "--json", model="wan_i2v")
        assert code == 0
        assert "warnings" not in json.loads(stdout)["clips"][0]
    assert len(list(out.glob("1.*.mp4"))) == 2


def test_a_calibrated_schedule_renders(render, checkpoint_folder, tmp_path, capsys):
    schedule = tmp_path / "smooth.json"
    calibrate = ["calibrate", "smoothcache", "a red circle", "--model", str(checkpoint_folder("wan"))]
    sizes = ["--width", "32", "--height", "32", "--frames", "5"]
    ask = ["--steps", "6", "--alpha", "10", "--out", str(schedule), "--json"]
    assert main([*calibrate, *sizes, *ask]) == 0
    assert json.loads(capsys.readouterr().out)["computed"] == {"attn1": 3, "attn2": 3, "ffn": 3}
    assert json.loads(schedule.read_text())["ffn"] == [1, 0, 0, 0, 1, 1]
    code, stdout, _, _ = render("a red circle", "--steps", "6", "--cache", f"smoothcache:{schedule}", "--json")
    assert code == 0
    (clip,) = json.loads(stdout)["clips"]
    assert (clip["computed_steps"], clip["skipped_steps"], clip["cost"]) == (3, 3, 0.5)
    code, _, stderr, _ = render("a red circle", "--steps", "7", "--cache", f"smoothcache:{schedule}")
    assert code == 2
    assert "the schedule is for 6 steps, got 7" in stderr
    for wrong, said in (
        (["--alpha", "nan"], "alpha must be 0 or more"),
        (["--max-lag", "6"], "max-lag must be 1 to 5 for 6 steps"),
        (["--out", str(tmp_path / "no" / "x.json")], "cannot be written: No such file"),
    ):
        assert main([*calibrate, *sizes, *ask, *wrong]) == 2
        assert said in capsys.readouterr().err
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".smooth")]
