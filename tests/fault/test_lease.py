"""The lease of an output folder: one holder at a time, whatever dies or stands still."""

import os
import signal
import subprocess
import sys

import pytest

from cineray.jobs.lease import Lease, LeasedError, current_lease, is_stale, read_holder
from cineray.jobs.output_folder import OutputError

HOLD = """
import sys, time
from pathlib import Path
from cineray.jobs.lease import Lease
with Lease(Path(sys.argv[1]), ttl_s=1.0, beat_s=0.05) as lease:
    print("held", flush=True)
    while True:
        time.sleep(0.05)
        lease.check()
"""
SHORT = {"ttl_s": 1.0, "beat_s": 0.05}


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
    with Lease(tmp_path / "state", ttl_s=3600, beat_s=0.05) as lease:  # its process is dead: nothing to wait for
        lease.check()
        assert current_lease(tmp_path / "state")[0] == 2
    assert current_lease(tmp_path / "state") == (0, None)


def test_a_frozen_holder_is_replaced_and_stops_when_it_wakes(holder, tmp_path):
    holder.send_signal(signal.SIGSTOP)
    with Lease(tmp_path / "state", **SHORT) as lease:
        holder.send_signal(signal.SIGCONT)
        _, stderr = holder.communicate(timeout=20)
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


def test_a_folder_that_disappears_is_noticed(tmp_path):
    with Lease(tmp_path / "state", **SHORT) as lease:
        (tmp_path / "state" / "lease.1.json").unlink()
        (tmp_path / "state").rmdir()
        lease._ended.wait(0.5)
        with pytest.raises(OutputError, match="disappeared, or its lease was removed"):
            lease.check()


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(OutputError, match="its lease cannot be written: Not a directory"),
        Lease(tmp_path / "file" / "state"),
    ):
        pass


def test_a_driver_that_lost_its_folder_does_not_tidy_it_up(checkpoint_folder, tmp_path):
    """The next one has files in the works there; found by scripts/chaos.py."""
    out = tmp_path / "out"
    arguments = ["a red circle", "--out", str(out), "--model", str(checkpoint_folder("wan")), "--lease-timeout", "1"]
    small = ["--width", "32", "--height", "32", "--frames", "5", "--steps", "300"]
    driver = subprocess.Popen(
        [sys.executable, "-m", "cineray", "render", *arguments, *small, "--checkpoint-every", "0"],
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONSAFEPATH": "1"},
    )
    while not list((out / ".state").glob("steps/*")) and driver.poll() is None:
        pass
    driver.send_signal(signal.SIGSTOP)
    with Lease(out / ".state", **SHORT) as lease:
        for path in (out / ".state" / "steps").iterdir():
            path.unlink()
        driver.send_signal(signal.SIGCONT)
        _, stderr = driver.communicate(timeout=60)
        assert driver.returncode == 75, stderr
        assert (out / ".tmp").is_dir()
        lease.check()
