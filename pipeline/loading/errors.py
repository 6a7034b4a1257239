"""Whether a checkpoint cannot be loaded at all, or only not here and now."""

import errno
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cineray.pipeline.request import InputError
from cineray.text import printable

# of a disk, a mount or a host that is not well, or is short of something; a file that is missing or may not be read is
# the checkpoint's own
_PASSING = {
    errno.EIO,
    errno.ENOMEM,
    errno.ENFILE,
    errno.EMFILE,
    errno.ENOSPC,
    errno.EDQUOT,
    errno.ESTALE,
    errno.EAGAIN,
    errno.EBUSY,
    errno.EINTR,
    errno.ETIMEDOUT,
    errno.ENOTCONN,
    errno.ENETDOWN,
    errno.ENETUNREACH,
    errno.EHOSTDOWN,
    errno.EHOSTUNREACH,
    errno.ECONNABORTED,
    errno.ECONNREFUSED,
    errno.ECONNRESET,
    getattr(errno, "EREMOTEIO", errno.EIO),
}
# what libraries make of these: Rust's own words for an errno, torch's for memory and devices, and the hub's refusals
# that pass: 429 and 5xx (huggingface_hub.errors.HfHubHTTPError)
_SAID = re.compile(
    r"out of memory|can't allocate memory|cannot allocate memory|not enough memory|_ALLOC_FAILED|cuda error"
    r"|input/output error|stale file handle|os error (?:5|12|23|24|28|110|116)\b"
    r"|connection (?:error|reset|refused|aborted|broken)|timed? ?out|temporary failure in name resolution"
    r"|max retries exceeded|(?:server|client) error '?(?:429|5\d\d)|\b(?:429|5\d\d) (?:server|client) error",
    re.IGNORECASE,
)


class LoadingError(InputError):
    """This machine cannot load the checkpoint now; another one may, or this one later.

    Alone it is bad input like any other: there is no other machine. Of a gang it is no more than the gang's loss.
    """


@contextmanager
def loading_errors(name: str, folder: Path) -> Iterator[None]:
    """Makes one line of whatever diffusers, transformers, safetensors and tokenizers raise, each in its own way.

    Args:
        name: of the checkpoint.
        folder: that is read.

    Raises:
        InputError: instead; LoadingError where the cause is this machine or the hub.
    """
    try:
        yield
    except InputError:
        raise
    except BaseException as error:  # Rust's panics are among them
        if isinstance(error, KeyboardInterrupt | SystemExit | GeneratorExit):
            raise
        reason = printable(" ".join(str(error).split()) or type(error).__name__, 400)
        kind = LoadingError if is_passing(error) else InputError
        line = f"model {printable(name, 200)}: loading from {printable(folder, 200)} failed: {reason}"
        raise kind(line) from error


def is_passing(error: BaseException) -> bool:
    """Whether an error of loading, or what it came from, tells of this machine or of the hub, not of the checkpoint."""
    return any(_is_passing(each) for each in _with_causes(error))


def _is_passing(error: BaseException) -> bool:
    if isinstance(error, MemoryError | ConnectionError | TimeoutError | LoadingError):
        return True
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in _PASSING
    status = getattr(getattr(error, "response", None), "status_code", None)  # of requests and httpx
    if isinstance(status, int):
        return status == 429 or status >= 500
    return _SAID.search(str(error)) is not None


def _with_causes(error: BaseException | None, most: int = 10) -> Iterator[BaseException]:
    while error is not None and most:
        yield error
        within = None if error.__suppress_context__ else error.__context__
        error, most = error.__cause__ or within, most - 1
