#!/usr/bin/env python
"""A PNG with a few frames of each clip in a row, to look at a batch without a video player.

python scripts/stills.py out/demo/*.mp4 --out out/demo/stills.png
"""

import argparse
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from cineray.pipeline.media.video import read_metadata, read_video

GAP_PX = 4
CAPTION_PX = 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("videos", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, required=True, help="PNG to write")
    parser.add_argument("--frames", type=int, default=6, help="frames per clip, evenly spread")
    parser.add_argument("--height", type=int, default=128, help="pixels of each frame")
    arguments = parser.parse_args()
    rows = [row(video, arguments.frames, arguments.height) for video in arguments.videos]
    sheet = Image.new("RGB", (max(r.width for r in rows), sum(r.height for r in rows)), "white")
    top = 0
    for image in rows:
        sheet.paste(image, (0, top))
        top += image.height
    sheet.save(arguments.out)
    print(arguments.out)


def row(video: Path, num_frames: int, height: int) -> Image.Image:
    """One clip: its prompt above evenly spread frames."""
    frames = read_video(video)
    chosen = frames[np.linspace(0, len(frames) - 1, num_frames).round().astype(int)]
    width = round(height * frames.shape[2] / frames.shape[1])
    image = Image.new("RGB", (num_frames * (width + GAP_PX) - GAP_PX, CAPTION_PX + height + GAP_PX), "white")
    ImageDraw.Draw(image).text((2, 2), str(read_metadata(video).get("prompt", video.name)), fill="black")
    for place, frame in enumerate(chosen):
        still = Image.fromarray(frame).resize((width, height), Image.Resampling.LANCZOS)
        image.paste(still, (place * (width + GAP_PX), CAPTION_PX))
    return image


if __name__ == "__main__":
    main()
