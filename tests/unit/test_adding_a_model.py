"""docs/adding_a_model.md, followed: its checkpoint, its file as the one line of a registry, its proof."""

import contextlib
import io
import re
import sys
import types

import pytest
from conftest import REPOSITORY

from cineray.pipeline.adapters import MODELS, by_transformer
from cineray.pipeline.loading import checkpoint as checkpoint_module
from cineray.pipeline.loading.checkpoint import open_checkpoint
from cineray.pipeline.request import InputError

pytestmark = pytest.mark.slow

FENCES = re.findall(r"```python\n(.*?)```", (REPOSITORY / "docs" / "adding_a_model.md").read_text(), re.DOTALL)


def run(code: str, **known) -> types.ModuleType:
    module = types.ModuleType("from_the_page")
    module.__dict__.update(known)
    sys.modules[module.__name__] = module  # dataclasses look their module up
    try:
        exec(compile(code, "adding_a_model.md", "exec"), module.__dict__)
    finally:
        del sys.modules[module.__name__]
    return module


def test_the_page_s_model_renders_the_bits_of_diffusers(tmp_path, monkeypatch):
    toy, adapter, proof = FENCES
    monkeypatch.chdir(tmp_path)
    run(toy)
    with pytest.raises(InputError, match="pipeline 'SkyReelsV2Pipeline' is not supported"):
        open_checkpoint("out/toy-skyreels")
    models = {**MODELS, **by_transformer(run(adapter).MODEL)}
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        run(
            proof.replace('open_checkpoint("out/toy-skyreels")', 'open_checkpoint("out/toy-skyreels", MINE)'),
            MINE=models,
        )
    assert said.getvalue() == "True\n"
    assert checkpoint_module.MODELS is MODELS  # nothing was patched
    assert "SkyReelsV2Transformer3DModel" not in MODELS
