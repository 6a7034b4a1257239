"""PNGs with text chunks: written, and read back."""

from __future__ import annotations

import io
import warnings
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, PngImagePlugin

from cineray.files import MAX_JSON_BYTES, parse_json, read_regular
from cineray.pipeline.media.ffmpeg import VideoError

MAX_PNG_BYTES = 2**30  # 8192 x 8192 pixels of noise have 201 MB


def write_png(pixels: np.ndarray, path: Path, texts: Mapping[str, str]) -> None:
    """Writes a PNG: 8 bits, RGB, sRGB; the same pixels and texts give the same bytes.

    Args:
        pixels: [H, W, 3] uint8 RGB.
        texts: keyword (PNG specification, 11.3.4: 1 to 79 Latin-1 characters) -> text, each an uncompressed iTXt chunk.

    Raises:
        OSError: the disk is full or not writable.
    """
    chunks = PngImagePlugin.PngInfo()
    for keyword, text in texts.items():
        chunks.add_itxt(keyword, text.encode("utf-8", "replace").decode())
    Image.fromarray(pixels).save(path, "PNG", pnginfo=chunks)


def read_png(path: Path) -> np.ndarray:
    """Pixels [H, W, 3] uint8 RGB.

    Raises:
        VideoError: it is no PNG, or broken.
    """
    with _opened(path) as image:
        return np.asarray(image.convert("RGB"))


def read_png_metadata(path: Path) -> dict[str, Any]:
    """The JSON of the comment chunk; empty where there is none that can be used."""
    with suppress(VideoError, ValueError), _opened(path) as image:
        text = getattr(image, "text", {}).get("comment", "")
        content = parse_json(str(text)) if len(text) <= MAX_JSON_BYTES else None
        return content if isinstance(content, dict) else {}
    return {}


def _opened(path: Path) -> Image.Image:
    """A PNG whose pixels have been decoded.

    Raises:
        VideoError: it is none, or broken.
    """
    try:
        content = read_regular(path, MAX_PNG_BYTES)
        with warnings.catch_warnings(action="ignore"):
            image = Image.open(io.BytesIO(content), formats=["PNG"])
            image.load()
    except Exception as error:  # noqa: BLE001  # decoders raise whatever a broken file makes them stumble over
        raise VideoError(f"{' '.join(str(error).split()) or type(error).__name__}") from None
    return image
