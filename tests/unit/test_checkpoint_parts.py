"""What a checkpoint says of itself is judged before anything is loaded; published and shipped ones pass."""

import json
import os
import shutil
import struct
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from cineray.pipeline.adapters import MODELS
from cineray.pipeline.loading.checkpoint import open_checkpoint, weights_digest
from cineray.pipeline.loading.model import LoadOptions, load_model
from cineray.pipeline.loading.parts import check_configs
from cineray.pipeline.request import InputError

UNIPC = {
    "_class_name": "UniPCMultistepScheduler",
    "flow_shift": 5.0,
    "num_train_timesteps": 1000,
    "prediction_type": "flow_prediction",
    "solver_order": 2,
    "solver_p": None,
    "solver_type": "bh2",
    "use_flow_sigmas": True,
    "disable_corrector": [],
}
UMT5 = {"model_type": "umt5", "d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64}
WAN_VAE = {"_class_name": "AutoencoderKLWan", "z_dim": 16, "latents_mean": [-0.7571] * 16, "latents_std": [2.8184] * 16}
WAN_INDEX = {
    "scheduler": ["diffusers", "UniPCMultistepScheduler"],
    "text_encoder": ["transformers", "UMT5EncoderModel"],
    "tokenizer": ["transformers", "T5TokenizerFast"],
    "transformer": ["diffusers", "WanTransformer3DModel"],
    "vae": ["diffusers", "AutoencoderKLWan"],
}
# the numbers of the configurations on the hub
PUBLISHED = {
    "wan2.1-t2v-1.3b": (
        WAN_INDEX | {"_class_name": "WanPipeline"},
        {
            "transformer": {"num_attention_heads": 12, "num_layers": 30, "ffn_dim": 8960, "text_dim": 4096},
            "vae": WAN_VAE,
            "text_encoder": UMT5 | {"vocab_size": 256384},
            "scheduler": UNIPC | {"flow_shift": 3.0},
        },
    ),
    "wan2.1-i2v-14b": (
        WAN_INDEX
        | {
            "_class_name": "WanImageToVideoPipeline",
            "image_encoder": ["transformers", "CLIPVisionModel"],
            "image_processor": ["transformers", "CLIPImageProcessor"],
        },
        {
            "transformer": {"in_channels": 36, "image_dim": 1280, "added_kv_proj_dim": 5120, "pos_embed_seq_len": None},
            "vae": WAN_VAE,
            "text_encoder": UMT5,
            "scheduler": UNIPC,
            "image_encoder": {
                "model_type": "clip_vision_model",
                "hidden_size": 1280,
                "intermediate_size": 5120,
                "num_hidden_layers": 32,
                "num_attention_heads": 16,
                "patch_size": 14,
                "hidden_act": "gelu",
            },
        },
    ),
    "hunyuan-video": (
        {
            "_class_name": "HunyuanVideoPipeline",
            "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
            "text_encoder": ["transformers", "LlamaModel"],
            "text_encoder_2": ["transformers", "CLIPTextModel"],
            "tokenizer": ["transformers", "LlamaTokenizerFast"],
            "tokenizer_2": ["transformers", "CLIPTokenizer"],
            "transformer": ["diffusers", "HunyuanVideoTransformer3DModel"],
            "vae": ["diffusers", "AutoencoderKLHunyuanVideo"],
        },
        {
            "transformer": {"guidance_embeds": True, "rope_axes_dim": [16, 56, 56], "rope_theta": 256.0},
            "vae": {"scaling_factor": 0.476986, "norm_num_groups": 32},
            "text_encoder": {
                "model_type": "llama",
                "hidden_size": 4096,
                "intermediate_size": 14336,
                "num_key_value_heads": 8,
                "rope_scaling": None,
                "rope_theta": 500000.0,
                "vocab_size": 128320,
                "max_position_embeddings": 8192,
            },
            "text_encoder_2": {
                "model_type": "clip_text_model",
                "hidden_size": 768,
                "intermediate_size": 3072,
                "num_attention_heads": 12,
                "eos_token_id": 2,
            },
            "scheduler": {
                "_class_name": "FlowMatchEulerDiscreteScheduler",
                "shift": 7.0,
                "use_dynamic_shifting": False,
            },
        },
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configurations_pass(name):
    index, configs = PUBLISHED[name]
    adapter = next(m.pipelines[index["_class_name"]] for m in MODELS.values() if index["_class_name"] in m.pipelines)
    assert adapter is not None
    parts = check_configs(adapter, index, lambda file: configs[file.partition("/")[0]])
    assert set(configs) <= set(parts)


@pytest.mark.parametrize("name", ["tiny-wan", "tiny-hunyuan", "wan", "wan_i2v", "hunyuan"])
def test_shipped_and_toy_checkpoints_pass(name, checkpoint_folder):
    open_checkpoint(name if name.startswith("tiny") else str(checkpoint_folder(name)))


@pytest.fixture
def changed(checkpoint_folder, tmp_path):
    """Factory: a copy of a toy checkpoint with entries of one of its JSON files changed (... leaves one out)."""

    def copy(name: str, file: str, **changes) -> Path:
        folder = tmp_path / name
        shutil.copytree(checkpoint_folder(name), folder)
        content = json.loads((folder / file).read_text()) | changes
        (folder / file).write_text(json.dumps({k: v for k, v in content.items() if v is not ...}, default=repr))
        return folder

    return copy


def refusal(folder: Path) -> str:
    with pytest.raises(InputError) as caught:
        open_checkpoint(str(folder))
    (line,) = caught.value.lines
    assert line.isprintable()
    assert len(line) < 600
    assert line.startswith(f"model {folder}: ")
    return line


TRANSFORMER, VAE, SCHEDULER = "transformer/config.json", "vae/config.json", "scheduler/scheduler_config.json"
INDEX, TEXT = "model_index.json", "text_encoder/config.json"
NAN, HUGE = float("nan"), 10**400


@pytest.mark.parametrize(
    ("name", "file", "changes", "said"),
    [
        ("wan", INDEX, {"transformer": None}, 'transformer must be ["diffusers", "WanTransformer3DModel"], got None'),
        ("wan", INDEX, {"transformer": [None, None]}, "transformer must be"),
        ("wan", INDEX, {"vae": ...}, 'vae must be ["diffusers", "AutoencoderKLWan"], got None'),
        ("wan", INDEX, {"text_encoder": ["transformers", "LlamaModel"]}, "text_encoder must be"),
        ("wan", INDEX, {"tokenizer": ["os", "system"]}, "tokenizer must be"),
        ("wan", INDEX, {"scheduler": ["diffusers", "DDPMScheduler"]}, "scheduler must be"),
        ("wan", INDEX, {"scheduler": "x" * 10**5}, "scheduler must be"),
        ("wan", INDEX, {"extra": ["builtins", "exec"]}, "'extra' is not a component of this pipeline"),
        ("wan", INDEX, {"_class_name": ["a", "b"]}, "pipeline of no name is not supported"),
        ("hunyuan", INDEX, {"scheduler": ["diffusers", "UniPCMultistepScheduler"]}, "scheduler must be"),
        ("wan_i2v", INDEX, {"image_encoder": [None, None]}, "image_encoder and image_processor must be there"),
        ("wan", TRANSFORMER, {"num_layers": 0}, "num_layers: input should be greater than or equal to 1, got 0"),
        ("wan", TRANSFORMER, {"num_layers": 10**9}, "num_layers: input should be less than or equal to 1000"),
        ("wan", TRANSFORMER, {"num_layers": HUGE}, "num_layers"),
        ("wan", TRANSFORMER, {"num_layers": "3"}, "num_layers: input should be a valid integer, got '3'"),
        ("wan", TRANSFORMER, {"num_layers": True}, "num_layers: input should be a valid integer, got True"),
        ("wan", TRANSFORMER, {"num_layers": 3.0}, "num_layers: input should be a valid integer"),
        ("wan", TRANSFORMER, {"num_layers": 2}, "num_layers is 2, but the weights are of 3 such layers"),
        ("wan", TRANSFORMER, {"num_layers": 4}, "num_layers is 4, but the weights are of 3 such layers"),
        ("wan", TRANSFORMER, {"num_attention_heads": -4}, "num_attention_heads"),
        ("wan", TRANSFORMER, {"attention_head_dim": 13}, "attention_head_dim: input should be a multiple of 2"),
        ("wan", TRANSFORMER, {"patch_size": [1, 2]}, "patch_size: list should have at least 3 items"),
        ("wan", TRANSFORMER, {"patch_size": 2}, "patch_size: input should be a valid list, got 2"),
        ("wan", TRANSFORMER, {"patch_size": [1, 0, 2]}, "patch_size.1: input should be greater than or equal to 1"),
        ("wan", TRANSFORMER, {"patch_size": [2, 2, 2]}, "patch_size must be [1, P, P]"),
        ("wan", TRANSFORMER, {"in_channels": 16}, "in_channels must be 4, for a VAE with z_dim 4, got 16"),
        ("wan", TRANSFORMER, {"text_dim": 65}, "text_dim must be 64, as the text encoder's d_model, got 65"),
        ("wan", TRANSFORMER, {"eps": NAN}, "eps"),
        ("wan", TRANSFORMER, {"rope_max_seq_len": 10**12}, "rope_max_seq_len"),
        ("wan", TRANSFORMER, {"pos_embed_seq_len": 514}, "pos_embed_seq_len"),
        ("wan", TRANSFORMER, {"_class_name": "FluxTransformer2DModel"}, "_class_name must be WanTransformer3DModel"),
        ("wan_i2v", TRANSFORMER, {"in_channels": 8}, "in_channels must be 12"),
        ("wan_i2v", TRANSFORMER, {"image_dim": 33}, "image_dim must be 32"),
        ("wan", VAE, {"z_dim": 0}, "z_dim"),
        ("wan", VAE, {"z_dim": "four"}, "z_dim: input should be a valid integer, got 'four'"),
        ("wan", VAE, {"latents_mean": [0.0] * 3}, "latents_mean must have z_dim 4 numbers, got 3"),
        ("wan", VAE, {"latents_mean": [0.0, 0.0, 0.0, NAN]}, "latents_mean.3"),
        ("wan", VAE, {"latents_mean": 0}, "latents_mean"),
        ("wan", VAE, {"latents_std": [1.0, 1.0, 0.0, 1.0]}, "latents_std.2: input should be greater than 0"),
        ("wan", VAE, {"latents_std": ...}, "latents_std must have z_dim 4 numbers, got 16"),
        ("wan", VAE, {"scale_factor_spatial": 0}, "scale_factor_spatial"),
        ("wan", VAE, {"scale_factor_spatial": 16}, "scale_factor_spatial must be 8, as its layers make it, got 16"),
        ("wan", VAE, {"scale_factor_temporal": "4"}, "scale_factor_temporal: input should be a valid integer"),
        ("wan", VAE, {"temperal_downsample": [False, True]}, "temperal_downsample must have 3 values, got 2"),
        ("wan", VAE, {"temperal_downsample": [0, 1, 1]}, "temperal_downsample.0: input should be a valid boolean"),
        ("wan", VAE, {"dim_mult": []}, "dim_mult"),
        ("wan", VAE, {"dim_mult": [1, 2, -4, 4]}, "dim_mult.2"),
        ("hunyuan", VAE, {"scaling_factor": 0}, "scaling_factor: input should be greater than 0, got 0"),
        ("hunyuan", VAE, {"spatial_compression_ratio": 6}, "spatial_compression_ratio"),
        ("hunyuan", VAE, {"block_out_channels": [8, 8, 9, 8]}, "must be a multiple of norm_num_groups 4, got 9"),
        ("hunyuan", VAE, {"norm_num_groups": 0}, "norm_num_groups"),
        ("hunyuan", TRANSFORMER, {"rope_axes_dim": [4, 6, 8]}, "rope_axes_dim must sum up to attention_head_dim 16"),
        ("hunyuan", TRANSFORMER, {"num_single_layers": 1}, "num_single_layers is 1, but the weights are of 2"),
        ("hunyuan", TRANSFORMER, {"image_condition_type": "latent_concat"}, "image_condition_type"),
        ("hunyuan", TRANSFORMER, {"mlp_ratio": "inf"}, "mlp_ratio: input should be a valid number, got 'inf'"),
        ("hunyuan", TEXT, {"num_attention_heads": 5}, "num_attention_heads must be a multiple of num_key"),
        ("hunyuan", TEXT, {"num_hidden_layers": 1}, "num_hidden_layers: input should be greater than or equal to 2"),
        ("hunyuan", "text_encoder_2/config.json", {"max_position_embeddings": 10}, "max_position_embeddings"),
        ("wan", TEXT, {"num_layers": 1}, "num_layers is 1, but the weights are of 2"),
        ("wan", TEXT, {"model_type": "bert"}, "model_type"),
        ("wan", SCHEDULER, {"_class_name": "DDPMScheduler"}, "_class_name must be UniPCMultistepScheduler"),
        ("wan", SCHEDULER, {"prediction_type": "epsilon"}, "prediction_type: input should be 'flow_prediction'"),
        ("wan", SCHEDULER, {"use_flow_sigmas": False}, "use_flow_sigmas: input should be True"),
        ("wan", SCHEDULER, {"flow_shift": 0}, "flow_shift: input should be greater than 0"),
        ("wan", SCHEDULER, {"num_train_timesteps": 10**12}, "num_train_timesteps"),
        ("wan", SCHEDULER, {"use_karras_sigmas": True, "use_exponential_sigmas": True}, "only one of"),
        ("hunyuan", SCHEDULER, {"shift": "3.0"}, "shift: input should be a valid number"),
        ("hunyuan", SCHEDULER, {"use_dynamic_shifting": True}, "use_dynamic_shifting"),
        ("hunyuan", SCHEDULER, {"stochastic_sampling": True}, "stochastic_sampling"),
    ],
)
def test_a_bad_configuration_is_one_line(changed, name, file, changes, said):
    assert said in refusal(changed(name, file, **changes))


@pytest.mark.parametrize("file", [INDEX, TRANSFORMER, VAE, TEXT, SCHEDULER])
@pytest.mark.parametrize(
    "text", ["", "[]", "7", "null", "{", "[" * 10**5, '{"a":' * 10**5, "\udcff", '"' + "x" * 2**21]
)
def test_a_file_that_is_no_json_object_is_one_line(changed, file, text):
    folder = changed("wan", file)
    (folder / file).write_bytes(text.encode("utf-8", "surrogateescape"))
    assert file in refusal(folder)


def test_a_config_of_deep_lists_is_one_line(changed):
    deep: list = []
    for _ in range(200):
        deep = [deep]
    assert "nested too deeply" in refusal(changed("wan", TRANSFORMER, extra=deep))


WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"


def header(**tensors) -> bytes:
    text = json.dumps(tensors).encode()
    return struct.pack("<Q", len(text)) + text


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "it is cut: 0 bytes"),
        (b"\0" * 100, "cannot be read|not JSON|Expecting value"),
        (struct.pack("<Q", 2**60) + b"{}", "it is cut"),
        (struct.pack("<Q", 17 * 2**20) + b" " * (17 * 2**20), "its header must have at most"),
        (struct.pack("<Q", 2) + b"[]", "its header must be a JSON object"),
        (struct.pack("<Q", 2) + b"{}", "it holds no tensors"),
        (header(a={"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}), "its tensors must take 8 bytes, got 0"),
        (header(a={"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}) + b"\0" * 4, "other data_offsets"),
        (header(a={"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}) + b"\0" * 4, "must have a shape"),
        (header(a={"dtype": "F32", "shape": [True], "data_offsets": [0, 4]}) + b"\0" * 4, "must have a shape"),
        (header(a={"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}) + b"\0" * 8, "overlap or leave gaps"),
        (header(a={"dtype": "I8", "shape": [1], "data_offsets": [0, 1]}) + b"\0", "must be one of F64, F32"),
        (header(a={"dtype": "F8_E4M3", "shape": [1], "data_offsets": [0, 1]}) + b"\0", "must be one of F64, F32"),
        (header(a=[1]), "must have a shape"),
        (header(a={"dtype": "F32", "shape": [10**30], "data_offsets": [0, 4]}) + b"\0" * 4, "must have a shape"),
    ],
)
def test_a_broken_weight_file_is_one_line(changed, content, said):
    folder = changed("wan", INDEX)
    (folder / WEIGHTS).write_bytes(content)
    line = refusal(folder)
    assert WEIGHTS in line
    assert any(s in line for s in said.split("|"))


@pytest.mark.parametrize(
    ("places", "said"),
    [
        ({}, '"weight_map"'),
        ({"a": "../vae/diffusion_pytorch_model.safetensors"}, "a .safetensors file beside it"),
        ({"a": "/etc/passwd"}, "a .safetensors file beside it"),
        ({"a": 7}, "a .safetensors file beside it"),
        ({"a": "no.safetensors"}, "no.safetensors: No such file"),
        ({"a": "diffusion_pytorch_model.safetensors"}, "does not say that"),
    ],
)
def test_a_broken_index_of_shards_is_one_line(changed, places, said):
    folder = changed("wan", INDEX)
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    assert said in refusal(folder)


def test_shards_are_read_as_one_file(changed):
    folder = changed("wan", INDEX)
    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    names = sorted(tensors)
    shards = {"one.safetensors": names[::2], "two.safetensors": names[1::2]}
    for shard, held in shards.items():
        save_file({name: tensors[name] for name in held}, folder / "transformer" / shard)
    places = {name: shard for shard, held in shards.items() for name in held}
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    load_model(open_checkpoint(str(folder)), LoadOptions())


def test_missing_or_special_files_are_one_line(changed):
    folder = changed("wan", INDEX)
    tokenizer = folder / "tokenizer" / "tokenizer.json"
    tokenizer.rename(folder / "kept")
    os.mkfifo(tokenizer)
    assert "tokenizer/tokenizer.json is not a regular file" in refusal(folder)
    tokenizer.unlink()
    tokenizer.symlink_to("/dev/zero")
    assert "tokenizer/tokenizer.json is not a regular file" in refusal(folder)
    tokenizer.unlink()
    (folder / "kept").rename(tokenizer)
    open_checkpoint(str(folder))
    (folder / WEIGHTS).rename(folder / "transformer" / "diffusion_pytorch_model.bin")
    assert f"{WEIGHTS} is missing; weights are read from safetensors files alone" in refusal(folder)
    os.mkfifo(folder / WEIGHTS)
    assert "is not a regular file" in refusal(folder)
    shutil.rmtree(folder / "vae")
    assert "vae/config.json is missing" in refusal(folder)


@pytest.mark.parametrize("model", ["", "a\0b", "x" * 5000, "no/such", "a/b/c", "\udcff", "/etc/passwd", "[/b]/c/d"])
def test_an_odd_name_is_one_line(model, monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(InputError) as caught:
        open_checkpoint(model)
    (line,) = caught.value.lines
    assert len(line) < 600


def test_other_files_of_the_folder_do_no_harm(changed):
    folder = changed("wan", INDEX)
    before = weights_digest(folder)
    (folder / "notes.txt").mkdir()
    (folder / "dir.json").mkdir()
    os.mkfifo(folder / "fifo.json")
    (folder / "zero.txt").symlink_to("/dev/zero")
    (folder / "loop.json").symlink_to("loop.json")
    (folder / "nowhere.json").symlink_to("/no/such/file")
    assert weights_digest(folder) == before
    load_model(open_checkpoint(str(folder)), LoadOptions())
    (folder / "broken.json").write_text("{")
    Path(os.fsdecode(os.fsencode(folder) + b"/\xff.txt")).write_text("x")
    assert weights_digest(folder) != before  # they are files; what is in them is nobody's concern
    load_model(open_checkpoint(str(folder)), LoadOptions())


def test_the_digest_follows_links_as_the_hub_cache_has_them(changed, tmp_path):
    folder = changed("wan", INDEX)
    linked = tmp_path / "linked"
    for path in folder.rglob("*"):
        if path.is_file():
            place = linked / path.relative_to(folder)
            place.parent.mkdir(parents=True, exist_ok=True)
            place.symlink_to(path)
    assert weights_digest(linked) == weights_digest(folder)
    open_checkpoint(str(linked))


def test_the_digests_of_the_shipped_models_have_not_changed():
    """They stand in the fingerprints of every clip that was rendered with them."""
    for name, digest in (("tiny-wan", "6a1a8bfe7faa78d9"), ("tiny-hunyuan", "a2d897615c548bef")):
        assert weights_digest(Path(open_checkpoint(name).source)) == digest
