"""FLACs of 16-bit samples with a record inside: written by ffmpeg, and read back."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cineray.files import read_regular
from cineray.pipeline.media.ffmpeg import EXTRA, VideoError, file_url, run_ffmpeg
from cineray.pipeline.media.video import metadata_file, read_metadata
from cineray.pipeline.request import InputError

MAX_FLAC_BYTES = 2**30
_INPUT = ("-protocol_whitelist", "file", "-format_whitelist", "flac", "-f", "flac")
# RFC 9639, section 8: the first metadata block, of kind 0 (above it a bit of the last one), and its length, is always
# what the stream says of itself
_HEADS = tuple(b"fLaC" + bytes((is_last << 7, 0, 0, 34)) for is_last in (False, True))
_STREAMINFO = slice(8, 42)
_BLOCK_SAMPLES = 4096  # what the format's own program takes at 44.1 kHz; ffmpeg would take too few at low rates


@dataclass(frozen=True, slots=True)
class StreamInfo:
    """What a FLAC says of itself (RFC 9639, section 8.2).

    Args:
        rate: samples a second.
        num_samples: of each channel.
        md5: of all samples, little endian, channel by channel within a sample.
    """

    rate: int
    num_channels: int
    num_samples: int
    md5: bytes


def check_flac() -> None:
    """
    Raises:
        InputError: there is no ffmpeg, or it does not write FLAC.
    """
    encoders = bytearray()
    try:
        run_ffmpeg(["-encoders"], encoders.extend)
        if b" flac " not in encoders:
            raise VideoError("it has no encoder for FLAC")
    except VideoError as error:
        raise InputError(
            f"ffmpeg cannot be used: {error}; install imageio-ffmpeg again, or leave --format flac out"
        ) from None


def write_flac(samples: np.ndarray, path: Path, rate: int, metadata: Mapping[str, Any]) -> None:
    """Writes a FLAC of 16 bits; the same samples and metadata give the same bytes.

    Args:
        samples: [number of samples, channels] int16.
        rate: samples a second.
        metadata: goes as JSON into the comment; its "prompt" also into the title.

    Raises:
        VideoError: ffmpeg failed, or the file does not hold the samples.
    """
    pcm = np.ascontiguousarray(samples, dtype="<i2")
    try:
        run_ffmpeg(
            [
                *("-f", "ffmetadata", "-i", EXTRA),
                *("-f", "s16le", "-ar", str(rate), "-ac", str(samples.shape[1]), "-i", "pipe:0"),
                *("-map", "1:a:0", "-map_metadata", "0", "-c:a", "flac", "-sample_fmt", "s16"),
                *("-frame_size", str(_BLOCK_SAMPLES)),
                *("-threads", "1", "-bitexact", "-f", "flac", file_url(path)),
            ],
            stdin=[pcm.data],
            extra=metadata_file(metadata),
        )
        info = read_stream_info(path)
    except VideoError as error:
        path.unlink(missing_ok=True)
        raise VideoError(f"ffmpeg could not write {path.name}: {error}") from None
    except BaseException:
        path.unlink(missing_ok=True)
        raise
    if (info.num_samples, info.md5) != (len(samples), hashlib.md5(pcm.data, usedforsecurity=False).digest()):
        path.unlink(missing_ok=True)
        raise VideoError(f"ffmpeg did not write all samples of {path.name}; is the disk full?")


def read_flac(path: Path) -> tuple[np.ndarray, int]:
    """(samples [number of samples, channels] int16, samples a second).

    Raises:
        VideoError: it is no such FLAC, or is cut or damaged.
    """
    info, pcm = read_stream_info(path), bytearray()
    run_ffmpeg(
        [
            *(*_INPUT, "-i", file_url(path)),
            *("-map", "0:a:0", "-f", "s16le", "pipe:1"),
        ],
        pcm.extend,
    )
    if hashlib.md5(pcm, usedforsecurity=False).digest() != info.md5:
        raise VideoError("its samples are cut or damaged")
    return np.frombuffer(pcm, dtype="<i2").reshape(-1, info.num_channels), info.rate


def read_stream_info(path: Path) -> StreamInfo:
    """
    Raises:
        VideoError: it is no FLAC of 16 bits.
    """
    try:
        head = read_regular(path, MAX_FLAC_BYTES)[: _STREAMINFO.stop]
    except (OSError, ValueError) as error:
        raise VideoError(" ".join(str(error).split()) or type(error).__name__) from None
    block = head[_STREAMINFO]
    if not head.startswith(_HEADS) or len(head) != _STREAMINFO.stop:
        raise VideoError("it is no FLAC")
    packed = int.from_bytes(block[10:18], "big")  # 20 bits rate, 3 channels less one, 5 bits less one, 36 samples
    num_bits = (packed >> 36 & 0x1F) + 1
    if num_bits != 16:
        raise VideoError(f"its samples have {num_bits} bits, not 16")
    return StreamInfo(
        rate=packed >> 44,
        num_channels=(packed >> 41 & 0x7) + 1,
        num_samples=packed & (1 << 36) - 1,
        md5=block[18:],
    )


def read_flac_metadata(path: Path) -> dict[str, Any]:
    """The JSON of the comment; empty where there is none that can be used."""
    return read_metadata(path, _INPUT)
