"""Ranks and finishers whose memory is too short for a while: nothing is held against a clip, and no pixel changes."""

import sys
import threading
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
import ray
import torch
from gang_runs import events, pixels, render, write_manifest
from ray import cloudpickle

from cineray.jobs.gangs import actors
from cineray.jobs.gangs.finisher_work import TILED, FinisherWork
from cineray.jobs.gangs.messages import ClipFault, Denoised, RunSpec, Task
from cineray.jobs.gangs.rank_work import RankWork
from cineray.jobs.output.folder import OutputFolder
from cineray.jobs.run_options import RunOptions
from cineray.pipeline.footprint import fit
from cineray.pipeline.footprint.fit import FINISHER, RANK, Demand
from cineray.pipeline.loading.options import LoadOptions

pytestmark = [pytest.mark.ranks, pytest.mark.process]

SHORT = (
    "CUDA out of memory. Tried to allocate 5.06 GiB. GPU 0 has a total capacity of 79.10 GiB of which 1.20 GiB is free."
)
SAID = "out of memory: needs 5.06 GiB more, has 1.20 GiB free of 79.10 GiB"


def shortage(times, after=0):
    """A hook that finds memory too short in some of a module's calls."""
    calls = []

    def hook(*_):
        calls.append(1)
        if after < len(calls) <= after + times:
            raise torch.OutOfMemoryError(SHORT)

    return hook


@pytest.fixture
def stages(checkpoint_folder, tmp_path, new_request):
    """(rank, finisher, task): what actors do, without Ray."""
    spec = RunSpec(
        model=str(checkpoint_folder("wan")),
        options=LoadOptions(),
        out=OutputFolder(tmp_path / "out").path,
        lossless=True,
        run=RunOptions(),
    )
    rank, finisher = RankWork(spec), FinisherWork(spec)
    rank.join(0, *rank.open_rendezvous("127.0.0.1"))
    finisher.load(shares_gpu=False)
    task = Task(request=new_request(num_inference_steps=3), fingerprint="0123456789ab", prompt_key="k" * 32)
    yield rank, finisher, task
    rank._gang.close()


def test_each_stage_tries_once_more_in_place(stages):
    rank, finisher, task = stages
    pipe = finisher._model.pipe
    hooks = [
        pipe.text_encoder.register_forward_pre_hook(shortage(1)),
        rank._model.pipe.transformer.register_forward_pre_hook(shortage(1, after=2)),
        pipe.vae.decoder.register_forward_pre_hook(shortage(1)),
    ]
    assert finisher.encode(task) == ()
    assert isinstance(rank.denoise(task), Denoised)
    record = finisher.finish(task)
    assert isinstance(record, dict)
    assert "warnings" not in record
    for hook in hooks:
        hook.remove()


def test_a_second_shortage_is_told_and_is_nobodys_fault(stages):
    rank, finisher, task = stages
    hook = finisher._model.pipe.text_encoder.register_forward_pre_hook(shortage(2))
    assert finisher.encode(task) == ClipFault(reason=SAID, fault="memory")
    hook.remove()
    assert finisher.encode(task) == ()
    hook = rank._model.pipe.transformer.register_forward_pre_hook(shortage(2))
    assert rank.denoise(task) == ClipFault(reason=SAID, fault="memory")
    hook.remove()
    assert isinstance(rank.denoise(task), Denoised)


def test_a_clip_that_does_not_fit_is_given_back_before_its_first_step(stages, monkeypatch):
    """A gang that came up before the clips were checked hears with each clip what it takes."""
    rank, finisher, task = stages
    finisher.encode(task)
    calls = []
    hook = rank._model.pipe.transformer.register_forward_pre_hook(lambda *_: calls.append(1))
    whole = replace(
        task, demands=(Demand(place=FINISHER, parts={"VAE": 10**12}), Demand(place=RANK, parts={"step": 10}))
    )
    on_cpu, on_cuda = rank._spec, replace(rank._spec, options=LoadOptions(device="cuda"))
    monkeypatch.setattr(fit, "gpu_memory_bytes", lambda: (9,))
    rank._spec = on_cuda
    found = rank.denoise(whole)
    assert isinstance(found, ClipFault)
    assert found.fault == "memory"
    assert "does not fit, by forecast: it takes 0.0 GB of a rank's GPU" in found.reason
    assert not calls
    monkeypatch.setattr(fit, "gpu_memory_bytes", lambda: (10,))
    assert rank._no_room(whole) is None  # a finisher's GPU is another one
    rank._spec = on_cpu
    assert isinstance(rank.denoise(whole), Denoised)
    hook.remove()


