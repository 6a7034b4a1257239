"""The output folder when the file system fails it, or others have put things there: what is said, what is left."""

import errno
import json
import os
import shutil
import socket
import tempfile
from pathlib import Path

import pytest

from cineray.jobs.output.folder import OutputError, OutputFolder, is_video, refuse_early

MARK = "0123456789ab"
NOBODY = 65534
UNIQUE = "0123456789abcdef" * 2


def failing(number):
    def fail(*_, **__):
        raise OSError(number, os.strerror(number))

    return fail


def put(kind: str, path: Path, target: Path) -> None:
    """Makes an entry of a kind; links point to `target`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if kind == "file":
        path.write_bytes(b"mine")
    elif kind == "folder":
        path.mkdir()
    elif kind == "link":
        path.symlink_to(target)
    elif kind == "dangling link":
        path.symlink_to(target / "nowhere")
    elif kind == "FIFO":
        os.mkfifo(path)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(str(path))


@pytest.fixture
def victim(tmp_path):
    """A folder of someone else's, with files of the names that cineray makes."""
    folder = tmp_path / "victim"
    for kind in ("", "steps", "prompts", "failures"):
        (folder / kind).mkdir(exist_ok=True)
        for name in ("thesis", f"probe.{UNIQUE}", f"{UNIQUE}.safetensors", f"1.{MARK}.safetensors.{UNIQUE}.tmp"):
            (folder / kind / name).write_text("mine")
    return folder


