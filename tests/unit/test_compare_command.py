"""`cineray compare`: numbers against ffmpeg's own, folders by ids, what cannot be compared."""

import json
import os
import re
import shutil

import numpy as np
import pytest

from cineray.jobs.cli.main import main
from cineray.pipeline.media.compare import DIFFERENCE_GAIN, psnr_db, vmaf_and_xpsnr
from cineray.pipeline.media.ffmpeg import run_ffmpeg
from cineray.pipeline.media.video import read_fps, read_still, read_video, write_video

pytestmark = pytest.mark.process

MARK = "0123456789ab"


def moving(seed=0, num_frames=5, height=48, width=64):
    """Smooth frames that move, [F, H, W, 3] uint8."""
    phase = np.random.default_rng(seed).uniform(0, 6, 3)
    f, y, x = np.meshgrid(np.arange(num_frames), np.arange(height), np.arange(width), indexing="ij")
    waves = [np.sin(x / 9 + y / 7 + f / 3 + p) for p in phase]
    return np.round(127 + 110 * np.stack(waves, axis=-1)).astype(np.uint8)


def noisy(frames, sigma, seed=1):
    noise = np.random.default_rng(seed).normal(0, sigma, frames.shape)
    return np.clip(frames + noise, 0, 255).round().astype(np.uint8)


def write(path, frames, **options):
    path.parent.mkdir(exist_ok=True)
    write_video(frames, path, 8, {"prompt": "a test"}, **{"lossless": True, **options})
    return path


@pytest.fixture
def compare(capsys):
    """Runs `cineray compare ... --json`: (exit code, the JSON object or None, stderr)."""

    def run(*words):
        capsys.readouterr()
        code = main(["compare", *map(str, words), "--json"])
        said = capsys.readouterr()
        last = said.out.strip().rsplit("\n", 1)[-1]
        return code, json.loads(last) if last.startswith("{") else None, said.err

    return run


def test_psnr_is_that_of_ffmpeg(tmp_path, compare):
    """Both on RGB, from the mean error of all frames."""
    a = write(tmp_path / "a.mp4", moving())
    b = write(tmp_path / "b.mp4", noisy(moving(), 6))
    _, found, _ = compare(a, b)
    graph = "[0:v]format=gbrp[a];[1:v]format=gbrp[b];[a][b]psnr"
    said = run_ffmpeg(["-v", "info", "-i", str(a), "-i", str(b), "-filter_complex", graph, "-f", "null", "-"])
    theirs = float(re.search(r"PSNR .*average:(\d+\.\d+)", said)[1])
    assert found["clips"][0]["psnr"] == pytest.approx(theirs, abs=0.01)
    assert 30 < theirs < 36


def test_xpsnr_and_vmaf_are_those_of_ffmpeg_on_the_files(tmp_path):
    """Files as yuv420p; ours decodes them to RGB and back, which costs rounding alone."""
    a = write(tmp_path / "a.mp4", moving(), lossless=False)
    b = write(tmp_path / "b.mp4", noisy(moving(), 12), lossless=False)
    vmaf, xpsnr = vmaf_and_xpsnr(read_video(b), read_video(a))
    files = ["-v", "info", "-i", str(a), "-i", str(b)]
    said = run_ffmpeg([*files, "-filter_complex", "[0:v][1:v]xpsnr", "-f", "null", "-"])
    said += run_ffmpeg([*files, "-filter_complex", "[1:v][0:v]libvmaf", "-f", "null", "-"])
    assert xpsnr == pytest.approx(float(re.search(r"minimum: ([\d.]+)", said)[1]), abs=0.3)
    assert vmaf == pytest.approx(float(re.search(r"VMAF score: ([\d.]+)", said)[1]), abs=1.0)


def test_more_noise_has_lower_scores(tmp_path, compare):
    clean = moving()
    write(tmp_path / "a" / f"x.{MARK}.mp4", clean)
    rows = []
    for sigma in (2, 8, 32):
        write(tmp_path / "b" / f"x.{MARK}.mp4", noisy(clean, sigma))
        rows.append(compare(tmp_path / "a", tmp_path / "b")[1]["clips"][0])
    for metric in ("psnr", "ssim", "vmaf", "xpsnr"):
        assert rows[0][metric] > rows[1][metric] > rows[2][metric]


