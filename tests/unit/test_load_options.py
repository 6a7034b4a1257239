"""How weights are loaded and what runs on them: LoRA, 8-bit weights, kernels, the VAE's type, the flow shift."""

import importlib.util
import re
from dataclasses import replace
from pathlib import Path

import click
import pytest
import torch
from safetensors.torch import save_file

from cineray.distributed.layout import parse_layout
from cineray.jobs.cli.clips import load_options
from cineray.jobs.cli.main import main
from cineray.jobs.cli.options import clip_options
from cineray.jobs.output.record import fingerprint_of, render_options
from cineray.pipeline.adapters.hunyuan_vae import attend_by_frame
from cineray.pipeline.adapters.hunyuan_video import without_padding
from cineray.pipeline.blocks import calling_without_mask
from cineray.pipeline.gang import Gang
from cineray.pipeline.loading import model as loading
from cineray.pipeline.loading.checkpoint import open_checkpoint
from cineray.pipeline.loading.model import load_model, vae_dtype_name
from cineray.pipeline.loading.options import ATTENTION_PACKAGES, LoadOptions, Lora, check_installed
from cineray.pipeline.loading.weights import identify
from cineray.pipeline.request import InputError

pytestmark = pytest.mark.slow


@pytest.fixture
def lora_file(tmp_path):
    """A LoRA of rank 2 for the toy Wan's first query projection, in the peft format of diffusers."""
    torch.manual_seed(0)
    size = load_model(open_checkpoint("tiny-wan"), LoadOptions()).pipe.transformer.blocks[0].attn1.to_q.weight.shape[0]
    prefix = "transformer.blocks.0.attn1.to_q"
    tensors = {f"{prefix}.lora_A.weight": torch.randn(2, size), f"{prefix}.lora_B.weight": torch.randn(size, 2)}
    save_file(tensors, tmp_path / "style.safetensors")
    return tmp_path / "style.safetensors", tensors[f"{prefix}.lora_B.weight"] @ tensors[f"{prefix}.lora_A.weight"]


def test_a_lora_is_fused_into_the_weights_and_nothing_of_it_stays(lora_file):
    path, update = lora_file
    plain = load_model(open_checkpoint("tiny-wan"), LoadOptions()).pipe.transformer
    options = LoadOptions(lora=(Lora.parse(f"{path}:0.5"),))
    fused = load_model(open_checkpoint("tiny-wan"), options).pipe.transformer
    change = fused.blocks[0].attn1.to_q.weight - plain.blocks[0].attn1.to_q.weight
    torch.testing.assert_close(change, 0.5 * update, rtol=1e-4, atol=1e-5)
    assert [name for name, _ in fused.named_parameters()] == [name for name, _ in plain.named_parameters()]
    others = [n for n, p in fused.named_parameters() if not torch.equal(p, plain.get_parameter(n))]
    assert others == ["blocks.0.attn1.to_q.weight"]


