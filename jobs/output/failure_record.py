"""The failure record of a clip that lost an attempt or failed: read back by the next run and by `status`."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from cineray.files import read_shaped

MAX_BYTES = 2**20
MAX_REASONS = 20  # attempts that are written down: several times as many as a clip may lose
MAX_REASON_CHARS = 2000  # a reason has 300 and a few names


class FailureRecord(BaseModel):
    """What is recorded of one clip; files of earlier versions have no `version`."""

    model_config = ConfigDict(frozen=True, strict=True)

    version: Literal[1] = 1
    id: str
    fingerprint: str
    status: Literal["failed", "quarantined", "retrying"]
    reasons: Annotated[list[Annotated[str, Field(max_length=MAX_REASON_CHARS)]], Field(max_length=MAX_REASONS)]


def read_failure_record(path: Path) -> FailureRecord:
    """Reads a failure record.

    Raises:
        OSError: it is not there, no regular file, a link, too long, or cannot be read.
        ValueError: it holds something else; or is of another clip than its name says.
    """
    record = read_shaped(path, _RECORD, MAX_BYTES, follow_links=False)
    if path.name != f"{record.id}.{record.fingerprint}.json":
        raise ValueError("it is of another clip")
    return record


_RECORD = TypeAdapter(FailureRecord)
