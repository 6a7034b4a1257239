#!/usr/bin/env python
"""Measures how often a tiny checkpoint renders what the caption says, and how well its VAE restores clips.

Renders (caption, seed) pairs in float32 on the CPU, reads the frames with tiny.reading (sounds with tiny.tones), which
sees no caption, and compares. The reader itself is measured too, on drawn clips, with and without noise. A model of
pictures is asked for stills, which have no direction.

    python scripts/check_obedience.py --model tiny-wan
    python scripts/check_obedience.py --model tiny-hunyuan --contact-sheet out/hunyuan.png
    python scripts/check_obedience.py --model tiny-audio
    python scripts/check_obedience.py --model out/my-wan --num-pairs 12 --steps 20 --vae-clips 8 --json

Exit code: 0; 1 if colour or direction (shape, of stills; any property, of sounds) is below 95 % or the VAE below 30 dB
(15, of sounds); 2 if the model cannot be used.
"""

import argparse
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageDraw
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

sys.path.insert(0, str(Path(__file__).parent))

from tiny.kinds import CLIPS, SOUNDS, STILLS, Kind
from tiny.shapes import SIZE

from cineray.pipeline.request import ClipRequest, InputError, problems

if TYPE_CHECKING:
    from cineray.pipeline.loading.model import LoadedModel

# Training seeds its generators with k * 1_000_003 + step, k up to 32, and with numbers below 12_000
# (train_tiny.py, tiny/vae.py, tiny/denoiser.py): the first three lie outside of all of these.
FIRST_PAIR_SEED = 900_000_000
FIRST_VAE_SEED = 77_000
FIRST_DRAWN_SEED = 88_000

ZOOM = 2  # contact sheet: 64 px frames are too small to judge by eye
TEXT_HEIGHT_PX = 14  # PIL's built-in font is 11 px high
GAP_PX = 6  # between clips
FRAME_GAP_PX = 2  # between the frames of a clip: on a flat background their edges could not be seen otherwise


