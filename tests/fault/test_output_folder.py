"""The output folder when the file system fails it: what is said, and what is left behind."""

import errno
import os

import pytest

from cineray.jobs.output_folder import OutputError, OutputFolder


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
