"""What a clip becomes: an MP4, a PNG, a WAV or a FLAC with its record inside; written, recognized and read back."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from cineray.pipeline.media.ffmpeg import VideoError
from cineray.pipeline.media.flac import check_flac, read_flac, read_flac_metadata, write_flac
from cineray.pipeline.media.sound import read_wav, read_wav_metadata, write_wav
from cineray.pipeline.media.still import read_png, read_png_metadata, write_png
from cineray.pipeline.media.video import check_ffmpeg, count_frames, read_metadata, read_video, write_video
from cineray.pipeline.request import ClipRequest


class Output(Protocol):
    """The kind of file that a model's clips are. Holds no state."""

    @property
    def suffix(self) -> str:
        """The end of its files' names, with the dot."""
        ...

    @property
    def noun(self) -> str:
        """What a person calls it."""
        ...

    def check(self) -> None:
        """Checks at the start of a run that such files can be written: no clip should be denoised for one that cannot.

        Raises:
            InputError: they cannot.
        """
        ...

    def write(
        self,
        frames: np.ndarray,
        path: Path,
        request: ClipRequest,
        metadata: Mapping[str, Any],
        lossless: bool = False,
        /,
    ) -> None:
        """Writes a file that holds its own record.

        Args:
            frames: as `misfit` finds fitting.
            metadata: what a JSON object can hold.
            lossless: without loss; kinds that never lose anything do not care.

        Raises:
            VideoError: it could not be written whole.
            OSError: the disk is full or not writable.
        """
        ...

    def misfit(self, frames: np.ndarray, request: ClipRequest, /) -> str | None:
        """Why decoded frames cannot be those of the request, or None."""
        ...

    def metadata(self, path: Path, /) -> dict[str, Any]:
        """The record that a file holds; empty where there is none that can be used."""
        ...

    def fault(self, path: Path, request: ClipRequest, /) -> str | None:
        """Why a file is not the request's whole one, by what it shows; or None."""
        ...

    def read(self, path: Path, /) -> np.ndarray:
        """The frames.

        Raises:
            VideoError: it cannot be read, or has none.
        """
        ...


@dataclass(frozen=True, slots=True)
class Video:
    """H.264 in an MP4: frames [F, H, W, 3] uint8 RGB."""

    suffix: str = ".mp4"
    noun: str = "video"

    def check(self) -> None:
        check_ffmpeg()

    def write(
        self,
        frames: np.ndarray,
        path: Path,
        request: ClipRequest,
        metadata: Mapping[str, Any],
        lossless: bool = False,
        /,
    ) -> None:
        write_video(frames, path, request.fps, metadata, lossless)

    def misfit(self, frames: np.ndarray, request: ClipRequest, /) -> str | None:
        return _other_size(frames, (request.num_frames, request.height, request.width))

    def metadata(self, path: Path, /) -> dict[str, Any]:
        return read_metadata(path)

    def fault(self, path: Path, request: ClipRequest, /) -> str | None:
        try:
            num_frames = count_frames(path)
        except VideoError as error:
            return f"it cannot be decoded: {error}"
        return None if num_frames == request.num_frames else f"it has {num_frames} of {request.num_frames} frames"

    def read(self, path: Path, /) -> np.ndarray:
        return read_video(path)


@dataclass(frozen=True, slots=True)
class Picture:
    """A PNG: frames [1, H, W, 3] uint8 RGB; its record stands in text chunks."""

    suffix: str = ".png"
    noun: str = "picture"

    def check(self) -> None:
        """Pillow is there, or nothing would have been imported."""

    def write(
        self,
        frames: np.ndarray,
        path: Path,
        request: ClipRequest,
        metadata: Mapping[str, Any],
        lossless: bool = False,  # noqa: ARG002  # a PNG loses nothing
        /,
    ) -> None:
        write_png(frames[0], path, {"comment": json.dumps(dict(metadata)), "Description": request.prompt})

    def misfit(self, frames: np.ndarray, request: ClipRequest, /) -> str | None:
        return _other_size(frames, (1, request.height, request.width))

    def metadata(self, path: Path, /) -> dict[str, Any]:
        return read_png_metadata(path)

    def fault(self, path: Path, request: ClipRequest, /) -> str | None:
        try:
            height, width, _ = read_png(path).shape
        except VideoError as error:
            return f"it cannot be decoded: {error}"
        is_whole = (width, height) == (request.width, request.height)
        return None if is_whole else f"it has {width}x{height} pixels, not {request.width}x{request.height}"

    def read(self, path: Path, /) -> np.ndarray:
        return read_png(path)[None]


