"""Layout of the output folder, and the commit protocol that says when a clip counts as rendered.

A clip exists once its video stands under its final name. Videos are written under `.tmp/`, flushed, and then
linked to that name in one step, so a crash leaves either the whole video or none, and of several writers the first
one wins. Where the file system has no hard links (some mounts of object stores, SMB) the file is renamed instead: it
still appears whole, but of two writers at the same moment the last one wins; both have the same pixels.

The sidecar JSON and `events.jsonl` are derived: nothing is decided from them but whether a video is still the one that
was written. `.state/` holds what an unfinished run needs to resume: the lease, step states, decoded frames, encoded
prompts, and the failure records of clips.

Others may write there too. What cineray makes is opened by descriptor and without following links (only `--out` itself
may be one), what is not of its kind is refused, and it removes nothing but regular files with names of its own making.
"""

import errno
import json
import os
import re
import shutil
import stat
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from cineray.jobs.output.own_files import (
    NotOursError,
    kind_of,
    new_file,
    open_file,
    opened_folder,
    replace_file,
    require,
    write_all,
)
from cineray.pipeline.media.output import SUFFIXES, VIDEO, Output
from cineray.pipeline.request import CLIP_ID, ClipRequest, InputError
from cineray.text import shorten

_NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
_GONE = (errno.ENOENT, errno.ENOTDIR, errno.ESTALE)
_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)
_STATE = ("steps", "frames", "prompts", "failures")
EARLIER_FAILURES = "trouble"  # what earlier versions called them
_FOLDERS = (".tmp", ".state", *(f".state/{name}" for name in _STATE))
_EVENTS = "events.jsonl"
_PROBE_BYTES = 4096  # a block: a full disk has none

# the names that are made below and in `tensor_file`; `unique` ends or precedes the ending of every temporary one
_UNIQUE = "[0-9a-f]{32}"
_CLIP = r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}\.[0-9a-f]{12}"  # ID.FINGERPRINT
_ENDING = "(?:" + "|".join(map(re.escape, SUFFIXES)) + ")"
_FINISHED = re.compile(_CLIP + _ENDING)
_KEPT_OF_CLIP = re.compile(rf"{_CLIP}\.(safetensors|json)")
_LEFTOVERS = {
    ".tmp": re.compile(rf"(probe|events\.jsonl|.+\.json)\.{_UNIQUE}|.+\.{_UNIQUE}{_ENDING}"),
    ".state/steps": re.compile(rf"{_CLIP}\.safetensors\.{_UNIQUE}\.tmp"),
    ".state/frames": re.compile(rf"{_CLIP}\.safetensors\.{_UNIQUE}\.tmp"),
    ".state/prompts": re.compile(rf"{_UNIQUE}\.safetensors(\.{_UNIQUE}\.tmp)?"),
}
_LONGEST = len("/.state/frames/") + 100 + len(".") + 12 + len(".safetensors.") + 32 + len(".tmp")


class OutputError(InputError):
    """The output folder cannot take what is to be written: not writable, or full. Ends the run."""


