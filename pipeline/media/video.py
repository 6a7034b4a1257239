"""Frames to MP4 and back, through the ffmpeg that imageio-ffmpeg carries.

Colours as players show them: yuv420p with the matrix of ITU-R BT.709 in limited range, at every size, and tagged so.
Videos without tags, as earlier versions wrote them, are read by ffmpeg's rule for those: BT.601.
"""

import json
import re
import stat
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from cineray.files import MAX_JSON_BYTES, parse_json
from cineray.pipeline.media.ffmpeg import EXTRA, VideoError, file_url, run_ffmpeg
from cineray.pipeline.request import InputError

__all__ = ["VideoError", "check_ffmpeg", "count_frames", "read_metadata", "read_video", "write_video"]

# CRF 14: 64x64 clips of flat shapes come back at 45 dB and more; at ffmpeg's default of 23 the colours bleed
CRF = 14
# area and full_chroma_inp: a chroma sample is the mean of its 2 x 2 pixels. Blocks of 16 x 16 random colours come back
# at 45 dB, with bicubic at 37 dB and in files twice as large. accurate_rnd: within 1 level of exact arithmetic
TO_YUV = "scale=in_range=pc:out_range=tv:out_color_matrix=bt709:flags=area+accurate_rnd+full_chroma_int+full_chroma_inp"
_YUV_TAGS = ("bt709", "bt709", "bt709", "tv")  # matrix, primaries, transfer, range
# frames are sRGB: BT.709's primaries, the transfer of IEC 61966-2-1, no matrix, full range
_RGB_TAGS = ("rgb", "bt709", "iec61966-2-1", "pc")
# what may be opened as a video; playlists and the like, which name other files, may not
_INPUT = ("-protocol_whitelist", "file", "-format_whitelist", "mov,mp4,matroska,webm,avi")
_PPM_HEADER = re.compile(rb"P6\n(\d+) (\d+)\n255\n")
_FPS = re.compile(r"Stream #0:\d+.*: Video: .*?, (\d+(?:\.\d+)?) fps")
_METADATA_LINE = re.compile(r"((?:[^\\\n]++|\\.)*+)(?:\n|\Z)", re.DOTALL)


def write_video(
    frames: np.ndarray, path: Path | str, fps: int, metadata: Mapping[str, Any], lossless: bool = False
) -> None:
    """Writes an H.264 MP4 that browsers play: yuv420p, index in front.

    Args:
        frames: [F, H, W, 3] uint8 RGB, sRGB; sides even.
        metadata: goes as JSON into the comment tag; its "prompt" also into the title tag.
        lossless: RGB at crf 0 instead: decoded frames equal `frames` bit for bit, but browsers do not play it.

    Raises:
        VideoError: ffmpeg failed, with the end of its output.
        OSError: the disk is full or not writable.
    """
    path = Path(path)
    num_frames, height, width, _ = frames.shape
    if lossless:
        codec = ["-c:v", "libx264rgb", "-pix_fmt", "rgb24", "-crf", "0"]
    else:
        codec = ["-c:v", "libx264", "-pix_fmt", "yuv420p", "-crf", str(CRF), "-preset", "medium"]
    try:
        run_ffmpeg(
            [
                *("-f", "ffmetadata", "-i", EXTRA),
                *("-f", "rawvideo", "-pix_fmt", "rgb24", "-video_size", f"{width}x{height}", "-framerate", str(fps)),
                *("-i", "pipe:0", "-map", "1:v:0", "-map_metadata", "0"),
                *_colour_options(lossless),
                *codec,
                # one encoder thread: x264's output then does not depend on the machine's core count
                *("-movflags", "+faststart", "-threads", "1", "-bitexact", "-f", "mp4", file_url(path)),
            ],
            stdin=(np.ascontiguousarray(frame).data for frame in frames),
            extra=metadata_file(metadata),
        )
        found = count_frames(path)
    except VideoError as error:
        _remove_half(path)
        raise VideoError(f"ffmpeg could not write {path.name}: {error}") from None
    except BaseException:
        _remove_half(path)
        raise
    if found != num_frames:
        _remove_half(path)
        raise VideoError(f"ffmpeg wrote {found} of {num_frames} frames of {path.name}; is the disk full?")