def test_each_of_two_experts_gets_the_loras_that_are_its_own(checkpoint_folder, tmp_path):
    folder = str(checkpoint_folder("wan22"))
    plain = load_model(open_checkpoint(folder), LoadOptions()).pipe
    torch.manual_seed(0)
    updates = {}
    for name, block in (("high", 0), ("low", 1), ("both", 2)):
        prefix = f"transformer.blocks.{block}.attn1.to_q"
        size = plain.transformer.blocks[0].attn1.to_q.weight.shape[0]
        down, up = torch.randn(2, size), torch.randn(size, 2)
        save_file({f"{prefix}.lora_A.weight": down, f"{prefix}.lora_B.weight": up}, tmp_path / f"{name}.safetensors")
        updates[name] = up @ down
    texts = (
        f"high:{tmp_path}/high.safetensors:0.5",
        f"low:{tmp_path}/low.safetensors",
        f"both:{tmp_path}/both.safetensors:2",
    )
    options = LoadOptions(lora=tuple(map(Lora.parse, texts)))
    fused = load_model(open_checkpoint(folder), options).pipe
    changes = {}
    for part in ("transformer", "transformer_2"):
        before, after = getattr(plain, part), getattr(fused, part)
        assert [name for name, _ in after.named_parameters()] == [name for name, _ in before.named_parameters()]
        for name, value in after.named_parameters():
            if not torch.equal(value, before.get_parameter(name)):
                changes[part, name] = value - before.get_parameter(name)
    weights = "blocks.{}.attn1.to_q.weight"
    wanted = {
        ("transformer", weights.format(0)): 0.5 * updates["high"],
        ("transformer_2", weights.format(1)): updates["low"],
        ("transformer", weights.format(2)): 2 * updates["both"],
        ("transformer_2", weights.format(2)): 2 * updates["both"],
    }
    assert changes.keys() == wanted.keys()
    for place, change in changes.items():
        torch.testing.assert_close(change, wanted[place], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        (
            {"transformer.nowhere.lora_A.weight": (2, 4), "transformer.nowhere.lora_B.weight": (4, 2)},
            "Target modules",
        ),
        ({"transformer.nowhere.lora_A.weight": (2, 4)}, "it is no whole LoRA in a form that diffusers reads"),
        (
            {
                "transformer.blocks.0.attn1.to_q.lora_A.weight": (2, 4),
                "transformer.blocks.0.attn1.to_q.lora_B.weight": (4, 2),
            },
            "size mismatch",
        ),
        ({"x": (1,)}, "all LoRA param names contain"),
    ],
)
def test_a_lora_that_does_not_fit_is_one_line_before_weights_are_read(tmp_path, monkeypatch, tensors, said):
    def reads_weights(*_):
        raise AssertionError("weights are read")

    monkeypatch.setattr(loading, "_load", reads_weights)
    path = tmp_path / "other.safetensors"
    save_file({name: torch.zeros(shape) for name, shape in tensors.items()}, path)
    with pytest.raises(InputError, match=rf"--lora .*other\.safetensors does not fit: .*{said}") as caught:
        load_model(open_checkpoint("tiny-wan"), LoadOptions(lora=(Lora.parse(str(path)),)))
    assert len(caught.value.lines) == 1
    assert "\n" not in caught.value.lines[0]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("none.safetensors", "is not a file; give PATH[:SCALE]"),
        ("{dir}/a.bin", "must be a .safetensors file: others may hold programs"),
        ("high:none.safetensors", "none.safetensors' is not a file; give PATH[:SCALE]"),
        ("{dir}/a.safetensors:0", "the scale must be a number up to 10, not 0, got 0"),
        ("{dir}/a.safetensors:1e9", "the scale must be a number up to 10"),
        ("{dir}/a.safetensors:1e", "the scale must be a number up to 10"),
        ("{dir}/a.safetensors", "is no whole .safetensors file: a.safetensors: it is cut"),
    ],
)
def test_bad_loras_are_refused_before_loading(tmp_path, text, reason):
    for name in ("a.bin", "a.safetensors"):
        (tmp_path / name).write_bytes(b"x")
    with pytest.raises(InputError) as caught:
        Lora.parse(text.replace("{dir}", str(tmp_path)))
    assert reason in str(caught.value)


