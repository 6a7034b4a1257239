"""Videos as players decode them, tags that come back, and an ffmpeg that can neither hang a run nor be told lies."""

import os
import re
import stat
import subprocess
import sys
import threading
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import pytest
from waiting import PATIENCE_S

from cineray.pipeline.media.ffmpeg import run_ffmpeg
from cineray.pipeline.media.video import VideoError, check_ffmpeg, count_frames, read_metadata, read_video, write_video
from cineray.pipeline.request import InputError

pytestmark = pytest.mark.process

BARS = [(255, 255, 255), (255, 255, 0), (0, 255, 255), (0, 255, 0), (255, 0, 255), (255, 0, 0), (0, 0, 255), (0, 0, 0)]
TEXTS = [
    "",
    " leading and trailing ",
    "a\nb\r\nc\rd",
    "\n",
    "ends in \\",
    "\\\\\n\\",
    ";a #b =c \\d",
    ";FFMETADATA1\n[CHAPTER]\nSTART=0\ntitle=x",
    "\u2028 \u2029 \x85 \x0b \x0c \x1c \x1e",
    "\x1b[31m \x07 \x7f \x9b",
    "%d %s $(id) `id` '\" \ufeff \u202e",
    "\N{CLAPPER BOARD}" * 20_000,
]


