"""What stands under a clip's final name: taken for the clip only where it is, and replaced only by a whole one."""

import errno
import json
import os
import shutil
from dataclasses import replace

import pytest

from cineray.jobs.cli.main import main
from cineray.jobs.output import commit as commit_module
from cineray.jobs.output.commit import Doubt, EntryError, commit_clip, find_clip
from cineray.jobs.output.folder import OutputError, OutputFolder
from cineray.jobs.output.record import clip_record, render_options
from cineray.pipeline.media import output as output_module
from cineray.pipeline.media.video import count_frames, read_metadata
from cineray.pipeline.render import render_clip
from cineray.pipeline.request import ClipRequest

pytestmark = pytest.mark.process

MARK = "0123456789ab"
SMALL = ["--width", "32", "--height", "32", "--frames", "5", "--steps", "2", "--fps", "8"]


@pytest.fixture(scope="module")
def rendered(loaded):
    """A clip with a cache, its request and its record."""
    sizes = {"width": 32, "height": 32, "num_frames": 5, "num_inference_steps": 2, "guidance_scale": 4.0, "fps": 8}
    model, request = loaded("wan"), ClipRequest(id="1", prompt="a red circle", cache="fbcache(threshold=0.1)", **sizes)
    clip = render_clip(model, request, lambda done, total: None)
    return clip, request, clip_record(request, MARK, model, render_options(model.options, False), clip)


@pytest.fixture
def committed(rendered, tmp_path):
    """Factory of a folder with that clip: (folder, request, video, record)."""
    clip, request, record = rendered

    def commit(out=tmp_path / "out"):
        folder = OutputFolder(out)
        return folder, request, commit_clip(folder, request, MARK, clip, record, lossless=False), record

    return commit


def test_a_clip_that_is_known_is_neither_read_nor_decoded(committed, monkeypatch):
    folder, request, video, record = committed()
    monkeypatch.setattr(commit_module, "_proof_of", lambda *_: pytest.fail("the video was read"))
    for name in ("count_frames", "read_metadata"):
        monkeypatch.setattr(output_module, name, lambda *_: pytest.fail("the video was read"))
    found = find_clip(folder, request, MARK)
    assert isinstance(found, dict)
    assert found.pop("timings").keys() == {"encode_s", "denoise_s", "decode_s", "write_s"}
    assert found.pop("video")["bytes"] == video.stat().st_size
    assert found == record


def test_a_copied_folder_is_read_once(committed, monkeypatch):
    folder, request, video, _ = committed()
    os.utime(video, (1, 1))
    before = find_clip(folder, request, MARK)
    assert isinstance(before, dict)
    assert before["video"]["mtime_ns"] == 10**9
    monkeypatch.setattr(commit_module, "_proof_of", lambda *_: pytest.fail("the video was read again"))
    assert find_clip(folder, request, MARK) == before


BROKEN = [None, "", '{"id": ', "[1]", "7", "null", '{"trace": null}', "[" * 100_000, '{"fingerprint": "ba9876543210"}']


@pytest.mark.parametrize("broken", BROKEN, ids=range(len(BROKEN)))
def test_a_sidecar_that_is_gone_or_not_ours_is_made_anew_from_the_video(committed, broken):
    folder, request, video, record = committed()
    sidecar = video.with_suffix(".json")
    known = json.loads(sidecar.read_text())["video"]
    sidecar.unlink() if broken is None else sidecar.write_text(broken)
    assert find_clip(folder, request, MARK) == record | {"video": known}
    assert json.loads(sidecar.read_text()) == record | {"video": known}


def test_a_sidecar_of_an_earlier_version_keeps_what_it_says(committed):
    folder, request, video, _ = committed()
    sidecar = video.with_suffix(".json")
    now = json.loads(sidecar.read_text())
    sidecar.write_text(json.dumps({name: value for name, value in now.items() if name != "video"}))
    assert find_clip(folder, request, MARK) == now
    assert json.loads(sidecar.read_text()) == now