@dataclass(frozen=True, kw_only=True, slots=True)
class Pair:
    """One clip to render."""

    caption: Any
    seed: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What was asked for and what was seen."""

    pair: Pair
    reading: Any

    def hit(self, name: str) -> bool:
        """Whether the property `name` of the caption was seen."""
        return getattr(self.reading, name) == getattr(self.pair.caption, name)


def main() -> int:
    arguments = parse_arguments()
    bars = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
    )
    with bars:
        try:
            model = load(arguments.model)
            if arguments.contact_sheet and kind_of(model) is SOUNDS:
                raise InputError(f"model {arguments.model}: sounds have no frames for --contact-sheet")
        except InputError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        kind = kind_of(model)
        pairs = pick_pairs(arguments.num_pairs, kind)
        reader = {"drawn": read_drawn(0.0, kind), f"drawn, noise {kind.noise:.2g}": read_drawn(kind.noise, kind)}
        vae_bar = bars.add_task("VAE, clips", total=arguments.vae_clips)
        vae_db = vae_score_db(model, arguments.vae_clips, lambda: bars.advance(vae_bar))
        render_bar = bars.add_task("rendering, steps", total=len(pairs) * arguments.steps)
        clips = list(render(model, pairs, arguments.steps, lambda *_: bars.advance(render_bar)))
    outcomes = measure(pairs, clips, kind)
    if arguments.contact_sheet:
        contact_sheet(outcomes, clips, kind).save(arguments.contact_sheet)
    report = summary(outcomes, vae_db, kind) | {
        "model": arguments.model,
        "digest": model.digest,
        "steps": arguments.steps,
        "reader": {name: tallies(drawn, kind) for name, drawn in reader.items()},
    }
    print_report(report, kind)
    if arguments.json:
        print(json.dumps(report))
    return 0 if report["passed"] else 1


def parse_arguments() -> argparse.Namespace:
    def positive(text: str) -> int:
        number = int(text)
        if number < 1:
            raise argparse.ArgumentTypeError(f"must be 1 or more, got {number}")
        return number

    def png(text: str) -> Path:
        path = Path(text)
        if path.suffix != ".png" or not path.parent.is_dir():
            raise argparse.ArgumentTypeError(f"must be a .png in a folder that exists, got {text}")
        return path

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a tiny model, or the folder of such a checkpoint")
    parser.add_argument("--num-pairs", type=positive, default=48, help="clips to render (default: %(default)s)")
    parser.add_argument("--steps", type=positive, default=50, help="denoising steps (default: %(default)s)")
    parser.add_argument("--vae-clips", type=positive, default=32, help="clips for the VAE (default: %(default)s)")
    parser.add_argument("--contact-sheet", type=png, metavar="FILE.png", help="write four frames of every clip")
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line of stdout")
    return parser.parse_args()


def pick_pairs(num_pairs: int, kind: Kind = CLIPS) -> list[Pair]:
    """The same pairs every time; each caption is the one whose words, alone and two by two, were used least so far.

    48 pairs of clips hold every colour 8, shape 16, direction 12 and background 16 times; 216 pairs are all captions.
    """

    def words(caption: Any) -> list[tuple[str, ...]]:
        single = [getattr(caption, name) for name in kind.properties]
        return [*combinations(single, 1), *combinations(single, 2)]

    used: Counter[tuple[str, ...]] = Counter()
    pairs, left = [], []
    for i in range(num_pairs):
        left = left or list(kind.captions)
        caption = min(left, key=lambda c: sum(used[w] for w in words(c)))
        left.remove(caption)
        used.update(words(caption))
        pairs.append(Pair(caption=caption, seed=FIRST_PAIR_SEED + i))
    return pairs


# diffusers takes seconds to import: only what needs a model imports it, so --help and the tests stay fast


def load(name: str) -> "LoadedModel":
    """Loads the checkpoint in float32 on the CPU.

    Raises:
        InputError: it is not here, or cannot render 64 x 64 clips of 17 frames from text alone, nor such stills, nor
            sounds.
    """
    from cineray.pipeline.loading.checkpoint import open_checkpoint
    from cineray.pipeline.loading.model import LoadOptions, load_model

    model = load_model(open_checkpoint(name), LoadOptions(device="cpu", dtype="float32"))
    request = clip_request(model, pick_pairs(1, kind_of(model))[0], num_steps=1)
    reasons = problems(request, model.checkpoint.size_rule)
    if reasons:
        raise InputError(f"model {name}: {'; '.join(reasons)}")
    return model


def kind_of(model: "LoadedModel") -> Kind:
    from cineray.pipeline.media.output import PICTURE, SOUND

    return {PICTURE: STILLS, SOUND: SOUNDS}.get(model.checkpoint.model.output, CLIPS)


def clip_request(model: "LoadedModel", pair: Pair, num_steps: int) -> ClipRequest:
    defaults, kind = model.checkpoint.defaults, kind_of(model)
    return ClipRequest(
        id=f"seed-{pair.seed}",
        prompt=kind.prompt(pair.caption),
        seed=pair.seed,
        width=kind.side,
        height=kind.side,
        num_frames=kind.num_frames,
        num_inference_steps=num_steps,
        guidance_scale=defaults.guidance_scale,
        guidance_scale_2=defaults.guidance_scale_2,
        fps=defaults.fps,
        seconds=defaults.seconds,
    )


def render(
    model: "LoadedModel", pairs: Iterable[Pair], num_steps: int, on_step: Callable[[int, int], None]
) -> Iterator[np.ndarray]:
    """Frames [17, 64, 64, 3] uint8 of each pair, of a still [1, 64, 64, 3], of a sound [1024, 1] int16."""
    from cineray.pipeline.render import render_clip

    for pair in pairs:
        yield render_clip(model, clip_request(model, pair, num_steps), on_step).frames


def vae_score_db(model: "LoadedModel", num_clips: int, on_clip: Callable[[], None]) -> float:
    """Mean PSNR (of sounds, signal-to-noise ratio) in dB over freshly drawn clips, through the model's own vae.encode
    (mode) and vae.decode."""
    from tiny.oobleck import restoring_snr_db
    from tiny.vae import reconstruction_psnr

    score = restoring_snr_db if kind_of(model) is SOUNDS else reconstruction_psnr
    found = []
    for i in range(num_clips):
        found.append(score(model.pipe.vae, 1, seed=FIRST_VAE_SEED + i))
        on_clip()
    return sum(found) / num_clips


def read_drawn(noise: float, kind: Kind) -> list[Outcome]:
    """The reader on one fresh clip of each of the 216 captions, one still of each of the 54, one sound of the 27."""
    pairs = [Pair(caption=c, seed=FIRST_DRAWN_SEED + i) for i, c in enumerate(kind.captions)]
    return measure(pairs, (kind.draw(p.caption, p.seed, noise) for p in pairs), kind)


def measure(pairs: Iterable[Pair], clips: Iterable[np.ndarray], kind: Kind = CLIPS) -> list[Outcome]:
    """Reads the frames of the pairs' clips, in their order."""
    return [Outcome(pair=p, reading=kind.read(frames)) for p, frames in zip(pairs, clips, strict=True)]


