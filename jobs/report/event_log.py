"""Reads `events.jsonl`: a log of many runs, whose last line may be half a line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from cineray.files import open_regular

MAX_LINE_BYTES = 2**16  # the longest line has an error of 300 characters and the process ids of one gang
LATEST_S = 253402300799.0  # the end of the year 9999: later times have no date


class Event(BaseModel):
    """One line; what an event does not have is None. Lines of other versions may say more, which is not read."""

    model_config = ConfigDict(frozen=True, strict=True)

    time: float = Field(ge=0, le=LATEST_S, allow_inf_nan=False)
    event: str
    id: str | None = None
    fingerprint: str | None = None
    gang: str | None = None
    actor: str | None = None
    wall_s: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    error: str | None = None
    reason: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class EventLog:
    """What a log says; `num_unreadable` lines are left out, `is_missing` where there is no log that can be read."""

    events: tuple[Event, ...] = ()
    num_unreadable: int = 0
    is_missing: bool = False


def read_events(path: Path) -> EventLog:
    """Reads a whole log; raises nothing: a page is worth having without it."""
    events, num_unreadable = [], 0
    try:
        with open_regular(path, follow_links=False) as file:
            for line in _lines(file):
                event = _event(line)
                if event is None:
                    num_unreadable += 1
                else:
                    events.append(event)
    except OSError:
        return EventLog(events=tuple(events), num_unreadable=num_unreadable, is_missing=not events)
    return EventLog(events=tuple(events), num_unreadable=num_unreadable)


def _lines(file: BinaryIO) -> Iterator[bytes]:
    """Lines that are not blank; of one that is too long the first part, which is no JSON, and not the rest."""
    is_rest = False
    while line := file.readline(MAX_LINE_BYTES):
        if not is_rest and line.strip():
            yield line
        is_rest = not line.endswith(b"\n")


def _event(line: bytes) -> Event | None:
    try:
        return _EVENT.validate_python(json.loads(line))
    except (ValueError, ValidationError, RecursionError):
        return None


_EVENT = TypeAdapter(Event)
