"""What a batch would do to an output folder, before anything is loaded or written: `render --dry-run`."""

import os
import re
import statistics
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cineray.distributed.layout import Layout
from cineray.jobs.output.record import fingerprint_of, policy_text, read_record, render_options
from cineray.jobs.planning.choice import Choice
from cineray.jobs.planning.schedule import makespan_s
from cineray.pipeline.loading.checkpoint import Checkpoint
from cineray.pipeline.loading.options import LoadOptions
from cineray.pipeline.loading.weights import identify
from cineray.pipeline.media.inputs import Pictures
from cineray.pipeline.request import ClipRequest, InputError, explain

MAX_SIDECARS = 1000  # of clips that are done, whose seconds are looked at


@dataclass(frozen=True, kw_only=True, slots=True)
class ClipShape:
    """What a clip's time depends on; `policy` is its cache with all options, as a sidecar has it."""

    width: int
    height: int
    frames: int
    steps: int
    is_guided: bool
    policy: str

    @classmethod
    def of(cls, request: ClipRequest, policy: str) -> "ClipShape":
        return cls(
            width=request.width,
            height=request.height,
            frames=request.num_frames,
            steps=request.num_inference_steps,
            is_guided=request.guidance_scale > 1,
            policy=policy,
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
    videos = _videos(out, checkpoint.model.output.suffix)
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
            to_render[ClipShape.of(request, policy_text(request, checkpoint))] += 1
    return Survey(
        done=counts["done"],
        new=counts["new"],
        changed=counts["changed"],
        refused=tuple(lines),
        num_refused=num_refused,
        to_render=to_render,
    )


def committed(out: Path, checkpoint: Checkpoint, options: LoadOptions, lossless: bool) -> Callable[[ClipRequest], bool]:
    """Says of a clip whether its video is in the folder, by its name alone; of one that cannot be looked up, that not.

    Raises:
        InputError: the folder cannot be read; no such model.
    """
    videos = _videos(out, checkpoint.model.output.suffix)
    if not videos:
        return lambda _: False
    digest, chosen, pictures = identify(checkpoint).digest, render_options(options, lossless), Pictures()

    def is_there(request: ClipRequest) -> bool:
        known = videos.get(request.id)
        try:
            return known is not None and fingerprint_of(pictures.pinned(request), checkpoint, digest, chosen) in known
        except (OSError, ValueError, InputError):
            return False

    return is_there


def _videos(out: Path, suffix: str) -> dict[str, set[str]]:
    """Fingerprints of the clips in a folder, by their ids; of links and empty files none."""
    finished = re.compile(rf"(?P<id>.+)\.(?P<fingerprint>[0-9a-f]{{12}}){re.escape(suffix)}")
    found: dict[str, set[str]] = {}
    try:
        with os.scandir(out) as entries:
            for entry in entries:
                named = finished.fullmatch(entry.name)
                if named and entry.is_file(follow_symlinks=False) and entry.stat(follow_symlinks=False).st_size:
                    found.setdefault(named["id"], set()).add(named["fingerprint"])
    except FileNotFoundError:
        pass
    except OSError as error:
        raise InputError(f"--out {out} cannot be read: {error.strerror}") from None
    return found


@dataclass(frozen=True, kw_only=True, slots=True)
class Remaining:
    """A forecast of what is left of a batch; None where nothing says how long such clips take.

    Args:
        wall_s: of the gangs' rendering, the longest clips first; start-up and stops are not in it.
        gpu_hours: of all ranks for so long.
        cost: in the currency of the price.
    """

    wall_s: float | None = None
    gpu_hours: float | None = None
    cost: float | None = None
    source: str = "nothing in the folder says how long such clips take; see `cineray plan`"

    def to_dict(self) -> dict[str, Any]:
        return {"wall_s": self.wall_s, "gpu_hours": self.gpu_hours, "cost": self.cost, "source": self.source}


def forecast(
    found: Survey, out: Path, device: str, layout: Layout, num_gangs: int, price_per_gpu_hour: float | None = None
) -> Remaining:
    """How long the rest would take, from the seconds of the folder's own clips on the same kind of device and layout.

    Args:
        layout: of one gang.
        price_per_gpu_hour: of one rank.
    """
    if not found.to_render:
        return Remaining(wall_s=0.0, gpu_hours=0.0, cost=0.0, source="nothing is left to render")
    seconds = _seconds(out, device, layout)
    if not set(found.to_render) <= set(seconds):
        return Remaining()
    clips = [(statistics.median(seconds[shape]), count) for shape, count in found.to_render.items()]
    wall_s = makespan_s(clips, num_gangs)
    gpu_hours = wall_s * num_gangs * layout.world_size / 3600
    num_known = sum(len(seconds[shape]) for shape in found.to_render)
    return Remaining(
        wall_s=round(wall_s, 1),
        gpu_hours=round(gpu_hours, 4),
        cost=None if price_per_gpu_hour is None else round(gpu_hours * price_per_gpu_hour, 2),
        source=f"forecast from {num_known} clips of this folder",
    )


def by_plan(choice: Choice, price_per_gpu_hour: float | None = None) -> Remaining:
    """The forecast of a layout that the plan chose."""
    gpu_hours = choice.makespan_s * choice.layout.world_size / 3600
    return Remaining(
        wall_s=round(choice.makespan_s, 1),
        gpu_hours=round(gpu_hours, 4),
        cost=None if price_per_gpu_hour is None else round(gpu_hours * price_per_gpu_hour, 2),
        source=f"forecast by the plan for {choice.layout.text}; {'; '.join(choice.sources)}",
    )


def _seconds(out: Path, device: str, layout: Layout) -> dict[ClipShape, list[float]]:
    """Seconds of the folder's clips, by what they depend on; of those that were rendered in one go on such a layout."""
    found: dict[ClipShape, list[float]] = defaultdict(list)
    for path in sorted(out.glob("*.json"))[:MAX_SIDECARS]:
        try:
            record = read_record(path)
            timings, degrees = record["timings"], {**record["layout"], "gangs": 1}
            is_alike = record["device"] == device and Layout(**degrees) == layout and not record.get("resumed_at")
            shape = ClipShape(
                width=record["width"],
                height=record["height"],
                frames=record["frames"],
                steps=record["steps"],
                is_guided=record["guidance"] > 1,
                policy=record["cache"],
            )
        except (OSError, ValueError, KeyError, TypeError):
            continue  # run.json, or a clip that says nothing of its seconds
        if is_alike:
            found[shape].append(float(sum(timings.values())))
    return found