def test_what_changes_pixels_is_in_the_fingerprint_and_what_does_not_is_not(new_request, tmp_path):
    save_file({"x": torch.zeros(1)}, tmp_path / "a.safetensors")
    checkpoint = open_checkpoint("tiny-wan")
    request, digest = new_request(), identify(checkpoint).digest

    def named(options: LoadOptions) -> str:
        return fingerprint_of(request, checkpoint, digest, render_options(options, lossless=False))

    plain = LoadOptions()
    same = [replace(plain, compile=True), replace(plain, attention="native")]
    lora = Lora.parse(str(tmp_path / "a.safetensors"))
    others = [
        replace(plain, lora=(lora,)),
        replace(plain, lora=(replace(lora, scale=0.5),)),
        *(replace(plain, lora=(replace(lora, expert=expert),)) for expert in ("high", "low", "both")),
        replace(plain, quantize="int8"),
        replace(plain, quantize="fp8"),
        replace(plain, vae_dtype="bfloat16"),
        replace(plain, dtype="bfloat16"),
        LoadOptions(device="cuda", attention="sage"),
    ]
    assert {named(options) for options in same} == {named(plain)}
    assert len({named(options) for options in (plain, *others)}) == 1 + len(others)
    assert named(LoadOptions(device="cuda", attention="flash3")) == named(replace(plain, dtype="bfloat16"))


def test_the_flow_shift_moves_the_timesteps_and_is_part_of_the_fingerprint(new_request):
    checkpoint = open_checkpoint("tiny-wan")
    pipe, adapter = load_model(checkpoint, LoadOptions()).pipe, checkpoint.adapter
    request = new_request(num_inference_steps=8)
    _, own = adapter.schedule(pipe, request)
    _, shifted = adapter.schedule(pipe, replace(request, flow_shift=9.0))
    assert (shifted[1:] > own[1:]).all()  # longer in the noise
    _, again = adapter.schedule(pipe, request)
    assert torch.equal(own, again)  # the pipeline's own scheduler is as it was
    digest, options = identify(checkpoint).digest, render_options(LoadOptions(), lossless=False)
    names = {fingerprint_of(replace(request, flow_shift=x), checkpoint, digest, options) for x in (None, 3.0, 9.0)}
    assert len(names) == 3


@pytest.mark.parametrize(
    ("width", "height", "shift"), [(64, 64, None), (832, 480, 3.0), (480, 832, 3.0), (1280, 720, 5.0)]
)
def test_wan_s_authors_shift_by_size(new_request, width, height, shift):
    adapter = open_checkpoint("tiny-wan").adapter
    assert adapter.effective(new_request(width=width, height=height)).flow_shift == shift
    assert adapter.effective(new_request(width=width, height=height, flow_shift=2.0)).flow_shift == 2.0


@pytest.mark.parametrize(
    ("model", "options", "name"),
    [
        ("tiny-wan", LoadOptions(), "float32"),
        ("tiny-wan", LoadOptions(device="cuda"), "float32"),
        ("tiny-wan", LoadOptions(vae_dtype="bfloat16"), "bfloat16"),
        ("tiny-hunyuan", LoadOptions(), "float32"),
        ("tiny-hunyuan", LoadOptions(dtype="bfloat16"), "bfloat16"),
        ("tiny-hunyuan", LoadOptions(device="cuda"), "float16"),
        ("tiny-hunyuan", LoadOptions(device="cuda", dtype="float32"), "float32"),
    ],
)
def test_the_vae_s_type_is_its_authors(model, options, name):
    assert vae_dtype_name(open_checkpoint(model), options) == name


