"""What becomes of the clips that a finisher had in hand when it died."""

from concurrent.futures import Future

import pytest

from cineray.distributed.layout import Layout
from cineray.jobs.clip_queue import Clip, ClipQueue
from cineray.jobs.finisher_slot import FinisherSlot
from cineray.jobs.gang_progress import GangProgress
from cineray.jobs.gang_slot import Resources
from cineray.jobs.lease import Lease
from cineray.jobs.metrics import RunMetrics
from cineray.jobs.output_folder import OutputFolder
from cineray.jobs.ray_batch import RayBatch
from cineray.jobs.results import ResultLog
from cineray.jobs.slots import Slots
from cineray.jobs.stages import RunSpec, Task
from cineray.pipeline.checkpoint import open_checkpoint
from cineray.pipeline.load_options import LoadOptions
from cineray.pipeline.weights import identify


class Call:
    """A call whose answer nobody will get."""

    def future(self) -> Future:
        return Future()


@pytest.fixture
def batch(tmp_path, checkpoint_folder):
    """A run with one finisher and no gang."""
    folder, model = OutputFolder(tmp_path / "out"), str(checkpoint_folder("wan"))
    spec = RunSpec(
        model=model,
        options=LoadOptions(),
        out=folder.path,
        lossless=False,
        layout=Layout(),
        checkpoint_s=60.0,
        collective_s=600.0,
    )
    checkpoint = open_checkpoint(model)
    finisher = FinisherSlot(number=0, spec=spec, resources=Resources(num_cpus=1, num_gpus=0), actor=None)
    finisher.stage = "ready"
    return RayBatch(
        spec=spec,
        slots=Slots([], [finisher]),
        folder=folder,
        lease=Lease(folder.state),
        queue=ClipQueue(iter([]), folder, checkpoint, identify(checkpoint), spec, 2),
        results=ResultLog(),
        progress=GangProgress(3),
        metrics=RunMetrics(),
        hang_s=300.0,
    )


def test_the_one_it_decoded_has_a_strike_the_one_behind_it_has_none(batch, new_request):
    (finisher,) = batch.finishers
    clips = [Clip(task=Task(request=new_request(id=name), mark="0" * 12, prompt_key="k")) for name in "abc"]
    for clip in clips[:2]:
        batch.finishing[clip.task.name] = clip
        finisher.finishing[Call()] = clip.task
    batch.denoised.append(clips[2])
    finisher.lost = "killed"
    batch._settle_finisher(finisher)
    assert [clip.id for clip in batch.denoised] == ["a", "b", "c"]
    assert [clip.strikes for clip in clips] == [["finisher-0: killed"], [], []]
    assert batch.finishing == finisher.finishing == {}
    assert (finisher.stage, finisher.num_losses_in_a_row) == ("gone", 1)