@dataclass(frozen=True, slots=True)
class Sound:
    """A WAV: frames [number of samples, channels] int16, `fps` of them a second."""

    suffix: str = ".wav"
    noun: str = "sound"

    def num_frames(self, request: ClipRequest) -> int:
        """Samples of a request's sound."""
        return int((request.seconds or 0.0) * request.fps)

    def check(self) -> None:
        """The standard library writes it."""

    def write(
        self,
        frames: np.ndarray,
        path: Path,
        request: ClipRequest,
        metadata: Mapping[str, Any],
        lossless: bool = False,  # noqa: ARG002  # a WAV loses nothing
        /,
    ) -> None:
        write_wav(frames, path, request.fps, {b"ICMT": json.dumps(dict(metadata)), b"INAM": request.prompt})

    def misfit(self, frames: np.ndarray, request: ClipRequest, /) -> str | None:
        fits = frames.ndim == 2 and len(frames) == self.num_frames(request)
        return None if fits else f"they decode to samples of shape {frames.shape}"

    def metadata(self, path: Path, /) -> dict[str, Any]:
        return read_wav_metadata(path)

    def fault(self, path: Path, request: ClipRequest, /) -> str | None:
        try:
            samples, rate = self.samples(path)
        except VideoError as error:
            return f"it cannot be decoded: {error}"
        if (len(samples), rate) == (self.num_frames(request), request.fps):
            return None
        return f"it has {len(samples)} samples at {rate} Hz, not {self.num_frames(request)} at {request.fps}"

    def read(self, path: Path, /) -> np.ndarray:
        return self.samples(path)[0]

    def samples(self, path: Path) -> tuple[np.ndarray, int]:
        """(samples [number of samples, channels] int16, samples a second).

        Raises:
            VideoError: it cannot be read.
        """
        return read_wav(path)


@dataclass(frozen=True, slots=True)
class Flac(Sound):
    """The same sound as a FLAC, half as large."""

    suffix: str = ".flac"

    def check(self) -> None:
        check_flac()

    def write(
        self,
        frames: np.ndarray,
        path: Path,
        request: ClipRequest,
        metadata: Mapping[str, Any],
        lossless: bool = False,  # noqa: ARG002  # a FLAC loses nothing
        /,
    ) -> None:
        write_flac(frames, path, request.fps, metadata)

    def metadata(self, path: Path, /) -> dict[str, Any]:
        return read_flac_metadata(path)

    def samples(self, path: Path) -> tuple[np.ndarray, int]:
        return read_flac(path)


def _other_size(frames: np.ndarray, wanted: tuple[int, int, int]) -> str | None:
    return None if frames.shape == (*wanted, 3) else f"they decode to frames of shape {frames.shape}"


VIDEO, PICTURE, SOUND, FLAC = Video(), Picture(), Sound(), Flac()
OUTPUTS: tuple[Output, ...] = (VIDEO, PICTURE, SOUND, FLAC)
SUFFIXES = tuple(output.suffix for output in OUTPUTS)


def output_of(path: Path | str) -> Output | None:
    """The kind of a file, by the end of its name."""
    return next((output for output in OUTPUTS if str(path).endswith(output.suffix)), None)


def format_of(output: Output) -> str:
    """A kind's name for `--format`."""
    return output.suffix.removeprefix(".")


def written_as(output: Output, name: str) -> Output:
    """The kind of this name that can stand for a model's own.

    Raises:
        ValueError: there is none; lists those that there are.
    """
    others = {format_of(other): other for other in OUTPUTS if other.noun == output.noun}
    if name not in others:
        raise ValueError(f"--format must be {' or '.join(others)} for a {output.noun}, got {name}")
    return others[name]
