"""The lease of an output folder: one holder at a time, whatever dies or stands still."""

import errno
import json
import os
import signal
import socket
import subprocess
import sys
import time

import psutil
import pytest
from waiting import PATIENCE_S, wait_for

from cineray.jobs.cli.main import main
from cineray.jobs.output import lease as lease_module
from cineray.jobs.output.folder import OutputError
from cineray.jobs.output.lease import Lease, LeasedError, _boot_id, current_lease, is_stale, read_holder
from cineray.jobs.run import held_folder
from cineray.pipeline.media.output import VIDEO

pytestmark = pytest.mark.process

HOLD = """
import sys, time
from pathlib import Path
from cineray.jobs.output.lease import Lease
with Lease(Path(sys.argv[1]), ttl_s=1.0, heartbeat_s=0.05) as lease:
    print("held", flush=True)
    while True:
        time.sleep(0.05)
        lease.check()
"""
SHORT = {"ttl_s": 1.0, "heartbeat_s": 0.05}


@pytest.fixture
def holder(tmp_path):
    """A process that holds the lease of tmp_path / "state"."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / "state")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONSAFEPATH": "1"},
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def test_a_second_driver_is_refused_while_the_first_beats(holder, tmp_path):
    with (
        pytest.raises(LeasedError, match=rf"is being rendered into by process {holder.pid}"),
        Lease(tmp_path / "state", **SHORT),
    ):
        pass


def test_a_killed_holder_is_replaced_at_once(holder, tmp_path):
    holder.kill()
    holder.wait()
    with Lease(tmp_path / "state", ttl_s=3600, heartbeat_s=0.05) as lease:  # its process is dead: nothing to wait for
        lease.check()
        assert current_lease(tmp_path / "state")[0] == 2
    assert current_lease(tmp_path / "state") == (0, None)


def test_a_frozen_holder_is_replaced_and_stops_when_it_wakes(holder, tmp_path):
    holder.send_signal(signal.SIGSTOP)
    with Lease(tmp_path / "state", **SHORT) as lease:
        holder.send_signal(signal.SIGCONT)
        _, stderr = holder.communicate(timeout=PATIENCE_S)
        assert f"taken over by process {os.getpid()}" in stderr
        lease.check()


def test_another_machines_lease_goes_stale_by_the_watchers_clock_alone(holder, tmp_path):
    """A lease dated in the future or the past is as good as any other: dates do not count."""
    holder.kill()
    holder.wait()
    path = tmp_path / "state" / "lease.1.json"
    path.write_text(path.read_text().replace('"host": "', '"host": "elsewhere-'))
    os.utime(path, (2**33, 2**33))
    clock = iter(range(100))
    watched = []
    assert is_stale(path, read_holder(path), ttl_s=10, now=lambda: next(clock), sleep=watched.append)
    assert len(watched) > 5


def test_a_released_folder_is_free(tmp_path):
    for _ in range(2):
        with Lease(tmp_path / "state", **SHORT):
            assert current_lease(tmp_path / "state")[0] == 1


def test_half_a_lease_is_no_lease_for_ever(tmp_path):
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / "lease.7.json").write_text('{"tok')
    with Lease(tmp_path / "state", **SHORT):
        assert current_lease(tmp_path / "state")[0] == 8


@pytest.mark.parametrize(
    ("left", "error", "said"),
    [
        ("", OutputError, "disappeared; is the disk still mounted"),
        # as a driver leaves it that took the folder over while this one slept, and has ended
        ("out", LeasedError, "its lease is gone: another driver took it over and has ended"),
        ("out/state", LeasedError, "its lease is gone"),
    ],
)
def test_a_lease_that_disappears_is_noticed(tmp_path, left, error, said):
    with Lease(tmp_path / "out" / "state", **SHORT) as lease:
        (tmp_path / "out" / "state" / "lease.1.json").unlink()
        for folder in ("out/state", "out"):
            if len(folder) > len(left):
                (tmp_path / folder).rmdir()
        lease._ended.wait(0.5)
        with pytest.raises(error, match=said):
            lease.check()


def test_trouble_with_a_folder_that_is_anothers_by_now_is_told_as_that(tmp_path):
    """Its successor tidies away what it writes, which is no fault of the disk."""

    def lose_a_file(folder):
        with folder.translated_os_errors("writing a clip"):
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))

    def lose_the_lease_too(folder):
        (folder.state / "lease.2.json").write_text("{}")
        lose_a_file(folder)

    for happens, error, said in (
        (lose_a_file, OutputError, "No such file or directory while writing a clip"),
        (lose_the_lease_too, LeasedError, "taken over by another driver; wait until it has ended"),
    ):
        with pytest.raises(error, match=said), held_folder(tmp_path / happens.__name__, VIDEO, 3600) as (folder, _):
            happens(folder)


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(OutputError, match="its lease cannot be written: Not a directory"),
        Lease(tmp_path / "file" / "state"),
    ):
        pass


def earlier_lease(path, **changes):
    """As versions without `ticks` wrote it: of this process, which lives."""
    process = psutil.Process()
    who = {"token": "t", "host": socket.gethostname(), "boot": _boot_id(), "pid": process.pid}
    who |= {"started": process.create_time()} | changes
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(json.dumps(who).encode() + b"\n" + b"0".rjust(16))


def as_an_earlier_version_reads(path):
    who, _, heartbeat = path.read_bytes().partition(b"\n")
    return json.loads(who), heartbeat.decode()


@pytest.mark.usefixtures("holder")
def test_a_clock_that_steps_kills_nobody(tmp_path, monkeypatch):
    """A process's start in seconds moves with the clock; in ticks it does not."""
    monkeypatch.setattr(psutil.Process, "create_time", lambda self: 0.0)
    monkeypatch.setattr(time, "time", lambda: 0.0)
    seen = read_holder(tmp_path / "state" / "lease.1.json")
    assert seen is not None
    assert not seen.is_surely_dead()
    with pytest.raises(LeasedError, match="is being rendered into by"), Lease(tmp_path / "state", **SHORT):
        pass