def test_equal_videos_have_a_hundred_decibels_and_say_so(tmp_path, compare):
    a = write(tmp_path / "a.mp4", moving())
    b = write(tmp_path / "b.mp4", moving())
    code, found, _ = compare(a, b)
    assert code == 0
    (clip,) = found["clips"]
    assert (clip["id"], clip["psnr"], clip["xpsnr"], clip["ssim"], clip["equal"]) == ("b", 100.0, 100.0, 1.0, True)
    assert clip["vmaf"] > 95  # the model gives no clip quite 100
    assert found["mean"].keys() == found["worst"].keys() == {"psnr", "ssim", "vmaf", "xpsnr"}
    one = moving()
    one[0, 0, 0, 0] ^= 1
    assert "equal" not in compare(a, write(tmp_path / "c.mp4", one))[1]["clips"][0]


def test_folders_by_ids(tmp_path, compare):
    a, b = tmp_path / "a", tmp_path / "b"
    for name in ("one", "two", "only-a"):
        write(a / f"{name}.{MARK}.mp4", moving())
    write(b / f"one.{'f' * 12}.mp4", noisy(moving(), 4))  # another cache, so another fingerprint
    write(b / "two.mp4", noisy(moving(), 8))  # as another program names it
    write(b / f"only-b.{MARK}.mp4", moving())
    (b / "notes.txt").touch()
    code, found, err = compare(a, b)
    assert code == 0
    assert [clip["id"] for clip in found["clips"]] == ["one", "two"]
    assert (found["only_a"], found["only_b"]) == (["only-a"], ["only-b"])
    assert f"1 clip only in {a}: only-a" in err
    assert f"1 clip only in {b}: only-b" in err
    for metric in ("psnr", "ssim", "vmaf", "xpsnr"):
        values = [clip[metric] for clip in found["clips"]]
        assert found["mean"][metric] == pytest.approx(sum(values) / 2, abs=1e-3)
        assert found["worst"][metric] == min(values)


def test_of_an_id_with_several_videos_none_is_chosen(tmp_path, compare):
    a, b = tmp_path / "a", tmp_path / "b"
    for folder, mark in ((a, "1" * 12), (a, "2" * 12), (b, "1" * 12)):
        write(folder / f"one.{mark}.mp4", moving())
        write(folder / f"two.{MARK}.mp4", moving())
    _, found, err = compare(a, b)
    assert [clip["id"] for clip in found["clips"]] == ["two"]
    assert found["ambiguous"] == ["one"]
    assert "several videos of the same id" in err


def test_a_pair_that_does_not_fit_costs_that_pair_alone(tmp_path, compare):
    a, b = tmp_path / "a", tmp_path / "b"
    for name in ("one", "two", "three"):
        write(a / f"{name}.{MARK}.mp4", moving())
    write(b / f"one.{MARK}.mp4", moving())
    write(b / f"two.{MARK}.mp4", moving(num_frames=9))
    (b / f"three.{MARK}.mp4").write_bytes(b"no video")
    code, found, err = compare(a, b)
    assert code == 1
    assert [clip["id"] for clip in found["clips"]] == ["one"]
    assert [clip["id"] for clip in found["failed"]] == ["three", "two"]
    assert "5 frames of 64 x 48" in err
    assert "9 frames of 64 x 48" in err
    assert "cannot read" in err


BAD = {
    "size": "5 frames of 64 x 48, {b} has 5 frames of 32 x 48",
    "length": "5 frames of 64 x 48, {b} has 4 frames of 64 x 48",
    "small": "VMAF needs sides of at least 17",
    "no video": "cannot read {b}",
    "nothing": "cannot be read: No such file or directory",
    "folder": "is a folder and {a} is a file",
    "fifo": "it is not a regular file",
}