def check_ffmpeg() -> None:
    """Checks at the start of a run that ffmpeg can write: a clip should not be denoised for one that cannot.

    Raises:
        InputError: there is none, or it lacks the encoder.
    """
    encoders = bytearray()
    try:
        run_ffmpeg(["-encoders"], encoders.extend)
        if b" libx264 " not in encoders or b" libx264rgb " not in encoders:
            raise VideoError("it has no libx264")
    except VideoError as error:
        raise InputError(
            f"ffmpeg cannot be used: {error}; install imageio-ffmpeg again, or let IMAGEIO_FFMPEG_EXE name an ffmpeg "
            "with libx264"
        ) from None


def _colour_options(lossless: bool) -> list[str]:
    """Converts, and tags both the stream (H.264's own header) and the file (`colr`)."""
    matrix, primaries, transfer, value_range = _RGB_TAGS if lossless else _YUV_TAGS
    # frames carry the tags too: newer ffmpegs take the encoder's from them
    frame_matrix = "gbr" if matrix == "rgb" else matrix
    tags = f"setparams=range={value_range}:color_primaries={primaries}:color_trc={transfer}:colorspace={frame_matrix}"
    filters = tags if lossless else f"{TO_YUV},format=yuv420p,{tags}"
    options = ("-vf", filters, "-colorspace", matrix, "-color_primaries", primaries)
    return [*options, "-color_trc", transfer, "-color_range", value_range]


def _remove_half(path: Path) -> None:
    with suppress(OSError):
        if stat.S_ISREG(path.lstat().st_mode):  # no device that someone gave for a file
            path.unlink()


def metadata_file(metadata: Mapping[str, Any]) -> bytes:
    """A metadata file in ffmpeg's own format. The JSON is ASCII: no character of it is the end of a line to any reader.

    The title comes last and without a line end: ffmpeg takes a line that ends with a backslash as going on, though
    that backslash be escaped.
    """
    title = str(metadata.get("prompt", "")).replace("\r\n", "\n").replace("\r", "\n")  # it loses those
    tags = {"comment": json.dumps(dict(metadata)), "title": title}
    lines = [f"{name}={_escaped(text)}" for name, text in tags.items()]
    return "\n".join((";FFMETADATA1", *lines)).encode("utf-8", "replace")


def _escaped(text: str) -> str:
    return re.sub(r"([=;#\\\n])", r"\\\1", text.replace("\0", ""))


def count_frames(path: Path | str, most: int | None = None) -> int:
    """Decodes a video and counts its frames.

    Args:
        most: it stops there; None: at the end.

    Raises:
        VideoError: it cannot be read, or is damaged.
    """
    _check_regular(path)
    report = bytearray()
    # a damaged packet is an error here, where a player would show what it can
    arguments = ["-xerror", *_INPUT, "-i", file_url(path), "-map", "0:v:0", *_at_most(most), "-f", "null"]
    run_ffmpeg([*arguments, "-progress", "pipe:1", "-"], report.extend)
    counts = re.findall(rb"^frame=\s*(\d+)", report, re.MULTILINE)
    return int(counts[-1]) if counts else 0


def _at_most(num_frames: int | None) -> list[str]:
    return [] if num_frames is None else ["-frames:v", str(num_frames)]