def bars(width: int, height: int) -> np.ndarray:
    """Two frames of eight vertical bars."""
    row = np.repeat(np.array(BARS, np.uint8), width // 8, axis=0)
    return np.broadcast_to(row, (2, height, width, 3))


def ffmpeg(*arguments: object) -> subprocess.CompletedProcess[bytes]:
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-nostdin", "-hide_banner", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, check=False, stdin=subprocess.DEVNULL, timeout=PATIENCE_S)


def as_a_player(video: Path, width: int, height: int) -> np.ndarray:
    """The first frame, decoded from its planes by the arithmetic of ITU-R BT.709-6, item 3, in limited range."""
    raw = ffmpeg("-v", "error", "-i", video, "-f", "rawvideo", "-pix_fmt", "yuv420p", "-").stdout
    planes = np.frombuffer(raw, np.uint8)[: width * height * 3 // 2].astype(np.float64)
    y, cb, cr = np.split(planes, [width * height, width * height * 5 // 4])
    y = (y.reshape(height, width) - 16) / 219
    cb, cr = (((c - 128) / 224).reshape(height // 2, width // 2).repeat(2, 0).repeat(2, 1) for c in (cb, cr))
    red, blue = y + 1.5748 * cr, y + 1.8556 * cb
    green = (y - 0.2126 * red - 0.0722 * blue) / 0.7152
    return (np.stack([red, green, blue], axis=-1).clip(0, 1) * 255).round()


@pytest.mark.parametrize(("width", "height"), [(64, 64), (832, 480), (1280, 720)])
def test_a_player_shows_the_colours_that_were_rendered(tmp_path, width, height):
    video, frames = tmp_path / "bars.mp4", bars(width, height)
    write_video(frames, video, 8, {})
    assert np.abs(as_a_player(video, width, height) - frames[0]).max() <= 2  # BT.601 without tags: 39
    assert np.abs(read_video(video).astype(int) - frames).max() <= 4  # swscale's short way from YUV cuts off
    assert "yuv420p(tv, bt709, progressive)" in ffmpeg("-i", video).stderr.decode()
    assert colour_atom(video) == (1, 1, 1, 0)


def colour_atom(video: Path) -> tuple[int, int, int, int]:
    """(primaries, transfer, matrix, full range) of the file itself: ISO 14496-12, 12.1.5."""
    content = video.read_bytes()
    atom = content[content.index(b"colrnclx") + 8 :]
    numbers = (int.from_bytes(atom[i : i + 2], "big") for i in (0, 2, 4))
    primaries, transfer, matrix = numbers
    return primaries, transfer, matrix, atom[6] >> 7


def test_lossless_frames_are_exact_and_tagged_as_what_they_are(tmp_path):
    video = tmp_path / "x.mp4"
    frames = np.random.default_rng(0).integers(0, 256, (3, 32, 48, 3), dtype=np.uint8)
    write_video(frames, video, 8, {}, lossless=True)
    assert np.array_equal(read_video(video), frames)
    assert "gbrp(pc, gbr/bt709/iec61966-2-1, progressive)" in ffmpeg("-i", video).stderr.decode()


def test_a_video_without_tags_is_read_as_bt601(tmp_path):
    """So were all that earlier versions wrote."""
    video = tmp_path / "old.mp4"
    frames = bars(64, 64)
    source = ("-f", "rawvideo", "-pix_fmt", "rgb24", "-video_size", "64x64", "-framerate", "8", "-i", "pipe:0")
    matrix = ("-vf", "scale=out_color_matrix=bt601:out_range=tv,format=yuv420p,setparams=colorspace=unknown")
    output = (*matrix, "-c:v", "libx264", "-crf", "1", str(video))
    run_ffmpeg([*source, *output], stdin=[np.ascontiguousarray(frames).data])
    assert "bt709" not in ffmpeg("-i", video).stderr.decode()
    assert np.abs(read_video(video).astype(int) - frames).max() <= 6


@pytest.mark.parametrize("text", TEXTS, ids=range(len(TEXTS)))
def test_any_text_comes_back_from_the_tags(tmp_path, text):
    record = {"prompt": text, "negative_prompt": text, "n": [1, {"a": None}]}
    write_video(np.zeros((1, 16, 16, 3), np.uint8), tmp_path / "x.mp4", 8, record)
    assert read_metadata(tmp_path / "x.mp4") == record
    assert os.listdir(tmp_path) == ["x.mp4"]
    tags = ffmpeg("-v", "error", "-i", tmp_path / "x.mp4", "-f", "ffmetadata", "-").stdout.decode()
    titles = re.findall(r"^title=((?:[^\\\n]|\\.)*)", tags, re.MULTILINE | re.DOTALL)
    title = text.replace("\r\n", "\n").replace("\r", "\n")
    assert [re.sub(r"\\(.)", r"\1", found, flags=re.DOTALL) for found in titles] == [title] * bool(title)


def test_nothing_of_the_prompt_is_in_the_process_list(tmp_path):
    seen: list[bytes] = []
    record = {"prompt": "a secret circle"}

    def frames_of(path: Path):
        for _ in range(3):
            for process in Path("/proc").glob("[0-9]*/cmdline"):
                try:
                    command = process.read_bytes()
                except OSError:
                    continue
                if os.fsencode(path) in command:
                    seen.append(command)
            yield np.zeros((16, 16, 3), np.uint8)

    class Frames:
        shape = (3, 16, 16, 3)

        def __iter__(self):
            return frames_of(tmp_path / "x.mp4")

    if not Path("/proc/self/cmdline").exists():
        pytest.skip("no /proc here")
    write_video(Frames(), tmp_path / "x.mp4", 8, record)  # type: ignore[arg-type]  # frames that come one by one
    assert seen
    assert not any(b"secret" in command for command in seen)
    assert read_metadata(tmp_path / "x.mp4") == record


@pytest.mark.parametrize(
    "comment",
    ["", "[1]", "3", "null", "{", "{" * 5, "[" * 100_000, '"text"', '{"a": "\\ud800"}', '{"a": ' + "9" * 5000],
)
def test_a_comment_that_is_none_of_ours_is_no_record(tmp_path, comment):
    tags = ";FFMETADATA1\ncomment=" + re.sub(r"([=;#\\])", r"\\\1", comment)
    black = ["-f", "lavfi", "-i", "color=size=16x16:rate=1:duration=1"]
    metadata = ["-f", "ffmetadata", "-i", "pipe:0", "-map", "0:v", "-map_metadata", "1"]
    run_ffmpeg([*black, *metadata, str(tmp_path / "x.mp4")], stdin=[tags.encode()])
    assert read_metadata(tmp_path / "x.mp4") == {}


@pytest.mark.parametrize(
    "name",
    ["-y.mp4", "%d.mp4", "a:b", "http:x", "concat:a|b", "file:z", "pipe:1", "fd:", "q'\".mp4", "n\nl", "\udcff\udcfe"],
)
def test_a_path_is_a_path_whatever_its_name(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    write_video(np.full((1, 16, 16, 3), 7, np.uint8), Path(name), 8, {"prompt": "x"})
    assert os.listdir(tmp_path) == [name]
    assert read_metadata(Path(name)) == {"prompt": "x"}
    assert count_frames(Path(name)) == 1
    assert read_video(Path(name)).shape == (1, 16, 16, 3)


def test_what_is_no_video_is_one_line(tmp_path):
    whole, out = tmp_path / "whole.mp4", tmp_path / "out"
    write_video(np.random.default_rng(0).integers(0, 256, (5, 32, 32, 3), dtype=np.uint8), whole, 8, {})
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "folder").mkdir()
    for name, content in {
        "empty": b"",
        "text": b"hello" * 1000,
        "cut": whole.read_bytes()[:-200],
        "playlist": b"#EXTM3U\n#EXTINF:1\nwhole.mp4\n",
        "concat": b"ffconcat version 1.0\nfile whole.mp4\n",
    }.items():
        (tmp_path / name).write_bytes(content)
    for name in ("fifo", "folder", "empty", "text", "playlist", "concat", "none", "x" * 300, "nul\0"):
        with pytest.raises(VideoError, match="cannot read") as caught:
            read_video(tmp_path / name)
        assert "\n" not in str(caught.value)
        assert "0x" not in str(caught.value)
        assert read_metadata(tmp_path / name) == {}
    with pytest.raises(VideoError):
        count_frames(tmp_path / "cut")
    for bad in (tmp_path / "folder", out / "deeper.mp4"):
        with pytest.raises(VideoError, match="could not write"):
            write_video(np.zeros((1, 16, 16, 3), np.uint8), bad, 8, {})


@pytest.fixture
def other_ffmpeg(tmp_path, monkeypatch):
    """Factory: a script that stands for ffmpeg."""

    def stand_in(script: str) -> None:
        path = tmp_path / "ffmpeg"
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
        monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", str(path))

    return stand_in


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ("echo one >&2; echo two >&2; exit 3", r"one \| two \(exit 3\)"),
        ("head -c 100 >/dev/null; kill -9 $$", r"killed by signal 9"),
        ("yes bad | head -c 3000000 >&2; exit 1", r"bad \| bad \| bad \(exit 1\)"),
        ("exec cat >/dev/null", "No such file"),
    ],
)
def test_an_ffmpeg_that_fails_says_its_last_lines(tmp_path, other_ffmpeg, script, said):
    other_ffmpeg(script)
    with pytest.raises(VideoError, match=said):
        write_video(np.zeros((9, 256, 256, 3), np.uint8), tmp_path / "x.mp4", 8, {"prompt": "a" * 200_000})
    assert not (tmp_path / "x.mp4").exists()


def test_an_ffmpeg_that_hangs_is_killed(other_ffmpeg):
    other_ffmpeg("exec sleep 600")
    with pytest.raises(VideoError, match="did nothing for 1 s and was killed"):
        run_ffmpeg(["-i", "pipe:0"], stdin=[bytes(10_000_000)], stall_s=1)


def test_a_missing_ffmpeg_is_known_at_the_start(monkeypatch, tmp_path):
    check_ffmpeg()
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", "/nowhere/ffmpeg")
    with pytest.raises(InputError, match=r"ffmpeg cannot be used: .*/nowhere/ffmpeg.* cannot be started"):
        check_ffmpeg()
    assert read_metadata(tmp_path) == {}


def test_an_interrupt_leaves_no_half_video_and_no_process(tmp_path):
    num_threads = threading.active_count()

    class Interrupted:
        shape = (100, 64, 64, 3)

        def __iter__(self):
            for _ in range(50):
                yield np.zeros((64, 64, 3), np.uint8)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_video(Interrupted(), tmp_path / "x.mp4", 8, {})  # type: ignore[arg-type]
    assert os.listdir(tmp_path) == []
    assert threading.active_count() == num_threads


IN_BACKGROUND = """
import fcntl, os, signal, sys, termios
os.setsid()
terminal = os.open(sys.argv[1], os.O_RDWR)
fcntl.ioctl(terminal, termios.TIOCSCTTY, 0)
signal.signal(signal.SIGHUP, signal.SIG_IGN)
child = os.fork()
if child == 0:
    os.setpgid(0, 0)  # a job in the background: the terminal stays the leader's
    os.dup2(terminal, 0)
    import numpy as np
    from cineray.pipeline.media.video import count_frames, read_metadata, read_video, write_video
    write_video(np.zeros((2, 16, 16, 3), np.uint8), sys.argv[2], 8, {"prompt": "x"})
    assert count_frames(sys.argv[2]) == len(read_video(sys.argv[2])) == 2
    assert read_metadata(sys.argv[2]) == {"prompt": "x"}
    os._exit(7)
_, status = os.waitpid(child, os.WUNTRACED)
if os.WIFSTOPPED(status):
    os.killpg(child, signal.SIGKILL)
    sys.exit(f"stopped by {signal.Signals(os.WSTOPSIG(status)).name}")
sys.exit(os.waitstatus_to_exitcode(status))
"""


def test_a_job_in_the_background_of_a_terminal_is_not_stopped(tmp_path):
    """As `cineray render ... &` is: ffmpeg must not touch the terminal, or the shell's whole job is stopped for it."""
    main, terminal = os.openpty()
    try:
        run = subprocess.run(
            [sys.executable, "-c", IN_BACKGROUND, os.ttyname(terminal), str(tmp_path / "x.mp4")],
            capture_output=True,
            text=True,
            env=os.environ | {"PYTHONSAFEPATH": "1"},
            timeout=PATIENCE_S,
            check=False,
        )
    finally:
        os.close(main)
        os.close(terminal)
    assert run.returncode == 7, run.stderr
