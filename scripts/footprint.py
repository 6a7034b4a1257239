#!/usr/bin/env python
"""Makes the table that `cineray plan` forecasts from, by running the real code on fake tensors. No GPU is used.

    python scripts/footprint.py                  # what is missing; goes on where it was stopped
    python scripts/footprint.py --again          # every row anew, after a change of the models or of the loop
    python scripts/footprint.py --only "hunyuan-video decode"
    python scripts/footprint.py --markdown       # the tables of docs/real_size.md, from what is there

Each row is a run of a few seconds.
"""

import argparse
import json
from dataclasses import fields
from importlib.metadata import version
from typing import Any

from rich.progress import track

from cineray.jobs.run_options import RunOptions, decodes_on_gang
from cineray.pipeline.footprint.cases import Case, cases, run
from cineray.pipeline.footprint.fit import Setup, demands, fits, nearest_fit
from cineray.pipeline.footprint.forecast import forecast, with_margin
from cineray.pipeline.footprint.laws import TABLE, errors_of, read_table
from cineray.pipeline.footprint.published import published_checkpoint
from cineray.pipeline.loading.checkpoint import Checkpoint
from cineray.pipeline.loading.options import LoadOptions
from cineray.pipeline.request import ClipRequest


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--again", action="store_true", help="every row anew")
    parser.add_argument("--only", default="", help="rows whose key holds this text")
    parser.add_argument("--markdown", action="store_true", help="print the tables of the document, run nothing")
    arguments = parser.parse_args(argv)
    if arguments.markdown:
        print(markdown())
    else:
        make(arguments.only, arguments.again)


def make(only: str, again: bool) -> None:
    """Adds the rows that are missing; the file is whole after each, and another such process may run."""
    wanted = list(cases())
    there = rows_there()
    todo = [case for case in wanted if only in case.key and (again or case.key not in there)]
    for case in track(todo, description="runs on fake tensors"):
        row = run(case)
        rows = rows_there() | {case.key: row}
        kept = [rows[case.key] for case in wanted if case.key in rows]
        save({"about": ABOUT, "versions": {n: version(n) for n in LIBRARIES}, "rows": kept})
    print(f"{TABLE}: {len(todo)} rows made, {sum(case.key in rows_there() for case in wanted)} of {len(wanted)} there")


def rows_there() -> dict[str, Any]:
    """The table's rows by key."""
    content = json.loads(TABLE.read_text()) if TABLE.is_file() else {"rows": []}
    return {key_of(row): row for row in content["rows"]}


ABOUT = "bytes and operations on fake tensors, no GPU was used; made by scripts/footprint.py"
FIELDS = tuple(field.name for field in fields(Case))
LIBRARIES = ("torch", "diffusers", "transformers")


def key_of(row: dict[str, Any]) -> str:
    return Case(**{name: row[name] for name in FIELDS}).key


def save(content: dict[str, Any]) -> None:
    """In one step, a row a line."""
    rows = ",\n".join(json.dumps(row) for row in content["rows"])
    head = json.dumps({name: content[name] for name in ("about", "versions")})[:-1]
    draft = TABLE.with_suffix(".draft")
    draft.write_text(f'{head}, "rows": [\n{rows}\n]}}\n')
    draft.replace(TABLE)


CLIPS = (
    ("wan2.1-t2v-1.3b", 832, 480, 81, (1, 2, 4)),
    ("wan2.1-t2v-14b", 832, 480, 81, (1, 2, 4, 8)),
    ("wan2.1-t2v-14b", 1280, 720, 81, (1, 2, 4, 8)),
    ("wan2.1-i2v-14b-720p", 1280, 720, 81, (1, 8)),
    ("wan2.2-ti2v-5b", 1280, 704, 121, (1, 2, 8)),
    ("hunyuan-video", 960, 544, 129, (1, 8)),
    ("hunyuan-video", 1280, 720, 129, (1, 2, 4, 8)),
    ("hunyuan-video-1.5-t2v-720p", 1280, 720, 121, (1, 8)),
    ("flux.1-dev", 1024, 1024, 1, (1, 4)),
)
CARDS = (("24 GB", 25.3), ("48 GB", 48.3), ("80 GB", 85.0), ("141 GB", 151.0))  # GB = 1e9 bytes that CUDA can hand out