@pytest.mark.parametrize("started", [0.0, 2.0**33])
def test_a_lease_of_an_earlier_version_holds_while_its_process_lives(tmp_path, started):
    path = tmp_path / "state" / "lease.1.json"
    earlier_lease(path, started=started)
    seen = read_holder(path)
    assert seen is not None
    assert seen.ticks is None
    assert not seen.is_surely_dead()
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    earlier_lease(path, pid=dead.pid)
    with Lease(tmp_path / "state", ttl_s=3600, heartbeat_s=0.05):
        assert current_lease(tmp_path / "state")[0] == 2


def test_an_earlier_version_reads_our_lease_and_sees_it_beat(tmp_path):
    with Lease(tmp_path / "state", **SHORT):
        path = tmp_path / "state" / "lease.1.json"
        who, first = as_an_earlier_version_reads(path)
        assert who.keys() == {"token", "host", "boot", "pid", "started"}  # it takes any other for no lease
        assert who["started"] == psutil.Process().create_time()
        assert wait_for(lambda: as_an_earlier_version_reads(path)[1] != first)


@pytest.mark.usefixtures("holder")
def test_a_process_that_has_the_number_of_a_dead_one_is_another(tmp_path):
    path = tmp_path / "state" / "lease.1.json"
    ticks = read_holder(path).ticks
    assert isinstance(ticks, int)
    path.write_text(path.read_text().replace(f'"ticks": {ticks}', f'"ticks": {ticks - 1}'))
    assert read_holder(path).is_surely_dead()


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.EACCES])
def test_a_read_that_fails_for_a_while_costs_nothing(tmp_path, monkeypatch, number):
    with Lease(tmp_path / "state", ttl_s=60, heartbeat_s=0.02) as lease:
        failed, read = [], lease_module._read

        def failing(path):
            failed.append(path)
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(lease_module, "_read", failing)
        assert wait_for(lambda: len(failed) >= 5)
        lease.check()
        assert not lease.is_ours()  # it is not seen to be: nothing is tidied up
        monkeypatch.setattr(lease_module, "_read", read)
        assert lease.is_ours()
        lease.check()


def test_a_read_that_fails_for_longer_costs_the_folder(tmp_path, monkeypatch):
    with Lease(tmp_path / "state", **SHORT) as lease:

        def failing(_):
            raise OSError(errno.EIO, os.strerror(errno.EIO))

        monkeypatch.setattr(lease_module, "_read", failing)
        assert not lease._ended.is_set()
        assert wait_for(lambda: lease._lost is not None)
        with pytest.raises(LeasedError, match="its lease cannot be read: Input/output error"):
            lease.check()


def test_a_lease_that_cannot_be_read_is_not_taken_for_stale(tmp_path, monkeypatch):
    earlier_lease(tmp_path / "state" / "lease.1.json", host="elsewhere")

    def failing(_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(lease_module, "_read", failing)
    with (
        pytest.raises(OutputError, match=r"its lease lease\.1\.json cannot be read: Input/output error"),
        Lease(tmp_path / "state", ttl_s=0.2, heartbeat_s=0.05),
    ):
        pass


def test_a_lease_that_was_unreadable_at_first_is_watched_from_then_on(tmp_path, monkeypatch):
    path, read, clock = tmp_path / "state" / "lease.1.json", lease_module._read, iter(range(1000))
    earlier_lease(path, host="elsewhere")
    watched = []

    def failing_at_first(path):
        if len(watched) < 3:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        if len(watched) == 8:
            earlier_lease(path, host="elsewhere", token="beats")
        return read(path)

    monkeypatch.setattr(lease_module, "_read", failing_at_first)
    assert not is_stale(path, None, ttl_s=10, now=lambda: next(clock), sleep=watched.append)


HOSTILE = [
    "", "{", "[]", "[1]", "7", "null", "[" * 50_000, "\xff", '{"pid": 1}', "\n" * 100,
    '{"token": 1, "host": "h", "boot": "b", "pid": 1, "started": 1}',
    *(f'{{"token": "t", "host": "h", "boot": "b", "pid": {n}, "started": 0}}' for n in (-1, 0, '"x"', 1e400, 2**70)),
]  # fmt: skip


@pytest.mark.parametrize("content", HOSTILE, ids=range(len(HOSTILE)))
def test_what_is_no_lease_is_none_for_ever(tmp_path, content):
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / "lease.1.json").write_bytes(content.encode("latin-1"))
    with Lease(tmp_path / "state", ttl_s=0.2, heartbeat_s=0.05):
        assert current_lease(tmp_path / "state")[0] == 2
    assert list((tmp_path / "state").iterdir()) == []


