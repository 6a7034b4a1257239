"""Checkpoints that somebody else has written: nothing of them is executed, and what is wrong is said in one line.

A fuzzer with a fixed seed changes the JSON files and the headers of a toy checkpoint: each change is refused by
`open_checkpoint` in one clean line, or opens. Some are loaded as well.
"""

import json
import os
import pickle
import random
import shutil
import socket
import struct
from pathlib import Path

import pytest
from waiting import PATIENCE_S

from cineray.pipeline.loading.checkpoint import open_checkpoint
from cineray.pipeline.loading.model import LoadOptions, load_model
from cineray.pipeline.request import InputError

pytestmark = pytest.mark.slow

NUM_FUZZED = 600
EVIL = "import os\nopen(os.environ['CINERAY_TEST_MARKER'], 'w').write('executed')\n"
CODE_FILES = ("diffusers", "transformers", "evil", "modeling_evil", "pipeline", "os", "__init__")


@pytest.fixture
def folder(checkpoint_folder, tmp_path) -> Path:
    shutil.copytree(checkpoint_folder("wan"), tmp_path / "wan")
    return tmp_path / "wan"


def attempt(folder: Path, load: bool) -> str:
    """ "ok", or the one line of the refusal; anything else that is raised is a failure of the test."""
    try:
        checkpoint = open_checkpoint(str(folder))
        if load:
            load_model(checkpoint, LoadOptions())
    except InputError as error:
        (line,) = error.lines
        assert len(line.splitlines()) == 1
        assert len(line) < 900
        assert line.isprintable()
        return line
    return "ok"


def edit(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


class _Bomb:
    def __reduce__(self):
        return (exec, (EVIL,))


def _index(**changes):
    return lambda folder: edit(folder / "model_index.json", **changes)


def _config(part: str, **changes):
    name = "scheduler_config.json" if part == "scheduler" else "config.json"
    return lambda folder: edit(folder / part / name, **changes)


def _tokenizer(**changes):
    return lambda folder: edit(folder / "tokenizer" / "tokenizer_config.json", **changes)


def _pickled(part: str, name: str, removed: str):
    def change(folder: Path) -> None:
        (folder / part / name).write_bytes(pickle.dumps(_Bomb()))
        (folder / part / removed).unlink()

    return change


def _adapter(folder: Path) -> None:
    (folder / "text_encoder" / "adapter_config.json").write_text('{"base_model_name_or_path": "evil/model"}')


def _beside(part: str):
    return lambda folder: (folder / part / "plain").write_bytes(pickle.dumps(_Bomb()))


ASKS_FOR_CODE = {
    "class of os": _index(tokenizer=["os", "system"]),
    "class of builtins": _index(scheduler=["builtins", "exec"]),
    "class of subprocess": _index(text_encoder=["subprocess", "Popen"]),
    "class of a file beside it": _index(transformer=["evil", "Evil"]),
    "class of a file named None": _index(transformer=["None", "Evil"]),
    "class with a path": _index(vae=["../evil", "Evil"]),
    "class with a dotted name": _index(vae=["diffusers", "utils.os.system"]),
    "class of a dunder": _index(vae=["diffusers", "__import__"]),
    "class of a pipeline module": _index(transformer=["wan", "WanPipeline"]),
    "class of null": _index(transformer=[None, "WanTransformer3DModel"]),
    "class that is a list": _index(transformer=["diffusers", ["WanTransformer3DModel"]]),
    "class of onnx": _index(vae=["diffusers", "OnnxRuntimeModel"]),
    "class of another model": _index(text_encoder=["transformers", "AutoModel"]),
    "tokenizer by auto class": _index(tokenizer=["transformers", "AutoTokenizer"]),
    "flash pack class": _index(transformer=["diffusers", "FlashPackWanTransformer3DModel"]),
    "pipeline that is a list": _index(_class_name=["evil", "Evil"]),
    "pipeline of os": _index(_class_name="os.system"),
    "pipeline that is a path": _index(_class_name="../evil"),
    "custom pipeline": _index(custom_pipeline="owner/repo"),
    "trusts remote code": _index(trust_remote_code=True),
    "extra component": _index(watermarker=["evil", "Evil"]),
    "component with a path": _index(**{"../evil": ["diffusers", "AutoencoderKLWan"]}),
    "transformer's class": _config("transformer", _class_name="os.system"),
    "transformer's class a path": _config("transformer", _class_name="../../evil"),
    "vae's class": _config("vae", _class_name="__import__"),
    "scheduler's class": _config("scheduler", _class_name="eval"),
    "auto map of a model": _config("text_encoder", auto_map={"AutoModel": "modeling_evil.Evil"}),
    "auto map of the transformer": _config("transformer", auto_map={"AutoModel": "owner/repo--evil.Evil"}),
    "auto map of a tokenizer": _tokenizer(auto_map={"AutoTokenizer": ["modeling_evil.Evil", None]}),
    "auto map deep within": _config("text_encoder", text_config={"x": [{"auto_map": {"a": "b"}}]}),
    "model type of code": _config("text_encoder", model_type="evil"),
    "attention from the hub": _config("text_encoder", _attn_implementation="owner/repo"),
    "attention from the hub, version 5": _config("text_encoder", attn_implementation="owner/repo@main:fn"),
    "attention of each part": _config("text_encoder", attn_implementation={"": "owner/repo"}),
    "attention that is fetched": _config("text_encoder", _attn_implementation="flash_attention_2"),
    "attention deep within": _config("text_encoder", x={"_attn_implementation_internal": "paged|owner/repo"}),
    "attention of the transformer": _config("transformer", _attn_implementation="owner/repo"),
    "quantized by a library": _config("transformer", quantization_config={"quant_method": "gguf"}),
    "quantized encoder": _config("text_encoder", quantization_config={"quant_method": "fp8"}),
    "quantized vae": _config("vae", quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True}),
    "kernels": _config("text_encoder", use_kernels=True),
    "pickled transformer": _pickled(
        "transformer", "diffusion_pytorch_model.bin", "diffusion_pytorch_model.safetensors"
    ),
    "pickled encoder": _pickled("text_encoder", "pytorch_model.bin", "model.safetensors"),
    "checkpoint of keras": _pickled("vae", "diffusion_pytorch_model.ckpt", "diffusion_pytorch_model.safetensors"),
    "pickle named safetensors": lambda f: (f / "vae" / "diffusion_pytorch_model.safetensors").write_bytes(
        pickle.dumps(_Bomb())
    ),
    "shards from elsewhere": lambda f: (
        (f / "text_encoder" / "model.safetensors").rename(f / "evil.safetensors")
        and (f / "text_encoder" / "model.safetensors.index.json").write_text(
            '{"metadata": {}, "weight_map": {"shared.weight": "../evil.safetensors"}}'
        )
    ),
    "adapter of another model": _adapter,
    "code for a component that is null": lambda f: (f / "None.py").write_text(EVIL),
    "code for the library": lambda f: (f / "transformer" / "diffusers.py").write_text(EVIL),
}
# of no effect: neither read nor executed
IS_PASSED_OVER = {
    "code in every folder": lambda f: [
        (place / f"{name}.py").write_text(EVIL)
        for place in (f, *(p for p in f.iterdir() if p.is_dir()))
        for name in CODE_FILES
        if name not in ("diffusers", "transformers")
    ],
    "code at the top": lambda f: [(f / f"{name}.py").write_text(EVIL) for name in CODE_FILES],
    "pickles beside the weights": _beside("transformer"),
    "odd version": _index(_diffusers_version="99.0.0"),
    "name or path": _config("text_encoder", _name_or_path="owner/repo"),
    "architectures": _config("text_encoder", architectures=["os.system"]),
    "tokenizer of a class": _tokenizer(name_or_path="owner/repo"),
}


