"""What an output folder says about its batch: from the files alone, while a driver runs or after."""

import json
import os
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cineray.jobs.lease import MIN_TTL_S, current_lease, is_stale
from cineray.jobs.output_folder import is_video
from cineray.pipeline.request import InputError

MAX_LISTED = 20  # clips with trouble that are shown to a person; --json has all


@dataclass(frozen=True, kw_only=True, slots=True)
class Running:
    """A clip in the works, and where."""

    id: str
    on: str
    step: int | None = None
    steps: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Trouble:
    """A clip that failed, was quarantined, or was tried again."""

    id: str
    status: str
    reasons: list[str]


@dataclass(frozen=True, kw_only=True, slots=True)
class FolderStatus:
    """`num_clips` of the manifest is None where no run has said it; `driver` who renders now, if anybody does."""

    num_clips: int | None
    num_done: int
    driver: str | None
    running: list[Running]
    kept: int  # step states on disk: clips that go on in their middle
    troubles: list[Trouble]

    def content(self) -> dict[str, Any]:
        """As `status --json` prints it."""
        by_status = Counter(trouble.status for trouble in self.troubles)
        return {
            "clips": self.num_clips,
            "done": self.num_done,
            "running": [asdict(clip) for clip in self.running],
            "failed": by_status["failed"],
            "quarantined": by_status["quarantined"],
            "retrying": by_status["retrying"],
            "step_states": self.kept,
            "driver": self.driver,
            "troubles": [asdict(trouble) for trouble in self.troubles],
        }


def read_status(folder: Path) -> FolderStatus:
    """Reads a folder; writes nothing, and disturbs no driver.

    Raises:
        InputError: it is not an output folder of cineray's.
    """
    try:
        with os.scandir(folder):
            pass
    except PermissionError as error:
        raise InputError(f"{folder} cannot be read: {error.strerror}; change its rights") from None
    except OSError:
        pass  # no folder: told below
    run = _read(folder / "run.json")
    state = folder / ".state"
    videos = {path.name.rsplit(".", 1)[0] for path in folder.glob("*.mp4") if is_video(path)}
    if not isinstance(run, dict) and not videos and not os.path.isdir(state):
        raise InputError(f"{folder} is not an output folder: it has no run.json and no videos; give a render's --out")
    driver = _driver(state)
    running = _read(state / "running.json") if driver else None
    marks = [(path, path.name.rsplit(".", 1)[0]) for path in sorted((state / "trouble").glob("*.json"))]
    troubles = [_read(path) for path, mark in marks if mark not in videos]
    return FolderStatus(
        num_clips=run.get("num_clips") if isinstance(run, dict) else None,
        num_done=len(videos),
        driver=driver,
        running=[Running(**clip) for clip in (running or {}).get("running", [])],
        kept=sum(path.name.rsplit(".", 1)[0] not in videos for path in (state / "steps").glob("*.safetensors")),
        troubles=[
            Trouble(id=trouble["id"], status=trouble["status"], reasons=trouble["reasons"])
            for trouble in troubles
            if trouble
        ],
    )


def lines(status: FolderStatus) -> list[str]:
    """The same for a person."""
    content = status.content()
    of = "" if status.num_clips is None else f" of {status.num_clips}"
    counts = [f"{content[name]} {name}" for name in ("failed", "quarantined", "retrying") if content[name]]
    said = [", ".join([f"{status.num_done}{of} done", f"{len(status.running)} running", *counts])]
    said.append(f"driver: {status.driver or 'none'}")
    for clip in status.running:
        said.append(f"  {clip.id} on {clip.on}" + ("" if clip.step is None else f", step {clip.step} of {clip.steps}"))
    if status.kept and not status.driver:
        said.append(f"{status.kept} clips would go on in their middle; run the same `cineray render` again")
    for trouble in status.troubles[:MAX_LISTED]:
        said.append(f"  {trouble.id} {trouble.status}: {trouble.reasons[-1] if trouble.reasons else ''}")
    if len(status.troubles) > MAX_LISTED:
        said.append(f"  and {len(status.troubles) - MAX_LISTED} more; --json lists all")
    return said


def _driver(state: Path) -> str | None:
    """Who holds the lease; a few beats are waited for, so that a dead driver is not shown as alive."""
    number, holder = current_lease(state)
    if holder is None or is_stale(state / f"lease.{number}.json", holder, ttl_s=MIN_TTL_S):
        return None
    return holder.text


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
