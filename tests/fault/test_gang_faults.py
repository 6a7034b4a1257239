"""Batches on a real Ray whose ranks, drivers and disks fail. What may be lost: some steps of the clips in flight."""

import json
import os
import shutil
import signal
import threading
from typing import Any

import pytest
import ray
from gang_runs import Harm, events, pixels, render, render_here, sidecar, start_driver, steps_on_disk, write_manifest
from waiting import PATIENCE_S, wait_for

from cineray.jobs.cli import clips as clip_arguments
from cineray.jobs.cli import main as command_line

pytestmark = pytest.mark.ray

STEPS = 300  # long enough to be caught in the middle: 0.6 s on a fast machine
GOOD = ["a", "b", "c"]
OFTEN = ("--checkpoint-every", 0)


@pytest.fixture(scope="module")
def cluster():
    """The address of a Ray with room for two gangs of two ranks and a finisher."""
    context: Any = ray.init(
        address="local",
        num_cpus=5,
        include_dashboard=False,
        object_store_memory=80 * 2**20,  # not someone else's Ray
    )
    yield context.address_info["gcs_address"]
    ray.shutdown()


@pytest.fixture(scope="module")
def undisturbed(checkpoint_folder, tmp_path_factory):
    """The pixels of the clips as one process renders them."""
    folder = tmp_path_factory.mktemp("undisturbed")
    manifest = write_manifest(folder / "m.jsonl", GOOD, STEPS)
    assert render_here(manifest, folder / "out", checkpoint_folder("wan")) == 0
    return pixels(folder / "out")


@pytest.fixture
def batch(cluster, checkpoint_folder, tmp_path):  # noqa: ARG001  # it must be up
    """(manifest, output folder, model): what a run is called with."""
    return write_manifest(tmp_path / "m.jsonl", GOOD, STEPS), tmp_path / "out", checkpoint_folder("wan")


@pytest.fixture
def slow_check(monkeypatch):
    """The check of a manifest takes until gangs are there, as that of a long one may."""
    monkeypatch.setattr(clip_arguments, "LONG_BYTES", 0)
    check = command_line.read_requests

    def after_gangs(*arguments):
        assert wait_for(ray.util.list_named_actors)
        return check(*arguments)

    monkeypatch.setattr(command_line, "read_requests", after_gangs)


@pytest.mark.usefixtures("slow_check")
def test_gangs_that_come_up_while_a_manifest_is_checked_go_if_it_is_bad(batch, capsys):
    manifest, out, _ = batch
    with manifest.open("a") as file:
        file.write('{"prompt": ""}\n')
    code, _, stderr = render(capsys, *batch, "--address", "auto")
    assert code == 2
    assert stderr.strip().splitlines()[-1].endswith("line 4: prompt must not be empty")
    assert not out.exists()
    assert wait_for(lambda: not ray.util.list_named_actors())


@pytest.mark.exhaustive
@pytest.mark.usefixtures("slow_check")
def test_two_gangs_render_the_pixels_of_one_process_and_encode_a_prompt_once(batch, undisturbed, capsys):
    code, summary, _ = render(capsys, *batch, "--gangs", 2)
    assert code == 0
    assert {clip["status"] for clip in summary["clips"]} == {"done"}
    assert 0 < summary["gangs_busy"] <= 1
    _, out, _ = batch
    assert pixels(out) == undisturbed
    assert json.loads((out / "run.json").read_text())["gangs_busy"] == summary["gangs_busy"]
    assert {e["gang"] for e in events(out) if e["event"] == "running"} == {"gang-0", "gang-1"}
    assert not (out / ".state").exists()
    assert not (out / ".tmp").exists()


def test_ranks_that_die_and_hang_cost_some_steps_of_one_clip(batch, undisturbed, capsys):
    """Two ranks per clip: the pixels stay, and the sidecar says where the clip went on."""
    _, out, _ = batch
    dies, hangs = Harm(out, "a", signal.SIGKILL, rank=1), Harm(out, "b", signal.SIGSTOP, rank=1)
    code, summary, stderr = render(capsys, *batch, "--sp", 2, "--hang-timeout", 5, *OFTEN)
    assert (dies.end(), hangs.end()) == (1, 1)
    assert code == 0, stderr
    assert pixels(out) == undisturbed
    for clip in summary["clips"]:
        assert clip["status"] == "done"
        if clip["id"] in ("a", "b"):
            (step,) = clip["resumed_at"]
            assert 0 < step < STEPS
            assert sidecar(out, clip["id"])["resumed_at"] == [step]
    assert sidecar(out, "c")["layout"]["ulysses"] == 2
    reasons = [e["reason"] for e in events(out) if e["event"] == "retrying"]
    assert len(reasons) == 2
    assert "rank 1 died" in reasons[0]
    assert "no sign of progress for 5 s" in reasons[1]


