"""The page of a batch's output folder."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from cineray.files import read_shaped
from cineray.jobs.output.status import FolderStatus, read_status
from cineray.jobs.report.clips import ClipRow, read_clips
from cineray.jobs.report.event_log import EventLog, read_events
from cineray.jobs.report.page import Page, ProgressBar, fill_page, link_to
from cineray.jobs.report.posters import posters_of
from cineray.jobs.report.timeline import Bar, Session, sessions_of
from cineray.text import printable

MAX_PROMPT_CHARS = 2_000  # of a prompt, on the page; the sidecar has all
MAX_LISTED = 500  # failures, runs and sorts of clips in tables; the gallery has every clip
STATUSES = ("done", "running", "failed", "quarantined", "retrying")
KINDS = ("rendered", "running", "preempted", "failed", "lost", "down")


_Score = Annotated[float, Field(allow_inf_nan=False)]


class _Setting(BaseModel):
    """From which clip on clips were rendered at which speed-up."""

    begin: int = Field(ge=0, le=2**53, alias="from")
    cache: str
    speedup: _Score


class _Audit(BaseModel):
    """What a page shows of the clips that `render --audit` has rendered again; earlier versions knew no VMAF."""

    num_clips: int = Field(ge=0)
    psnr_mean: _Score | None
    psnr_worst: _Score | None
    vmaf_mean: _Score | None = None
    vmaf_worst: _Score | None = None
    with_floors: int | None = None
    below_floors: list[str] = []
    settings: list[_Setting] = []


class _Run(BaseModel):
    """What a page shows of `run.json`."""

    model_config = ConfigDict(strict=True)

    model: str | None = None
    num_clips: int | None = None
    gangs: int | None = None
    layout: dict[str, int] = {}
    lossless: bool = False
    wall_s: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    clips_per_hour: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    gangs_busy: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    counts: dict[str, int] = {}
    options: dict[str, Any] = {}
    defaults: dict[str, Any] = {}
    audit: _Audit | None = None


def batch_page(folder: Path, out: Path, progress_bar: ProgressBar) -> Page:
    """Reads all that the folder says, and fills the page.

    Raises:
        InputError: it is not an output folder, or cannot be read.
    """
    status = read_status(folder)
    remarks = [f"{name} cannot be read and is left out" for name in status.unreadable]
    try:
        run = read_shaped(folder / "run.json", _RUN, follow_links=False)
    except (OSError, ValueError):
        run = _Run()
        remarks.append("run.json is missing or cannot be read: nothing is known of the last run's options and speed")
    log = read_events(folder / "events.jsonl")
    remarks += _log_remarks(log)
    clips, num_left_out = read_clips(folder, status, log.events, progress_bar)
    if num_left_out:
        videos = "1 video is" if num_left_out == 1 else f"{num_left_out} videos are"
        remarks.append(f"{videos} not on this page: it shows {len(clips)} clips, in the order of their ids")
    posters = posters_of(folder, clips, progress_bar)
    denoise_s = {(clip.id, clip.fingerprint): clip.denoise_s for clip in clips if clip.denoise_s is not None}
    sessions = sessions_of(log.events, denoise_s, time.time() if status.driver else None)
    counts = {name: sum(clip.status == name for clip in clips) for name in STATUSES}
    counts["done"] = status.num_done
    values = _values(folder, run, status, clips, sessions, counts) | {"remarks": remarks}
    data = _data(folder, out, clips, posters, sessions)
    html = fill_page("batch.html", "batch.js", values, data)
    return Page(html=html, facts={"clips": len(clips), "counts": counts}, remarks=tuple(remarks))


def _log_remarks(log: EventLog) -> list[str]:
    if log.is_missing:
        return ["events.jsonl is missing or cannot be read: nothing is known of what ran when"]
    if log.num_unreadable:
        lines = "1 line is" if log.num_unreadable == 1 else f"{log.num_unreadable} lines are"
        return [f"events.jsonl: {lines} no event and left out"]
    return []


def _values(
    folder: Path,
    run: _Run,
    status: FolderStatus,
    clips: Sequence[ClipRow],
    sessions: Sequence[Session],
    counts: dict[str, int],
) -> dict[str, Any]:
    """What the template says; it escapes all of it."""
    name = printable(folder.resolve().name or str(folder.resolve()))
    unfinished = [clip for clip in clips if clip.reasons]
    sorts = Counter(clip.provenance for clip in clips if clip.provenance)
    return {
        "title": f"{name}: cineray batch",
        "name": name,
        "summary": _summary(run, sessions, status),
        "tiles": _tiles(run, status, clips, counts),
        "failures": [
            {"id": printable(c.id), "status": c.status, "reasons": [printable(reason) for reason in c.reasons]}
            for c in unfinished[:MAX_LISTED]
        ],
        "num_failures": len(unfinished),
        "runs": [_run_row(number, session) for number, session in enumerate(sessions, 1)][-MAX_LISTED:],
        "lanes": [_lane_rows(session) for session in sessions[-1:]],
        "sorts": [{"num_clips": number, "facts": facts} for facts, number in sorts.most_common(MAX_LISTED)],
        "seeds": _seeds(clips),
        "run_facts": [
            *_settings(run.audit),
            *_flat({"options": run.options, "layout": run.layout, "defaults": run.defaults}),
        ],
        "is_lossless": run.lossless,
        "num_clips": len(clips),
        "statuses": [s for s in STATUSES if any(clip.status == s for clip in clips)],
    }


def _summary(run: _Run, sessions: Sequence[Session], status: FolderStatus) -> list[str]:
    """The line below the heading."""
    said = [] if run.model is None else [printable(run.model)]
    if run.gangs is not None:
        num_ranks = math.prod(run.layout.get(axis, 1) for axis in ("cfg", "ring", "ulysses"))
        gangs = "1 gang" if run.gangs == 1 else f"{run.gangs} gangs"
        said.append(f"{gangs} of {num_ranks} rank{'' if num_ranks == 1 else 's'}")
    if sessions:
        said.append(f"{date_text(sessions[0].begin_s)} to {date_text(sessions[-1].end_s)}")
    if len(sessions) > 1:
        said.append(f"{len(sessions)} runs")
    if status.driver:
        said.append("a driver is at work: the page shows what was there when it was made")
    return said


def _tiles(run: _Run, status: FolderStatus, clips: Sequence[ClipRow], counts: dict[str, int]) -> list[tuple[str, str]]:
    """(what, how much), as the page shows them large."""
    of = "" if status.num_clips is None or counts["done"] > status.num_clips else f" of {status.num_clips}"
    tiles = [("done", f"{counts['done']}{of}")]
    tiles += [(name, str(counts[name])) for name in STATUSES[1:] if counts[name]]
    waiting = (status.num_clips or 0) - sum(counts.values())
    if waiting > 0:
        tiles.append(("not begun", str(waiting)))
    if run.wall_s is not None:
        tiles.append(("last run", duration_text(run.wall_s)))
    if run.clips_per_hour is not None:
        tiles.append(("clips per hour, last run", f"{run.clips_per_hour:,.0f}"))
    if run.gangs_busy is not None:
        tiles.append(("gangs busy, last run", f"{run.gangs_busy:.0%}"))
    costs = [clip.cost for clip in clips if clip.cost is not None]
    if costs:
        tiles.append(("block evaluations that ran", f"{math.fsum(costs) / len(costs):.0%}"))
    tiles += [] if run.audit is None else _audit_tiles(run.audit)
    if run.counts:
        last = ", ".join(f"{number} {name}" for name, number in sorted(run.counts.items()))
        tiles.append(("became of the last run's clips", printable(last)))
    return tiles


def _audit_tiles(audit: _Audit) -> list[tuple[str, str]]:
    tiles, clips = [], f"{audit.num_clips} audited clips"
    if audit.psnr_mean is not None and audit.psnr_worst is not None:
        tiles.append((f"PSNR of {clips}", f"{audit.psnr_mean:.1f} dB, worst {audit.psnr_worst:.1f} dB"))
        known = audit.vmaf_mean is not None and audit.vmaf_worst is not None
        text = f"{audit.vmaf_mean:.1f}, worst {audit.vmaf_worst:.1f}" if known else "not measured"
        tiles.append((f"VMAF of {clips}", text))
    if audit.with_floors is not None:
        num_kept = audit.with_floors - len(audit.below_floors)
        tiles.append(("audited clips that keep their floor", f"{num_kept} of {audit.with_floors}"))
    return tiles


def _settings(audit: _Audit | None) -> list[tuple[str, str]]:
    """(cache as it was asked for, the speeds that it was given); clips are counted from 1."""
    said: dict[str, list[str]] = {}
    for setting in audit.settings if audit is not None else ():
        speed = "uncached" if setting.speedup == 1 else f"{setting.speedup:g}x"
        said.setdefault(setting.cache, []).append(f"{speed} from clip {setting.begin + 1} on")
    return [(f"audit: {printable(cache)}", ", ".join(speeds[-MAX_LISTED:])) for cache, speeds in said.items()]


def _run_row(number: int, session: Session) -> dict[str, Any]:
    speed = session.clips_per_hour
    return {
        "number": number,
        "begin": date_text(session.begin_s),
        "lasted": duration_text(session.span_s),
        "num_done": len(session.done),
        "speed": "" if speed is None else f"{speed:,.0f}",
        "num_failed": session.num_failed,
        "num_retries": session.num_retries,
        "num_lost": sum(lane.num_lost for lane in session.lanes),
    }


def _lane_rows(session: Session) -> list[dict[str, Any]]:
    rows = []
    for lane in session.lanes:
        idle_s = max(0.0, session.span_s - lane.busy_s - lane.down_s)
        shares = (
            f"{part_s / session.span_s:.0%}" if session.span_s else "" for part_s in (lane.busy_s, idle_s, lane.down_s)
        )
        rows.append(
            {"name": printable(lane.name), "num_clips": lane.num_clips, "num_lost": lane.num_lost}
            | dict(zip(("busy", "idle", "down"), shares, strict=True))
        )
    return rows


def _seeds(clips: Sequence[ClipRow]) -> str:
    seeds = sorted({clip.seed for clip in clips if clip.seed is not None})
    if not seeds:
        return ""
    return str(seeds[0]) if len(seeds) == 1 else f"{len(seeds)} seeds from {seeds[0]} to {seeds[-1]}"


def _flat(values: dict[str, dict[str, Any]]) -> list[tuple[str, str]]:
    """(name, value) of all that was said; each on its line."""
    pairs = [(f"{group}: {name}", value) for group, inner in values.items() for name, value in inner.items()]
    return [(printable(name), printable(value)) for name, value in pairs if value not in (None, "")]


def _data(
    folder: Path, out: Path, clips: Sequence[ClipRow], posters: dict[str, str], sessions: Sequence[Session]
) -> dict[str, Any]:
    """What the script draws: clips by columns, since ten thousand of them repeat no name then."""
    policies, decisions, sorts = _Numbered(), _Numbered(), _Numbered()
    columns: dict[str, list[Any]] = {}
    for clip in clips:
        row = asdict(clip)
        row |= {
            "prompt": _cut(clip.prompt),
            "negative_prompt": None if clip.negative_prompt is None else _cut(clip.negative_prompt),
            "policy": policies.of(clip.policy),
            "decisions": decisions.of(clip.decisions),
            "provenance": sorts.of(clip.provenance),
            "poster": posters.get(str(clip.video)),
        }
        for name, value in row.items():
            columns.setdefault(name, []).append(value)
    places = {clip.id: place for place, clip in reversed(list(enumerate(clips)))}
    return {
        "base": link_to(folder.resolve() / "x", out.parent.resolve() / out.name).removesuffix("x"),
        "num_clips": len(clips),
        "clips": columns,
        "policies": policies.values,
        "decisions": decisions.values,
        "provenance": sorts.values,
        "kinds": KINDS,
        "sessions": [
            {
                "begin_s": round(session.begin_s, 3),
                "span_s": round(session.span_s, 3),
                "bins": session.bins,
                "lanes": [
                    {"name": printable(lane.name), "bars": [_bar(bar, session.begin_s, places) for bar in lane.bars]}
                    for lane in session.lanes
                ],
            }
            for session in sessions
        ],
    }


def _bar(bar: Bar, begin_s: float, places: dict[str, int]) -> list[Any]:
    """[kind, begin, end, clip]: the clip by its number, by its id where it is not on the page."""
    clip = None if bar.clip is None else places.get(bar.clip, printable(bar.clip))
    return [KINDS.index(bar.kind), round(bar.begin_s - begin_s, 2), round(bar.end_s - begin_s, 2), clip]


def _cut(text: str) -> str:
    rest = len(text) - MAX_PROMPT_CHARS
    return text if rest <= 0 else f"{text[:MAX_PROMPT_CHARS]}... ({rest} more characters)"


class _Numbered:
    """Values that many clips share, each once."""

    def __init__(self) -> None:
        self.values: list[Any] = []
        self._places: dict[Any, int] = {}

    def of(self, value: Any) -> int:
        if value not in self._places:
            self._places[value] = len(self.values)
            self.values.append(value)
        return self._places[value]


def date_text(time_s: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(time_s))


def duration_text(seconds: float) -> str:
    """As 42.1 s, 3 min 2 s, 5 h 12 min."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest_s = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest_s} s"
    return f"{minutes // 60} h {minutes % 60} min"


_RUN = TypeAdapter(_Run)
