"""What a batch would do to an output folder, before anything is loaded or written: `render --dry-run`."""

import os
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cineray.jobs.output.record import fingerprint_of, render_options
from cineray.pipeline.loading.checkpoint import Checkpoint
from cineray.pipeline.loading.options import LoadOptions
from cineray.pipeline.loading.weights import identify
from cineray.pipeline.media.picture import Pictures
from cineray.pipeline.request import ClipRequest, InputError, explain

_VIDEO = re.compile(r"(?P<id>.+)\.(?P<fingerprint>[0-9a-f]{12})\.mp4")


@dataclass(frozen=True, kw_only=True, slots=True)
class ClipShape:
    """What a clip's time depends on."""

    width: int
    height: int
    num_frames: int
    num_inference_steps: int
    guidance_scale: float
    cache: str

    @classmethod
    def of(cls, request: ClipRequest) -> "ClipShape":
        return cls(
            width=request.width,
            height=request.height,
            num_frames=request.num_frames,
            num_inference_steps=request.num_inference_steps,
            guidance_scale=request.guidance_scale,
            cache=request.cache,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Survey:
    """What would become of a batch's clips.

    Args:
        done: their videos are in the folder.
        new: no video has their id.
        changed: a video of another fingerprint has their id; it stays, and the clip is rendered beside it.
        refused: lines about clips that cannot be rendered.
        num_refused: how many those are; `refused` names the first ones.
        to_render: number of clips of each shape that would be rendered.
    """

    done: int
    new: int
    changed: int
    refused: tuple[str, ...]
    num_refused: int
    to_render: Counter[ClipShape]

    def to_dict(self) -> dict[str, Any]:
        return {"done": self.done, "new": self.new, "changed": self.changed, "refused": self.num_refused}


def survey(
    requests: Iterable[ClipRequest],
    refused: tuple[str, ...],
    num_refused: int,
    out: Path,
    checkpoint: Checkpoint,
    options: LoadOptions,
    lossless: bool,
) -> Survey:
    """Looks for each clip's video by its name and writes nothing; a render looks into the videos too.

    Args:
        requests: those that were checked and can be rendered.
        refused: what is wrong with others, and `num_refused` how many those are.

    Raises:
        InputError: the folder cannot be read; no such model.
    """
    videos = _videos(out)
    digest, chosen, pictures = identify(checkpoint).digest, render_options(options, lossless), Pictures()
    counts, to_render, lines = Counter[str](), Counter[ClipShape](), list(refused)
    for request in requests:
        known = videos.get(request.id)
        try:
            name = fingerprint_of(pictures.pinned(request), checkpoint, digest, chosen)
        except (OSError, ValueError, InputError) as error:  # its picture or schedule went away since it was checked
            lines.append(f"{request.id}: {explain(error)}")
            num_refused += 1
            continue
        status = "new" if known is None else "done" if name in known else "changed"
        counts[status] += 1
        if status != "done":
            to_render[ClipShape.of(request)] += 1
    return Survey(
        done=counts["done"],
        new=counts["new"],
        changed=counts["changed"],
        refused=tuple(lines),
        num_refused=num_refused,
        to_render=to_render,
    )


def _videos(out: Path) -> dict[str, set[str]]:
    """Fingerprints of the videos in a folder, by clip id; of links and empty files none."""
    found: dict[str, set[str]] = {}
    try:
        with os.scandir(out) as entries:
            for entry in entries:
                named = _VIDEO.fullmatch(entry.name)
                if named and entry.is_file(follow_symlinks=False) and entry.stat(follow_symlinks=False).st_size:
                    found.setdefault(named["id"], set()).add(named["fingerprint"])
    except FileNotFoundError:
        pass
    except OSError as error:
        raise InputError(f"--out {out} cannot be read: {error.strerror}") from None
    return found
