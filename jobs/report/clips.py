"""What an output folder says of each clip: its sidecar, its trace, what went wrong; without reading a video."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from cineray.caching.observation import BRANCH_ORDER
from cineray.caching.trace import TraceEntry, load_trace
from cineray.jobs.output.folder import is_video
from cineray.jobs.output.record import read_record
from cineray.jobs.output.status import FolderStatus
from cineray.jobs.report.event_log import Event
from cineray.jobs.report.page import ProgressBar
from cineray.text import printable

MAX_CLIPS = 20_000  # on one page: 500 bytes each, which a phone still opens
MAX_WITH_GAMMAS = 1_000  # clips whose every gamma is on the page: 8 bytes for each skipped step
LOST_RECORD = "its sidecar is gone or cannot be read: the next run writes it again"
CHANGED_VIDEO = "the video has another size than when it was written: the next run renders it again"


class _Trace(BaseModel):
    model_config = ConfigDict(strict=True)

    policy: str
    steps: int
    computed_steps: int
    skipped_steps: int
    cost: float


class _Timings(BaseModel):
    model_config = ConfigDict(strict=True)

    encode_s: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    denoise_s: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    decode_s: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    write_s: float = Field(default=0.0, ge=0, allow_inf_nan=False)


class _Video(BaseModel):
    model_config = ConfigDict(strict=True)

    bytes: int


class _Record(BaseModel):
    """What a page shows of a sidecar."""

    model_config = ConfigDict(strict=True)

    prompt: str = ""
    negative_prompt: str | None = None
    seed: int | None = None
    width: int | None = None
    height: int | None = None
    frames: int | None = None
    fps: int | None = None
    seconds: float | None = None
    guidance: float | None = None
    image: str | None = None
    trace: _Trace
    timings: _Timings = _Timings()
    resumed_at: list[int] = []
    warnings: list[str] = []
    warning: str = ""
    video: _Video | None = None
    model: dict[str, Any] = {}
    layout: dict[str, Any] = {}
    options: dict[str, Any] = {}
    device: str | None = None
    versions: dict[str, Any] = {}


@dataclass(frozen=True, kw_only=True, slots=True)
class ClipRow:
    """One clip on the page.

    Args:
        status: "done", "running", "failed", "quarantined" or "retrying".
        video: its file's name; None where there is none.
        decisions: per branch, a character per step: C computed, s skipped, . not told.
        gammas: (step, gamma) of skipped steps, of the first branch that has any.
        provenance: what it was rendered with, as (name, value) pairs.
        reasons: why it failed, the latest last.
        remarks: warnings of the render, and what this reading found.
    """

    id: str
    fingerprint: str
    status: str
    video: str | None = None
    prompt: str = ""
    negative_prompt: str | None = None
    seed: int | None = None
    width: int | None = None
    height: int | None = None
    frames: int | None = None
    fps: int | None = None
    seconds: float | None = None
    guidance: float | None = None
    image: str | None = None
    policy: str | None = None
    computed_steps: int | None = None
    skipped_steps: int | None = None
    cost: float | None = None
    encode_s: float | None = None
    denoise_s: float | None = None
    decode_s: float | None = None
    write_s: float | None = None
    resumed_at: tuple[int, ...] = ()
    decisions: tuple[tuple[str, str], ...] = ()
    gammas: tuple[tuple[int, float], ...] = ()
    provenance: tuple[tuple[str, str], ...] = ()
    reasons: tuple[str, ...] = ()
    remarks: tuple[str, ...] = field(default=())


def read_clips(
    folder: Path, status: FolderStatus, events: Sequence[Event], progress_bar: ProgressBar
) -> tuple[list[ClipRow], int]:
    """(clips in the order of their ids, number of videos that are left out because there are too many).

    Args:
        events: of the folder's log: clips that failed in a run without gangs stand there alone.
    """
    names = sorted((name for name in os.listdir(folder) if is_video(folder / name)), key=natural)
    unfinished = _unfinished(status, events, {_stem(name) for name in names})[:MAX_CLIPS]
    shown = names[: MAX_CLIPS - len(unfinished)]
    done = []
    with progress_bar("clips", len(shown)) as on_clip:
        for number, name in enumerate(shown, 1):
            done.append(_done(folder, name, with_gammas=number <= MAX_WITH_GAMMAS))
            on_clip(number)
    return sorted([*done, *unfinished], key=lambda clip: natural(clip.id)), len(names) - len(shown)


def natural(text: str) -> tuple[tuple[int, str], ...]:
    """A sorting key by which clip-9 comes before clip-10."""
    parts = re.split("([0-9]+)", text)  # every second one is a number
    numbers = (part.lstrip("0") for part in parts[1::2])
    pairs = zip(parts[::2], [*((len(number), number) for number in numbers), (0, "")], strict=True)
    return tuple(pair for name, number in pairs for pair in ((0, name), number))


def decisions_of(entries: Iterable[TraceEntry]) -> tuple[tuple[str, str], ...]:
    """Per branch, a character per step; a step that any sample skipped is skipped."""
    rows: dict[str, dict[int, bool]] = {}
    for entry in entries:
        row = rows.setdefault(entry.branch, {})
        row[entry.step] = row.get(entry.step, True) and entry.compute
    told = {True: "C", False: "s", None: "."}
    return tuple(
        (branch, "".join(told[rows[branch].get(step)] for step in range(max(rows[branch]) + 1)))
        for branch in BRANCH_ORDER
        if branch in rows and max(rows[branch]) < MAX_STEPS
    )


MAX_STEPS = 10_000  # ten times as many as a clip may have


def _stem(name: str) -> str:
    return name.rpartition(".")[0]


def _done(folder: Path, name: str, with_gammas: bool) -> ClipRow:
    stem = _stem(name)
    clip_id, fingerprint = stem.rsplit(".", 1)
    row = ClipRow(id=clip_id, fingerprint=fingerprint, status="done", video=name)
    try:
        record = _RECORD.validate_python(read_record(folder / f"{stem}.json"))
        num_bytes = os.lstat(folder / name).st_size
    except (OSError, ValueError, ValidationError, RecursionError):
        return replace(row, remarks=(LOST_RECORD,))
    remarks = [*record.warnings, *filter(None, [record.warning])]
    if record.video is not None and record.video.bytes != num_bytes:
        remarks.append(CHANGED_VIDEO)
    entries = [] if record.trace.policy == "none" else _entries(folder / f"{stem}.trace.json")
    return replace(
        row,
        prompt=record.prompt,
        negative_prompt=record.negative_prompt,
        seed=record.seed,
        width=record.width,
        height=record.height,
        frames=record.frames,
        fps=record.fps,
        seconds=record.seconds,
        guidance=record.guidance,
        image=record.image,
        policy=record.trace.policy,
        computed_steps=record.trace.computed_steps,
        skipped_steps=record.trace.skipped_steps,
        cost=record.trace.cost,
        encode_s=record.timings.encode_s,
        denoise_s=record.timings.denoise_s,
        decode_s=record.timings.decode_s,
        write_s=record.timings.write_s,
        resumed_at=tuple(record.resumed_at),
        decisions=decisions_of(entries),
        gammas=_gammas(entries) if with_gammas else (),
        provenance=_provenance(record),
        remarks=tuple(remarks),
    )


def _entries(path: Path) -> list[TraceEntry]:
    try:
        return load_trace(path).entries
    except ValueError:
        return []  # the summary in the sidecar says how many steps were skipped


def _gammas(entries: Iterable[TraceEntry]) -> tuple[tuple[int, float], ...]:
    found: dict[int, float] = {}
    for entry in entries:
        if entry.gamma is not None:
            found.setdefault(entry.step, round(entry.gamma, 3))
    return tuple(sorted(found.items()))


def _provenance(record: _Record) -> tuple[tuple[str, str], ...]:
    """In the order in which a page shows it; one line each."""
    pairs = [(f"model {name}", record.model.get(name)) for name in ("name", "pipeline", "digest", "revision")]
    pairs += [("cache", record.trace.policy), ("device", record.device)]
    pairs += [("layout", ", ".join(f"{name} {value}" for name, value in record.layout.items()))]
    pairs += list(record.options.items())
    pairs += [(f"version of {name}", value) for name, value in record.versions.items()]
    return tuple((printable(name), printable(value)) for name, value in pairs if value not in (None, ""))


def _unfinished(status: FolderStatus, events: Sequence[Event], done: set[str]) -> list[ClipRow]:
    """Clips without a video: those that run, and those that did not get through."""
    rows: dict[str, ClipRow] = {}
    last = {event.id: event for event in events if event.id is not None and event.event in _ENDS}
    for event in last.values():
        if event.event == "failed" and f"{event.id}.{event.fingerprint}" not in done:
            reasons = () if event.error is None else (event.error,)
            rows[str(event.id)] = ClipRow(
                id=str(event.id), fingerprint=event.fingerprint or "", status="failed", reasons=reasons
            )
    for failure in status.failures:
        rows[failure.id] = ClipRow(
            id=failure.id, fingerprint=failure.fingerprint, status=failure.status, reasons=tuple(failure.reasons)
        )
    for clip in status.running:
        step = None if clip.step is None else f"step {clip.step} of {clip.steps} on {clip.on}"
        known = rows.get(clip.id, ClipRow(id=clip.id, fingerprint="", status="running"))
        rows[clip.id] = replace(known, status="running", remarks=(step or f"on {clip.on}",))
    ids_done = {name.rsplit(".", 1)[0] for name in done}
    # on gangs the line of a failure has no fingerprint; a clip of that id whose video stands is not counted twice
    return [row for row in rows.values() if row.fingerprint or row.status == "running" or row.id not in ids_done]


_ENDS = ("done", "existing", "failed", "quarantined")
_RECORD = TypeAdapter(_Record)