def read_video(path: Path | str, most: int | None = None, skip: int = 0) -> np.ndarray:
    """The frames [F, H, W, 3] uint8 RGB, by the colour tags of the video.

    Args:
        most: the first so many; None: all.
        skip: frames in front of those.

    Raises:
        VideoError: it cannot be read, or has no frames.
    """
    content = bytearray()
    try:
        _check_regular(path)
        skipping = ["-vf", f"select=gte(n\\,{skip})", "-fps_mode", "passthrough"] if skip else []
        source = [*_INPUT, "-i", file_url(path), "-map", "0:v:0", *skipping, *_at_most(most)]
        run_ffmpeg([*source, "-pix_fmt", "rgb24", "-c:v", "ppm", "-f", "image2pipe", "pipe:1"], content.extend)
    except VideoError as error:
        raise VideoError(f"cannot read {path}: {error}") from None
    header = _PPM_HEADER.match(content)
    if header is None:
        raise VideoError(f"cannot read {path}: it has no frames")
    width, height = int(header[1]), int(header[2])
    images = np.frombuffer(content, np.uint8).reshape(-1, header.end() + height * width * 3)
    return images[:, header.end() :].reshape(-1, height, width, 3)


def read_still(path: Path | str, at_s: float, width: int) -> np.ndarray:
    """One frame [H, W, 3] uint8 RGB, without decoding the whole video.

    Args:
        at_s: seconds from the beginning.
        width: pixels, to which a wider one is scaled.

    Raises:
        VideoError: it cannot be read, or has no frame there.
    """
    content = bytearray()
    _check_regular(path)
    scaled = ["-vf", f"scale='min({width},iw)':-2:flags=area", "-frames:v", "1", "-pix_fmt", "rgb24", "-c:v", "ppm"]
    source = [*_INPUT, "-ss", f"{at_s:.3f}", "-i", file_url(path), "-map", "0:v:0"]
    run_ffmpeg([*source, *scaled, "-f", "image2pipe", "pipe:1"], content.extend)
    header = _PPM_HEADER.match(content)
    if header is None:
        raise VideoError("it has no frame there")
    width, height = int(header[1]), int(header[2])
    if len(content) < header.end() + height * width * 3:
        raise VideoError("its frame is cut")
    return np.frombuffer(content, np.uint8, height * width * 3, header.end()).reshape(height, width, 3)


def read_fps(path: Path | str) -> float:
    """Frames per second, as the file says.

    Raises:
        VideoError: it cannot be read, or says nothing.
    """
    _check_regular(path)
    said = run_ffmpeg(["-v", "info", *_INPUT, "-i", file_url(path), "-map", "0:v:0", "-t", "0", "-f", "null", "-"])
    found = _FPS.search(said)
    if found is None or not float(found[1]) > 0:
        raise VideoError("it has no frame rate")
    return float(found[1])


def read_metadata(path: Path | str, source: Sequence[str] = _INPUT) -> dict[str, Any]:
    """The JSON that `write_video` put into the comment tag; empty where there is none that can be used.

    Args:
        source: ffmpeg's options for reading the file.
    """
    text = bytearray()

    def take(piece: bytes) -> None:
        text.extend(piece)
        if len(text) > 2 * MAX_JSON_BYTES:  # each character may be escaped
            raise VideoError("its tags are too long")

    try:
        _check_regular(path)
        run_ffmpeg([*source, "-i", file_url(path), "-f", "ffmetadata", "pipe:1"], take)
        for line in _METADATA_LINE.finditer(text.decode()):
            if line[1].startswith("comment="):
                record = parse_json(re.sub(r"\\(.)", r"\1", line[1].removeprefix("comment="), flags=re.DOTALL))
                json.dumps(record, ensure_ascii=False).encode()  # half a character would not get into the sidecar
                return record if isinstance(record, dict) else {}
    except (VideoError, ValueError):
        pass
    return {}


def _check_regular(path: Path | str) -> None:
    """A FIFO would be read for ever.

    Raises:
        VideoError: it is not there, or not a regular file.
    """
    try:
        mode = Path(path).stat().st_mode
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise VideoError(getattr(error, "strerror", None) or str(error)) from None
    if not stat.S_ISREG(mode):
        raise VideoError("it is not a regular file")
