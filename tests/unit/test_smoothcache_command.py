"""`cineray calibrate smoothcache` and `render --cache smoothcache:FILE` on a folder of every model."""

import json

import numpy as np
import pytest
from conftest import BUILDERS
from every_model import STACKED
from more_models import CLIPS, clip_of
from open_sora_files import convert, publish

from cineray.jobs.cli.main import main
from cineray.pipeline.adapters import MODELS
from cineray.pipeline.caches.layers import layers_of
from cineray.pipeline.loading.checkpoint import open_checkpoint
from cineray.pipeline.loading.model import LoadOptions, load_model
from cineray.pipeline.media.output import output_of

pytestmark = pytest.mark.slow

STEPS = 5
# one of each pipeline, and two experts
OTHERS = ("wan", "wan_i2v", "wan22", "vace", "hunyuan", "hunyuan_concat", "hunyuan15", "hunyuan15_image", "flux")
NAMES = (*STACKED, *OTHERS)
SMALL = {"width": 32, "height": 32, "num_frames": 5}
SIZES = dict.fromkeys(BUILDERS, SMALL) | {"wan_i2v": {**SMALL, "image": ""}}
SIZES |= {"open_sora": {"width": 16, "height": 16, "num_frames": 17}}
FLAGS = {"num_frames": "frames", "guidance_scale_2": "guidance-2", "reference_images": "reference-image"}
OF_NO_USE = {  # of `CLIPS`, what these models refuse
    "flux": ("fps", "num_frames"),
    "dit": ("fps", "num_frames", "width", "height"),
    "stable_audio": ("fps", "num_frames", "width", "height"),
}


@pytest.fixture(scope="session")
def folder_of(checkpoint_folder, tmp_path_factory):
    """Factory: name -> folder of a random checkpoint, made once."""

    def folder(name):
        if name != "open_sora":
            return checkpoint_folder(name)
        out = tmp_path_factory.getbasetemp() / "open-sora-converted"
        if not out.exists():
            assert convert(publish(tmp_path_factory.mktemp("published")), out) == 0
        return out

    return folder


@pytest.fixture
def command(folder_of, new_request, tmp_path, capsys):
    """Runs a command on a model's small clip with STEPS steps, and returns the JSON that it prints."""

    def run(name, *words, more):
        asked = SIZES.get(name) or SMALL | CLIPS[name]
        if "image" in asked or "reference_images" in asked:
            made = clip_of(name, new_request, tmp_path) if name in CLIPS else _first_frame(tmp_path)
            asked = {key: getattr(made, key) if key in ("image", "reference_images") else asked[key] for key in asked}
        options = [
            word
            for key, value in asked.items()
            if key != "prompt" and key not in OF_NO_USE.get(name, ())
            for one in (value if isinstance(value, tuple) else (value,))
            for word in (f"--{FLAGS.get(key, key).replace('_', '-')}", str(one))
        ]
        prompt, model = asked.get("prompt", "a red circle"), str(folder_of(name))
        capsys.readouterr()
        assert main([*words, prompt, "--model", model, *options, "--steps", str(STEPS), *more, "--json"]) == 0
        return json.loads(capsys.readouterr().out.splitlines()[-1])

    return run


def _first_frame(folder):
    from PIL import Image

    class Made:
        image = str(folder / "first.png")

    Image.new("RGB", (32, 32), "green").save(Made.image)
    return Made


ALIKE = ("hunyuan15_image", "hunyuan_concat", "wan_i2v")  # their layers are those of their text-to-video kin


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.exhaustive) if name in ALIKE else name for name in NAMES]
)
def test_a_calibrated_schedule_skips_what_it_says(command, folder_of, tmp_path, name):
    model = load_model(open_checkpoint(str(folder_of(name))), LoadOptions())
    layers = [layer for layer, _, _ in layers_of(model.pipe.transformer, model.checkpoint.model.layout)]
    always = calibrated(command, name, "1e9", tmp_path)
    rows = json.loads(always.read_text())
    assert set(rows) == set(layers)
    row = next(iter(rows.values()))
    assert sum(row) < STEPS
    assert all(other == row for other in rows.values())
    _, plain = rendered(command, name, "none", tmp_path / "plain")
    clip, cached = rendered(command, name, f"smoothcache:{always}", tmp_path / "cached")
    assert clip["cost"] == pytest.approx(np.mean(row), abs=1e-4)
    assert clip["skipped_steps"] == STEPS - sum(row)
    assert cached.shape == plain.shape
    assert not np.array_equal(cached, plain)


@pytest.mark.parametrize("name", STACKED)
def test_alpha_0_never_skips_and_one_layer_type_skips_alone(command, folder_of, tmp_path, name):
    """Of the models whose guidance stands in the batch."""
    model = load_model(open_checkpoint(str(folder_of(name))), LoadOptions())
    layers = [layer for layer, _, _ in layers_of(model.pipe.transformer, model.checkpoint.model.layout)]
    never = calibrated(command, name, "0", tmp_path)
    assert json.loads(never.read_text()) == dict.fromkeys(layers, [1] * STEPS)
    _, plain = rendered(command, name, "none", tmp_path / "plain")
    clip, off = rendered(command, name, f"smoothcache:{never}", tmp_path / "off")
    assert np.array_equal(off, plain)
    assert (clip["cost"], clip["skipped_steps"]) == (1.0, 0)
    once = tmp_path / "once.json"
    once.write_text(json.dumps({layers[-1]: [1, 1, 0, 1, 1]}))
    clip, skipped = rendered(command, name, f"smoothcache:{once}", tmp_path / "once")
    assert clip["cost"] == pytest.approx(1 - layers.count(layers[-1]) / len(layers) / STEPS, abs=1e-4)
    assert not np.array_equal(skipped, plain)


def calibrated(command, name, alpha, folder):
    path = folder / f"{alpha}.json"
    command(name, "calibrate", "smoothcache", more=["--alpha", alpha, "--max-lag", "2", "--out", str(path)])
    return path


def rendered(command, name, cache, out):
    """(the clip of `--json`, its frames or samples)."""
    (clip,) = command(name, "render", more=["--cache", cache, "--lossless", "--out", str(out)])["clips"]
    return clip, output_of(clip["video"]).read(out / clip["video"])


def test_every_pipeline_that_can_be_cached_so_is_here(folder_of):
    """`cineray models` promises it for all."""
    here = {open_checkpoint(str(folder_of(name))).pipeline_class for name in NAMES}
    assert here == {pipeline for model in MODELS.values() for pipeline in model.pipelines}
