"""Weights that are not those of the configuration, or no numbers, are refused in one line when they are loaded."""

import json
import shutil

import pytest
import torch
from conftest import _wan_parts
from diffusers import AutoencoderKLWan, WanPipeline
from safetensors.torch import load_file, save_file

from cineray.pipeline.loading.checkpoint import open_checkpoint
from cineray.pipeline.loading.model import LoadOptions, load_model
from cineray.pipeline.request import InputError

TRANSFORMER_FILE, TEXT_FILE = "transformer/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"


def refusal(folder, skip_components=(), **options) -> str:
    checkpoint = open_checkpoint(str(folder))
    with pytest.raises(InputError) as caught:
        load_model(checkpoint, LoadOptions(**options), skip_components)
    (line,) = caught.value.lines
    assert line.startswith(f"model {folder}: loading from {folder} failed: ")
    assert len(line) < 900
    return line


@pytest.fixture
def folder(checkpoint_folder, tmp_path):
    shutil.copytree(checkpoint_folder("wan"), tmp_path / "wan")
    return tmp_path / "wan"


def change(path, edit) -> None:
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path, {"format": "pt"})


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(
    ("file", "tensor"),
    [
        (TRANSFORMER_FILE, "blocks.1.ffn.net.0.proj.weight"),
        ("vae/diffusion_pytorch_model.safetensors", "decoder.conv_out.bias"),
        (TEXT_FILE, "shared.weight"),
    ],
)
def test_a_value_that_is_not_finite_is_refused_by_name(folder, file, tensor, value):
    def poison(tensors):
        tensors[tensor].view(-1)[-1] = value

    change(folder / file, poison)
    assert f"tensor '{tensor}' holds values that are not finite as float32" in refusal(folder)


def test_parts_that_stay_out_of_memory_are_not_looked_at(folder):
    change(folder / TRANSFORMER_FILE, lambda tensors: tensors["proj_out.weight"].fill_(float("nan")))
    load_model(open_checkpoint(str(folder)), LoadOptions(), skip_components=("transformer",))
    assert "proj_out.weight" in refusal(folder, skip_components=("text_encoder",))


def test_a_number_too_large_for_the_type_that_was_asked_for_is_refused(folder):
    change(folder / TRANSFORMER_FILE, lambda tensors: tensors["proj_out.weight"].fill_(1e6))
    load_model(open_checkpoint(str(folder)), LoadOptions())
    assert "not finite as float16" in refusal(folder, dtype="float16")


@pytest.mark.parametrize(
    ("file", "edit", "said"),
    [
        (TRANSFORMER_FILE, lambda t: t.pop("proj_out.bias"), "transformer: 1 tensors are missing from the weights"),
        (TRANSFORMER_FILE, lambda t: t.update(x=torch.zeros(1)), "1 tensors are in the weights and not in the model"),
        (TRANSFORMER_FILE, lambda t: t.update({"proj_out.bias": torch.zeros(3)}), "another shape in the weights"),
        (TEXT_FILE, lambda t: t.pop("encoder.final_layer_norm.weight"), "text_encoder: 1 tensors are missing"),
        (TEXT_FILE, lambda t: t.pop("shared.weight"), "are missing from the weights"),
        (TEXT_FILE, lambda t: t.update({"encoder.x": torch.zeros(1)}), "such as 'encoder.x'"),
        (TEXT_FILE, lambda t: t.update({"shared.weight": torch.zeros(7, 64)}), "another shape in the weights"),
    ],
)
def test_other_tensors_than_the_configuration_asks_for_are_refused(folder, file, edit, said):
    change(folder / file, edit)
    assert said in refusal(folder)


def test_what_older_versions_saved_beside_the_weights_is_passed_over(checkpoint_folder, tmp_path):
    shutil.copytree(checkpoint_folder("hunyuan"), tmp_path / "hunyuan")
    extra = {
        "text_encoder": {"lm_head.weight": torch.zeros(2, 2), "layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(8)},
        "text_encoder_2": {"embeddings.position_ids": torch.arange(77)[None], "text_projection.weight": torch.zeros(2)},
    }
    for part, tensors in extra.items():
        change(tmp_path / "hunyuan" / part / "model.safetensors", lambda t, more=tensors: t.update(more))
    load_model(open_checkpoint(str(tmp_path / "hunyuan")), LoadOptions())


def test_a_tokenizer_of_another_vocabulary_is_refused(folder):
    config = folder / "text_encoder" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"vocab_size": 10}))
    change(folder / TEXT_FILE, lambda t: t.update({"shared.weight": t["shared.weight"][:10].clone()}))
    assert "tokenizer: its tokens go up to" in refusal(folder)


def test_a_folder_that_goes_away_before_it_is_loaded_is_one_line(folder):
    checkpoint = open_checkpoint(str(folder))
    shutil.rmtree(folder)
    with pytest.raises(InputError, match="the folder has gone since it was looked at"):
        load_model(checkpoint, LoadOptions())


@pytest.mark.parametrize("options", [{"device": "x" * 10**5}, {"dtype": "\x1b[31m"}, {"offload": "none\n"}])
def test_odd_options_are_one_short_line(options):
    with pytest.raises(InputError) as caught:
        LoadOptions(**options)
    (line,) = caught.value.lines
    assert len(line) < 200
    assert line.isprintable()


def test_a_pipeline_without_its_vae_keeps_the_vae_s_scale_factors(tmp_path):
    """Noise is drawn where the VAE is not: a pipeline built without one would take Wan's 8 for its own."""
    parts = _wan_parts(0)
    sizes = {
        "dim_mult": [1, 1, 1],
        "temperal_downsample": [True, False],
        "num_res_blocks": 1,
        "base_dim": 4,
        "z_dim": 4,
    }
    factors = {"scale_factor_spatial": 4, "scale_factor_temporal": 2}
    statistics = {"latents_mean": [0.0] * 4, "latents_std": [1.0] * 4}
    vae = AutoencoderKLWan(**sizes, **factors, **statistics)
    WanPipeline(**{**parts, "vae": vae}).save_pretrained(tmp_path)
    checkpoint = open_checkpoint(str(tmp_path))
    pipe = load_model(checkpoint, LoadOptions(), skip_components=checkpoint.model.decoder_parts).pipe
    assert pipe.vae is None
    assert (pipe.vae_scale_factor_spatial, pipe.vae_scale_factor_temporal) == (4, 2)
