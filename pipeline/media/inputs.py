"""The files that clips are rendered from, each looked at once; read without torch."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from cineray.pipeline.media.control import FileFacts, is_picture, too_few_frames, video_facts
from cineray.pipeline.media.picture import PictureError, refusal, shown_picture
from cineray.pipeline.request import ClipRequest, PictureFacts

MAX_REMEMBERED = 10_000  # pictures: 7 MB


class Pictures:
    """Reads each file once, for as long as it stays the same; a manifest may name one a million times."""

    def __init__(self) -> None:
        self._known: OrderedDict[str, tuple[tuple[int, ...], Any]] = OrderedDict()

    def facts(self, path: str) -> PictureFacts:
        """Decodes the whole picture, unless it has done so before.

        Raises:
            PictureError: it cannot be used.
        """
        return self._once(path, lambda path: shown_picture(path)[1])

    def control_facts(self, path: str) -> FileFacts:
        """The same of a file that VACE takes, picture or video."""
        return FileFacts(self.facts(path).sha256) if is_picture(path) else self._once(path, video_facts)

    def control_problems(self, request: ClipRequest, num_frames_needed: int) -> list[str]:
        """Why files that control a clip cannot be used, each in one phrase.

        Args:
            num_frames_needed: that a video must have at least.
        """
        found = []
        for path in request.control_files:
            if path in request.reference_images and not is_picture(path):
                found.append(str(refusal(path, "its name does not end as a picture's")))
                continue
            try:
                num_frames = self.control_facts(path).num_frames
            except PictureError as error:
                found.append(str(error))
                continue
            if path == request.control_video and num_frames is None:
                found.append(f"control_video must be a video, got the picture {path}")
            elif num_frames is not None and (problem := too_few_frames(path, num_frames, num_frames_needed)):
                found.append(problem)
        return found

    def pinned(self, request: ClipRequest) -> ClipRequest:
        """The request with what its files hold now: that and nothing else is then rendered.

        Raises:
            PictureError: a file cannot be used.
        """
        if request.image is not None:
            request = replace(request, picture=self.facts(request.image))
        if request.control_files:
            digests = tuple(self.control_facts(path).sha256 for path in request.control_files)
            request = replace(request, control_digests=digests)
        return request

    def _once(self, path: str, look: Callable[[str], Any]) -> Any:
        identity = _identity(path)
        known = self._known.get(path)
        if known is None or known[0] != identity:
            try:
                found = look(path)
            except PictureError as error:
                found = error
            known = self._known[path] = (identity, found)
            if len(self._known) > MAX_REMEMBERED:
                self._known.popitem(last=False)
        self._known.move_to_end(path)
        if isinstance(known[1], PictureError):
            raise PictureError(str(known[1]))
        return known[1]


def _identity(path: str) -> tuple[int, ...]:
    try:
        about = Path(path).stat()
    except (OSError, ValueError) as error:  # ValueError: a NUL, or half a character
        raise refusal(path, getattr(error, "strerror", None) or str(error)) from None
    return about.st_dev, about.st_ino, about.st_size, about.st_mtime_ns, about.st_ctime_ns
