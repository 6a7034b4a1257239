"""The clips that a driver on Ray has in hand, without Ray."""

import pytest
from PIL import Image

from cineray.distributed.layout import Layout
from cineray.jobs.gangs.messages import RunSpec
from cineray.jobs.gangs.queue import ClipQueue
from cineray.jobs.memory_check import MemoryCheck
from cineray.jobs.outlook import Outlook
from cineray.jobs.output.folder import OutputFolder
from cineray.jobs.output.lease import Lease
from cineray.jobs.run import RunPlan, Work, _queue
from cineray.jobs.run_options import RunOptions
from cineray.pipeline.footprint.fit import RANK, SHARED, Demand, Setup
from cineray.pipeline.footprint.published import published_checkpoint
from cineray.pipeline.loading.checkpoint import open_checkpoint
from cineray.pipeline.loading.options import LoadOptions
from cineray.pipeline.loading.weights import identify


def test_a_picture_that_is_broken_when_its_clip_is_due_fails_that_clip_alone(checkpoint_folder, new_request, tmp_path):
    """Its line was checked when the picture was whole."""
    checkpoint = open_checkpoint(str(checkpoint_folder("wan_i2v")))
    Image.new("RGB", (32, 32), "red").save(tmp_path / "good.png")
    (tmp_path / "bad.png").write_bytes(b"no picture")
    requests = [new_request(id=name, image=str(tmp_path / f"{name}.png")) for name in ("bad", "good")]
    spec = RunSpec(
        model=checkpoint.name,
        options=LoadOptions(),
        out=tmp_path / "out",
        lossless=False,
        run=RunOptions(),
    )
    queue = ClipQueue(iter(requests), OutputFolder(spec.out), checkpoint, identify(checkpoint), spec)
    (new,), (failed,) = queue.read(4)
    assert (failed.id, failed.status) == ("bad", "failed")
    assert failed.error is not None
    assert "bad.png' cannot be used" in failed.error
    assert new.id == "good"
    picture = queue.tasks[new.name].request.picture
    assert picture is not None
    assert (picture.width, queue.is_exhausted) == (32, True)


def test_actors_that_came_up_early_are_told_with_each_clip_what_it_takes(new_request, tmp_path):
    checkpoint = open_checkpoint("tiny-wan")
    spec = RunSpec(model=checkpoint.name, options=LoadOptions(), out=tmp_path / "out", lossless=False, run=RunOptions())
    told = (Demand(place=RANK, parts={"step": 7}),)

    def demands_of(request):
        return told if request.id == "large" else ()

    requests, folder = [new_request(id="large"), new_request(id="small", seed=1)], OutputFolder(spec.out)
    queue = ClipQueue(iter(requests), folder, checkpoint, identify(checkpoint), spec, demands_of)
    (large, small), _ = queue.read(4)
    assert queue.tasks[large.name].demands == told
    assert queue.tasks[small.name].demands == ()
    queue = ClipQueue(iter(requests), folder, checkpoint, identify(checkpoint), spec)
    (large, _), _ = queue.read(4)
    assert queue.tasks[large.name].demands == ()


@pytest.mark.parametrize("come_up_early", [True, False])
def test_a_run_tells_its_gangs_what_each_clip_takes_where_they_came_up_early(new_request, tmp_path, come_up_early):
    checkpoint, known = open_checkpoint("tiny-wan"), published_checkpoint("wan2.1-t2v-14b")
    setup = Setup(options=LoadOptions(device="cuda"), layout=Layout(ulysses=2), has_finishers=True)
    outlook = Outlook(MemoryCheck(known, setup, None))
    clip = new_request(id="1", width=832, height=480, num_frames=81)
    assert outlook(clip) is None
    plan = RunPlan(
        checkpoint=checkpoint,
        load_options=LoadOptions(),
        options=RunOptions(sp=2),
        out=tmp_path / "out",
        lossless=False,
        outlook=outlook,
    )
    spec = RunSpec(
        model=checkpoint.name,
        options=plan.load_options,
        out=plan.out,
        lossless=False,
        run=plan.options,
        demands=() if come_up_early else outlook.demands(shares_gpu=True),
    )
    folder = OutputFolder(plan.out)
    work = Work(num_clips=1, requests=iter([clip]), folder=folder, lease=Lease(folder.state))
    queue = _queue(plan, work, identify(checkpoint), spec, shares_gpu=True)
    (new,), _ = queue.read(1)
    told = queue.tasks[new.name].demands
    assert {demand.place for demand in told} == ({RANK, SHARED} if come_up_early else set())
