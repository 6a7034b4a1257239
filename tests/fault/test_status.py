"""`cineray status`: what the files of a folder say, while a driver renders and after."""

import json
import os
import subprocess
import sys

import pytest

from cineray.jobs.cli.main import main
from cineray.jobs.output.folder import OutputFolder
from cineray.jobs.output.lease import Lease


@pytest.fixture
def folder(tmp_path):
    """An output folder of a batch of five: two clips done, one tried again, one quarantined, one preempted."""
    state = tmp_path / ".state"
    for kind in ("steps", "failures"):
        (state / kind).mkdir(parents=True)
    (tmp_path / "run.json").write_text(json.dumps({"num_clips": 5}))
    for clip in ("a", "b"):
        (tmp_path / f"{clip}.0123456789ab.mp4").write_bytes(b"x")
    for clip, status in (("b", "retrying"), ("c", "retrying"), ("d", "quarantined")):
        failure = {"id": clip, "fingerprint": "0123456789ab", "status": status, "reasons": ["gang-0: rank 1 died"]}
        (state / "failures" / f"{clip}.0123456789ab.json").write_text(json.dumps(failure))
    (state / "steps" / "e.0123456789ab.safetensors").write_bytes(b"")
    running = {"running": [{"id": "c", "on": "gang-0", "step": 3, "steps": 9}], "counts": {}}
    (state / "running.json").write_text(json.dumps(running))
    return tmp_path


def status_of(folder, capsys, *arguments):
    code = main(["status", str(folder), *arguments])
    return code, capsys.readouterr().out


def test_while_a_driver_renders(folder, capsys):
    with Lease(folder / ".state", heartbeat_s=0.05):
        code, out = status_of(folder, capsys, "--json")
    found = json.loads(out)
    assert code == 0
    assert (found["clips"], found["done"], found["retrying"], found["quarantined"]) == (5, 2, 1, 1)
    assert found["running"] == [{"id": "c", "on": "gang-0", "step": 3, "steps": 9}]
    assert found["driver"].startswith(f"process {os.getpid()} on ")
    assert [failure["id"] for failure in found["troubles"]] == ["c", "d"]  # b is done since


@pytest.mark.process
def test_after_a_driver_was_killed_nothing_runs(folder, capsys):
    hold = "import sys, os; from pathlib import Path; from cineray.jobs.output.lease import Lease\n"
    hold += "Lease(Path(sys.argv[1])).__enter__(); os._exit(9)"
    subprocess.run(
        [sys.executable, "-c", hold, str(folder / ".state")], env=os.environ | {"PYTHONSAFEPATH": "1"}, check=False
    )
    assert list((folder / ".state").glob("lease.*"))
    code, out = status_of(folder, capsys)
    assert code == 0
    assert out.splitlines() == [
        "2 of 5 done, 0 running, 1 quarantined, 1 retrying",
        "driver: none",
        "1 clip can be resumed from a checkpoint; run the same `cineray render` again",
        "  c retrying: gang-0: rank 1 died",
        "  d quarantined: gang-0: rank 1 died",
    ]


def test_another_folder_is_an_error(tmp_path, capsys):
    code, _ = status_of(tmp_path, capsys)
    assert code == 2


def test_failure_records_of_an_earlier_version_are_read_and_adopted(folder, capsys):
    (folder / ".state" / "failures").rename(folder / ".state" / "trouble")
    found = json.loads(status_of(folder, capsys, "--json")[1])
    assert [failure["id"] for failure in found["troubles"]] == ["c", "d"]
    output = OutputFolder(folder)
    output.remove_leftovers()
    assert output.failure_path("d", "0123456789ab").is_file()
    assert not (folder / ".state" / "trouble").exists()