def test_a_decode_goes_on_in_tiles_and_then_elsewhere(stages):
    _, finisher, task = stages
    rank, _, _ = stages
    finisher.encode(task)
    rank.denoise(task)
    vae = finisher._model.pipe.vae
    hook = vae.decoder.register_forward_pre_hook(shortage(3))
    assert finisher.finish(task) == ClipFault(reason=SAID, fault="memory")
    assert not vae.use_tiling
    hook.remove()
    hook = vae.decoder.register_forward_pre_hook(shortage(2))
    record = finisher.finish(task)  # its latents are there still
    hook.remove()
    assert isinstance(record, dict)
    assert record["warnings"] == [TILED]
    assert not vae.use_tiling


def test_a_finisher_whose_device_is_not_well_says_nothing_of_the_clip(stages):
    rank, finisher, task = stages
    finisher.encode(task)
    rank.denoise(task)

    def broken(*_):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    hook = finisher._model.pipe.vae.decoder.register_forward_pre_hook(broken)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        finisher.finish(task)
    hook.remove()


@pytest.mark.parametrize(("offload", "is_one_at_a_time"), [("none", False), ("model", True), ("sequential", True)])
def test_with_offload_a_finisher_encodes_and_decodes_one_after_the_other(stages, offload, is_one_at_a_time):
    """Accelerate's hooks would move a text encoder to the CPU while it is at work, for the decoder's sake."""
    rank, loaded, task = stages
    loaded.encode(task)
    rank.denoise(task)
    options = LoadOptions(device="cuda", offload=offload)
    finisher = FinisherWork(replace(loaded._spec, options=options))
    finisher._spec, finisher._model = loaded._spec, loaded._model  # the lock is the other's, the rest is on the CPU
    inside, overlap, both_there = [], [], threading.Event()

    def at_work(*_):
        inside.append(1)
        if len(inside) > 1:
            overlap.append(1)
            both_there.set()
        both_there.wait(0.3 if is_one_at_a_time else 60.0)

    hooks = [
        loaded._model.pipe.text_encoder.register_forward_pre_hook(at_work),
        loaded._model.pipe.vae.decoder.register_forward_pre_hook(at_work),
        loaded._model.pipe.text_encoder.register_forward_hook(lambda *_: inside.clear()),
        loaded._model.pipe.vae.decoder.register_forward_hook(lambda *_: inside.clear()),
    ]
    encode = threading.Thread(target=finisher.encode, args=[replace(task, prompt_key="j" * 32)])
    encode.start()
    assert isinstance(finisher.finish(task), dict)
    encode.join()
    for hook in hooks:
        hook.remove()
    assert bool(overlap) is not is_one_at_a_time


class ShortRank(actors.GangRank):
    """Its first rank has too little memory in the third step of the first attempt at all."""

    def join(self, rank, host, port):
        super().join(rank, host, port)
        mark, short = self._work._spec.out / "short", shortage(1, after=2)

        def hook(*_):
            with suppress(FileExistsError):
                try:
                    short()
                except torch.OutOfMemoryError:
                    mark.touch(exist_ok=False)
                    raise

        if rank == 0:
            self._work._model.pipe.transformer.register_forward_pre_hook(hook)


class ShortFinisher(actors.Finisher):
    """Has too little memory for the first clip, even in tiles."""

    def load(self, shares_gpu):
        super().load(shares_gpu)
        self._work._model.pipe.vae.decoder.register_forward_pre_hook(shortage(3))


@pytest.fixture(scope="module")
def cluster():
    ray.init(address="local", num_cpus=6, include_dashboard=False, object_store_memory=80 * 2**20)
    yield
    ray.shutdown()


@pytest.mark.ray
@pytest.mark.usefixtures("cluster")
def test_actors_without_memory_for_a_while_render_the_same_pixels(checkpoint_folder, tmp_path, capsys, monkeypatch):
    batch = write_manifest(tmp_path / "m.jsonl", ["a", "b"], 20), tmp_path / "out", checkpoint_folder("wan")
    code, _, said = render(capsys, batch[0], tmp_path / "one", batch[2])
    assert code == 0, said
    cloudpickle.register_pickle_by_value(sys.modules[__name__])  # Ray's workers cannot import a test
    made = actors.actors_of(ShortRank, ShortFinisher)
    monkeypatch.setattr(actors, "actors_of", lambda: made)
    code, summary, said = render(capsys, *batch, "--sp", 2, "--address", "auto", "--checkpoint-every", 0)
    assert code == 0, said
    assert {clip["status"] for clip in summary["clips"]} == {"done"}
    reasons = [event["reason"] for event in events(batch[1]) if event["event"] == "retrying"]
    assert sorted(reasons) == [f"finisher-0: {SAID}", f"gang-0: {SAID}"]
    Path(batch[1] / "short").unlink()
    assert pixels(batch[1]) == pixels(tmp_path / "one")
