"""WAVs of 16-bit samples with a record inside: written, and read back."""

from __future__ import annotations

import io
import struct
import wave
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from cineray.files import MAX_JSON_BYTES, parse_json, read_regular
from cineray.pipeline.media.ffmpeg import VideoError

MAX_WAV_BYTES = 2**30  # 47 s at 44.1 kHz have 8 MB
SAMPLE_BYTES = 2


def write_wav(samples: np.ndarray, path: Path, rate: int, texts: Mapping[bytes, str]) -> None:
    """Writes a WAV (PCM, 16 bits, little endian); the same samples and texts give the same bytes.

    Args:
        samples: [number of samples, channels] int16.
        rate: samples a second.
        texts: four letters of the INFO list (Multimedia Programming Interface and Data Specifications 1.0, 1991), such
            as ICMT for a comment -> text.

    Raises:
        OSError: the disk is full or not writable.
    """
    content = io.BytesIO()
    with wave.open(content, "wb") as file:
        file.setnchannels(samples.shape[1])
        file.setsampwidth(SAMPLE_BYTES)
        file.setframerate(rate)
        file.writeframes(np.ascontiguousarray(samples, dtype="<i2").tobytes())
    info = b"INFO" + b"".join(_chunk(name, text.encode("utf-8", "replace") + b"\0") for name, text in texts.items())
    whole = content.getvalue() + _chunk(b"LIST", info)
    path.write_bytes(whole[:4] + struct.pack("<I", len(whole) - 8) + whole[8:])


def read_wav(path: Path) -> tuple[np.ndarray, int]:
    """(samples [number of samples, channels] int16, samples a second).

    Raises:
        VideoError: it is no such WAV, or is cut.
    """
    try:
        with wave.open(io.BytesIO(read_regular(path, MAX_WAV_BYTES)), "rb") as file:
            if file.getsampwidth() != SAMPLE_BYTES:
                raise VideoError(f"its samples have {8 * file.getsampwidth()} bits, not 16")
            samples = np.frombuffer(file.readframes(file.getnframes()), dtype="<i2")
            if len(samples) != file.getnframes() * file.getnchannels():
                raise VideoError("its samples are cut")
            return samples.reshape(-1, file.getnchannels()), file.getframerate()
    except (OSError, EOFError, ValueError, wave.Error) as error:
        raise VideoError(" ".join(str(error).split()) or type(error).__name__) from None


def read_wav_metadata(path: Path) -> dict[str, Any]:
    """The JSON of the comment; empty where there is none that can be used."""
    try:
        content = read_regular(path, MAX_WAV_BYTES)
        lists = [body[4:] for name, body in _chunks(content[12:]) if name == b"LIST" and body[:4] == b"INFO"]
        comments = [body for info in lists for name, body in _chunks(info) if name == b"ICMT"]
        found = parse_json(comments[0].rstrip(b"\0")) if comments and len(comments[0]) <= MAX_JSON_BYTES else None
    except (OSError, ValueError, struct.error):
        return {}
    return found if isinstance(found, dict) else {}


def _chunk(name: bytes, body: bytes) -> bytes:
    """A RIFF chunk: a name, a length, and a body of an even number of bytes."""
    return name + struct.pack("<I", len(body)) + body + b"\0" * (len(body) % 2)


def _chunks(content: bytes) -> list[tuple[bytes, bytes]]:
    """(name, body) of the chunks that follow each other."""
    found, at = [], 0
    while at + 8 <= len(content):
        (length,) = struct.unpack_from("<I", content, at + 4)
        found.append((content[at : at + 4], content[at + 8 : at + 8 + length]))
        at += 8 + length + length % 2
    return found
