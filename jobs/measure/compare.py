"""`cineray compare`: the same clips of two output folders, or two videos, pictures or sounds."""

from __future__ import annotations

import math
import os
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cineray.jobs.out_file import check_out, replacing
from cineray.jobs.output.folder import clip_of
from cineray.pipeline.media.compare import EQUAL_CLIPS_DB, MIN_SIDE, Scores, compare_frames
from cineray.pipeline.media.output import PICTURE, SUFFIXES, VIDEO, Sound, output_of
from cineray.pipeline.media.spectra import EQUAL_SOUNDS_DB, SoundScores, compare_sounds
from cineray.pipeline.media.video import VideoError, read_fps, write_video
from cineray.pipeline.request import InputError
from cineray.text import printable, shorten

_COMMAND = "compare"
_DIGITS = {"psnr": 3, "ssim": 6, "vmaf": 3, "xpsnr": 3}  # of frames
_DIGITS |= {"log_stft_db": 3, "stft_convergence": 6, "snr": 3}  # of sounds
_IS_DISTANCE = ("log_stft_db", "stft_convergence")  # the higher the worse

AnyScores = Scores | SoundScores


@dataclass(frozen=True, kw_only=True, slots=True)
class Pair:
    """One clip and what it is compared with."""

    id: str
    reference: Path
    video: Path


@dataclass(frozen=True, kw_only=True, slots=True)
class Pairing:
    """Clips of two folders by their ids.

    Args:
        only_a, only_b: ids that one folder alone has.
        ambiguous: ids of which a folder has several videos, as after a changed prompt: which one is meant is not known.
    """

    pairs: tuple[Pair, ...]
    only_a: tuple[str, ...] = ()
    only_b: tuple[str, ...] = ()
    ambiguous: tuple[str, ...] = ()

    def remarks(self, a: Path, b: Path) -> list[str]:
        """What is not compared, for a person."""
        said = [
            f"{len(ids)} clip{'' if len(ids) == 1 else 's'} {where}: {_named(ids)}"
            for ids, where in (
                (self.only_a, f"only in {a}"),
                (self.only_b, f"only in {b}"),
                (self.ambiguous, "with several videos of the same id, left out"),
            )
            if ids
        ]
        return [printable(line) for line in said]


def pair_videos(a: Path, b: Path, wanted: Sequence[str] = ()) -> Pairing:
    """What is to be compared with what.

    Args:
        a, b: two folders or two videos; `a` holds the references.
        wanted: ids; all that both folders have unless given.

    Raises:
        InputError: there is nothing to be compared.
    """
    kinds = [_is_folder(path) for path in (a, b)]
    if kinds[0] != kinds[1]:
        folder, video = (a, b) if kinds[0] else (b, a)
        raise InputError(f"{_COMMAND}: {folder} is a folder and {video} is a file; give two folders or two videos")
    if not kinds[0]:
        if wanted:
            raise InputError(f"{_COMMAND}: --clip names clips of two folders, and {a} is a file; leave it out")
        return Pairing(pairs=(Pair(id=_id_of(b.name), reference=a, video=b),))
    in_a, in_b = _videos(a), _videos(b)
    common = [name for name in in_a if name in in_b and (not wanted or name in wanted)]
    if lacking := [name for name in wanted if name not in common]:
        raise InputError(f"{_COMMAND}: no clip {shorten(lacking[0])} in both {a} and {b}; leave out --clip to see all")
    clear = [name for name in common if len(in_a[name]) == len(in_b[name]) == 1]
    found = Pairing(
        pairs=tuple(Pair(id=name, reference=in_a[name][0], video=in_b[name][0]) for name in clear),
        only_a=() if wanted else tuple(name for name in in_a if name not in in_b),
        only_b=() if wanted else tuple(name for name in in_b if name not in in_a),
        ambiguous=tuple(name for name in common if name not in clear),
    )
    if not found.pairs:
        why = "; ".join(found.remarks(a, b)) or "neither has a video"
        raise InputError(f"{_COMMAND}: {a} and {b} have no clip that can be compared: {why}")
    return found


def is_sound(path: Path) -> bool:
    return isinstance(output_of(path), Sound)


def compare_pair(pair: Pair) -> tuple[AnyScores, np.ndarray, np.ndarray]:
    """(scores, frames or samples, those of the reference).

    Raises:
        InputError: a file cannot be read, or they are not of one kind, size and length.
    """
    try:
        if is_sound(pair.reference) and is_sound(pair.video):
            return _compare_sounds(pair)
        reference, frames = _frames(pair.reference), _frames(pair.video)
    except VideoError as error:
        raise InputError(f"{_COMMAND}: {error}") from None
    if frames.shape != reference.shape:
        raise InputError(
            f"{_COMMAND}: {pair.reference} has {_shape(reference)}, {pair.video} has {_shape(frames)}; "
            "only clips of the same size and length can be compared"
        )
    if min(frames.shape[1:3]) < MIN_SIDE:
        raise InputError(f"{_COMMAND}: {pair.video} has {_shape(frames)}; VMAF needs sides of at least {MIN_SIDE}")
    try:
        return compare_frames(frames, reference), frames, reference
    except VideoError as error:
        raise InputError(f"{_COMMAND}: {error}; let IMAGEIO_FFMPEG_EXE name an ffmpeg with libvmaf and xpsnr") from None


