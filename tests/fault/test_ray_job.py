"""`cineray submit` on a head node as `ray start --head` makes it: stopped by `ray job stop`, and submitted again."""

import os
import re
import signal
import time

import pytest
from gang_runs import arguments, events, pixels, render, sidecar, steps_on_disk, write_manifest
from local_cluster import head_node
from waiting import PATIENCE_S, wait_for

pytestmark = pytest.mark.ray

STEPS = 300  # the clip in flight lasts a good part of a second: long enough to be caught in it


def submitted(head, *more):
    """What a submission said that went well; a head that is just up, on a busy machine, takes none for a while."""
    deadline = time.monotonic() + PATIENCE_S
    while True:
        submit = head.cineray("submit", "--cluster", head.dashboard, *more)
        said, _ = submit.communicate(timeout=PATIENCE_S)
        if submit.returncode == 0:
            return said
        assert "No available agent" in said, said
        assert time.monotonic() < deadline, said
        time.sleep(2)


def test_a_job_that_is_stopped_and_submitted_again_goes_on_in_the_middle_of_its_clip(
    checkpoint_folder, tmp_path, capsys
):
    model, out = checkpoint_folder("wan"), tmp_path / "out"
    manifest = write_manifest(tmp_path / "m.jsonl", ["a", "b", "c"], STEPS)
    code, _, said = render(capsys, manifest, tmp_path / "one", model)
    assert code == 0, said

    _, *clips = arguments(manifest, out, model, "--checkpoint-every", 0, "--device", "cpu")
    with head_node(num_cpus=2) as head:
        said = submitted(head, "--no-wait", *clips)
        job = re.search(r"raysubmit_\w+", said)
        assert job, said
        assert wait_for(lambda: steps_on_disk(out, "b"), PATIENCE_S), said
        (rank,) = next(event["pids"] for event in events(out) if event["event"] == "built")
        os.kill(rank, signal.SIGSTOP)  # or the clip may be done before the job hears that it is to stop
        stop = head.ray("job", "stop", "--address", head.dashboard, job[0])
        assert wait_for(lambda: any(event["event"] == "stopping" for event in events(out)), PATIENCE_S)
        os.kill(rank, signal.SIGCONT)
        said, _ = stop.communicate(timeout=PATIENCE_S)
        assert "was stopped" in said
        (yielded,) = [event for event in events(out) if event["event"] == "yielded"]
        assert (yielded["id"], yielded["kept"]) == ("b", True)
        assert set(pixels(out)) == {"a"}

        submitted(head, *clips)
    log = events(out)
    assert sorted(event["id"] for event in log if event["event"] == "done") == ["a", "b", "c"]
    assert sidecar(out, "b")["resumed_at"] == [yielded["step"]]
    assert 0 < yielded["step"] < STEPS
    assert "resumed_at" not in sidecar(out, "c")
    assert pixels(out) == pixels(tmp_path / "one")
    assert not (out / ".state").exists()