@pytest.fixture
def marker(tmp_path, monkeypatch):
    """Where hostile code would leave its mark; the network is cut meanwhile."""

    def refuse(*_, **__):
        raise AssertionError("a local folder was loaded, and the network was asked")

    monkeypatch.setenv("CINERAY_TEST_MARKER", str(tmp_path / "marker"))
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "marker"


def test_the_mark_would_be_seen(marker):
    pickle.loads(pickle.dumps(_Bomb()))
    assert marker.read_text() == "executed"


@pytest.mark.parametrize("name", ASKS_FOR_CODE)
def test_a_folder_that_asks_for_code_is_refused(name, folder, marker):
    for place in (folder, *(p for p in folder.iterdir() if p.is_dir())):
        (place / "evil.py").write_text(EVIL)
        (place / "modeling_evil.py").write_text(EVIL)
    ASKS_FOR_CODE[name](folder)
    assert attempt(folder, load=False) != "ok"
    assert not marker.exists()


@pytest.mark.parametrize("name", IS_PASSED_OVER)
def test_code_that_lies_about_is_not_executed(name, folder, marker):
    IS_PASSED_OVER[name](folder)
    assert attempt(folder, load=True) == "ok"
    assert not marker.exists()


ODD = (
    *(None, True, False, 0, -1, 1, 2, 3, 7, 64, 1.5, -0.0, 10**9, 10**400, float("nan"), float("inf"), -float("inf")),
    *("", "x", "0", "3", "\x1b]0;owned\x07", "a\nb", "\u202e", "\ud800", "x" * 5000, "os.system", "owner/repo", "[/b]"),
    *([], [1], [0, 0, 0], [1, 2, 2], ["x"] * 3, [None] * 4, {}, {"a": 1}, [[[[[[1]]]]]]),
)


