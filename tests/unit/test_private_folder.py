"""Sockets and tokens of a process lie where their paths fit and nobody else comes."""

import fcntl
import os

import pytest

from cineray.jobs.private_folder import MAX_PLACE_BYTES, private_folder, socket_place
from cineray.pipeline.request import InputError


@pytest.fixture
def place(monkeypatch):
    """A short folder of the test's own, which TMPDIR names."""
    folder = f"/tmp/cr{os.getpid()}"
    os.mkdir(folder)
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    monkeypatch.setenv("TMPDIR", folder)
    yield folder
    for root, folders, files in os.walk(folder, topdown=False):
        for name in (*files, *folders):
            path = os.path.join(root, name)
            (os.rmdir if os.path.isdir(path) and not os.path.islink(path) else os.unlink)(path)
    os.rmdir(folder)


def test_it_is_closed_to_others_and_goes_away(place):
    before = os.umask(0)
    try:
        with private_folder() as folder:
            assert folder.parent.as_posix() == place
            assert folder.stat().st_mode & 0o777 == 0o700
            (folder / "r").mkdir(mode=0o777)
    finally:
        os.umask(before)
    assert os.listdir(place) == []


def test_those_of_dead_processes_are_removed_and_no_others(place):
    names = ("cineray-dead", "cineray-alive", "cineray-open", "cineray-nolock", "others", "target")
    for name in names:
        os.mkdir(f"{place}/{name}", 0o755 if name == "cineray-open" else 0o700)
        if name != "cineray-nolock":
            open(f"{place}/{name}/lock", "w").close()
    os.symlink("target", f"{place}/cineray-link")
    with open(f"{place}/cineray-alive/lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with private_folder():
            pass
    assert sorted(os.listdir(place)) == sorted({*names, "cineray-link"} - {"cineray-dead"})
    assert os.listdir(f"{place}/target") == ["lock"]


@pytest.mark.parametrize(
    "folder",
    ["x" * (MAX_PLACE_BYTES + 1), "with blank", "percent%41", "umläut", "not/there", "'"],
)
def test_a_folder_that_does_not_serve_is_not_taken(folder, place):
    if folder != "not/there":
        os.makedirs(f"{place}/{folder}")
    assert socket_place({"TMPDIR": f"{place}/{folder}"}) == "/tmp"
    assert socket_place({"TMPDIR": "relative"}) == "/tmp"
    assert socket_place({"TMPDIR": f"{place}/{folder}", "XDG_RUNTIME_DIR": place}) == place
    assert socket_place({"RAY_TMPDIR": place, "TMPDIR": "/"}) == place


def test_no_folder_at_all_is_one_line(monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(InputError, match="TMPDIR must name a folder that can be written"):
        socket_place({})
