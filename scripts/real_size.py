#!/usr/bin/env python
"""Renders with a checkpoint of real size on CPUs: Wan 2.1 1.3B's published configuration, random weights.

    python scripts/real_size.py make out/wan-1.3b                 # 11 GB: sharded safetensors in float32, as on the hub
    python scripts/real_size.py render out/wan-1.3b --out out/real-size --sp 2
    python scripts/real_size.py load out/wan-2gb                  # seconds and host memory of 1 and of 4 ranks
    python scripts/real_size.py make out/wan-2gb --layers 10 --text-layers 1

What comes out is noise; what it shows is that the sizes fit, load, shard and decode. The text encoder has the published
width and vocabulary, but few layers: all 24 would be 23 GB more on disk. Memory is what the kernel says of each process
(/proc/PID/smaps_rollup, Linux): private pages, of which every process has its own, and file pages, which they share.
"""

import argparse
import json
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from safetensors.torch import save_file
from tiny.text import new_umt5
from torch import nn

from cineray.jobs.measure.local_ranks import run_on_local_ranks
from cineray.pipeline.footprint.published import Published, published
from cineray.pipeline.footprint.subject import empty_part
from cineray.pipeline.loading.checkpoint import open_checkpoint
from cineray.pipeline.loading.model import load_model
from cineray.pipeline.loading.options import LoadOptions

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
    asked, more = parser.parse_known_args(argv)
    if more and asked.command != "render":
        parser.error(f"unknown: {' '.join(more)}")
    if asked.command == "make":
        make(asked.folder, asked.layers, asked.text_layers, asked.vocabulary)
    elif asked.command == "render":
        print(json.dumps(render(asked.folder, asked.out, asked.sp, asked.cache, more)))
    else:
        for num_ranks in asked.ranks:
            print(json.dumps(load_on(num_ranks, asked.folder)))


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


@dataclass
class Memory:
    """The most that the processes below this one had together.

    Args:
        private_bytes: pages of their own.
        file_bytes: pages of files, counted once however many processes have them.
        largest_bytes: private pages of the largest process.
    """

    private_bytes: int = 0
    file_bytes: int = 0
    largest_bytes: int = 0


@contextmanager
def watched(every_s: float = 0.2) -> Iterator[Memory]:
    """Looks at all processes below this one, as often."""
    memory, ended = Memory(), threading.Event()

    def watch() -> None:
        while not ended.wait(every_s):
            private, files = [], []
            for process in psutil.Process().children(recursive=True):
                own, shared = pages_of(process.pid)
                private.append(own)
                files.append(shared)
            memory.private_bytes = max(memory.private_bytes, sum(private))
            memory.file_bytes = max(memory.file_bytes, sum(files))
            memory.largest_bytes = max(memory.largest_bytes, max(private, default=0))

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield memory
    finally:
        ended.set()
        thread.join()


def pages_of(pid: int) -> tuple[int, int]:
    """(bytes of anonymous pages, its share of pages of files); nothing of a process that has ended."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0, 0
    kilobytes = {line.split(":")[0]: int(line.split()[1]) for line in lines[1:] if line.endswith("kB")}
    return 1024 * kilobytes["Pss_Anon"], 1024 * kilobytes["Pss_File"]


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
        "private_bytes": memory.private_bytes,
        "largest_process_bytes": memory.largest_bytes,
        "file_bytes": memory.file_bytes,
    }


def load_on(num_ranks: int, folder: Path) -> dict[str, Any]:
    """Has so many processes load the transformer at the same time, as ranks do; what it took."""
    size = sum(file.stat().st_size for file in (folder / "transformer").glob("*.safetensors"))
    with watched(0.05) as memory:
        seconds = run_on_local_ranks(_load_on_rank, num_ranks, str(folder), timeout_s=3600)
    return {
        "ranks": num_ranks,
        "checkpoint_bytes": size,
        "slowest_s": round(max(seconds), 1),
        "private_bytes": memory.private_bytes,
        "largest_process_bytes": memory.largest_bytes,
        "file_bytes": memory.file_bytes,
    }


def _load_on_rank(_rank: int, _num_ranks: int, _init_method: str, folder: str) -> float:
    checkpoint = open_checkpoint(folder)
    others = (*checkpoint.model.encoder_parts, *checkpoint.model.decoder_parts)
    began = time.monotonic()
    load_model(checkpoint, LoadOptions(dtype="bfloat16"), skip_components=others)
    return time.monotonic() - began


if __name__ == "__main__":
    main()