def _mutate(value, random_):
    """One change somewhere in a JSON value."""
    if isinstance(value, dict) and value and random_.random() < 0.9:
        changed, key = dict(value), random_.choice(sorted(value))
        kind = random_.random()
        if kind < 0.1:
            del changed[key]
        elif kind < 0.15:
            changed[random_.choice(["__metadata__", "\x1b[2J", "x" * 3000, key + "2"])] = random_.choice(ODD)
        else:
            changed[key] = _mutate(value[key], random_)
        return changed
    if isinstance(value, list) and value and random_.random() < 0.5:
        place = random_.randrange(len(value))
        return [*value[:place], _mutate(value[place], random_), *value[place + 1 :]]
    if isinstance(value, int) and not isinstance(value, bool) and random_.random() < 0.3:
        return value + random_.choice([-1, 1, 8, -value, 2**31, 2**63])
    return random_.choice(ODD)


def _harm_bytes(content: bytes, random_) -> bytes:
    kind, place = random_.randrange(4), random_.randrange(len(content))
    if kind == 0:
        return content[:place]
    if kind == 1:
        return content[:place] + bytes([random_.randrange(256)]) + content[place + 1 :]
    if kind == 2:
        return content[:place] + random_.randbytes(random_.randrange(1, 50)) + content[place:]
    return content[:place] * random_.choice([2, 3])


def _mutated(content: bytes, is_weights: bool, random_) -> bytes:
    if random_.random() < 0.2:
        return _harm_bytes(content, random_)
    if not is_weights:
        return json.dumps(_mutate(json.loads(content), random_)).encode("utf-8", "surrogatepass")
    length = struct.unpack("<Q", content[:8])[0]
    header = json.dumps(_mutate(json.loads(content[8 : 8 + length]), random_)).encode()
    told = len(header) if random_.random() < 0.9 else random_.choice([0, 1, length, 2**32, 2**63, 2**64 - 1])
    return struct.pack("<Q", told) + header + content[8 + length :]


def _targets(folder: Path) -> list[Path]:
    names = ("model_index.json", "config.json", "scheduler_config.json", "tokenizer_config.json")
    return sorted(p for p in folder.rglob("*") if p.name in names or p.suffix == ".safetensors")


def _fuzz(folder: Path, seed: int, count: int, load: bool) -> dict[bool, int]:
    random_ = random.Random(seed)
    targets = _targets(folder)
    originals = {path: path.read_bytes() for path in targets}
    seen = {True: 0, False: 0}
    for number in range(count):
        path = random_.choice(targets)
        path.write_bytes(_mutated(originals[path], path.suffix == ".safetensors", random_))
        try:
            seen[attempt(folder, load) == "ok"] += 1
        except BaseException as error:
            raise AssertionError(f"seed {seed}, change {number} of {path.relative_to(folder)}: {error!r}") from error
        path.write_bytes(originals[path])
    return seen


@pytest.mark.parametrize("name", ["wan", "wan_i2v", "hunyuan"])
def test_changed_files_are_refused_in_one_line_or_open(name, checkpoint_folder, tmp_path, marker):
    shutil.copytree(checkpoint_folder(name), tmp_path / name)
    seen = _fuzz(tmp_path / name, seed=9, count=NUM_FUZZED // 3, load=False)
    assert seen[False] > NUM_FUZZED // 12  # most changes are seen before anything loads
    assert seen[True] > 0
    assert not marker.exists()


def test_changed_files_load_or_are_refused_in_one_line(folder, marker):
    assert sum(_fuzz(folder, seed=10, count=24, load=True).values()) == 24
    assert not marker.exists()


@pytest.mark.process
@pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("setpriv"), reason="becomes another user")
def test_a_folder_that_may_not_be_read_is_one_line(folder):
    import subprocess
    import sys

    def said(path: Path) -> str:
        path.chmod(0)
        for parent in folder.parents:
            parent.chmod(parent.stat().st_mode | 0o005)
        script = (
            "import sys; from cineray.pipeline.loading.checkpoint import open_checkpoint\n"
            "try: open_checkpoint(sys.argv[1])\n"
            "except ValueError as error: print(error)"
        )
        drop = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]
        run = subprocess.run(
            [*drop, sys.executable, "-c", script, str(folder)], capture_output=True, text=True, timeout=PATIENCE_S
        )
        path.chmod(0o755)
        if "Permission denied" in run.stderr and "open_checkpoint" not in run.stderr:
            pytest.skip("this interpreter may not be read by another user")
        (line,) = run.stdout.splitlines()
        return line

    for part in ("", "transformer", "transformer/config.json", "vae/diffusion_pytorch_model.safetensors"):
        assert "Permission denied" in said(folder / part), part