def _frames(path: Path) -> np.ndarray:
    if is_sound(path):
        raise InputError(f"{_COMMAND}: {path} is a sound, and is compared with sounds alone")
    return (output_of(path) or VIDEO).read(path)


def _compare_sounds(pair: Pair) -> tuple[SoundScores, np.ndarray, np.ndarray]:
    (reference, rate), (samples, other_rate) = _samples(pair.reference), _samples(pair.video)
    if (samples.shape, other_rate) != (reference.shape, rate):
        raise InputError(
            f"{_COMMAND}: {pair.reference} has {_heard(reference, rate)}, {pair.video} has "
            f"{_heard(samples, other_rate)}; only sounds of the same length, channels and rate can be compared"
        )
    if not samples.size:
        raise InputError(f"{_COMMAND}: {pair.video} has no samples")
    return compare_sounds(samples, reference), samples, reference


def _samples(path: Path) -> tuple[np.ndarray, int]:
    output = output_of(path)
    assert isinstance(output, Sound)
    try:
        return output.samples(path)
    except VideoError as error:
        raise InputError(f"{_COMMAND}: cannot read {path}: {error}") from None


def row(clip_id: str, scores: AnyScores) -> dict[str, object]:
    """A clip in `--json`; JSON has no infinity, so that equal clips have EQUAL_CLIPS_DB, as in `bench quality`."""
    return {"id": clip_id, **finite(scores), **({"equal": True} if scores.is_equal else {})}


def finite(scores: AnyScores) -> dict[str, float]:
    """The scores as JSON can hold them."""
    if isinstance(scores, SoundScores):
        values = {"log_stft_db": scores.log_stft_db, "stft_convergence": scores.stft_convergence}
        values["snr"] = min(scores.snr, EQUAL_SOUNDS_DB)
    else:
        psnr, xpsnr = min(scores.psnr, EQUAL_CLIPS_DB), min(scores.xpsnr, EQUAL_CLIPS_DB)
        values = {"psnr": psnr, "ssim": scores.ssim, "vmaf": scores.vmaf, "xpsnr": xpsnr}
    return {name: round(value, _DIGITS[name]) for name, value in values.items()}


def mean_and_worst(rows: Sequence[dict[str, float]]) -> tuple[dict[str, float], dict[str, float]]:
    """(mean, worst) of each metric over the clips that have it; each metric has its own worst clip."""
    columns = {name: [values[name] for values in rows if name in values] for name in _DIGITS}
    columns = {name: column for name, column in columns.items() if column}
    mean = {name: round(math.fsum(column) / len(column), _DIGITS[name]) for name, column in columns.items()}
    return mean, {name: (max if name in _IS_DISTANCE else min)(column) for name, column in columns.items()}


def check_video_out(out: Path, option: str) -> None:
    """Nothing if a video can be written there.

    Raises:
        InputError: it cannot.
    """
    if out.suffix != ".mp4":
        raise InputError(f"{_COMMAND}: {option} must end with .mp4, got {out}")
    check_out(out, f"{_COMMAND} {option}")


def write_frames(frames: np.ndarray, out: Path, source: Path, what: str) -> None:
    """Writes a video for the eye, in one step, at the speed of its source.

    Raises:
        InputError: it cannot be written.
    """
    _, height, width, _ = frames.shape
    even = np.pad(frames, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), mode="edge")  # as yuv420p wants it
    try:
        with replacing(out, _COMMAND) as temporary:
            fps = 1 if output_of(source) == PICTURE else max(1, round(read_fps(source)))
            write_video(even, temporary, fps, {"prompt": what})
    except VideoError as error:
        raise InputError(f"{_COMMAND}: {out}: {error}") from None


def _videos(folder: Path) -> dict[str, list[Path]]:
    """Paths by ids, in order; a video that is not named as in an output folder has its name for an id."""
    found: dict[str, list[Path]] = defaultdict(list)
    for name in sorted(os.listdir(folder)):
        if name.endswith(SUFFIXES) and not name.startswith(".") and (folder / name).is_file():
            found[_id_of(name)].append(folder / name)
    return dict(found)


def _id_of(name: str) -> str:
    clip = clip_of(name)
    return clip[0] if clip else next((name.removesuffix(end) for end in SUFFIXES if name.endswith(end)), name)


def _is_folder(path: Path) -> bool:
    try:
        path.stat()
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise InputError(f"{_COMMAND}: {path} cannot be read: {reason}; give two folders or two videos") from None
    return path.is_dir()


def _shape(frames: np.ndarray) -> str:
    num_frames, height, width, _ = frames.shape
    return f"{num_frames} frames of {width} x {height}"


def _heard(samples: np.ndarray, rate: int) -> str:
    return f"{len(samples)} samples of {samples.shape[1]} channel{'' if samples.shape[1] == 1 else 's'} at {rate} Hz"


def _named(ids: Sequence[str], limit: int = 5) -> str:
    return ", ".join(ids[:limit]) + (f" and {len(ids) - limit} more" if len(ids) > limit else "")
