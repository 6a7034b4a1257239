"""`cineray models`, and what the registry says of published checkpoints."""

import json

import pytest
from accelerate import init_empty_weights
from every_model import EVERY_MODEL, build, call, layout_of

import cineray
from cineray.caching.spec import NAMES
from cineray.jobs.cli.main import main
from cineray.pipeline.adapters import MODELS, PIPELINES


def test_it_lists_every_model_with_the_policies_that_it_can_be_cached_with(capsys):
    assert main(["models", "--json"]) == 0
    said = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert {"tiny-wan", "tiny-hunyuan", "wan2.1-t2v-1.3b", "hunyuan-video"} <= {row["name"] for row in said["models"]}
    assert said["pipelines"] == PIPELINES
    assert [row["family"] for row in said["cached"]] == [model.family for model in MODELS.values()]
    cached = {row["transformer"]: row for row in reversed(said["cached"])}
    names = [name.partition(":")[0] for name in NAMES]
    assert cached["WanTransformer3DModel"]["policies"] == names
    assert cached["WanTransformer3DModel"]["renders"] == ["WanPipeline", "WanImageToVideoPipeline"]
    assert cached["DiTTransformer2DModel"]["pipelines"] == ["DiTPipeline"]
    for kind in ("DiTTransformer2DModel", "StableAudioDiTModel", "STDiT3"):
        assert set(names) - set(cached[kind]["policies"]) >= {"dicache-paper"}
    assert cached["STDiT3"]["renders"] == ["OpenSoraPipeline"]
    assert [cached[kind]["output"] for kind in ("StableAudioDiTModel", "DiTTransformer2DModel")] == ["sound", "picture"]


def test_the_table_names_them_too(capsys):
    assert main(["models"]) == 0
    out = capsys.readouterr().out
    for name in (
        "tiny-wan",
        "HunyuanVideoPipeline",
        "FluxPipeline",
        "DiTPipeline",
        "StableAudioPipeline",
        "OpenSoraPipeline",
    ):
        assert name in out


@pytest.mark.parametrize("name", EVERY_MODEL)
def test_what_is_listed_can_be_enabled(name, capsys):
    main(["models", "--json"])
    said = json.loads(capsys.readouterr().out.splitlines()[-1])["cached"]
    pipe = build(name)
    policies = next(row["policies"] for row in said if row["transformer"] == type(pipe.transformer).__name__)
    assert len(policies) > 4
    for policy in policies:
        if policy in ("teacache", "magcache"):  # each fits one checkpoint, by its profile
            with pytest.raises(ValueError, match=f"{policy} has no profile of this model"):
                cineray.enable_cache(pipe, policy)
        elif policy not in ("none", "smoothcache", "replay"):  # these two take a file
            cineray.enable_cache(pipe, policy).disable()


def test_the_published_sizes_have_the_blocks_that_the_papers_cache():
    """The default configurations are the published ones; depths as in the papers' models."""
    from diffusers import DiTTransformer2DModel, StableAudioDiTModel

    from cineray.pipeline.adapters.open_sora_transformer import STDiT3
    from cineray.pipeline.caches.layers import layers_of

    for kind, num_blocks, num_layers in (
        (DiTTransformer2DModel, 28, 2 * 28),
        (StableAudioDiTModel, 24, 3 * 24),
        (STDiT3, 28, 6 * 28),
    ):
        with init_empty_weights():
            transformer = kind()
        with cineray.enable_cache(transformer, "dicache") as handle:
            assert handle.trace.num_blocks == num_blocks
        assert len(list(layers_of(transformer, layout_of(transformer)))) == num_layers


def test_the_published_dit_config_names_an_older_class_which_diffusers_maps(tmp_path):
    """facebook/DiT-XL-2-256 was saved as Transformer2DModel."""
    from diffusers import DiTPipeline

    build("dit").save_pretrained(tmp_path)
    for path in (tmp_path / "model_index.json", tmp_path / "transformer" / "config.json"):
        path.write_text(path.read_text().replace("DiTTransformer2DModel", "Transformer2DModel"))
    pipe = DiTPipeline.from_pretrained(tmp_path)
    pipe.set_progress_bar_config(disable=True)
    with cineray.enable_cache(pipe, "interval(interval=2)") as handle:
        call(pipe)
    assert handle.trace.summary()["skipped_steps"] == 5