def test_blocks_hold_their_weights_in_eight_bits_and_render_nearly_the_same():
    plain = load_model(open_checkpoint("tiny-wan"), LoadOptions()).pipe.transformer
    small = load_model(open_checkpoint("tiny-wan"), LoadOptions(quantize="int8")).pipe.transformer
    torch.manual_seed(0)
    inputs = {
        "hidden_states": torch.randn(1, plain.config.in_channels, 2, 8, 8),
        "timestep": torch.tensor([500.0]),
        "encoder_hidden_states": torch.randn(1, 16, plain.config.text_dim),
        "return_dict": False,
    }
    with torch.no_grad():
        expected, found = plain(**inputs)[0], small(**inputs)[0]
    assert not torch.equal(expected, found)
    assert (expected - found).norm() / expected.norm() < 0.05  # 8 bits a row
    assert type(small.blocks[0].ffn.net[2].weight).__name__ != "Parameter"
    assert type(small.proj_out.weight).__name__ == "Parameter"


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("--attention", "flash3"), "attention flash3 is a kernel of GPUs; it needs --device cuda"),
        (("--attention", "quick"), "'quick' is not one of 'auto'"),
        (
            ("--attention", "flash", "--device", "cuda", "--dtype", "float32"),
            "attention flash takes values of 16 bits; it needs --dtype bfloat16 or float16",
        ),
        (
            ("--attention", "flash3", "--device", "cuda", "--layout", "ring2"),
            "--attention flash3 is not used in layout ring2: a ring adds up parts",
        ),
        (
            ("--attention", "xfuser", "--device", "cuda"),
            "--attention xfuser is that of ranks that share a clip's tokens, layout 1 has none; give --sp 2 or more",
        ),
        (("--quantize", "int4"), "'int4' is not one of 'none'"),
        (("--vae-dtype", "float8"), "vae-dtype must be auto or one of float32, bfloat16, float16, got 'float8'"),
        (("--offload", "group"), "offload group moves weights between CPU and GPU; it needs --device cuda"),
        (("--lora", "none.safetensors"), "is not a file"),
        (("--flow-shift", "-1"), "flow_shift must be 0.01 to 100, got -1"),
        (("--flow-shift", "nan"), "flow_shift must be 0.01 to 100, got nan"),
    ],
)
def test_bad_options_are_one_line_and_nothing_is_made(tmp_path, capsys, arguments, reason):
    out = tmp_path / "out"
    assert main(["render", "a red circle", "--out", str(out), "--device", "cpu", *arguments]) == 2
    assert reason in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.parametrize("name", ["flash", "flash3", "sage", "xfuser"])
def test_a_kernel_that_is_not_installed_is_named_with_its_package(monkeypatch, name):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    package = re.escape(ATTENTION_PACKAGES[name][1])
    with pytest.raises(InputError, match=rf"^attention {name} needs {package}, which is not installed"):
        check_installed(LoadOptions(device="cuda", attention=name))


@pytest.mark.parametrize("module", ["torchao", "peft"])
def test_a_package_that_is_missing_is_named(monkeypatch, tmp_path, module):
    save_file({"x": torch.zeros(1)}, tmp_path / "a.safetensors")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    lora = (Lora.parse(str(tmp_path / "a.safetensors")),)
    options = LoadOptions(quantize="int8") if module == "torchao" else LoadOptions(lora=lora)
    with pytest.raises(InputError, match=rf"needs {module}, which is not installed"):
        load_model(open_checkpoint("tiny-wan"), options)


def test_text_without_its_padding_and_without_a_mask_gives_the_same_velocity():
    """Both are right: a hidden key counts nothing. The sums have other lengths, so the last bits differ."""
    checkpoint = open_checkpoint("tiny-hunyuan")
    transformer = load_model(checkpoint, LoadOptions()).pipe.transformer.double()
    torch.manual_seed(0)
    text = torch.randn(1, 24, transformer.config.text_embed_dim, dtype=torch.float64)
    mask = (torch.arange(24) < 7)[None]
    inputs = {
        "hidden_states": torch.randn(1, transformer.config.in_channels, 2, 8, 8, dtype=torch.float64),
        "timestep": torch.tensor([500.0], dtype=torch.float64),
        "pooled_projections": torch.randn(1, transformer.config.pooled_projection_dim, dtype=torch.float64),
        "guidance": torch.tensor([3000.0], dtype=torch.float64),
        "return_dict": False,
    }
    masks = []
    transformer.transformer_blocks[0].attn.register_forward_pre_hook(
        lambda module, args, kwargs: masks.append(kwargs.get("attention_mask")), with_kwargs=True
    )
    with torch.no_grad():
        padded = transformer(encoder_hidden_states=text, encoder_attention_mask=mask.double(), **inputs)[0]
        short, valid = without_padding(text, mask)
        with calling_without_mask(transformer, checkpoint.model.layout):
            trimmed = transformer(encoder_hidden_states=short, encoder_attention_mask=valid.double(), **inputs)[0]
    assert short.shape[1] == 7
    assert masks[0] is not None
    assert masks[1] is None
    # the refiner's timestep embedding is float32 in diffusers, so more than float64's own rounding
    torch.testing.assert_close(trimmed, padded, rtol=1e-5, atol=1e-6)
    assert not any(block._forward_pre_hooks for block in transformer.single_transformer_blocks)


