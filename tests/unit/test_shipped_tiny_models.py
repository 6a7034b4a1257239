"""Each tiny checkpoint that ships can be named, loads and renders: `cineray render --model NAME`, two steps."""

import json

import pytest

from cineray.jobs.cli.main import main
from cineray.pipeline.adapters import KNOWN_MODELS
from cineray.pipeline.adapters.model import SHIPPED
from cineray.pipeline.loading.checkpoint import open_checkpoint
from cineray.pipeline.media.output import SOUND

CLIP, STILL = "a red circle moving left on a navy background", "a red circle on a navy background"
TONE = "a low bright tone rising"
PROMPTS = {
    "tiny-wan": CLIP,
    "tiny-hunyuan": CLIP,
    "tiny-wan2.2": CLIP,
    "tiny-open-sora": CLIP,
    "tiny-dit": STILL,
    "tiny-audio": TONE,
}


def test_every_folder_that_ships_has_its_name():
    assert {path.name for path in SHIPPED.iterdir()} == PROMPTS.keys()
    assert {name for name in KNOWN_MODELS if name.startswith("tiny-")} == PROMPTS.keys()


@pytest.mark.slow
@pytest.mark.parametrize(("name", "prompt"), PROMPTS.items())
def test_it_renders_what_it_was_trained_on(name, prompt, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["render", prompt, "--model", name, "--steps", "2", "--out", str(out), "--json"]) == 0
    (clip,) = json.loads(capsys.readouterr().out.splitlines()[-1])["clips"]
    assert clip["status"] == "done"
    checkpoint = open_checkpoint(name)
    output = checkpoint.model.output
    (file,) = out.glob(f"*{output.suffix}")
    whole = (1024, 1) if output is SOUND else (checkpoint.defaults.num_frames, 64, 64, 3)
    assert output.read(file).shape == whole
