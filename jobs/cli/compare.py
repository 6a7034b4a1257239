"""The command that says how far videos are apart."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from cineray.jobs.cli.exit_codes import EXIT_DONE, EXIT_FAILED_CLIPS
from cineray.jobs.cli.options import json_option
from cineray.jobs.console.terminal import print_json, print_table, tell
from cineray.text import printable

if TYPE_CHECKING:
    from cineray.jobs.measure.compare import AnyScores

_PATH = click.Path(path_type=Path)
_COLUMNS = {  # metric -> (head, format)
    "psnr": ("PSNR dB", ".2f"),
    "ssim": ("SSIM", ".4f"),
    "vmaf": ("VMAF", ".2f"),
    "xpsnr": ("XPSNR dB", ".2f"),
    "log_stft_db": ("log STFT dB", ".2f"),
    "stft_convergence": ("STFT convergence", ".4f"),
    "snr": ("SNR dB", ".2f"),
}


@click.command()
@click.argument("a", type=_PATH, metavar="A")
@click.argument("b", type=_PATH, metavar="B")
@click.option("--clip", "clips", multiple=True, metavar="ID", help="Of two folders, these clips only; repeatable.")
@click.option(
    "--side-by-side", type=_PATH, metavar="FILE.mp4", help="Write both clips beside each other, A on the left."
)
@click.option("--difference", type=_PATH, metavar="FILE.mp4", help="Write their difference, eight times as large.")
@json_option
def compare(
    a: Path, b: Path, clips: tuple[str, ...], side_by_side: Path | None, difference: Path | None, as_json: bool
) -> int:
    """Compares two videos, pictures or sounds, or the clips of two folders by their ids.

    Of videos and pictures PSNR, SSIM, VMAF and XPSNR; of sounds (WAV, FLAC) how far their spectra are apart at three
    resolutions, in dB and as a share of the reference, where 0 is equal, and the SNR of their samples. A is the
    reference. Clips that are equal in every pixel or sample have 100 dB of PSNR, XPSNR and SNR. Exit code 1 if a pair
    could not be compared.

    \b
    Examples:
      cineray compare out/uncached out/cached
      cineray compare out/uncached out/cached --clip square --side-by-side both.mp4 --difference apart.mp4
      cineray compare a.mp4 b.mp4 --json
      cineray compare a.wav b.flac
    """
    from cineray.jobs.console.measure import progress_bar
    from cineray.jobs.measure.compare import (
        check_video_out,
        compare_pair,
        finite,
        is_sound,
        mean_and_worst,
        pair_videos,
        row,
        write_frames,
    )
    from cineray.pipeline.media.compare import difference as frames_apart
    from cineray.pipeline.media.compare import side_by_side as frames_beside
    from cineray.pipeline.request import InputError

    paired = pair_videos(a, b, clips)
    asked = [("--side-by-side", side_by_side, frames_beside), ("--difference", difference, frames_apart)]
    wanted = [(option, out, make) for option, out, make in asked if out is not None]
    for option, out, _ in wanted:
        if len(paired.pairs) > 1:
            raise InputError(f"compare: {option} shows one clip, and there are {len(paired.pairs)}; give one --clip ID")
        if heard := [pair.video for pair in paired.pairs if is_sound(pair.video)]:
            raise InputError(f"compare: {option} shows frames, and {heard[0]} is a sound; leave it out")
        check_video_out(out, option)
    tell(*(f"cineray compare: {remark}" for remark in paired.remarks(a, b)))
    found: dict[str, AnyScores] = {}
    failed: dict[str, str] = {}
    with progress_bar("clips", len(paired.pairs)) as on_clip:
        for number, pair in enumerate(paired.pairs, 1):
            try:
                found[pair.id], frames, reference = compare_pair(pair)
            except InputError as error:
                if len(paired.pairs) == 1:
                    raise
                failed[pair.id] = str(error)
                tell(f"cineray: {error}")
            else:
                for option, out, make in wanted:
                    write_frames(make(frames, reference), out, pair.video, f"{option.strip('-')} of {pair.id}")
            on_clip(number)
    if not found:
        raise InputError(f"compare: none of {len(paired.pairs)} pairs could be compared")
    mean, worst = mean_and_worst([finite(scores) for scores in found.values()])
    _print(found, mean, worst)
    if as_json:
        content = {"clips": [row(name, scores) for name, scores in found.items()], "mean": mean, "worst": worst}
        left_out = {"only_a": paired.only_a, "only_b": paired.only_b, "ambiguous": paired.ambiguous}
        content |= {name: list(ids) for name, ids in left_out.items() if ids}
        print_json(content | ({"failed": [{"id": n, "error": e} for n, e in failed.items()]} if failed else {}))
    return EXIT_FAILED_CLIPS if failed else EXIT_DONE


def _print(found: "dict[str, AnyScores]", mean: dict[str, float], worst: dict[str, float]) -> None:
    from rich.table import Table
    from rich.text import Text

    from cineray.jobs.measure.compare import finite

    columns = [name for name in _COLUMNS if name in mean]
    table = Table("clip", *(_COLUMNS[name][0] for name in columns), "", box=None)
    named = [(name, finite(scores), "equal" if scores.is_equal else "") for name, scores in found.items()]
    rest = [("mean", mean, ""), ("worst", worst, "")] if len(named) > 1 else []
    for name, values, note in [*named, *rest]:
        numbers = [f"{values[column]:{_COLUMNS[column][1]}}" if column in values else "" for column in columns]
        table.add_row(Text(printable(name)), *numbers, note)
    print_table(table)