def markdown() -> str:
    """The tables of the document: errors of the laws, then memory by model, size, layout, policy and way to decode."""
    return f"{errors()}\n\n{fullest_cards()}\n\n{on_four_small_cards()}\n\n{memory_by_part()}"


def errors() -> str:
    """The largest errors on rows that no law was made from, by what ran."""
    lines = ["| runs held out | number | largest error of bytes | of operations |", "|---|---|---|---|"]
    for part in ("denoise", "decode", "tiled", "encode-image"):
        found = [errors_of(row) for row in read_table() if row["is_held_out"] and row["part"] == part]
        of_bytes, of_flop = (max((error[i] for error in found), key=abs) for i in (0, 1))
        said = f"{of_flop:+.1%}" if any(error[1] for error in found) else "closed form"
        lines.append(f"| {part} | {len(found)} | {of_bytes:+.1%} | {said} |")
    return "\n".join(lines)


# (model, width, height, frames, ranks by ulysses, sum on the fullest card before decodes were tiled or shared, encoders
# and VAE left to finishers: the same harness, cineray 0.1.0, whose two processes were added up by hand)
FULLEST = (
    ("wan2.1-t2v-1.3b", 832, 480, 81, 1, None),
    ("wan2.1-t2v-1.3b", 832, 480, 81, 4, None),
    ("wan2.1-t2v-14b", 832, 480, 81, 1, 58.6),
    ("wan2.1-t2v-14b", 832, 480, 81, 4, None),
    ("wan2.1-t2v-14b", 832, 480, 81, 8, 53.2),
    ("wan2.1-t2v-14b", 1280, 720, 81, 1, 79.9),
    ("wan2.1-t2v-14b", 1280, 720, 81, 8, 65.7),
    ("wan2.1-i2v-14b-720p", 1280, 720, 81, 1, 86.7),
    ("wan2.1-i2v-14b-720p", 1280, 720, 81, 8, None),
    ("wan2.2-t2v-a14b", 1280, 720, 81, 8, None),
    ("wan2.2-ti2v-5b", 1280, 704, 121, 1, None),
    ("wan2.2-ti2v-5b", 1280, 704, 121, 8, None),
    ("hunyuan-video", 1280, 720, 129, 1, 98.7),
    ("hunyuan-video", 1280, 720, 129, 2, 91.7),
    ("hunyuan-video", 1280, 720, 129, 4, 86.6),
    ("hunyuan-video", 1280, 720, 129, 8, 84.3),
    ("hunyuan-video-1.5-t2v-480p", 848, 480, 121, 1, None),
    ("hunyuan-video-1.5-t2v-720p", 1280, 720, 121, 1, None),
    ("hunyuan-video-1.5-t2v-720p", 1280, 720, 121, 8, None),
    ("hunyuan-video-1.5-i2v-720p", 1280, 720, 121, 8, None),
    ("flux.1-dev", 1024, 1024, 1, 1, None),
    ("flux.1-dev", 1024, 1024, 1, 4, None),
    ("open-sora-1.2", 424, 240, 51, 1, None),
    ("dit-xl-2-256", 256, 256, 1, 1, None),
)


def fullest_cards() -> str:
    """What the fullest card takes before and now, and the options with which the clip fits smaller ones."""
    sizes = [(name, round(size * 1e9)) for name, size in CARDS if name != "141 GB"]
    names = " | ".join(name for name, _ in sizes)
    lines = [f"| clip, dicache | ranks | before | now | {names} |", "|---|---|---|---|---|---|---|"]
    for model, width, height, frames, ulysses, before in FULLEST:
        known = published_checkpoint(model)
        run, tiles = RunOptions(sp=ulysses), known.adapter.tiles_on_gpus
        options = LoadOptions(device="cuda", vae_tiling=tiles)
        setup = Setup(
            options=options,
            layout=run.layout,
            has_finishers=True,
            shares_gpu=True,
            decodes_on_gang=decodes_on_gang(run, options, known.model),
        )
        clip = _clip(known, width, height, frames)
        now = max(demand.tensor_bytes for demand in demands(known, clip, setup)) / 1e9
        said = [_options(known, clip, setup, size, ulysses) for _, size in sizes]
        then = "" if before is None else f"{before:.1f}"
        lines.append(f"| {model}, {width}x{height}, {frames} | {ulysses} | {then} | {now:.1f} | {' | '.join(said)} |")
    return "\n".join(lines)