class OutputFolder:
    """One folder of finished clips.

    Args:
        path: made if it does not exist.
        output: the kind of file that its run writes; those of other runs may lie there too.

    Raises:
        OutputError: it cannot be made or written, or something that is not cineray's stands under a name that it uses.
    """

    def __init__(self, path: Path, output: Output = VIDEO) -> None:
        self.path = path
        self.output = output
        self.state = path / ".state"
        self._made: list[Path] = []
        refuse_early(path)
        made = [p for p in (path, *path.parents) if not os.path.lexists(p)]
        try:
            path.mkdir(parents=True, exist_ok=True)
            self._probe(is_flushed=True)
            self._made = made
        except OSError as error:
            self._remove_folders("", ".tmp")
            self._made = made
            self.remove_if_empty()
            raise _unwritable(path, error) from None

    @classmethod
    def existing(cls, path: Path, output: Output = VIDEO) -> "OutputFolder":
        """A folder that another process has made.

        Raises:
            OutputError: it is there no more, or cannot be written.
        """
        folder = cls.__new__(cls)
        folder.path, folder.output, folder.state, folder._made = path, output, path / ".state", []
        with folder.translated_os_errors("a clip was rendered"), folder._opened(".tmp"):
            return folder

    def video_path(self, request: ClipRequest, fingerprint: str) -> Path:
        return self.path / f"{_checked(request.id)}.{fingerprint}{self.output.suffix}"

    def check(self, doing: str) -> None:
        """Looks at the folder, and writes a block: before a clip is denoised, and after one could not be written.

        Raises:
            OutputError: it is gone, full, not writable, or not only ours any more. No clip is to blame then.
        """
        with self.translated_os_errors(doing), self._opened():
            _check_entries(self.path)
            self._probe()

    def close(self) -> None:
        """Removes the temporary folder; and the folder itself if it was made for nothing."""
        self.remove_empty_folders()
        self.remove_if_empty()

    def remove_empty_folders(self) -> None:
        """Removes folders of ours that are empty; for the holder of the lease, since others write there."""
        self._remove_folders("", ".tmp")
        self._remove_folders(".state", *_STATE)

    def remove_if_empty(self) -> None:
        self._remove_folders("", ".state")
        for folder in self._made:
            with suppress(OSError):
                folder.rmdir()

    def remove_leftovers(self) -> None:
        """Removes what processes that were killed left behind; for the holder of the folder's lease."""
        for folder, names in _LEFTOVERS.items():
            self._remove_files(folder, names)
        earlier, failures = self.state / EARLIER_FAILURES, self.state / "failures"
        with suppress(OSError):
            if kind_of(earlier) == "a folder" and not os.path.lexists(failures):
                earlier.rename(failures)

    def delete_stale_clips(self) -> None:
        """Removes what is kept of unfinished clips; for a run that has rendered all that was asked for.

        Then those that are left are of clips that a changed manifest asks for no more.
        """
        for kind in ("steps", "frames", "failures"):
            self._remove_files(f".state/{kind}", _KEPT_OF_CLIP)

    def delete(self, path: Path) -> None:
        """Removes a file of ours within the folder; what is no file, or cannot be removed, stays."""
        *folders, name = path.relative_to(self.path).parts
        with suppress(OSError), self._opened(*folders, make=False) as folder:
            require("a file", name, folder)
            os.unlink(name, dir_fd=folder)

    def step_path(self, clip_id: str, fingerprint: str) -> Path:
        """Where a clip that is being denoised keeps its latest step state."""
        return self._in_state("steps", f"{_checked(clip_id)}.{fingerprint}.safetensors")

    def frames_path(self, clip_id: str, fingerprint: str) -> Path:
        """Where the frames of a clip lie that its gang has decoded."""
        return self._in_state("frames", f"{_checked(clip_id)}.{fingerprint}.safetensors")

    def prompt_path(self, key: str) -> Path:
        return self._in_state("prompts", f"{key}.safetensors")

    def delete_prompt(self, key: str) -> None:
        self.delete(self.state / "prompts" / f"{key}.safetensors")

    def failure_path(self, clip_id: str, fingerprint: str) -> Path:
        """Where the failed attempts of a clip are recorded."""
        return self.state / "failures" / f"{_checked(clip_id)}.{fingerprint}.json"  # `write_json` makes the folder

    def _in_state(self, kind: str, name: str) -> Path:
        with self.translated_os_errors(f"making {self.state / kind}"), self._opened(".state", kind):
            return self.state / kind / name

    @contextmanager
    def new_video(self, request: ClipRequest) -> Iterator[Path]:
        """A path to write a video to, for `commit`; removed on leaving.

        Raises:
            OutputError: the folder cannot be written.
        """
        with self.translated_os_errors(f"writing clip {request.id}"), self._opened(".tmp"):
            temporary = self.path / ".tmp" / f"{_checked(request.id)}.{_unique()}{self.output.suffix}"
        try:
            yield temporary
        finally:
            self.delete(temporary)

    def commit(self, temporary: Path, final: Path, replace: bool = False) -> bool:
        """Gives a flushed file its final name in one step.

        Args:
            replace: what stands under that name.

        Returns:
            Whether it was given; False if something stands there that was not to be replaced.

        Raises:
            OutputError: the folder is full, gone or cannot be written.
        """
        with (
            self.translated_os_errors(f"committing {final.name}"),
            self._opened(".tmp") as tmp,
            self._opened() as folder,
        ):
            require("a file", temporary.name, tmp)
            if replace:
                replace_file(temporary.name, tmp, final.name, folder)
            else:
                try:
                    os.link(temporary.name, final.name, src_dir_fd=tmp, dst_dir_fd=folder, follow_symlinks=False)
                except FileExistsError:
                    return False
                except OSError as error:
                    if error.errno not in _NO_LINKS:
                        raise
                    if os.path.lexists(final):
                        return False
                    replace_file(temporary.name, tmp, final.name, folder)
            os.fsync(folder)
        return True

    def write_json(self, name: str, content: Mapping[str, Any], indent: int | None = 2) -> None:
        """Writes a JSON file in one step.

        Args:
            name: within the folder.

        Raises:
            OutputError: the disk is full or not writable, or a folder stands there.
        """
        *folders, last = Path(name).parts
        temporary = f"{last}.{_unique()}"
        # a path of another encoding has lone surrogates, which UTF-8 has not: they become JSON's own escapes
        text = (json.dumps(content, indent=indent, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace")
        with (
            self.translated_os_errors(f"writing {name}"),
            self._opened(".tmp") as tmp,
            self._opened(*folders) as folder,
        ):
            try:
                write_all(new_file(temporary, tmp), text)
                replace_file(temporary, tmp, last, folder)
            except NotOursError as error:
                raise NotOursError(error.errno, error.strerror, name) from None
            finally:
                with suppress(FileNotFoundError):
                    os.unlink(temporary, dir_fd=tmp)

    def log_event(self, event: str, **fields: Any) -> None:
        """Appends one line to `events.jsonl`."""
        line = json.dumps({"time": round(time.time(), 3), "event": event} | fields, ensure_ascii=False) + "\n"
        with self.translated_os_errors(f"writing {_EVENTS}"), self._opened() as folder:
            descriptor = open_file(_EVENTS, folder, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
            with os.fdopen(descriptor, "ab") as file:
                file.write(line.encode("utf-8", "backslashreplace"))

    def is_full_for(self, num_bytes: int) -> bool:
        """Whether the file system has less room than that."""
        free = _free_bytes(self.path)
        return free is not None and free < num_bytes

    def disk_full_error(self, doing: str) -> OutputError:
        """The error to raise when the disk is full."""
        free = _free_bytes(self.path) or 0
        return OutputError(
            f"output folder {self.path}: the disk is full ({free} bytes free) while {doing}; "
            "finished clips are kept: make room and run the same command again"
        )

    def folder_gone_error(self, doing: str) -> OutputError:
        """The error to raise when the folder has disappeared."""
        return OutputError(f"output folder {self.path} disappeared while {doing}; is the disk still mounted?")

    @contextmanager
    def translated_os_errors(self, doing: str) -> Iterator[None]:
        """Turns what the file system says into an OutputError."""
        try:
            yield
        except NotOursError as error:
            raise _not_ours(self.path, error) from None
        except OSError as error:
            if error.errno in _NO_SPACE:
                raise self.disk_full_error(doing) from None
            if error.errno in _GONE and not os.path.isdir(self.path):
                raise self.folder_gone_error(doing) from None
            raise OutputError(f"output folder {self.path}: {error.strerror or error} while {doing}") from None

    @contextmanager
    def _opened(self, *names: str, make: bool = True) -> Iterator[int]:
        """The descriptor of a folder within this one, of this one without names."""
        with ExitStack() as stack:
            folder = stack.enter_context(opened_folder(self.path, follow_links=True))
            for number, name in enumerate(names, start=1):
                try:
                    folder = stack.enter_context(opened_folder(name, folder, make=make))
                except NotOursError as error:
                    raise NotOursError(error.errno, error.strerror, "/".join(names[:number])) from None
            yield folder

    def _probe(self, is_flushed: bool = False) -> None:
        """Writes a block; only when it is flushed do some file systems find out that they are full."""
        name = f"probe.{_unique()}"
        with self._opened(".tmp") as tmp:
            try:
                write_all(new_file(name, tmp), b"x" * _PROBE_BYTES, is_flushed)
            finally:
                with suppress(FileNotFoundError):
                    os.unlink(name, dir_fd=tmp)

    def _remove_files(self, folder: str, names: re.Pattern[str]) -> None:
        with suppress(OSError), self._opened(*folder.split("/"), make=False) as descriptor:
            with os.scandir(descriptor) as entries:
                ours = [e.name for e in entries if names.fullmatch(e.name) and e.is_file(follow_symlinks=False)]
            for name in ours:
                with suppress(OSError):
                    os.unlink(name, dir_fd=descriptor)

    def _remove_folders(self, within: str, *names: str) -> None:
        with suppress(OSError), self._opened(*filter(None, [within]), make=False) as descriptor:
            for name in names:
                with suppress(OSError):
                    os.rmdir(name, dir_fd=descriptor)

    def own_log(self) -> None:
        """A log that has a second name (a hard link, as in a backup) is copied: the other one stays as it is.

        For the holder of the folder's lease.

        Raises:
            OutputError: it cannot be read or copied.
        """
        with self.translated_os_errors(f"writing {_EVENTS}"), self._opened(".tmp") as tmp, self._opened() as folder:
            try:
                source = open_file(_EVENTS, folder, os.O_RDONLY)
            except FileNotFoundError:
                return
            with os.fdopen(source, "rb") as log:
                if os.fstat(source).st_nlink == 1:
                    return
                name = f"{_EVENTS}.{_unique()}"
                with os.fdopen(new_file(name, tmp), "wb") as copy:
                    shutil.copyfileobj(log, copy)
                replace_file(name, tmp, _EVENTS, folder)


def _checked(clip_id: str) -> str:
    """The id that a path is made of; requests are checked long before, and none may ever lead out of the folder.

    Raises:
        ValueError: it could.
    """
    if not CLIP_ID.fullmatch(clip_id):
        raise ValueError(f"a clip with the id {shorten(clip_id)} has no place in an output folder")
    return clip_id


def is_video(entry: "os.PathLike[str]") -> bool:
    """Whether an entry of an output folder can be a finished clip: its name, a regular file, no link, not empty."""
    try:
        about = os.lstat(entry)
    except OSError:
        return False
    return bool(_FINISHED.fullmatch(os.path.basename(entry))) and stat.S_ISREG(about.st_mode) and about.st_size > 0


def clip_of(video: str) -> tuple[str, str] | None:
    """(id, fingerprint) of a finished clip, by its file's name; None where it has not the name of one."""
    if not _FINISHED.fullmatch(video):
        return None
    clip_id, fingerprint, _ = video.rsplit(".", 2)
    return clip_id, fingerprint


def refuse_early(path: Path) -> None:
    """Looks whether a folder can be an output folder; makes and writes nothing.

    Raises:
        OutputError: it cannot be made or written; or something that is not cineray's stands under a name of its own.
    """
    try:
        _check_path(path)
        if os.path.lexists(path):
            _check_entries(path)
    except NotOursError as error:
        raise _not_ours(path, error) from None
    except OSError as error:
        raise _unwritable(path, error) from None


def _check_path(path: Path) -> None:
    num_bytes = len(os.fsencode(path))
    if "\0" in str(path):
        raise OSError(errno.EINVAL, "its name has a null character")
    try:
        os.stat(path)  # names what is too long, a circle of links, no folder
    except FileNotFoundError:
        if os.path.islink(path):
            raise OSError(errno.ENOENT, "it is a symbolic link to nothing") from None
    nearest = next((p for p in (path, *path.parents) if os.path.lexists(p)), Path("."))
    limit = os.pathconf(nearest, "PC_PATH_MAX")
    if 0 < limit <= num_bytes + _LONGEST:
        raise OSError(errno.ENAMETOOLONG, f"its path has {num_bytes} bytes, at most {limit - _LONGEST - 1} can be used")
    with opened_folder(nearest, follow_links=True):
        pass
    if os.statvfs(nearest).f_flag & os.ST_RDONLY:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise OSError(errno.EACCES, os.strerror(errno.EACCES))


def _check_entries(path: Path) -> None:
    wanted = {**dict.fromkeys(_FOLDERS, ("a folder", os.R_OK | os.W_OK | os.X_OK)), _EVENTS: ("a file", os.W_OK)}
    for name, (kind, access) in wanted.items():
        try:
            require(kind, path / name)
        except NotOursError as error:
            raise NotOursError(error.errno, error.strerror, name) from None
        if os.path.lexists(path / name) and not os.access(path / name, access):
            raise OSError(errno.EACCES, f"{os.strerror(errno.EACCES)} in {name}")
    for name in ("run.json", ".state/running.json"):  # replaced, whatever file or link it is
        if kind_of(path / name) == "a folder":
            raise NotOursError(errno.EISDIR, "is a folder where cineray keeps a file", name)


def _not_ours(path: Path, error: NotOursError) -> OutputError:
    return OutputError(f"output folder {path}: {error.filename} {error.strerror}; remove it, or give another --out")


def _unwritable(path: Path, error: OSError) -> OutputError:
    return OutputError(
        f"output folder {path} cannot be written: {error.strerror or error}; give another --out, or change its rights"
    )


def _free_bytes(path: Path) -> int | None:
    try:
        return shutil.disk_usage(path).free
    except OSError:
        return None


def _unique() -> str:
    return uuid.uuid4().hex
