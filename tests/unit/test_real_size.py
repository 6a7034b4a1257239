"""The script that makes and renders a checkpoint of published width, with few layers and words so that it is quick."""

import json
import sys

import pytest

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.exhaustive]


@pytest.mark.skipif(sys.platform != "linux", reason="it reads /proc")
def test_a_checkpoint_of_published_width_renders(tmp_path):
    import real_size

    from cineray.pipeline.footprint.published import published
    from cineray.pipeline.loading.checkpoint import open_checkpoint

    folder = tmp_path / "wan"
    real_size.make(folder, layers=2, text_layers=1, vocabulary=1000)
    checkpoint = open_checkpoint(str(folder))
    known = published(real_size.MODEL)
    assert {**checkpoint.configs.transformer, "num_layers": 30} == dict(known.config("transformer"))
    assert dict(checkpoint.configs.vae) == dict(known.config("vae"))
    index = json.loads((folder / "text_encoder" / "model.safetensors.index.json").read_text())
    assert all(name.endswith(".safetensors") for name in index["weight_map"].values())
    more = ["--steps", "9", "--frames", "1", "--guidance", "1", "--shard-weights"]
    found = real_size.render(folder, tmp_path / "out", 2, "interval(interval=2)", more)
    assert found["layout"] == {"gangs": 1, "cfg": 1, "ring": 1, "ulysses": 2}
    assert found["skipped_steps"] > 0
    assert found["computed_steps"] + found["skipped_steps"] == 9
    weights = sum(file.stat().st_size for file in (folder / "transformer").glob("*.safetensors")) / 2  # in bfloat16
    assert weights < found["largest_process"]["anonymous_bytes"] < weights + 3e9