def test_what_is_not_understood_but_changes_is_alive(tmp_path):
    """As of a later version."""
    path = tmp_path / "lease.1.json"
    path.write_text("new form 1")
    watched = []

    def sleep(_):
        watched.append(path.write_text(f"new form {len(watched)}"))

    assert not is_stale(path, None, ttl_s=3600, sleep=sleep)


def test_a_large_number_takes_no_longer_than_a_small_one(tmp_path):
    for number in (99_999_999_999, 3):
        earlier_lease(tmp_path / "state" / f"lease.{number}.json", host="elsewhere")
    with Lease(tmp_path / "state", ttl_s=0.2, heartbeat_s=0.05):
        assert [path.name for path in (tmp_path / "state").iterdir()] == ["lease.100000000000.json"]


def test_numbers_that_no_lease_has(tmp_path):
    state = tmp_path / "out" / ".state"
    state.mkdir(parents=True)
    for name in ("lease.0.json", "lease.007.json", "lease.\u0663.json", f"lease.{'9' * 200}.json", "lease.-1.json"):
        (state / name).write_text("mine")
    with Lease(state, **SHORT):
        assert current_lease(state)[0] == 1
    (state / f"lease.{10**15 - 1}.json").write_text("mine")
    with pytest.raises(OutputError, match=r"\.state/lease\.9+\.json has a number that no lease"), Lease(state, **SHORT):
        pass
    assert len(list(state.iterdir())) == 6


@pytest.mark.parametrize("kind", ["link", "dangling link", "FIFO", "folder"])
def test_a_lease_that_is_no_file_is_named(tmp_path, kind):
    state, other = tmp_path / "out" / ".state", tmp_path / "other"
    state.mkdir(parents=True)
    other.write_text("mine")
    entry = state / "lease.1.json"
    {
        "link": lambda: entry.symlink_to(other),
        "dangling link": lambda: entry.symlink_to(tmp_path / "nowhere"),
        "FIFO": lambda: os.mkfifo(entry),
        "folder": entry.mkdir,
    }[kind]()
    with (
        pytest.raises(OutputError, match=r"out: \.state/lease\.1\.json is .+ where cineray keeps a file; remove it"),
        Lease(state, ttl_s=3600),
    ):
        pass
    assert current_lease(state) == (1, None)
    assert other.read_text() == "mine"


def test_a_state_folder_that_is_a_link_is_named(tmp_path):
    (tmp_path / "victim").mkdir()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".state").symlink_to(tmp_path / "victim")
    with pytest.raises(OutputError, match=r"out: \.state is a symbolic link"), Lease(tmp_path / "out" / ".state"):
        pass
    assert list((tmp_path / "victim").iterdir()) == []


def test_a_full_disk_leaves_no_lease(tmp_path, monkeypatch):
    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutputError, match="its lease cannot be written: No space left"), Lease(tmp_path / "state"):
        pass
    assert list((tmp_path / "state").iterdir()) == []


@pytest.mark.parametrize("seconds", ["0.5", "4.9", "0", "-1", "nan"])
def test_a_patience_of_fewer_than_five_beats_is_refused(tmp_path, capsys, seconds):
    """It would take a living driver's folder."""
    assert main(["render", "a", "--out", str(tmp_path / "out"), "--lease-timeout", seconds]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("cineray: --lease-timeout must be 5 or more, got ")
    assert not (tmp_path / "out").exists()


def test_a_driver_that_lost_its_folder_does_not_tidy_it_up(checkpoint_folder, tmp_path):
    """The next one has files in flight there; found by scripts/chaos.py."""
    out = tmp_path / "out"
    arguments = ["a red circle", "--out", str(out), "--model", str(checkpoint_folder("wan")), "--lease-timeout", "5"]
    small = ["--width", "32", "--height", "32", "--frames", "5", "--steps", "300"]
    driver = subprocess.Popen(
        [sys.executable, "-m", "cineray", "render", *arguments, *small, "--checkpoint-every", "0"],
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONSAFEPATH": "1"},
    )
    assert wait_for(lambda: list((out / ".state").glob("steps/*")) or driver.poll() is not None)
    assert driver.poll() is None, driver.communicate()[1]
    driver.send_signal(signal.SIGSTOP)
    with Lease(out / ".state", **SHORT) as lease:
        for path in (out / ".state" / "steps").iterdir():
            path.unlink()
        driver.send_signal(signal.SIGCONT)
        _, stderr = driver.communicate(timeout=PATIENCE_S)
        assert driver.returncode == 75, stderr
        assert (out / ".tmp").is_dir()
        lease.check()