def test_a_clip_that_kills_its_rank_each_time_is_quarantined_and_the_others_are_rendered(batch, undisturbed, capsys):
    _, out, _ = batch
    poison = Harm(out, "b", signal.SIGKILL, times=99)
    code, summary, _ = render(capsys, *batch, "--gangs", 2, *OFTEN)
    assert poison.end() == 3
    assert code == 1
    status = {clip["id"]: clip["status"] for clip in summary["clips"]}
    assert status == {"a": "done", "b": "quarantined", "c": "done"}
    (error,) = (clip["error"] for clip in summary["clips"] if "error" in clip)
    assert "3 attempts were lost; the last: gang-" in error
    assert pixels(out) == {clip: undisturbed[clip] for clip in "ac"}
    assert {e["gang"] for e in events(out) if e["event"] == "running"} == {"gang-0", "gang-1"}
    failure = json.loads(next((out / ".state" / "failures").iterdir()).read_text())
    assert (failure["id"], failure["status"], len(failure["reasons"])) == ("b", "quarantined", 3)

    code, summary, _ = render(capsys, *batch, "--address", "auto")  # asked again, it is tried again
    assert code == 0
    assert sorted(clip["status"] for clip in summary["clips"]) == ["done", "existing", "existing"]
    assert pixels(out) == undisturbed
    assert not (out / ".state").exists()


@pytest.mark.exhaustive
def test_drivers_that_are_two_or_killed_or_told_to_stop(cluster, batch, undisturbed):
    """One of two drivers renders; what it had done when it was killed or stopped is not done again."""
    _, out, _ = batch
    run = (*batch, "--address", cluster, *OFTEN)
    first = start_driver(*run)
    assert wait_for(lambda: steps_on_disk(out, "a"))
    (rank,) = next(e["pids"] for e in events(out) if e["event"] == "built")
    os.kill(rank, signal.SIGSTOP)  # or all might be done before the second one asks
    second = start_driver(*run)
    _, stderr = second.communicate(timeout=PATIENCE_S)
    os.kill(rank, signal.SIGCONT)
    assert second.returncode == 75, stderr
    assert f"is being rendered into by process {first.pid}" in stderr.splitlines()[-1]
    assert wait_for(lambda: steps_on_disk(out, "b"))
    first.kill()
    first.communicate()

    third = start_driver(*run)
    assert wait_for(
        lambda: steps_on_disk(out, "c") and any(e["event"] == "running" and e["id"] == "c" for e in events(out))
    )
    third.send_signal(signal.SIGTERM)
    stdout, stderr = third.communicate(timeout=PATIENCE_S)
    assert third.returncode == 143, stderr
    assert "run the same command again to resume" in stderr
    clips = {clip["id"]: clip for clip in json.loads(stdout.splitlines()[-1])["clips"]}
    assert clips["a"]["status"] in ("existing", "done")
    assert steps_on_disk(out, "c")

    fourth = start_driver(*run, "--sp", 2)  # goes on with another number of ranks
    stdout, stderr = fourth.communicate(timeout=PATIENCE_S)
    assert fourth.returncode == 0, stderr
    last = {clip["id"]: clip for clip in json.loads(stdout.splitlines()[-1])["clips"]}
    assert last["a"]["status"] == "existing"
    assert last["c"]["status"] == "done"
    assert last["c"]["resumed_at"]
    assert pixels(out) == undisturbed
    done = [e["id"] for e in events(out) if e["event"] == "done"]
    assert len(set(done)) == len(done) >= len(GOOD) - 1  # a driver that is killed may not have told of its last clip


@pytest.mark.exhaustive
def test_a_folder_that_disappears_ends_the_run_with_one_line(batch, capsys):
    _, out, _ = batch

    def vanish() -> None:
        wait_for(lambda: steps_on_disk(out, "a"))
        while out.exists():
            shutil.rmtree(out, ignore_errors=True)

    thread = threading.Thread(target=vanish)
    thread.start()
    code, _, stderr = render(capsys, *batch, "--address", "auto", *OFTEN)
    thread.join()
    assert code == 2
    assert "disappear" in stderr.strip().splitlines()[-1]
    assert "Traceback" not in stderr
    assert not out.exists()


def test_a_layout_that_does_not_fit_is_refused_before_anything_starts(batch, capsys):
    for options, said in (
        (("--sp", 3), "ulysses must divide the model's 4 attention heads (1, 2, 4), got 3"),
        (("--gangs", 0), "--gangs must be 1 to 10000, got 0"),
        (("--sp", 2, "--hang-timeout", 0), "--hang-timeout must be above 0, got 0"),
    ):
        code, _, stderr = render(capsys, *batch, *options)
        assert code == 2
        assert said in stderr
        assert not batch[1].exists()
