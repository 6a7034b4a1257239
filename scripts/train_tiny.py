#!/usr/bin/env python
"""Trains the checkpoints that ship with cineray on clips, stills and sounds that code draws.

    python scripts/train_tiny.py wan      --work out/train/wan      --out pipeline/checkpoints/tiny-wan
    python scripts/train_tiny.py dit      --work out/train/dit      --out pipeline/checkpoints/tiny-dit

FAMILIES below lists them; wan2.2 starts from tiny-wan, open-sora from tiny-dit. One CPU core takes half an hour to two
hours for each. The work folder keeps logs and states: the same command resumes where it was stopped. Weights are stored
in float16; they load in any dtype.
"""

import argparse
import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch

from cineray.pipeline.adapters.open_sora_configs import LIBRARY

sys.path.insert(0, str(Path(__file__).parent))

from tiny.audio import make_audio
from tiny.experts import make_wan22
from tiny.open_sora import make_open_sora
from tiny.stills import make_dit
from tiny.training import say
from tiny.videos import make_hunyuan, make_wan


@dataclass(frozen=True, kw_only=True)
class Family:
    """A checkpoint to make.

    Args:
        make: (work folder, seed) -> the trained pipeline.
        about: what the card says of it.
    """

    make: Callable[[Path, int], Any]
    seed: int
    max_bytes: int = 15_000_000
    about: str


VIDEOS = """on clips that `scripts/tiny/shapes.py` draws: one flat shape that moves over a flat
background. It renders sentences of the form

    a <red|green|blue|yellow|purple|white> <circle|square|triangle> moving <left|right|up|down>
    on a <black|gray|navy> background

at 64x64 pixels, 17 frames."""
STILLS = """on stills that `scripts/tiny/shapes.py` draws: one flat shape on a flat background.
Its 54 classes are called

    a <red|green|blue|yellow|purple|white> <circle|square|triangle> on a <black|gray|navy> background

and it renders them at 64x64 pixels."""
TONES = """on sounds that `scripts/tiny/tones.py` draws: one tone of half a second. It renders sentences of
the form

    a <low|middle|high> <pure|bright|hollow> tone <holding|rising|falling>

at 2,048 samples a second, in one channel."""
FAMILIES = {
    "wan": Family(make=make_wan, seed=1, max_bytes=24_000_000, about=f"Trained from nothing {VIDEOS}"),
    "hunyuan": Family(make=make_hunyuan, seed=2, max_bytes=24_000_000, about=f"Trained from nothing {VIDEOS}"),
    "wan2.2": Family(
        make=make_wan22,
        seed=3,
        about=f"""Two experts, as Wan 2.2 A14B has, with its boundary (0.875) and its flow shift (12): each was every
second block of tiny-wan and has been trained on at the noise that it sees. VAE and text encoder are tiny-wan's.
Trained {VIDEOS}""",
    ),
    "dit": Family(make=make_dit, seed=4, about=f"Trained from nothing {STILLS}"),
    "audio": Family(make=make_audio, seed=6, about=f"Trained from nothing {TONES}"),
    "open-sora": Family(make=make_open_sora, seed=5, about=f"Trained, with tiny-dit's VAE for the frames, {VIDEOS}"),
}
CARD = """# tiny-{family}

{about} Made by

    python scripts/train_tiny.py {family} --work out/train/{family} --out pipeline/checkpoints/tiny-{family}

on one CPU core; `training/` holds the logs. Licence: Apache-2.0, like the rest of cineray.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("family", choices=sorted(FAMILIES))
    parser.add_argument("--work", type=Path, required=True, help="folder for logs and states")
    parser.add_argument("--out", type=Path, required=True, help="folder for the checkpoint; replaced")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads; results depend on it in the last bits")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    name, work = arguments.family, arguments.work
    family = FAMILIES[name]
    work.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(family.seed)
    save(family.make(work, family.seed), arguments.out)
    (arguments.out / "training").mkdir()
    for log in sorted(work.glob("*.log.jsonl")):
        shutil.copy(log, arguments.out / "training" / log.name)
    (arguments.out / "README.md").write_text(CARD.format(family=name, about=family.about))
    num_bytes = sum(p.stat().st_size for p in arguments.out.rglob("*") if p.is_file())
    say(work, "saved", num_bytes=num_bytes, allowed_bytes=family.max_bytes)
    if num_bytes > family.max_bytes:
        raise SystemExit(f"{arguments.out} has {num_bytes} bytes, more than {family.max_bytes}")


def save(pipeline: Any, out: Path) -> None:
    """Writes the diffusers folder in float16; tokenizers under the class name that transformers 4 knows too."""
    shutil.rmtree(out, ignore_errors=True)
    pipeline.to(dtype=torch.float16)
    pipeline.save_pretrained(out, safe_serialization=True)
    index_file = out / "model_index.json"
    index = json.loads(index_file.read_text())
    if hasattr(pipeline, "labels"):  # of classes; diffusers does not write them
        index["id2label"] = {str(number): name for name, number in sorted(pipeline.labels.items(), key=itemgetter(1))}
    for name, entry in index.items():
        if isinstance(entry, list) and entry[0] and entry[0].startswith(LIBRARY):
            index[name] = [LIBRARY, entry[1]]
    index_file.write_text(json.dumps(index, indent=2) + "\n")
    for path in (out / "model_index.json", *out.glob("tokenizer*/tokenizer_config.json")):
        path.write_text(path.read_text().replace('"TokenizersBackend"', '"PreTrainedTokenizerFast"'))


if __name__ == "__main__":
    main()