@pytest.mark.parametrize("kind", BAD)
def test_what_cannot_be_compared_is_told_in_one_line(tmp_path, compare, kind):
    a, b = write(tmp_path / "a.mp4", moving()), tmp_path / "b.mp4"
    frames = {"size": moving(width=32), "length": moving(num_frames=4), "small": moving(height=16)}
    if kind in frames:
        write(b, frames[kind])
    elif kind == "no video":
        b.write_text("#EXTM3U")
    elif kind == "folder":
        b.mkdir()
    elif kind == "fifo":
        os.mkfifo(b)
    if kind == "small":
        write(a, frames[kind])
    code, found, err = compare(a, b)
    assert (code, found, err.count("\n")) == (2, None, 1)
    assert BAD[kind].format(a=a, b=b) in err


def test_folders_without_a_common_clip(tmp_path, compare):
    write(tmp_path / "a" / f"one.{MARK}.mp4", moving())
    (tmp_path / "b").mkdir()
    code, _, err = compare(tmp_path / "a", tmp_path / "b")
    assert (code, err.count("\n")) == (2, 1)
    assert "no clip that can be compared: 1 clip only in" in err
    code, _, err = compare(tmp_path / "b", tmp_path / "b")
    assert (code, err.count("\n")) == (2, 1)
    code, _, err = compare(tmp_path / "a", tmp_path / "a", "--clip", "two")
    assert (code, err.count("\n")) == (2, 1)
    assert "no clip 'two' in both" in err


def test_both_beside_each_other_and_their_difference(tmp_path, compare):
    clean = moving(height=47, width=63)  # odd sides, which an MP4 of yuv420p cannot have
    apart = clean.copy()
    apart[:, :20] = np.clip(apart[:, :20].astype(int) + 12, 0, 255)
    a, b = tmp_path / "a", tmp_path / "b"
    for folder, frames in ((a, clean), (b, apart)):
        for name in ("one", "two"):
            write(folder / f"{name}.{MARK}.mp4", frames)
    both, difference = tmp_path / "both.mp4", tmp_path / "apart.mp4"
    code, _, err = compare(a, b, "--side-by-side", both)
    assert (code, both.exists()) == (2, False)
    assert "shows one clip, and there are 2" in err
    code, found, _ = compare(a, b, "--clip", "one", "--side-by-side", both, "--difference", difference)
    assert (code, len(found["clips"])) == (0, 1)
    assert read_video(both).shape == (5, 48, 126, 3)
    left, right = (read_video(both)[:, :47, begin : begin + 63] for begin in (0, 63))
    assert psnr_db(left, clean) > psnr_db(right, clean) + 1 > 20  # the reference is on the left
    assert read_fps(both) == 8
    shown = read_video(difference)[:, :47, :63].astype(int)
    wanted = np.abs(apart.astype(int) - clean) * DIFFERENCE_GAIN
    assert np.abs(shown - wanted)[:, 4:16].mean() < 4  # but for H.264
    assert shown[:, 28:].mean() < 2
    assert sorted(os.listdir(tmp_path)) == ["a", "apart.mp4", "b", "both.mp4"]


@pytest.mark.parametrize("out", ["x.avi", "no/such.mp4", "folder.mp4"])
def test_a_video_that_cannot_be_written_is_told_before_anything_is_read(tmp_path, compare, out):
    (tmp_path / "folder.mp4").mkdir()
    a = write(tmp_path / "a.mp4", moving())
    before = sorted(os.listdir(tmp_path))
    code, _, err = compare(a, a, "--difference", tmp_path / out)
    assert (code, err.count("\n")) == (2, 1)
    assert "--difference" in err
    assert sorted(os.listdir(tmp_path)) == before


def test_a_still_is_the_frame_of_its_time(tmp_path):
    frames = moving(num_frames=9, width=256)
    path = write(tmp_path / "a.mp4", frames)
    assert np.array_equal(read_still(path, 4 / 8, 1000), frames[4])
    assert read_still(path, 0, 128).shape == (24, 128, 3)
    shutil.copy(path, tmp_path / "odd %d name.mp4")
    assert np.array_equal(read_still(tmp_path / "odd %d name.mp4", 1.0, 1000), frames[8])
