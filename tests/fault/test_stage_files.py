"""Files that cross between ranks and finishers: changed on their way, they are made again; no clip fails for them."""

import shutil
from dataclasses import replace

import pytest

from cineray.jobs.gangs.finisher_work import FinisherWork
from cineray.jobs.gangs.messages import ClipFault, Denoised, NoPrompt, RunSpec, Task
from cineray.jobs.gangs.rank_work import LOCALHOST, RankWork
from cineray.jobs.output.folder import OutputFolder
from cineray.jobs.run_options import RunOptions
from cineray.pipeline.loading.options import LoadOptions
from cineray.pipeline.media.video import read_video
from cineray.pipeline.resume.encoded_prompts import is_encoded
from cineray.pipeline.resume.tensor_file import read_tensors

pytestmark = pytest.mark.ranks

MARK, OTHER = "0123456789ab", "ba9876543210"


@pytest.fixture
def stages(checkpoint_folder, tmp_path):
    """(finisher, rank, output folder): of one rank, in this process."""
    out = tmp_path / "out"
    folder = OutputFolder(out)
    spec = RunSpec(
        model=str(checkpoint_folder("wan")),
        options=LoadOptions(),
        out=out,
        lossless=True,
        run=RunOptions(checkpoint_s=1e9, hang_s=30.0),
    )
    finisher, rank = FinisherWork(spec), RankWork(spec)
    finisher.load(shares_gpu=False)
    rank.join(0, *rank.open_rendezvous(LOCALHOST))
    yield finisher, rank, folder
    rank._gang.close()


def damage(path):
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


def test_what_is_damaged_on_its_way_is_made_again(stages, new_request, capsys):
    finisher, rank, folder = stages
    request = new_request(width=16, height=16, num_frames=1, num_inference_steps=2)
    task, other = (
        Task(request=replace(request, seed=seed), fingerprint=mark, prompt_key="k" * 32)
        for seed, mark in ((0, MARK), (1, OTHER))
    )
    prompt, state = folder.prompt_path(task.prompt_key), folder.step_path("1", MARK)

    answer = rank.denoise(task)
    assert isinstance(answer, NoPrompt)
    assert finisher.encode(task) == ()
    whole = read_tensors(prompt).digest
    damage(prompt)
    answer = rank.denoise(task)
    assert isinstance(answer, NoPrompt)
    assert "changed or damaged" in answer.reason
    assert finisher.encode(task) == ()
    assert read_tensors(prompt).digest == whole
    shutil.copy(prompt, folder.prompt_path("j" * 32))
    assert not is_encoded(folder.prompt_path("j" * 32))  # of other prompts

    for each in (task, other):
        assert isinstance(rank.denoise(each), Denoised)
    good = state.read_bytes()
    shutil.copy(folder.step_path("1", OTHER), state)  # another clip's latents
    assert finisher.finish(task) is None
    assert "its latents on disk are not used: it is another clip's" in capsys.readouterr().err
    assert isinstance(rank.denoise(task), Denoised)
    assert "begins anew" in capsys.readouterr().err
    damage(state)
    assert finisher.finish(task) is None
    assert isinstance(rank.denoise(task), Denoised)
    record = finisher.finish(task)
    assert isinstance(record, dict)
    assert not state.exists()
    video = read_video(folder.video_path(request, MARK))
    folder.video_path(request, MARK).unlink()
    state.write_bytes(good)
    assert isinstance(finisher.finish(task), dict)
    assert (read_video(folder.video_path(request, MARK)) == video).all()


def test_latents_that_are_not_finite_are_the_clip_s_fault(stages, new_request):
    finisher, rank, _ = stages
    request = new_request(width=16, height=16, num_frames=1, num_inference_steps=2)
    task = Task(request=request, fingerprint=MARK, prompt_key="k" * 32)
    assert finisher.encode(task) == ()
    rank._model.pipe.transformer.proj_out.bias.data[0] = float("nan")
    answer = rank.denoise(task)
    assert isinstance(answer, ClipFault)
    assert "not finite after denoising" in answer.reason
