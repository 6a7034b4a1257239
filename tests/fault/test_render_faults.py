"""`cineray render` as a process of its own: full disks and interrupts. What may be lost: the clip in flight."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import imageio_ffmpeg
import pytest
from gang_runs import render, start_driver, steps_on_disk, write_manifest
from waiting import PATIENCE_S, wait_for

pytestmark = pytest.mark.process

SMALL = ["--width", "32", "--height", "32", "--frames", "5"]


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "cineray", "render", *map(str, arguments), *SMALL]


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONSAFEPATH": "1"}  # the repository's folders are no top-level packages


def test_ctrl_c_leaves_whole_clips_only_and_a_rerun_continues(checkpoint_folder, tmp_path, capsys):
    model, out = checkpoint_folder("wan"), tmp_path / "out"
    manifest = tmp_path / "m.jsonl"
    manifest.write_text("".join(json.dumps({"prompt": "a red circle", "seed": i}) + "\n" for i in range(500)))
    run = start_driver(manifest, out, model, "--steps", 8)
    assert wait_for(lambda: len(list(out.glob("*.mp4"))) >= 2 or run.poll() is not None)
    run.send_signal(signal.SIGINT)
    _, stderr = run.communicate(timeout=PATIENCE_S)
    assert run.returncode == 130, stderr
    assert stderr.strip().splitlines()[-1].startswith("cineray: interrupted; finished clips are kept")
    assert "Traceback" not in stderr
    videos = sorted(out.glob("*.mp4"))
    assert 2 <= len(videos) < 500
    for video in videos:
        assert imageio_ffmpeg.count_frames_and_secs(str(video))[0] == 5
    assert not (out / ".tmp").exists()

    manifest.write_text("".join(manifest.read_text().splitlines(keepends=True)[: len(videos) + 1]))
    code, again, stderr = render(capsys, manifest, out, model, "--steps", 8)
    assert code == 0, stderr
    assert [clip["status"] for clip in again["clips"]] == ["existing"] * len(videos) + ["done"]


def test_sigterm_in_the_middle_of_a_clip_keeps_its_steps(checkpoint_folder, tmp_path, capsys):
    model, out = checkpoint_folder("wan"), tmp_path / "out"
    manifest = write_manifest(tmp_path / "m.jsonl", ["a"], 300)
    run = start_driver(manifest, out, model, "--checkpoint-every", 0)
    assert wait_for(lambda: steps_on_disk(out, "a") or run.poll() is not None)
    run.send_signal(signal.SIGTERM)
    stdout, stderr = run.communicate(timeout=PATIENCE_S)
    assert run.returncode == 143, stderr
    assert json.loads(stdout.splitlines()[-1])["clips"] == []
    code, again, stderr = render(capsys, manifest, out, model, "--checkpoint-every", 0)
    assert code == 0, stderr
    (step,) = again["clips"][0]["resumed_at"]
    assert 0 < step < 300
    assert not (out / ".state").exists()


def in_tmpfs(folder: Path, size_kib: int, script: str) -> subprocess.CompletedProcess[str] | None:
    """Runs a shell script with a small tmpfs on `folder` in a mount namespace of its own; None where it may not."""
    unshare = ["unshare", "--mount"] if os.geteuid() == 0 else ["unshare", "--user", "--map-root-user", "--mount"]
    mount = f"mount -t tmpfs -o size={size_kib}k tmpfs {folder}"
    if shutil.which("unshare") is None or subprocess.run([*unshare, "sh", "-c", mount], capture_output=True).returncode:
        return None
    return subprocess.run(
        [*unshare, "sh", "-c", f"{mount} && {script}"],
        capture_output=True,
        text=True,
        env=environment(),
        timeout=PATIENCE_S,
    )


@pytest.mark.parametrize("on_ray", [(), pytest.param(("--gangs", 2), marks=[pytest.mark.ray, pytest.mark.exhaustive])])
def test_a_full_disk_ends_the_run_with_one_line_and_no_half_clip(checkpoint_folder, tmp_path, on_ray):
    out, num_clips = tmp_path / "out", 12 if on_ray else 5
    out.mkdir()
    run = " ".join(
        command(
            *["'a red circle'"] * num_clips,
            *("--out", out, "--model", checkpoint_folder("wan"), "--steps", 2, "--lossless", *on_ray),
        )
    )
    # On Ray the prompt of two branches in float32 lies there too, and the latents of clips that are under way: up to
    # ten pages of 4 KiB, where a clip takes about four. Enough for some clips, not for all.
    size_kib = 512 * 64 * 4 * 2 // 1024 + 96 if on_ray else 48
    done = in_tmpfs(out, size_kib, f"{run}; echo code $?; ls -A {out}; rm -f {out}/*.mp4")
    if done is None:
        pytest.skip("this system does not let the test mount a tmpfs")
    code, *left = done.stdout.splitlines()
    assert code == "code 2", done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith(f"cineray: output folder {out}: the disk is full (")
    assert last.endswith("make room and run the same command again")
    assert "Traceback" not in done.stderr
    assert ".tmp" not in left
    assert any(name.endswith(".mp4") for name in left)  # the clips before it stay
    assert len([name for name in left if name.endswith(".mp4")]) < num_clips
