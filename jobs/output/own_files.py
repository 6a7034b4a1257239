"""Folders and files that cineray makes where others can write too: opened by descriptor, no link is followed."""

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_OPEN = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC  # not blocking: a FIFO would be waited for
_MODE = 0o666  # less the umask
_KINDS = (
    (stat.S_ISREG, "a file"),
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISLNK, "a symbolic link"),
    (stat.S_ISFIFO, "a FIFO"),
    (stat.S_ISSOCK, "a socket"),
)


class NotOursError(OSError):
    """Under a name of cineray's stands what cineray does not make; `strerror` says what, `filename` where."""


def kind_of(name: str | Path, dir_fd: int | None = None) -> str | None:
    """What stands there, as "a file" or "a symbolic link"; None where nothing does.

    Raises:
        OSError: it cannot be looked at.
    """
    try:
        mode = os.lstat(name, dir_fd=dir_fd).st_mode
    except (FileNotFoundError, NotADirectoryError):
        return None
    return next((kind for is_kind, kind in _KINDS if is_kind(mode)), "a device")


def require(kind: str, name: str | Path, dir_fd: int | None = None) -> None:
    """Nothing if there is nothing, or what is wanted.

    Raises:
        NotOursError: something else stands there.
        OSError: it cannot be looked at.
    """
    found = kind_of(name, dir_fd)
    if found not in (None, kind):
        raise NotOursError(errno.EEXIST, f"is {found} where cineray keeps {kind}", str(name))


@contextmanager
def opened_folder(
    name: str | Path, dir_fd: int | None = None, *, make: bool = False, follow_links: bool = False
) -> Iterator[int]:
    """The descriptor of a folder.

    Args:
        make: the folder itself where it is missing, not its parents.
        follow_links: for a name that the user chose.

    Raises:
        NotOursError: a link or a file stands there.
        OSError: it is missing or cannot be opened.
    """
    if make:
        with suppress(FileExistsError):
            os.mkdir(name, dir_fd=dir_fd)
    try:
        descriptor = os.open(name, _FOLDER | (0 if follow_links else os.O_NOFOLLOW), dir_fd=dir_fd)
    except OSError:
        if not follow_links:
            require("a folder", name, dir_fd)
        raise
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def new_file(name: str, dir_fd: int) -> int:
    """The descriptor of a file that was not there before, to write.

    Raises:
        OSError: something stands there, or it cannot be made.
    """
    return os.open(name, _NEW, _MODE, dir_fd=dir_fd)


def open_file(name: str, dir_fd: int, flags: int) -> int:
    """The descriptor of a regular file.

    Args:
        flags: of `os.open`: read or write, append, create.

    Raises:
        NotOursError: something else stands there.
        OSError: it cannot be opened.
    """
    require("a file", name, dir_fd)  # before it is opened: that alone may wake a device
    try:
        descriptor = os.open(name, flags | _OPEN, _MODE, dir_fd=dir_fd)
    except OSError:
        require("a file", name, dir_fd)
        raise
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise NotOursError(errno.EEXIST, "is no file", name)
    return descriptor


def replace_file(temporary: str, tmp_fd: int, name: str, dir_fd: int) -> None:
    """Gives a file its name in one step, over a file or link that has it.

    Raises:
        NotOursError: a folder stands there.
        OSError: it cannot be done.
    """
    try:
        os.replace(temporary, name, src_dir_fd=tmp_fd, dst_dir_fd=dir_fd)
    except IsADirectoryError:
        raise NotOursError(errno.EISDIR, "is a folder where cineray keeps a file", name) from None


def write_all(descriptor: int, content: bytes, is_flushed: bool = True) -> None:
    """Writes, flushes to the disk if wanted, and closes the descriptor, also when it fails.

    Raises:
        OSError: full, or not writable.
    """
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)
        file.flush()
        if is_flushed:
            os.fsync(descriptor)
