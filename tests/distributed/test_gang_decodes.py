"""`--decode gang`: the ranks decode together and a finisher makes the video of their frames, without a VAE."""

import numpy as np
import pytest
import torch.distributed as dist
from torch import nn

from cineray.jobs.cli.main import main
from cineray.jobs.gangs.finisher_work import FinisherWork
from cineray.jobs.gangs.messages import Denoised, RunSpec, Task
from cineray.jobs.gangs.rank_work import LOCALHOST, RankWork
from cineray.jobs.output.folder import OutputFolder
from cineray.jobs.run_options import RunOptions, decodes_on_gang
from cineray.pipeline.loading.checkpoint import open_checkpoint
from cineray.pipeline.loading.options import LoadOptions
from cineray.pipeline.media.video import read_video
from cineray.pipeline.request import ClipRequest, InputError
from cineray.pipeline.resume.decoded_frames import DecodedFrames, read_frames, write_frames
from cineray.pipeline.resume.tensor_file import TensorFileError

MARK = "0123456789ab"
SIZES = {"width": 64, "height": 64, "num_frames": 9, "num_inference_steps": 2, "guidance_scale": 4.0, "fps": 8}
TASK = Task(request=ClipRequest(id="1", prompt="a red circle", **SIZES), fingerprint=MARK, prompt_key="k" * 32)


def spec_of(out, num_ranks, decodes):
    run = RunOptions(sp=num_ranks, checkpoint_s=1e9)
    return RunSpec(model="tiny-wan", options=LoadOptions(), out=out, lossless=True, run=run, decodes_on_gang=decodes)


def denoise_on_rank(rank, num_ranks, init_method, spec):
    work = RankWork(spec)
    meeting = dist.FileStore(f"{init_method.removeprefix('file://')}.place", num_ranks)
    if rank == 0:
        _, port = work.open_rendezvous(LOCALHOST)
        meeting.set("port", str(port))
    work.join(rank, LOCALHOST, int(meeting.get("port")))
    convolved_rows = []
    if spec.decodes_on_gang:
        last = work._model.pipe.vae.decoder.conv_out
        last.register_forward_pre_hook(lambda _, args: convolved_rows.append(args[0].shape[-2]))
    answer = work.denoise(TASK)
    has_vae = isinstance(work._model.pipe.vae, nn.Module)
    work._gang.close()
    return isinstance(answer, Denoised), has_vae, convolved_rows[:1]


@pytest.mark.slow
def test_two_ranks_decode_the_pixels_of_a_finisher(ranks, tmp_path):
    videos = {}
    for decodes in (False, True):
        folder = OutputFolder(tmp_path / str(decodes))
        spec = spec_of(folder.path, 2, decodes)
        finisher = FinisherWork(spec)
        finisher.load(shares_gpu=False)
        assert isinstance(finisher._model.pipe.vae, nn.Module) is not decodes
        assert finisher.encode(TASK) == ()
        answers = ranks.run(denoise_on_rank, 2, spec, timeout_s=300)
        assert answers == [(True, decodes, [32] if decodes else [])] * 2  # half of the rows each
        record = finisher.finish(TASK)
        assert isinstance(record, dict)
        assert not list(folder.state.glob("*/*.safetensors"))[1:]  # what is left is the prompt
        videos[decodes] = read_video(folder.video_path(TASK.request, MARK)).astype(int)
    difference = np.abs(videos[True] - videos[False])
    assert difference.max() <= 1  # by rows a convolution adds up in another order
    assert (difference != 0).mean() < 1e-4


@pytest.mark.slow
def test_frames_that_are_damaged_or_gone_are_decoded_again(tmp_path, capsys):
    folder = OutputFolder(tmp_path / "out")
    spec = spec_of(folder.path, 1, decodes=True)
    finisher, rank = FinisherWork(spec), RankWork(spec)
    finisher.load(shares_gpu=False)
    rank.join(0, *rank.open_rendezvous(LOCALHOST))
    assert finisher.encode(TASK) == ()
    assert isinstance(rank.denoise(TASK), Denoised)
    frames = folder.frames_path("1", MARK)
    content = bytearray(frames.read_bytes())
    content[-5] ^= 1
    frames.write_bytes(content)
    assert finisher.finish(TASK) is None
    assert "decoded anew; its frames on disk are not used: its content is not what" in capsys.readouterr().err
    frames.unlink()
    assert finisher.finish(TASK) is None
    steps = []
    hook = rank._model.pipe.transformer.register_forward_pre_hook(lambda *_: steps.append(1))
    assert isinstance(rank.denoise(TASK), Denoised)  # from the latents that are there
    hook.remove()
    assert steps == []
    assert isinstance(finisher.finish(TASK), dict)
    rank._gang.close()


def test_frames_are_read_back_as_they_were_written_and_for_their_clip_alone(tmp_path):
    frames = np.arange(2 * 4 * 6 * 3, dtype=np.uint8).reshape(2, 4, 6, 3)
    path = tmp_path / "frames.safetensors"
    write_frames(DecodedFrames(frames=frames, decode_s=1.25), MARK, path)
    found = read_frames(path, MARK, (2, 4, 6))
    assert np.array_equal(found.frames, frames)
    assert found.decode_s == 1.25
    with pytest.raises(TensorFileError, match="another clip's"):
        read_frames(path, "ba9876543210", (2, 4, 6))
    with pytest.raises(TensorFileError, match=r"uint8 \[2, 6, 4, 3\]"):
        read_frames(path, MARK, (2, 6, 4))


@pytest.mark.parametrize(
    ("run", "options", "model", "expected"),
    [
        (RunOptions(sp=8), LoadOptions(device="cuda"), "tiny-wan", True),
        (RunOptions(sp=2), LoadOptions(device="cuda"), "tiny-wan", False),
        (RunOptions(sp=2, decode="gang"), LoadOptions(device="cuda"), "tiny-wan", True),
        (RunOptions(sp=8, decode="finisher"), LoadOptions(device="cuda"), "tiny-wan", False),
        (RunOptions(sp=8), LoadOptions(device="cuda", vae_tiling=True), "tiny-hunyuan", False),
        (RunOptions(sp=8), LoadOptions(), "tiny-wan", False),
    ],
)
def test_who_decodes(run, options, model, expected):
    assert decodes_on_gang(run, options, open_checkpoint(model).model) is expected


def test_an_unknown_way_to_decode_is_refused():
    with pytest.raises(InputError, match="--decode must be auto, gang, finisher, got rank"):
        RunOptions(decode="rank")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--vae-tiling"], "--decode gang decodes by bands of rows, not in tiles"),
        (["--model", "MODEL"], "its decoder cannot be shared by ranks; leave --decode gang out"),
    ],
)
def test_what_does_not_go_with_a_gang_that_decodes(words, said, checkpoint_folder, tmp_path, capsys):
    words = [str(checkpoint_folder("flux")) if word == "MODEL" else word for word in words]
    out = tmp_path / "out"
    assert main(["render", "a cat", "--out", str(out), "--sp", "2", "--decode", "gang", *words]) == 2
    assert said in capsys.readouterr().err
    assert not out.exists()
