"""Stills of clips as small WebP pictures inside the page: what stands there before a video plays."""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from cineray.jobs.report.clips import ClipRow
from cineray.jobs.report.page import ProgressBar
from cineray.pipeline.media.ffmpeg import VideoError
from cineray.pipeline.media.output import VIDEO, output_of
from cineray.pipeline.media.video import read_still

MAX_POSTERS = 240  # ten pages of the gallery; on later ones the browser reads the first frame of what is shown
MAX_POSTER_CHARS = 1_200_000  # of all together, so that a page stays below 2 MB
WIDTH = 192  # pixels, as wide as a card on a phone of two columns
QUALITY = 55  # of WebP: a 192 x 108 still of a real scene then has 2 to 5 kB


def posters_of(folder: Path, clips: Sequence[ClipRow], progress_bar: ProgressBar) -> dict[str, str]:
    """Data URIs by the names of videos; without those that cannot be read, or are too many."""
    shown = [clip for clip in clips if clip.video is not None and output_of(clip.video) == VIDEO][:MAX_POSTERS]
    found, num_chars = {}, 0
    if not shown:
        return found
    with progress_bar("stills", len(shown)) as on_still, ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        posters = pool.map(partial(_poster, folder), shown)  # each waits for an ffmpeg
        for number, (clip, poster) in enumerate(zip(shown, posters, strict=True), 1):
            on_still(number)
            if poster is not None and num_chars + len(poster) <= MAX_POSTER_CHARS:
                num_chars += len(poster)
                found[str(clip.video)] = poster
    return found


def _poster(folder: Path, clip: ClipRow) -> str | None:
    """The middle frame; of an unknown number of frames the first one."""
    from PIL import Image

    middle_s = (clip.frames or 0) // 2 / (clip.fps or 1)
    try:
        frame = read_still(folder / str(clip.video), middle_s, WIDTH)
    except VideoError:
        return None
    content = io.BytesIO()
    Image.fromarray(frame).save(content, "WEBP", quality=QUALITY)
    return f"data:image/webp;base64,{base64.b64encode(content.getvalue()).decode()}"