def _clip(known: Checkpoint, width: int, height: int, frames: int) -> ClipRequest:
    return ClipRequest(
        id="1",
        prompt="a",
        width=width,
        height=height,
        num_frames=frames,
        num_inference_steps=50,
        guidance_scale=known.defaults.guidance_scale,
        fps=16,
        cache="dicache",
        image="first.png" if known.size_rule.takes_image else None,
    )


SMALL_CARDS: tuple[tuple[str, dict[str, Any], dict[str, Any]], ...] = (
    ("none", {}, {}),
    ("`--text-encoders gpu --shard-weights`", {"shards_weights": True}, {"text_encoders": "gpu"}),
    ("`--shard-weights`", {"shards_weights": True}, {}),
    ("`--quantize fp8`", {}, {"quantize": "fp8"}),
    ("`--quantize int8`", {}, {"quantize": "int8"}),
)


def on_four_small_cards() -> str:
    """What the fullest of four cards of 24 GB takes of Wan 14B at 480p, by how its weights are held."""
    lines = [
        "| options with `--sp 4` | transformer | step | cache | VAE | text | sum | with margin | 24 GB |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    known, room = published_checkpoint("wan2.1-t2v-14b"), round(dict(CARDS)["24 GB"] * 1e9)
    clip = _clip(known, 832, 480, 81)
    for name, changes, options in SMALL_CARDS:
        setup = Setup(
            options=LoadOptions(device="cuda", **options),
            layout=RunOptions(sp=4).layout,
            has_finishers=True,
            shares_gpu=True,
            decodes_on_gang=True,
            **changes,
        )
        fullest = max(demands(known, clip, setup), key=lambda demand: demand.tensor_bytes)
        parts = [fullest.parts.get(part, 0) for part in ("transformer", "step", "cache", "VAE", "text encoders")]
        sums = (fullest.tensor_bytes, with_margin(fullest.tensor_bytes))
        numbers = " | ".join(f"{part / 1e9:.1f}" for part in (*parts, *sums))
        lines.append(f"| {name} | {numbers} | {'fits' if fits(known, clip, setup, room) else 'no'} |")
    return "\n".join(lines)


def _options(known: Any, clip: ClipRequest, setup: Setup, memory_bytes: int, max_ranks: int) -> str:
    if fits(known, clip, setup, memory_bytes):
        return "fits"
    found = nearest_fit(known, clip, setup, memory_bytes, max_ranks)
    return "no" if found is None else f"`{found[0]}`"


def memory_by_part() -> str:
    lines = [
        "| model, size, frames | ulysses | cache | decode | weights | step | cached | VAE | text | total | fits |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for model, width, height, frames, degrees in CLIPS:
        for ulysses in degrees:
            for cache in ("none", "dicache"):
                for decode in ("finisher", "tiled", "gang"):
                    memory, _ = forecast(
                        model,
                        width=width,
                        height=height,
                        frames=frames,
                        cfg=1,
                        ring=1,
                        ulysses=ulysses,
                        cache=cache,
                        decode=decode,
                    )
                    parts = (memory.weights, memory.activations, memory.cache, memory.vae, memory.text_encoder)
                    numbers = " | ".join(f"{part / 1e9:.1f}" for part in (*parts, memory.total))
                    fits = next((name for name, size in CARDS if memory.total <= size * 1e9), "none")
                    clip = f"{model}, {width}x{height}, {frames}"
                    lines.append(f"| {clip} | {ulysses} | {cache} | {decode} | {numbers} | {fits} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