@pytest.mark.parametrize("kind", ["link", "FIFO"])
def test_a_sidecar_that_is_no_file_is_replaced_unread(committed, tmp_path, kind):
    folder, request, video, record = committed()
    other = tmp_path / "other.json"
    shutil.copy(video.with_suffix(".json"), other)
    before = other.read_bytes()
    video.with_suffix(".json").unlink()
    video.with_suffix(".json").symlink_to(other) if kind == "link" else os.mkfifo(video.with_suffix(".json"))
    found = find_clip(folder, request, MARK)
    assert isinstance(found, dict)
    assert found["prompt"] == record["prompt"]
    assert "timings" not in found  # of the file behind the link
    assert not video.with_suffix(".json").is_symlink()
    assert other.read_bytes() == before


def damaged(name, video):
    content = bytearray(video.read_bytes())
    if name == "empty":
        return b""
    if name == "cut":
        return bytes(content[: len(content) // 2])
    if name == "longer":
        return bytes(content) + b"\0"
    if name == "a bit":
        content[-200] ^= 16
    if name == "zeroes":
        content[-300:-100] = bytes(200)
    if name == "another file":
        return b"no video".ljust(len(content))
    return bytes(content)


@pytest.mark.parametrize("damage", ["empty", "cut", "longer", "a bit", "zeroes", "another file"])
def test_a_video_that_is_not_what_was_written_is_rendered_again_and_replaced(committed, rendered, damage):
    folder, request, video, record = committed()
    whole = video.read_bytes()
    video.write_bytes(damaged(damage, video))
    assert isinstance(find_clip(folder, request, MARK), Doubt)
    assert isinstance(find_clip(folder, request, MARK), Doubt)  # looking alone forgets nothing
    commit_clip(folder, request, MARK, rendered[0], record, lossless=False)
    assert video.read_bytes() == whole
    assert isinstance(find_clip(folder, request, MARK), dict)
    assert list((folder.path / ".tmp").iterdir()) == []


@pytest.mark.parametrize("damage", ["empty", "cut", "another file"])
def test_without_a_sidecar_a_video_is_decoded(committed, damage):
    folder, request, video, _ = committed()
    video.write_bytes(damaged(damage, video))
    video.with_suffix(".json").unlink()
    assert isinstance(find_clip(folder, request, MARK), Doubt)


def test_without_a_sidecar_a_video_of_another_clip_is_not_this_one(committed):
    folder, request, video, _ = committed()
    for other, mark in ((request, "ba9876543210"), (replace(request, num_frames=9), MARK)):
        if mark != MARK:
            shutil.copy(video, folder.video_path(other, mark))
        folder.video_path(other, mark).with_suffix(".json").unlink(missing_ok=True)
        assert isinstance(find_clip(folder, other, mark), Doubt)


def put(kind, path, target):
    if kind == "link":
        path.symlink_to(target)
    elif kind == "dangling link":
        path.symlink_to(target / "nowhere")
    elif kind == "folder":
        path.mkdir()
    else:
        os.mkfifo(path)


@pytest.mark.parametrize("kind", ["link", "dangling link", "folder", "FIFO"])
def test_what_is_no_file_fails_its_clip_before_it_is_rendered(committed, rendered, tmp_path, kind):
    _, request, video, record = committed()
    folder = OutputFolder(tmp_path / "other")
    entry = folder.path / video.name
    put(kind, entry, video)
    inode = os.lstat(entry).st_ino
    with pytest.raises(EntryError, match=rf"{entry} is a .+, which cineray does not make; remove it and run") as it:
        find_clip(folder, request, MARK)
    assert len(it.value.lines) == 1
    with pytest.raises(EntryError):
        commit_clip(folder, request, MARK, rendered[0], record, lossless=False)
    assert os.lstat(entry).st_ino == inode
    assert [path.name for path in folder.path.iterdir()] == [".tmp", entry.name] or kind == "folder"
    assert list((folder.path / ".tmp").iterdir()) == []


@pytest.mark.parametrize("suffix", [".json", ".trace.json"])
def test_a_folder_in_the_way_of_a_sidecar_or_trace_is_named_too(committed, suffix):
    folder, request, video, _ = committed()
    video.with_suffix(suffix).unlink()
    video.with_suffix(suffix).mkdir()
    with pytest.raises(EntryError, match=f"{suffix} is a folder, which cineray does not make"):
        find_clip(folder, request, MARK)


@pytest.mark.parametrize("what", ["the same clip", "dangling link", "another file"])
def test_what_appears_at_the_last_moment_must_prove_itself_too(committed, rendered, tmp_path, monkeypatch, what):
    _, request, theirs, record = committed(tmp_path / "theirs")
    folder, link = OutputFolder(tmp_path / "out"), os.link
    final = folder.video_path(request, MARK)

    def too_late(*arguments, **options):
        monkeypatch.setattr(os, "link", link)
        if what == "the same clip":
            shutil.copy(theirs, final)
        elif what == "dangling link":
            final.symlink_to(tmp_path / "nowhere")
        else:
            final.write_bytes(b"no video")
        return link(*arguments, **options)

    monkeypatch.setattr(os, "link", too_late)
    if what == "dangling link":
        with pytest.raises(EntryError, match="is a symbolic link"):
            commit_clip(folder, request, MARK, rendered[0], record, lossless=False)
        assert not final.with_suffix(".json").exists()
        assert not final.with_suffix(".trace.json").exists()
        return
    commit_clip(folder, request, MARK, rendered[0], record, lossless=False)
    assert count_frames(final) == 5
    found = find_clip(folder, request, MARK)
    assert isinstance(found, dict)
    assert found["video"]["bytes"] == final.stat().st_size


@pytest.mark.parametrize("which", [".trace.json", ".json", ".mp4"])
def test_a_disk_that_fills_up_leaves_a_whole_clip_or_none(rendered, tmp_path, monkeypatch, which):
    clip, request, record = rendered
    folder, replace_file = OutputFolder(tmp_path / "out"), os.replace
    video = folder.video_path(request, MARK)

    def full(source, name, **options):
        if name == video.with_suffix(which).name:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return replace_file(source, name, **options)

    monkeypatch.setattr(os, "replace" if which != ".mp4" else "link", full)
    with pytest.raises(OutputError, match="the disk is full"):
        commit_clip(folder, request, MARK, clip, record, lossless=False)
    assert [path.name for path in folder.path.iterdir()] == [".tmp"]
    monkeypatch.undo()
    commit_clip(folder, request, MARK, clip, record, lossless=False)
    assert json.loads(video.with_suffix(".trace.json").read_text())["entries"]
    assert read_metadata(video)["fingerprint"] == MARK


@pytest.mark.parametrize("fault", ["gone", "a file", "a link"])
def test_a_fault_of_the_folder_is_not_the_clips(rendered, tmp_path, monkeypatch, fault):
    clip, request, record = rendered
    folder, write_video = OutputFolder(tmp_path / "out"), output_module.write_video
    tmp = folder.path / ".tmp"

    def write_after_the_fault(*arguments):
        monkeypatch.setattr(output_module, "write_video", write_video)
        tmp.rmdir()
        if fault == "a file":
            tmp.write_text("mine")
        elif fault == "a link":
            tmp.symlink_to(tmp_path / "nowhere")
        write_video(*arguments)

    monkeypatch.setattr(output_module, "write_video", write_after_the_fault)
    if fault == "gone":  # made again, and the clip written again
        assert commit_clip(folder, request, MARK, clip, record, lossless=False).stat().st_size
        return
    with pytest.raises(OutputError, match=r"\.tmp is a .+ where cineray keeps a folder"):
        commit_clip(folder, request, MARK, clip, record, lossless=False)


def test_on_the_command_line_the_other_clips_go_on(checkpoint_folder, tmp_path, capsys):
    out = tmp_path / "out"
    command = ["render", "a", "b", "c", "d", "--out", str(out), "--model", str(checkpoint_folder("wan")), *SMALL]
    assert main([*command, "--json"]) == 0
    whole = {path: path.read_bytes() for path in sorted(out.glob("*.mp4"))}
    capsys.readouterr()
    one, two, three, _ = whole
    one.unlink(), one.symlink_to(tmp_path / "nowhere")
    two.write_bytes(b"")
    three.unlink(), three.mkdir()
    assert main(["status", str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["done"] == 1
    assert main([*command, "--json"]) == 1
    said = capsys.readouterr()
    clips = json.loads(said.out)["clips"]
    assert [clip["status"] for clip in clips] == ["failed", "done", "failed", "existing"]
    assert clips[0][
        "error"
    ] == f"{one} is a symbolic link, which cineray does not make; remove it and run the same " + ("command again")
    assert said.err.count(f"{two} is rendered again: it is empty") == 1
    assert two.read_bytes() == whole[two]
    one.unlink(), three.rmdir()
    assert main([*command, "--json"]) == 0
    assert {path: path.read_bytes() for path in sorted(out.glob("*.mp4"))} == whole
