#!/usr/bin/env python
"""Renders with a checkpoint of real size on CPUs: Wan 2.1 1.3B's published configuration, random weights.

    python scripts/real_size.py make out/wan-1.3b                 # 11 GB: sharded safetensors in float32, as on the hub
    python scripts/real_size.py render out/wan-1.3b --out out/real-size --sp 2
    python scripts/real_size.py make out/wan-2gb --layers 10 --vocabulary 1000
    python scripts/real_size.py load out/wan-2gb                  # seconds and host memory of 1 and of 4 ranks
    python scripts/real_size.py load out/wan-2gb --before DIR     # the same of a checkout of cineray at 5bd4280
    python scripts/real_size.py load out/wan-2gb --ranks 2 --shard-weights

What comes out is noise; what it shows is that the sizes fit, load, shard and decode. The text encoder has the published
width and vocabulary, but few layers: all 24 would be 23 GB more on disk. Memory is what the kernel says of each process
(/proc/PID/smaps_rollup, Linux): anonymous pages, of which every process has its own, and file pages, which they share.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import psutil
import torch
from safetensors.torch import save_file
from tiny.text import new_umt5
from torch import nn

from cineray.pipeline.footprint.published import Published, published
from cineray.pipeline.footprint.subject import empty_part

MODEL = "wan2.1-t2v-1.3b"
MAX_SHARD_BYTES = 10**9
STEMS = {"transformer": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model"}
# the smallest clip in which each of two ranks has the tokens of whole rows; more steps than a cache is off for
CLIP = ("--width", "64", "--height", "64", "--frames", "5", "--steps", "10", "--fps", "8")
PROMPT = "a red circle moving left on a navy background"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    making = commands.add_parser("make")
    making.add_argument("folder", type=Path)
    making.add_argument("--layers", type=int, default=30, help="of the transformer")
    making.add_argument("--text-layers", type=int, default=1)
    making.add_argument("--vocabulary", type=int, help="of the text encoder, instead of the published one")
    rendering = commands.add_parser("render", description="Takes further options of `cineray render`.")
    rendering.add_argument("folder", type=Path)
    rendering.add_argument("--out", type=Path, required=True)
    rendering.add_argument("--sp", type=int, default=2)
    rendering.add_argument("--cache", default="dicache")
    loading = commands.add_parser("load")
    loading.add_argument("folder", type=Path)
    loading.add_argument("--ranks", type=int, nargs="+", default=[1, 4])
    loading.add_argument("--before", type=Path, metavar="DIR", help="a checkout of cineray at 5bd4280")
    loading.add_argument("--dtype", default="bfloat16", help="that ranks compute in")
    loading.add_argument("--shard-weights", action="store_true", help="the ranks share a clip, and keep a part each")
    asked, more = parser.parse_known_args(argv)
    if more and asked.command != "render":
        parser.error(f"unknown: {' '.join(more)}")
    if asked.command == "make":
        make(asked.folder, asked.layers, asked.text_layers, asked.vocabulary)
    elif asked.command == "render":
        print(json.dumps(render(asked.folder, asked.out, asked.sp, asked.cache, more)))
    else:
        for num_ranks in asked.ranks:
            code = SHARDED if asked.shard_weights else NOW if asked.before is None else BEFORE
            print(json.dumps(load_on(num_ranks, asked.folder, asked.dtype, code, asked.before)))


def make(folder: Path, layers: int, text_layers: int, vocabulary: int | None = None) -> None:
    """Writes the checkpoint, a shard at a time."""
    found, changes = published(MODEL), {"transformer": {"num_layers": layers}, "vae": {}}
    changes["text_encoder"] = {"num_layers": text_layers} | ({"vocab_size": vocabulary} if vocabulary else {})
    kinds = {name: entry[1] for name, entry in found.files["model_index.json"].items() if isinstance(entry, list)}
    for name, changed in changes.items():
        write_part(found, folder / name, name, kinds[name], changed)
    tokenizer, _ = new_umt5()  # the published one does not ship
    tokenizer.save_pretrained(folder / "tokenizer")
    index = {**found.files["model_index.json"], "tokenizer": ["transformers", type(tokenizer).__name__]}
    (folder / "model_index.json").write_text(json.dumps(index))
    (folder / "scheduler").mkdir(exist_ok=True)
    (folder / "scheduler" / "scheduler_config.json").write_text(
        json.dumps(found.files["scheduler/scheduler_config.json"])
    )


def write_part(found: Published, folder: Path, name: str, kind: str, changes: dict[str, int]) -> None:
    """One component: its configuration, and its weights in shards with their index."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**found.config(name), **changes}))
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    room = MAX_SHARD_BYTES
    for tensor, shape in shapes_of(empty_part(found, name, kind, **changes)):
        size = 4 * torch.Size(shape).numel()
        if size > room and shards[-1]:
            shards.append({})
            room = MAX_SHARD_BYTES
        shards[-1][tensor] = shape
        room -= size
    places: dict[str, str] = {}
    generator = torch.Generator().manual_seed(0)
    for number, shard in enumerate(shards, 1):
        file = f"{STEMS[name]}-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = {tensor: weight(tensor, shape, generator) for tensor, shape in shard.items()}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        places |= dict.fromkeys(shard, file)
    (folder / f"{STEMS[name]}.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))


def shapes_of(part: nn.Module) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Parameters by name, tied ones once."""
    for name, parameter in part.named_parameters():
        yield name, tuple(parameter.shape)


def weight(name: str, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """Random, of a size that keeps a signal as it is; norms pass it on."""
    if "norm" in name and not name.endswith("bias"):
        return torch.ones(shape)
    fan_in = torch.Size(shape[1:]).numel() if len(shape) > 1 else 1e4
    return torch.randn(shape, generator=generator) * fan_in**-0.5


@dataclass(frozen=True, slots=True)
class Pages:
    """Memory of a process, or of several.

    Args:
        anonymous_bytes: pages that stand in no file; a forked process's share of those of its parent.
        file_bytes: its share of pages of files, so that a sum counts each page once.
        unique_bytes: pages that no other process has (USS).
        resident_bytes: all its pages, shared or not (RSS).
    """

    anonymous_bytes: int = 0
    file_bytes: int = 0
    unique_bytes: int = 0
    resident_bytes: int = 0

    @classmethod
    def of(cls, pid: int) -> "Pages":
        """Of a process now; nothing of one that has ended."""
        try:
            lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        except OSError:
            return cls()
        size = {line.split(":")[0]: 1024 * int(line.split()[1]) for line in lines[1:] if line.endswith("kB")}
        unique = size["Private_Clean"] + size["Private_Dirty"]
        return cls(size["Pss_Anon"], size["Pss_File"], unique, size["Rss"])


@dataclass
class Memory:
    """The most that the processes below this one had: together, and the largest of them; of each kind by itself."""

    together: Pages = Pages()
    largest: Pages = Pages()

    def see(self, found: list[Pages]) -> None:
        names = [field.name for field in fields(Pages)]
        sums = Pages(*(sum(getattr(pages, name) for pages in found) for name in names))
        self.together = most(names, [self.together, sums])
        self.largest = most(names, [self.largest, *found])


def most(names: list[str], found: list[Pages]) -> Pages:
    return Pages(*(max(getattr(pages, name) for pages in found) for name in names))


@contextmanager
def watched(every_s: float = 0.2) -> Iterator[Memory]:
    """Looks at all processes below this one, as often."""
    memory, ended = Memory(), threading.Event()

    def watch() -> None:
        while not ended.wait(every_s):
            memory.see([Pages.of(process.pid) for process in psutil.Process().children(recursive=True)])

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield memory
    finally:
        ended.set()
        thread.join()


def render(folder: Path, out: Path, sp: int, cache: str, more: list[str]) -> dict[str, Any]:
    """Renders one clip through the command line; what it took."""
    shutil.rmtree(out, ignore_errors=True)
    command = [sys.executable, "-m", "cineray", "render", PROMPT, "--model", str(folder), "--out", str(out)]
    command += ["--sp", str(sp), "--dtype", "bfloat16", "--cache", cache, *CLIP, "--json", *more]
    began = time.monotonic()
    with watched() as memory:
        run = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    (clip,) = json.loads(run.stdout.splitlines()[-1])["clips"]
    sidecar = json.loads(Path(clip["video"]).with_suffix(".json").read_text())
    return {
        "wall_s": round(time.monotonic() - began, 1),
        "timings": sidecar["timings"],
        "computed_steps": clip["computed_steps"],
        "skipped_steps": clip["skipped_steps"],
        "layout": sidecar["layout"],
        "together": asdict(memory.together),
        "largest_process": asdict(memory.largest),
    }


# What a rank of a batch loads, as `jobs/gangs/rank_work.py` does where finishers decode.
NOW = """
from cineray.pipeline.loading.checkpoint import open_checkpoint
from cineray.pipeline.loading.model import load_model
from cineray.pipeline.loading.options import LoadOptions
checkpoint = open_checkpoint(folder)
skipped = (*checkpoint.model.encoder_parts, *checkpoint.model.decoder_parts)
load = lambda: load_model(checkpoint, LoadOptions(dtype=dtype), skip_components=skipped)
"""
# The same with `--shard-weights`; ranks meet once each has read what stands outside the blocks.
SHARDED = """
from cineray.distributed.layout import parse_layout
from cineray.pipeline.gang import Gang
from cineray.pipeline.loading.checkpoint import open_checkpoint
from cineray.pipeline.loading.model import load_model
from cineray.pipeline.loading.options import LoadOptions
checkpoint = open_checkpoint(folder)
skipped = (*checkpoint.model.encoder_parts, *checkpoint.model.decoder_parts)
def load():
    model = load_model(checkpoint, LoadOptions(dtype=dtype), skip_components=skipped, is_sharded=True)
    layout = parse_layout(f"ulysses{num_ranks}")
    gang = Gang.join(layout, rank, num_ranks, init_method=f"file://{meeting}", timeout_s=600)
    gang.shard_weights(model)
    return gang, model
"""
BEFORE = """
from cineray.pipeline.checkpoint import open_checkpoint
from cineray.pipeline.loading import TEXT_ENCODERS, LoadOptions, load_model
checkpoint = open_checkpoint(folder)
load = lambda: load_model(checkpoint, LoadOptions(dtype=dtype), without=TEXT_ENCODERS)
"""
RANK = """
import sys, time, torch, diffusers, transformers
folder, dtype, rank, num_ranks, meeting = sys.argv[1:]
rank, num_ranks = int(rank), int(num_ranks)
torch.set_num_threads(1)
{imports}
print("ready", flush=True)
input()
began = time.monotonic()
model = load()
print(time.monotonic() - began, flush=True)
input()
"""


def load_on(num_ranks: int, folder: Path, dtype: str, load: str, before: Path | None) -> dict[str, Any]:
    """Has so many processes load at the same time what a rank loads; what it took.

    Args:
        load: Python that defines `load()`.
        before: a checkout of cineray from before its ranks' loading was changed; None for this one.
    """
    code = RANK.format(imports=load)
    source = Path(__file__).parents[1] if before is None else before.resolve()
    environment = {**os.environ, "PYTHONPATH": str(source / "src")}
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "env": environment}
    with ExitStack() as running:
        meeting = Path(running.enter_context(tempfile.TemporaryDirectory())) / "ranks"
        ranks = []
        for rank in range(num_ranks):
            asked = [str(folder), dtype, str(rank), str(num_ranks), str(meeting)]
            ranks.append(running.enter_context(subprocess.Popen([sys.executable, "-c", code, *asked], **pipes)))
        told = [heard(rank) for rank in ranks]
        assert told == ["ready"] * num_ranks, told
        with watched(0.05) as memory:
            for rank in ranks:
                say(rank)
            seconds = [float(heard(rank)) for rank in ranks]
        for rank in ranks:
            say(rank)
    return {
        "ranks": num_ranks,
        "checkpoint_bytes": sum(file.stat().st_size for file in (folder / "transformer").glob("*.safetensors")),
        "slowest_s": round(max(seconds), 1),
        "together": asdict(memory.together),
        "largest_process": asdict(memory.largest),
    }


def heard(rank: "subprocess.Popen[str]") -> str:
    assert rank.stdout is not None
    return rank.stdout.readline().strip()


def say(rank: "subprocess.Popen[str]") -> None:
    """Lets a rank go on."""
    assert rank.stdin is not None
    rank.stdin.write("\n")
    rank.stdin.flush()


if __name__ == "__main__":
    main()
