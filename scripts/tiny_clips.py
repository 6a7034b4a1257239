#!/usr/bin/env python
"""Prints a manifest of clips that the tiny models know, to measure and calibrate cache policies on.

    python scripts/tiny_clips.py --num 8 > clips.jsonl
    python scripts/tiny_clips.py --num 8 --stills > stills.jsonl    # for tiny-dit
    python scripts/tiny_clips.py --num 8 --sounds > sounds.jsonl    # for tiny-audio
    cineray bench quality --model tiny-wan --manifest clips.jsonl "fewer-steps(25)" dicache

Captions are drawn from the sentences of the training world; the seeds serve no other purpose. Clips from --first 100
on are for calibration, so that no policy is judged on what it was fitted to.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from tiny.kinds import CLIPS, SOUNDS, STILLS, Kind

FIRST_SEED = 700_000_000  # neither training nor the obedience check uses seeds from here on
# coprime to the 216 captions, and to the 27 of tones: neighbours differ in every word
CAPTION_STRIDE, TONE_STRIDE = 89, 40


def tiny_clip(number: int, kind: Kind = CLIPS) -> dict[str, Any]:
    """A row of the manifest."""
    captions = SOUNDS.captions if kind is SOUNDS else CLIPS.captions  # a still is a frame of a clip
    stride = TONE_STRIDE if kind is SOUNDS else CAPTION_STRIDE
    prompt = kind.prompt(captions[number * stride % len(captions)])
    return {"id": str(number), "prompt": prompt, "seed": FIRST_SEED + number}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num", type=int, default=32, help="clips")
    parser.add_argument("--first", type=int, default=0, help="number of the first clip")
    kinds = parser.add_mutually_exclusive_group()
    kinds.add_argument("--stills", action="store_true", help="pictures, by the names of tiny-dit's classes")
    kinds.add_argument("--sounds", action="store_true", help="tones, for tiny-audio")
    arguments = parser.parse_args()
    kind = SOUNDS if arguments.sounds else STILLS if arguments.stills else CLIPS
    for number in range(arguments.first, arguments.first + arguments.num):
        print(json.dumps(tiny_clip(number, kind)))


if __name__ == "__main__":
    main()
