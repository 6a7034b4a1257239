"""Blocks that are read one at a time: in the end the model is what diffusers loads, and never whole before."""

import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from cineray.pipeline.loading.checkpoint import open_checkpoint
from cineray.pipeline.loading.errors import LoadingError
from cineray.pipeline.loading.model import load_model
from cineray.pipeline.loading.options import LoadOptions
from cineray.pipeline.request import InputError

pytestmark = pytest.mark.slow

SHARED_BY_RANKS = ["wan", "wan_i2v", "wan22", "hunyuan", "hunyuan15", "flux", "dit", "stable_audio", "open_sora"]


@pytest.fixture
def blocks_folder(checkpoint_folder, tmp_path):
    """A folder of a model; `small_shards` has its transformers in several files."""

    def folder(name, small_shards=False):
        found = checkpoint_folder(name)
        if small_shards:
            model = load_model(open_checkpoint(str(found)), LoadOptions())
            found = shutil.copytree(found, tmp_path / "shards")
            for part in model.checkpoint.model.denoiser_parts:
                shutil.rmtree(found / part, ignore_errors=True)  # Wan 2.1 has no second expert
                if getattr(model.pipe, part, None) is not None:
                    getattr(model.pipe, part).save_pretrained(found / part, max_shard_size="100KB")
            assert len(list((found / "transformer").glob("*.safetensors"))) > 2
        return str(found)

    return folder


def names_of_blocks(model, transformer):
    return [
        f"{name}.{n}"
        for name in model.checkpoint.model.layout.lists
        for n in range(len(transformer.get_submodule(name)))
    ]


def is_of_a_block(model, name):
    return name.partition(".")[0] in model.checkpoint.model.layout.lists


@pytest.mark.parametrize(("dtype", "small_shards"), [("float32", False), ("bfloat16", False), ("bfloat16", True)])
@pytest.mark.parametrize("name", SHARED_BY_RANKS)
def test_read_block_by_block_a_transformer_is_the_one_that_diffusers_loads(blocks_folder, name, dtype, small_shards):
    folder = blocks_folder(name, small_shards)
    options = LoadOptions(dtype=dtype)
    whole = load_model(open_checkpoint(folder), options)
    late = load_model(open_checkpoint(folder), options, is_sharded=True)
    assert list(late.unread) == [p for p in late.checkpoint.model.denoiser_parts if getattr(late.pipe, p, None)]
    for part, blocks in late.unread.items():
        transformer, wanted = getattr(late.pipe, part), getattr(whole.pipe, part)
        for key, tensor in transformer.state_dict().items():
            assert tensor.is_meta == is_of_a_block(late, key), key
        names = names_of_blocks(late, transformer)
        blocks.read(names[1])
        read = {key for key, tensor in transformer.state_dict().items() if not tensor.is_meta}
        assert {key for key in read if is_of_a_block(late, key)} == {
            key for key in wanted.state_dict() if key.startswith(f"{names[1]}.")
        }
        for block in names:
            blocks.read(block)
        for tensors in ("named_parameters", "named_buffers"):
            found, expected = dict(getattr(transformer, tensors)()), dict(getattr(wanted, tensors)())
            assert found.keys() == expected.keys()
            for key, tensor in found.items():
                assert tensor.dtype == expected[key].dtype, key
                assert torch.equal(tensor, expected[key]), key
        assert transformer.training == wanted.training


def test_a_block_with_a_value_that_is_not_finite_is_one_line(blocks_folder):
    folder = blocks_folder("wan", small_shards=True)
    (file,) = {f for f in open_blocks(folder).files.values() if "blocks.2.ffn.net.2.bias" in load_file(f)}
    tensors = load_file(file)
    tensors["blocks.2.ffn.net.2.bias"][3] = torch.nan
    save_file(tensors, file, metadata={"format": "pt"})
    blocks = open_blocks(folder)
    blocks.read("blocks.1")
    with pytest.raises(InputError, match=r"tensor \S*ffn.net.2.bias\S* holds values that are not finite") as caught:
        blocks.read("blocks.2")
    assert re.match(r"model \S+: loading from \S+ failed: transformer\.blocks\.2: ", str(caught.value))
    assert not isinstance(caught.value, LoadingError)
    assert len(str(caught.value).splitlines()) == 1


def test_a_file_that_goes_away_in_between_is_one_line(blocks_folder):
    folder = blocks_folder("wan", small_shards=True)
    blocks = open_blocks(folder)
    blocks.files["blocks.2.ffn.net.2.bias"].unlink()
    with pytest.raises(InputError, match=r"loading from .* failed") as caught:
        blocks.read("blocks.2")
    assert len(str(caught.value).splitlines()) == 1


def open_blocks(folder):
    model = load_model(open_checkpoint(folder), LoadOptions(), ("text_encoder", "vae"), is_sharded=True)
    return model.unread["transformer"]


def test_what_fuses_a_lora_is_read_whole(blocks_folder, tmp_path):
    from cineray.pipeline.loading.options import Lora

    row = "transformer.blocks.0.attn1.to_q.lora_"
    save_file({f"{row}A.weight": torch.ones(4, 48), f"{row}B.weight": torch.ones(48, 4)}, tmp_path / "a.safetensors")
    options = LoadOptions(lora=(Lora.parse(str(tmp_path / "a.safetensors")),))
    model = load_model(open_checkpoint(blocks_folder("wan")), options, is_sharded=True)
    assert not model.unread
    assert not any(p.is_meta for p in model.pipe.transformer.parameters())
