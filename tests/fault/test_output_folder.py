"""The output folder when the file system fails it: what is said, and what is left behind."""

import errno
import json
import os

import pytest

from cineray.jobs.commit import commit_clip, read_or_rebuild_record
from cineray.jobs.output_folder import OutputError, OutputFolder
from cineray.jobs.record import clip_record, render_options
from cineray.pipeline.render import render_clip


def failing(number):
    def fail(*_):
        raise OSError(number, os.strerror(number))

    return fail


def test_a_disk_that_fills_up_while_a_sidecar_is_written(tmp_path, monkeypatch):
    folder = OutputFolder(tmp_path / "out")
    monkeypatch.setattr(os, "fsync", failing(errno.ENOSPC))
    with pytest.raises(OutputError, match=r"the disk is full \(\d+ bytes free\) while writing a\.json"):
        folder.write_json("a.json", {})
    monkeypatch.undo()
    folder.close()
    assert not (tmp_path / "out").exists()  # made for nothing, removed again


def test_other_failures_are_named(tmp_path, monkeypatch):
    folder = OutputFolder(tmp_path)
    monkeypatch.setattr(os, "fsync", failing(errno.EIO))
    with pytest.raises(OutputError, match=r"Input/output error while writing a\.json"):
        folder.write_json("a.json", {})
    assert list((tmp_path / ".tmp").iterdir()) == []


@pytest.mark.parametrize("has_links", [True, False])
def test_a_video_appears_whole_under_its_final_name_or_not_at_all(tmp_path, monkeypatch, new_request, has_links):
    folder, request = OutputFolder(tmp_path), new_request()
    final = folder.video_path(request, "0123")
    if not has_links:
        monkeypatch.setattr(os, "link", failing(errno.EPERM))

    def interrupted_writing():
        with folder.new_video(request, final) as temporary:
            temporary.write_bytes(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted_writing()
    assert not final.exists()
    with folder.new_video(request, final) as temporary:
        temporary.write_bytes(b"whole")
        assert not final.exists()
    assert final.read_bytes() == b"whole"
    assert list((tmp_path / ".tmp").iterdir()) == []


def test_a_clip_that_is_there_already_stays(tmp_path, new_request):
    folder, request = OutputFolder(tmp_path), new_request()
    final = folder.video_path(request, "0123")
    for content in (b"first", b"second"):
        with folder.new_video(request, final) as temporary:
            temporary.write_bytes(content)
    assert final.read_bytes() == b"first"


def test_a_sidecar_that_is_gone_or_broken_is_made_anew_from_the_video(loaded, new_request, tmp_path):
    model, request, folder = loaded("wan"), new_request(num_inference_steps=1), OutputFolder(tmp_path)
    clip = render_clip(model, request, lambda done, total: None)
    record = clip_record(request, "0123", model, render_options(model.options, False), clip)
    video = commit_clip(folder, request, "0123", clip, record, lossless=False)
    sidecar = video.with_suffix(".json")
    for broken in (None, "", '{"id": '):
        sidecar.unlink() if broken is None else sidecar.write_text(broken)
        assert read_or_rebuild_record(folder, video) == record
        assert json.loads(sidecar.read_text()) == record


def test_a_folder_that_is_gone_is_not_made_again(tmp_path):
    folder = OutputFolder(tmp_path / "out")
    folder.close()
    for write in (lambda: folder.step_path("a", "0"), lambda: folder.write_json("a.json", {})):
        with pytest.raises(OutputError, match="disappeared while"):
            write()
    with pytest.raises(OutputError, match="disappeared while"):
        OutputFolder.existing(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_leftovers_of_killed_processes_are_swept(tmp_path):
    folder = OutputFolder(tmp_path)
    state, prompt = folder.step_path("a", "0"), folder.prompt_path("k")
    for path in (state, prompt, state.with_name("a.0.safetensors.1.tmp"), tmp_path / ".tmp" / "a.mp4"):
        path.write_bytes(b"x")
    folder.sweep()
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == [state.name]