def content_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


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
    final = folder.video_path(request, MARK)
    if not has_links:
        monkeypatch.setattr(os, "link", failing(errno.EPERM))

    def interrupted_writing():
        with folder.new_video(request) as temporary:
            temporary.write_bytes(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted_writing()
    assert not final.exists()
    with folder.new_video(request) as temporary:
        temporary.write_bytes(b"whole")
        assert not final.exists()
        assert folder.commit(temporary, final)
    assert final.read_bytes() == b"whole"
    assert list((tmp_path / ".tmp").iterdir()) == []


@pytest.mark.parametrize("has_links", [True, False])
def test_what_stands_there_stays_unless_it_is_to_be_replaced(tmp_path, monkeypatch, new_request, has_links):
    folder, request = OutputFolder(tmp_path), new_request()
    final = folder.video_path(request, MARK)
    if not has_links:
        monkeypatch.setattr(os, "link", failing(errno.EPERM))
    for content, replace, committed, stands in (
        (b"first", False, True, b"first"),
        (b"second", False, False, b"first"),
        (b"third", True, True, b"third"),
    ):
        with folder.new_video(request) as temporary:
            temporary.write_bytes(content)
            assert folder.commit(temporary, final, replace) is committed
        assert final.read_bytes() == stands


def test_a_temporary_that_became_a_link_is_not_committed(tmp_path, new_request, victim):
    folder, request = OutputFolder(tmp_path / "out"), new_request()
    final = folder.video_path(request, MARK)

    def commit_a_link():
        with folder.new_video(request) as temporary:
            temporary.symlink_to(victim / "thesis")
            folder.commit(temporary, final)

    with pytest.raises(OutputError, match=r"1\.[0-9a-f]{32}\.mp4 is a symbolic link where cineray keeps a file"):
        commit_a_link()
    assert not os.path.lexists(final)


def test_a_folder_that_is_gone_is_not_made_again(tmp_path):
    folder = OutputFolder(tmp_path / "out")
    folder.close()
    for write in (
        lambda: folder.step_path("a", "0"),
        lambda: folder.write_json("a.json", {}),
        lambda: folder.log_event("done"),
        lambda: folder.check("a clip was to be rendered"),
        lambda: OutputFolder.existing(tmp_path / "out"),
    ):
        with pytest.raises(OutputError, match="disappeared while"):
            write()
    assert not (tmp_path / "out").exists()


def test_a_temporary_folder_that_is_gone_is_made_again(tmp_path, new_request):
    folder, request = OutputFolder(tmp_path), new_request()
    (tmp_path / ".tmp").rmdir()
    folder.check("a clip was to be rendered")
    (tmp_path / ".tmp").rmdir()
    folder.write_json(".state/failures/a.json", {})
    (tmp_path / ".tmp").rmdir()
    with folder.new_video(request) as temporary:
        temporary.write_bytes(b"x")
        assert folder.commit(temporary, folder.video_path(request, MARK))


def test_leftovers_of_killed_processes_are_swept(tmp_path):
    folder = OutputFolder(tmp_path)
    state, prompt = folder.step_path("a", MARK), folder.prompt_path(UNIQUE)
    names = (f"a.{UNIQUE}.mp4", f"a.{MARK}.json.{UNIQUE}", f"run.json.{UNIQUE}", f"probe.{UNIQUE}")
    for path in (
        state,
        prompt,
        prompt.with_name(f"{prompt.name}.{UNIQUE}.tmp"),
        state.with_name(f"{state.name}.{UNIQUE}.tmp"),
        *(tmp_path / ".tmp" / name for name in names),
    ):
        path.write_bytes(b"x")
    folder.remove_leftovers()
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == [state.name]


def test_the_sweep_takes_nothing_that_is_not_of_our_making(tmp_path, victim):
    out = tmp_path / "out"
    for folder in (".tmp", ".state/steps", ".state/prompts", ".state/failures"):
        for name in ("thesis", "a.mp4", "a.tmp", "notes.json", "a.0123.tmp", UNIQUE, f"{UNIQUE.upper()}.safetensors"):
            put("file", out / folder / name, victim)
        put("link", out / folder / f"run.json.{UNIQUE}", victim / "thesis")
        put("FIFO", out / folder / f"probe.{UNIQUE}", victim)
        put("folder", out / folder / f"a.{UNIQUE}.mp4", victim)
        put("file", out / folder / f"a.{UNIQUE}.mp4" / f"a.{UNIQUE}.mp4", victim)
    put("link", out / ".state" / "prompts" / f"{UNIQUE}.safetensors", victim / "thesis")
    before = {str(path): os.lstat(path).st_ino for path in tmp_path.rglob("*")}
    folder = OutputFolder(out)
    folder.remove_leftovers()
    folder.delete_stale_clips()
    folder.close()
    assert {str(path): os.lstat(path).st_ino for path in tmp_path.rglob("*")} == before


FOLDERS = (".tmp", ".state", ".state/steps", ".state/prompts", ".state/failures")


@pytest.mark.parametrize("kind", ["link", "dangling link", "file", "FIFO", "socket"])
@pytest.mark.parametrize("name", FOLDERS)
def test_no_hidden_folder_may_be_anything_else(tmp_path, monkeypatch, victim, name, kind):
    monkeypatch.chdir(tmp_path)  # a socket's path is short
    out, before = Path("out"), content_of(victim)
    put(kind, out / name, victim)
    with pytest.raises(OutputError, match=rf"out: {name} is .+ where cineray keeps a folder; remove it, or give") as it:
        OutputFolder(out)
    assert len(it.value.lines) == 1
    assert content_of(victim) == before
    assert sorted(str(path) for path in out.rglob("*") if path.name not in name) == []


@pytest.mark.parametrize("name", FOLDERS)
def test_a_hidden_folder_that_becomes_a_link_ends_the_run(tmp_path, victim, name):
    folder = OutputFolder(tmp_path / "out")
    folder.step_path("a", MARK), folder.prompt_path("k"), folder.write_json(".state/failures/a.json", {})
    folder.delete(tmp_path / "out" / ".state" / "failures" / "a.json")
    (tmp_path / "out" / name).rename(tmp_path / "moved")
    (tmp_path / "out" / name).symlink_to(victim)
    before = content_of(victim)
    with pytest.raises(OutputError, match=f"{name} is a symbolic link where cineray keeps a folder"):
        folder.check("a clip was to be rendered")
    folder.remove_leftovers()
    folder.delete_stale_clips()
    folder.close()
    assert content_of(victim) == before


@pytest.mark.parametrize("kind", ["link", "dangling link", "folder", "FIFO", "socket"])
def test_the_log_of_events_is_a_file_or_refused(tmp_path, monkeypatch, victim, kind):
    monkeypatch.chdir(tmp_path)
    folder, before = OutputFolder(Path("out")), content_of(victim)
    put(kind, Path("out") / "events.jsonl", victim / "thesis")
    with pytest.raises(OutputError, match=r"events\.jsonl is .+ where cineray keeps a file"):
        folder.log_event("done")
    with pytest.raises(OutputError, match=r"events\.jsonl is .+ where cineray keeps a file"):
        OutputFolder(Path("out"))
    assert content_of(victim) == before


def test_a_log_with_a_second_name_is_copied(tmp_path, victim):
    folder = OutputFolder(tmp_path / "out")
    os.link(victim / "thesis", tmp_path / "out" / "events.jsonl")
    folder.own_log()
    folder.log_event("done")
    assert (victim / "thesis").read_text() == "mine"
    assert (tmp_path / "out" / "events.jsonl").read_text().startswith("mine{")


@pytest.mark.parametrize("kind", ["link", "dangling link", "FIFO", "file"])
@pytest.mark.parametrize("name", ["run.json", ".state/running.json", f"1.{MARK}.json"])
def test_a_file_of_ours_replaces_a_link_and_never_follows_it(tmp_path, victim, name, kind):
    folder, before = OutputFolder(tmp_path / "out"), content_of(victim)
    put(kind, tmp_path / "out" / name, victim / "thesis")
    folder.write_json(name, {"a": 1})
    assert json.loads((tmp_path / "out" / name).read_text()) == {"a": 1}
    assert not (tmp_path / "out" / name).is_symlink()
    assert content_of(victim) == before


@pytest.mark.parametrize("name", ["run.json", ".state/running.json"])
def test_a_folder_in_the_way_of_a_file_is_named(tmp_path, name):
    folder = OutputFolder(tmp_path)
    (tmp_path / name).mkdir(parents=True)
    for write in (lambda: folder.write_json(name, {}), lambda: refuse_early(tmp_path)):
        with pytest.raises(OutputError, match=f"{name} is a folder where cineray keeps a file; remove it"):
            write()
    assert list((tmp_path / ".tmp").iterdir()) == []


def test_what_cannot_be_an_output_folder_is_refused_before_anything_is_made(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    deep = tmp_path / "/".join(["d" * 200] * 20)
    for path, said in (
        (tmp_path / "file", "Not a directory"),
        (tmp_path / "file" / "deeper", "Not a directory"),
        (tmp_path / "dangling", "it is a symbolic link to nothing"),
        (tmp_path / "circle", "Too many levels of symbolic links"),
        (tmp_path / ("n" * 256), "File name too long"),
        (deep, r"its path has \d+ bytes, at most \d+ can be used"),
        (tmp_path / "a\0b", "its name has a null character"),
    ):
        for make in (refuse_early, OutputFolder):
            with pytest.raises(OutputError, match=f"cannot be written: {said}") as it:
                make(path)
            assert len(it.value.lines) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["circle", "dangling", "file"]


def test_a_link_to_a_folder_may_be_an_output_folder(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "disk")
    folder = OutputFolder(tmp_path / "out")
    folder.write_json("run.json", {})
    folder.close()
    assert [path.name for path in (tmp_path / "disk").iterdir()] == ["run.json"]
    assert (tmp_path / "out").is_symlink()


@pytest.fixture
def ordinary_user():
    """A folder of a user whom modes hold off, and whom the test runs as."""
    if os.geteuid() != 0:
        with tempfile.TemporaryDirectory() as folder:
            yield Path(folder)
        return
    folder = Path(tempfile.mkdtemp())
    os.chown(folder, NOBODY, NOBODY)
    os.setresgid(NOBODY, NOBODY, 0), os.setresuid(NOBODY, NOBODY, 0)
    try:
        if not os.access(folder, os.W_OK):
            pytest.skip("the folder for temporary files is closed to other users")
        yield folder
    finally:
        os.setresuid(0, 0, 0), os.setresgid(0, 0, 0)
        shutil.rmtree(folder)


@pytest.mark.parametrize("locked", [".", "out", "out/.tmp", "out/.state", "out/.state/steps"])
def test_a_permission_that_is_lost_is_one_line(ordinary_user, locked):
    folder = OutputFolder(ordinary_user / "out")
    folder.step_path("a", MARK)
    (ordinary_user / locked).chmod(0o000)
    try:
        with pytest.raises(
            OutputError, match=f"^output folder {ordinary_user}/out: Permission denied( in .+)? while "
        ) as it:
            folder.check("clip a was to be rendered"), folder.step_path("a", MARK)
        assert len(it.value.lines) == 1
        for begin in (refuse_early, OutputFolder):
            with pytest.raises(OutputError, match="cannot be written: Permission denied"):
                begin(ordinary_user / "out")
        folder.remove_leftovers(), folder.delete_stale_clips()
    finally:
        (ordinary_user / locked).chmod(0o755)


def test_modes_follow_the_umask(tmp_path):
    before = os.umask(0o002)
    try:
        folder = OutputFolder(tmp_path / "out")
        folder.log_event("done")
        folder.write_json("run.json", {})
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "out").iterdir()}
    assert modes == {".tmp": 0o775, "events.jsonl": 0o664, "run.json": 0o664}


def test_names_of_other_encodings_and_with_control_characters(tmp_path):
    out = tmp_path / os.fsdecode(b"caf\xe9\x1b[31m\n")
    folder = OutputFolder(out)
    folder.write_json("run.json", {"image": str(out)})
    folder.log_event("done", video=str(out))
    assert json.loads((out / "run.json").read_text()) == {"image": str(out)}
    assert json.loads((out / "events.jsonl").read_text())["video"] == str(out)


@pytest.mark.parametrize("kind", ["link", "dangling link", "folder", "FIFO", "nothing", "empty"])
def test_only_a_file_with_content_can_be_a_video(tmp_path, victim, kind):
    entry, good = tmp_path / f"1.{MARK}.mp4", tmp_path / f"2.{MARK}.mp4"
    put(kind, entry, victim / "thesis")
    if kind == "empty":
        entry.write_bytes(b"")
    good.write_bytes(b"x")
    (tmp_path / "holiday.mp4").write_bytes(b"x")
    assert not is_video(entry)
    assert is_video(good)
    assert not is_video(tmp_path / "holiday.mp4")
    assert [e.name for e in os.scandir(tmp_path) if is_video(e)] == [good.name]
