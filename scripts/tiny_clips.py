#!/usr/bin/env python
"""Prints a manifest of clips that the tiny models know, to measure and calibrate cache policies on.

    python scripts/tiny_clips.py --num 8 > clips.jsonl
    python scripts/tiny_clips.py --num 8 --stills > stills.jsonl    # for tiny-dit
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

from tiny.shapes import all_captions

FIRST_SEED = 700_000_000  # neither training nor the obedience check uses seeds from here on
CAPTION_STRIDE = 89  # coprime to the 216 captions: neighbours differ in every word


def tiny_clip(number: int, still: bool = False) -> dict[str, Any]:
    """A row of the manifest."""
    captions = all_captions()
    caption = captions[number * CAPTION_STRIDE % len(captions)]
    return {"id": str(number), "prompt": caption.still if still else str(caption), "seed": FIRST_SEED + number}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num", type=int, default=32, help="clips")
    parser.add_argument("--first", type=int, default=0, help="number of the first clip")
    parser.add_argument("--stills", action="store_true", help="pictures, by the names of tiny-dit's classes")
    arguments = parser.parse_args()
    for number in range(arguments.first, arguments.first + arguments.num):
        print(json.dumps(tiny_clip(number, arguments.stills)))


if __name__ == "__main__":
    main()