def test_hunyuan_s_vae_attends_by_frame_without_a_mask_as_it_did_with_one():
    vae = load_model(open_checkpoint("tiny-hunyuan"), LoadOptions()).pipe.vae.double()
    torch.manual_seed(0)
    latents = torch.randn(1, vae.config.latent_channels, 3, 8, 8, dtype=torch.float64)
    with torch.no_grad():
        expected = vae.decode(latents, return_dict=False)[0]
        before = sorted(vae.state_dict())
        attend_by_frame(vae)
        found = vae.decode(latents, return_dict=False)[0]
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    assert sorted(vae.state_dict()) == before
    video = torch.randn(1, 3, 5, 32, 32, dtype=torch.float64)
    with torch.no_grad():
        assert torch.isfinite(vae.encode(video, return_dict=False)[0].mean).all()


@pytest.mark.parametrize(
    ("model", "typed", "tiles"),
    [
        ("tiny-hunyuan", ["--device", "cuda"], True),
        ("tiny-hunyuan", ["--device", "cuda", "--no-vae-tiling"], False),
        ("tiny-hunyuan", ["--device", "cpu"], False),
        ("tiny-wan", ["--device", "cuda"], False),
        ("tiny-wan", ["--device", "cpu", "--vae-tiling"], True),
    ],
)
def test_the_vae_decodes_in_tiles_where_its_model_needs_it(model, typed, tiles):
    found = []

    @click.command()
    @clip_options
    def command(asked):
        found.append(load_options(asked, open_checkpoint(model)).vae_tiling)

    command(["--model", model, *typed], standalone_mode=False)
    assert found == [tiles]


def test_xfuser_s_groups_are_made_in_a_world_that_is_bound_to_no_device(monkeypatch):
    """What its documentation asks for; recorded, since nothing of it runs without GPUs."""
    calls = []

    class Recorded(Exception):
        """The call was seen."""

    def record(backend, **how):
        calls.append((backend, how["device_id"]))
        raise Recorded

    monkeypatch.setattr(torch.distributed, "init_process_group", record)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    for attention in ("native", "xfuser"):
        with pytest.raises(Recorded):
            Gang.join(parse_layout("ulysses2"), 0, 2, device="cuda:0", init_method="tcp://x", attention=attention)
    assert calls == [("nccl", torch.device("cuda:0")), ("nccl", None)]


def test_weights_that_have_no_room_whole_are_held_in_8_bits_on_their_way_to_the_gpu(monkeypatch):
    checkpoint = open_checkpoint("tiny-wan")
    folder = Path(checkpoint.source)
    size = sum(file.stat().st_size for file in folder.glob("*/*.safetensors"))
    options, of_encoder = LoadOptions(device="cuda"), (folder / "text_encoder" / "model.safetensors").stat().st_size
    monkeypatch.setattr(loading, "gpu_memory_bytes", lambda: (size,))
    assert not loading._has_room(folder, checkpoint, (), options)
    assert loading._has_room(folder, checkpoint, ("text_encoder",), options)
    monkeypatch.setattr(loading, "gpu_memory_bytes", lambda: (size - of_encoder,))
    assert not loading._has_room(folder, checkpoint, ("text_encoder",), options)
    assert loading._has_room(folder, checkpoint, (), LoadOptions())
