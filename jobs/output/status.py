"""What an output folder says about its batch: from the files alone, while a driver runs or after.

Whatever lies in the folder, it answers: a file that does not say what it should is counted as unreadable.
"""

import errno
import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from cineray.files import read_shaped
from cineray.jobs.output.failure_record import FailureRecord, read_failure_record
from cineray.jobs.output.folder import EARLIER_FAILURES, is_video
from cineray.jobs.output.lease import MIN_TTL_S, current_lease, is_stale
from cineray.pipeline.media.output import SUFFIXES
from cineray.pipeline.request import InputError

MAX_LISTED = 20  # failed clips that are shown to a person; --json has all
MAX_NAMED = 3  # unreadable files
_Count = Annotated[int, Field(ge=0, le=2**53)]
T = TypeVar("T")


class Running(BaseModel):
    """A clip in flight, and where."""

    model_config = ConfigDict(frozen=True, strict=True)

    id: str
    on: str
    step: _Count | None = None
    steps: _Count | None = None


class _RunningFile(BaseModel):
    """What `running.json` says."""

    running: list[Running]


class _Run(BaseModel):
    """What is read of `run.json`."""

    model_config = ConfigDict(strict=True)

    num_clips: _Count | None = None


_RUN, _RUNNING = TypeAdapter(_Run), TypeAdapter(_RunningFile)


@dataclass(frozen=True, kw_only=True, slots=True)
class FolderStatus:
    """`num_clips` of the manifest is None where no run has said it; `driver` who renders now, if anybody does.

    `unreadable` are files, by their paths within the folder.
    """

    num_clips: int | None
    num_done: int
    driver: str | None
    running: list[Running]
    kept: int  # step states on disk: clips that can be resumed
    failures: list[FailureRecord]
    unreadable: list[str]

    def to_dict(self) -> dict[str, Any]:
        """What `status --json` prints."""
        by_status = Counter(failure.status for failure in self.failures)
        return {
            "clips": self.num_clips,
            "done": self.num_done,
            "running": [clip.model_dump() for clip in self.running],
            "failed": by_status["failed"],
            "quarantined": by_status["quarantined"],
            "retrying": by_status["retrying"],
            "step_states": self.kept,
            "driver": self.driver,
            "troubles": [failure.model_dump(include={"id", "status", "reasons"}) for failure in self.failures],
            "unreadable": len(self.unreadable),
        }


def read_status(folder: Path) -> FolderStatus:
    """Reads a folder; writes nothing, and disturbs no driver.

    Raises:
        InputError: it is not an output folder of cineray's, or cannot be read.
    """
    unreadable: list[str] = []

    def read(path: Path, how: Callable[[], T]) -> T | None:
        """What a file says; None where it is not there, or says nothing that can be understood."""
        try:
            return how()
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ENOTDIR):
                return None  # another process has just removed it, or it never was
        except (ValueError, TypeError, OverflowError, RecursionError):
            pass
        unreadable.append(str(path.relative_to(folder)))
        return None

    def names(place: Path, ending: str) -> list[str]:
        found = read(place, lambda: os.listdir(place))
        return sorted(name for name in found or () if name.endswith(ending))

    state = folder / ".state"
    try:
        videos = {
            name.rsplit(".", 1)[0] for name in os.listdir(folder) if name.endswith(SUFFIXES) and is_video(folder / name)
        }
    except OSError as error:
        raise InputError(f"{folder} cannot be read: {error.strerror}; give a render's --out") from None
    run = read(folder / "run.json", lambda: read_shaped(folder / "run.json", _RUN, follow_links=False))
    if run is None and not videos and not os.path.isdir(state):
        raise InputError(f"{folder} is not an output folder: it has no run.json and no videos; give a render's --out")
    driver = read(state, lambda: _driver(state))
    running = None
    if driver:
        path = state / "running.json"
        running = read(path, lambda: read_shaped(path, _RUNNING, follow_links=False))
    failures = []
    for kept_in in (state / "failures", state / EARLIER_FAILURES):
        for name in names(kept_in, ".json"):
            if name.rsplit(".", 1)[0] not in videos:
                path = kept_in / name
                failures.append(read(path, lambda path=path: read_failure_record(path)))
    kept = [name for name in names(state / "steps", ".safetensors") if name.rsplit(".", 1)[0] not in videos]
    return FolderStatus(
        num_clips=None if run is None else run.num_clips,
        num_done=len(videos),
        driver=driver,
        running=running.running if running else [],
        kept=len(kept),
        failures=[failure for failure in failures if failure is not None],
        unreadable=unreadable,
    )


def lines(status: FolderStatus) -> list[str]:
    """The same for a person."""
    content = status.to_dict()
    of = "" if status.num_clips is None else f" of {status.num_clips}"
    counts = [f"{content[name]} {name}" for name in ("failed", "quarantined", "retrying") if content[name]]
    said = [", ".join([f"{status.num_done}{of} done", f"{len(status.running)} running", *counts])]
    said.append(f"driver: {status.driver or 'none'}")
    for clip in status.running:
        said.append(f"  {clip.id} on {clip.on}" + ("" if clip.step is None else f", step {clip.step} of {clip.steps}"))
    if status.kept and not status.driver:
        clips = "1 clip" if status.kept == 1 else f"{status.kept} clips"
        said.append(f"{clips} can be resumed from a checkpoint; run the same `cineray render` again")
    for failure in status.failures[:MAX_LISTED]:
        said.append(f"  {failure.id} {failure.status}: {failure.reasons[-1] if failure.reasons else ''}")
    if len(status.failures) > MAX_LISTED:
        said.append(f"  and {len(status.failures) - MAX_LISTED} more; --json lists all")
    if status.unreadable:
        more = ", ..." if len(status.unreadable) > MAX_NAMED else ""
        named = ", ".join(status.unreadable[:MAX_NAMED])
        said.append(f"{len(status.unreadable)} unreadable files, left out here: {named}{more}")
    return said


def _driver(state: Path) -> str | None:
    """Who holds the lease; a few heartbeats are waited for, so that a dead driver is not shown as alive."""
    number, holder = current_lease(state)
    if holder is None or is_stale(state / f"lease.{number}.json", holder, ttl_s=MIN_TTL_S):
        return None
    return holder.text
