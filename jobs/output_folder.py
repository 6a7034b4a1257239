"""What lies on disk, and when a clip counts as rendered.

A clip exists once its video stands under its final name. Videos are written under `.tmp/`, flushed, and then
linked to that name in one step, so a crash leaves either the whole video or none, and of several writers the first
one wins. Where the file system has no hard links (some mounts of object stores, SMB) the file is renamed instead: it
still appears whole, but of two writers at the same moment the last one wins; both have the same pixels.

The sidecar JSON and `events.jsonl` are derived: nothing is decided from them. `.state/` holds what an unfinished run
needs to go on: the lease, step states, encoded prompts, and the clips that had trouble.
"""

import errno
import json
import os
import re
import shutil
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from cineray.pipeline.request import ClipRequest, InputError

_NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
_STATE = ("steps", "prompts", "trouble")
_OF_CLIP = re.compile(r".+\.[0-9a-f]{12}\.(safetensors|json)")  # ID.FINGERPRINT
_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)


class OutputError(InputError):
    """The output folder cannot take what is to be written: not writable, or full. Ends the run."""


class OutputFolder:
    """One folder of finished clips.

    Args:
        path: made if it does not exist.

    Raises:
        OutputError: it cannot be made or written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._tmp = path / ".tmp"
        self.state = path / ".state"
        made = [p for p in (path, *path.parents) if not p.exists()]
        try:
            self._tmp.mkdir(parents=True, exist_ok=True)
            probe = self._tmp / f"probe.{uuid.uuid4().hex}"
            probe.write_bytes(b"x" * 4096)
            probe.unlink()
        except OSError as error:
            for folder in (self._tmp, *made):
                with suppress(OSError):
                    folder.rmdir()
            raise OutputError(
                f"output folder {path} cannot be written: {error.strerror}; give another --out, or change its rights"
            ) from None
        self._made = made

    @classmethod
    def existing(cls, path: Path) -> "OutputFolder":
        """A folder that another process has made.

        Raises:
            OutputError: it is there no more.
        """
        folder = cls.__new__(cls)
        folder.path, folder.state, folder._tmp, folder._made = path, path / ".state", path / ".tmp", []
        if not path.is_dir():
            raise folder.gone("a clip was rendered")
        with folder.explained("making .tmp"):
            folder._tmp.mkdir(exist_ok=True)
        return folder

    def video_path(self, request: ClipRequest, fingerprint: str) -> Path:
        return self.path / f"{request.id}.{fingerprint}.mp4"

    def close(self) -> None:
        """Removes the temporary folder; and the folder itself if it was made for nothing."""
        self.tidy()
        self.remove_if_empty()

    def tidy(self) -> None:
        """Removes folders of ours that are empty; for the holder of the lease, since others write there."""
        for folder in (self._tmp, *(self.state / name for name in _STATE)):
            with suppress(OSError):
                folder.rmdir()

    def remove_if_empty(self) -> None:
        for folder in (self.state, *self._made):
            with suppress(OSError):
                folder.rmdir()

    def sweep(self) -> None:
        """Removes what processes that were killed left behind; for the holder of the folder's lease."""
        for leftover in (*self._tmp.glob("*"), *self.state.glob("*/*.tmp"), *(self.state / "prompts").glob("*")):
            with suppress(OSError):
                leftover.unlink()

    def forget_clips(self) -> None:
        """Removes what is kept of unfinished clips; for a run that has rendered all that was asked for.

        Then those that are left are of clips that a changed manifest asks for no more.
        """
        for kind in ("steps", "trouble"):
            for path in (self.state / kind).glob("*"):
                if _OF_CLIP.fullmatch(path.name):
                    with suppress(OSError):
                        path.unlink()

    def step_path(self, clip_id: str, fingerprint: str) -> Path:
        """Where a clip that is being denoised keeps its latest step state."""
        return self._in_state("steps", f"{clip_id}.{fingerprint}.safetensors")

    def prompt_path(self, key: str) -> Path:
        return self._in_state("prompts", f"{key}.safetensors")

    def trouble_path(self, clip_id: str, fingerprint: str) -> Path:
        """Where the strikes of a clip are written down."""
        return self.state / "trouble" / f"{clip_id}.{fingerprint}.json"  # `write_json` makes the folder

    def _in_state(self, kind: str, name: str) -> Path:
        with self.explained(f"making {self.state / kind}"):
            self.state.mkdir(exist_ok=True)  # not its parents: a folder that has disappeared stays so
            (self.state / kind).mkdir(exist_ok=True)
        return self.state / kind / name

    @contextmanager
    def new_video(self, request: ClipRequest, final: Path) -> Iterator[Path]:
        """A path to write a video to; commits it to `final` unless the block raises.

        Raises:
            OutputError: the disk is full.
        """
        temporary = self._tmp / f"{request.id}.{uuid.uuid4().hex}.mp4"
        try:
            yield temporary
            with self.explained(f"writing clip {request.id}"):
                _flush(temporary)
                _link(temporary, final)
                _flush(self.path)
        finally:
            temporary.unlink(missing_ok=True)

    def write_json(self, name: str, content: Mapping[str, Any], indent: int | None = 2) -> None:
        """Writes a JSON file in one step.

        Raises:
            OutputError: the disk is full or not writable.
        """
        temporary = self._tmp / f"{Path(name).name}.{uuid.uuid4().hex}"
        try:
            with self.explained(f"writing {name}"):
                temporary.write_text(json.dumps(content, indent=indent, ensure_ascii=False) + "\n", encoding="utf-8")
                _flush(temporary)
                (self.path / name).parent.mkdir(parents=True, exist_ok=True)
                os.replace(temporary, self.path / name)
        finally:
            temporary.unlink(missing_ok=True)

    def log_event(self, event: str, **fields: Any) -> None:
        """Appends one line to `events.jsonl`."""
        line = json.dumps({"time": round(time.time(), 3), "event": event} | fields, ensure_ascii=False)
        with self.explained("writing events.jsonl"), (self.path / "events.jsonl").open("a", encoding="utf-8") as file:
            file.write(line + "\n")

    def is_full_for(self, num_bytes: int) -> bool:
        """Whether the file system has less room than that."""
        return shutil.disk_usage(self.path).free < num_bytes

    def full(self, doing: str) -> OutputError:
        """The error to raise when the disk is full."""
        free = shutil.disk_usage(self.path).free
        return OutputError(
            f"output folder {self.path}: the disk is full ({free} bytes free) while {doing}; finished clips are kept: "
            "make room and run the same command again"
        )

    def gone(self, doing: str) -> OutputError:
        """The error to raise when the folder has disappeared."""
        return OutputError(f"output folder {self.path} disappeared while {doing}; is the disk still mounted?")

    @contextmanager
    def explained(self, doing: str) -> Iterator[None]:
        """Turns what the file system says into an OutputError."""
        try:
            yield
        except OSError as error:
            if error.errno in _NO_SPACE:
                raise self.full(doing) from None
            if not self.path.is_dir():
                raise self.gone(doing) from None
            raise OutputError(f"output folder {self.path}: {error.strerror} while {doing}") from None


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _link(temporary: Path, final: Path) -> None:
    """Gives the file its final name; a clip that is there already stays."""
    try:
        os.link(temporary, final)
    except FileExistsError:
        pass
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        if not final.exists():
            os.replace(temporary, final)