def tallies(outcomes: list[Outcome], kind: Kind = CLIPS) -> dict[str, dict[str, Any]]:
    """Hits, total, percentage and misses by property; "all" counts clips with every property right."""
    rows: dict[str, dict[str, Any]] = {}
    for name in (*kind.properties, "all"):
        wanted = kind.properties if name == "all" else (name,)
        missed = [o for o in outcomes if not all(o.hit(w) for w in wanted)]
        hits = len(outcomes) - len(missed)
        rows[name] = {
            "hits": hits,
            "total": len(outcomes),
            "percent": 100 * hits / len(outcomes),
            "misses": [
                {
                    "caption": kind.prompt(o.pair.caption),
                    "seed": o.pair.seed,
                    "wrong": [p for p in kind.properties if not o.hit(p)],
                    "read": asdict(o.reading),
                }
                for o in missed
            ],
        }
    return rows


def summary(outcomes: list[Outcome], vae_db: float, kind: Kind = CLIPS) -> dict[str, Any]:
    """The tallies beside the limits, and whether all limits are kept."""
    properties = tallies(outcomes, kind)
    kept = all(properties[name]["percent"] >= limit for name, limit in kind.limits.items())
    return {
        "properties": properties,
        "vae_db": vae_db,
        "limits": {**kind.limits, "vae_db": kind.vae_limit_db},
        "passed": kept and vae_db >= kind.vae_limit_db,
    }


def describe(read: dict[str, Any], kind: Kind) -> str:
    """A reading in one line; ? for what could not be seen or heard."""
    names = " ".join(read[name] or "?" for name in kind.properties)
    numbers = {name: value for name, value in read.items() if value is not None and not isinstance(value, str)}
    return f"{names} ({', '.join(f'{name} {_rounded(value)}' for name, value in numbers.items())})"


def _rounded(value: Any) -> str:
    return "/".join(f"{x:.3g}" for x in (value if isinstance(value, list | tuple) else (value,)))


def print_report(report: dict[str, Any], kind: Kind) -> None:
    """Tables for people, on stdout."""
    print(f"{report['model']} ({report['digest']}), {report['steps']} steps")
    for title, rows in {"rendered": report["properties"], **report["reader"]}.items():
        print(f"\n{title if title == 'rendered' else f'the reader itself: {title}'}")
        for name, row in rows.items():
            limit = kind.limits.get(name) if title == "rendered" else None
            note = f"  (at least {limit:.0f} %)" if limit else ""
            print(f"  {name:<12}{row['hits']:>4} / {row['total']:<4}{row['percent']:>6.1f} %{note}")
        for miss in rows["all"]["misses"]:
            print(f"    asked: {miss['caption']}, seed {miss['seed']}")
            print(f"     read: {describe(miss['read'], kind)}; wrong: {', '.join(miss['wrong'])}")
    print(f"\nVAE reconstruction  {report['vae_db']:.2f} dB  (at least {kind.vae_limit_db:.0f} dB)")
    print("passed" if report["passed"] else "FAILED")


def contact_sheet(outcomes: list[Outcome], clips: list[np.ndarray], kind: Kind = CLIPS) -> Image.Image:
    """First, one-third, two-thirds and last frame of each clip under its caption; red captions are misses."""
    side = SIZE * ZOOM
    cell_width, cell_height = len(kind.shares) * (side + FRAME_GAP_PX) + GAP_PX, side + TEXT_HEIGHT_PX + GAP_PX
    num_rows = -(-len(clips) // kind.columns)
    sheet = Image.new("RGB", (kind.columns * cell_width, num_rows * cell_height), "white")
    pen = ImageDraw.Draw(sheet)
    for index, (outcome, frames) in enumerate(zip(outcomes, clips, strict=True)):
        row, column = divmod(index, kind.columns)
        left, top = column * cell_width, row * cell_height
        colour = "black" if all(outcome.hit(name) for name in kind.properties) else "red"
        caption = outcome.pair.caption
        asked = f"{caption}, seed {outcome.pair.seed}" if kind is CLIPS else caption.still.replace(" background", "")
        pen.text((left, top), asked, fill=colour)
        for place, share in enumerate(kind.shares):
            frame = Image.fromarray(frames[round(share * (len(frames) - 1))])
            frame = frame.resize((side, side), Image.Resampling.NEAREST)
            sheet.paste(frame, (left + place * (side + FRAME_GAP_PX), top + TEXT_HEIGHT_PX))
    return sheet


if __name__ == "__main__":
    sys.exit(main())
