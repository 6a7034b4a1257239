"""Rows for which a tokenizer, an image, a model or a decoder raises something: they fail, the others are rendered."""

import json
from dataclasses import replace
from typing import Any

import pytest
import torch

from cineray.jobs.console.progress import RenderProgress
from cineray.jobs.gangs.finisher_work import FinisherWork
from cineray.jobs.gangs.messages import ClipFault, Denoised, RunSpec
from cineray.jobs.gangs.queue import ClipQueue
from cineray.jobs.gangs.rank_work import RankWork
from cineray.jobs.gangs.retry import RankOutcome, classify_failure
from cineray.jobs.in_process import Batch, render_batch
from cineray.jobs.output.folder import OutputError, OutputFolder
from cineray.jobs.output.lease import Lease, LeasedError
from cineray.jobs.output.results import ResultLog
from cineray.jobs.run import RunReport
from cineray.jobs.run_options import RunOptions
from cineray.pipeline.loading.checkpoint import open_checkpoint
from cineray.pipeline.loading.model import load_model
from cineray.pipeline.loading.options import LoadOptions
from cineray.pipeline.loading.weights import identify
from cineray.pipeline.request import InputError

pytestmark = pytest.mark.process


class UnshownError(Exception):
    def __str__(self) -> str:
        raise ValueError("no")


ERRORS = {
    "key": KeyError("vocab"),
    "attribute": AttributeError("'NoneType' object has no attribute 'shape'"),
    "index": IndexError("index out of range in self"),
    "assertion": AssertionError(),
    "recursion": RecursionError("maximum recursion depth exceeded"),
    "memory": MemoryError(),
    "unicode": UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"),
    "stop": StopIteration(),
    "type": TypeError("expected Tensor"),
    "os": OSError(5, "Input/output error"),
    "torch": torch.OutOfMemoryError("CUDA out of memory."),
    "input": InputError("a picture that cannot be used"),
    "unshown": UnshownError(),
}


class Hostile:
    """Stands before a part of a pipeline, and raises what the prompt's last word names."""

    def __init__(self, part: Any) -> None:
        self._part = part

    def __call__(self, text: str | list[str], **options: Any) -> Any:
        last = (text if isinstance(text, str) else text[0]).rpartition(" ")[2]
        if last in ERRORS:
            raise ERRORS[last]
        return self._part(text, **options)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._part, name)


@pytest.fixture
def model(checkpoint_folder):
    """A model of the test's own, whose parts it may change."""
    return load_model(open_checkpoint(str(checkpoint_folder("wan"))), LoadOptions())


@pytest.fixture
def render(tmp_path, model):
    """Factory: requests -> results by id."""

    def run(*requests):
        folder = OutputFolder(tmp_path / "out")
        results = ResultLog()
        with Lease(folder.state) as lease, RenderProgress(len(requests)) as progress:
            batch = Batch(
                model=model,
                folder=folder,
                lease=lease,
                progress=progress,
                lossless=False,
                checkpoint_s=60.0,
                is_stop_requested=lambda: False,
            )
            render_batch(batch, requests, results)
        return {clip["id"]: clip for clip in results}

    return run


def test_whatever_is_raised_for_a_row_the_others_are_rendered(render, model, new_request, capsys):
    model.pipe.tokenizer = Hostile(model.pipe.tokenizer)
    bad = [new_request(id=name, prompt=f"a red {name}", num_frames=1, num_inference_steps=1) for name in ERRORS]
    good = [replace(bad[0], id=name, prompt="a red circle") for name in ("first", "last")]
    found = render(good[0], *bad, good[1])
    assert [found[name]["status"] for name in ("first", "last")] == ["done", "done"]
    assert {found[name]["status"] for name in ERRORS} == {"failed"}
    assert found["key"]["error"] == "KeyError: 'vocab'"
    assert found["assertion"]["error"] == "AssertionError"
    assert found["input"]["error"] == "a picture that cannot be used"
    assert found["unshown"]["error"] == "UnshownError: (it cannot be shown: ValueError)"
    assert "[15/15]" in capsys.readouterr().err


def test_also_in_the_model_and_in_the_decoder(render, model, new_request):
    request = new_request(num_frames=1, num_inference_steps=1)
    for part in (model.pipe.transformer, model.pipe.vae.decoder):
        hook = part.register_forward_pre_hook(_raise_once())
        found = render(replace(request, id="a"), replace(request, id="b"))
        hook.remove()
        assert (found["a"]["status"], found["a"]["error"]) == ("failed", "IndexError: list index out of range")
        assert found["b"]["status"] in ("done", "existing")


def _raise_once():
    calls = []

    def hook(*_: Any) -> None:
        calls.append(1)
        if len(calls) == 1:
            raise IndexError("list index out of range")

    return hook


def test_an_image_that_is_gone_before_its_turn(render, new_request, tmp_path):
    found = render(new_request(id="a", image=str(tmp_path / "gone.png")), new_request(num_frames=1))
    assert "gone.png' cannot be used: No such file or directory" in found["a"]["error"]
    assert found["1"]["status"] == "done"


@pytest.mark.parametrize("end", [OutputError("full"), LeasedError("lost"), KeyboardInterrupt(), SystemExit(3)])
def test_what_ends_a_run_ends_it(render, model, new_request, end):
    def stop(*_: Any) -> None:
        raise end

    model.pipe.transformer.register_forward_pre_hook(stop)
    with pytest.raises(type(end)):
        render(new_request(), new_request(id="2"))


def test_an_id_that_leads_out_of_the_folder_fails_as_late_as_can_be(render, new_request, tmp_path):
    found = render(new_request(id="../ESCAPED", num_frames=1))
    assert "has no place in an output folder" in found["../ESCAPED"]["error"]
    assert not list(tmp_path.glob("ESCAPED*"))


def test_warnings_are_told_once_and_stand_in_every_sidecar(render, new_request, tmp_path, capsys):
    off = new_request(guidance_scale=1.0, negative_prompt="blurry", num_frames=1, num_inference_steps=1)
    render(off, replace(off, id="2", seed=1))
    said = "the negative prompt has no effect: guidance of 1 or less is off"
    assert capsys.readouterr().err.count(said) == 1
    sidecars = [json.loads(path.read_text()) for path in (tmp_path / "out").glob("*.*.json")]
    assert [sidecar["warnings"] for sidecar in sidecars] == [[said], [said]]


@pytest.fixture
def work(tmp_path, checkpoint_folder):
    """(spec, rank, finisher, Task of a request): what actors do, without Ray."""
    folder = OutputFolder(tmp_path / "out")
    checkpoint = open_checkpoint(str(checkpoint_folder("wan")))
    spec = RunSpec(
        model=checkpoint.name,
        options=LoadOptions(),
        out=folder.path,
        lossless=False,
        run=RunOptions(),
    )
    rank, finisher = RankWork(spec), FinisherWork(spec)
    rank.join(0, *rank.open_rendezvous("127.0.0.1"))
    finisher.load(shares_gpu=False)

    def queued(*requests):
        queue = ClipQueue(iter(requests), folder, checkpoint, identify(checkpoint), spec)
        return queue, *queue.read(9)

    yield queued, rank, finisher
    rank._gang.close()


def test_actors_find_fault_with_the_clip_and_go_on(work, new_request):
    queued, rank, finisher = work
    requests = [new_request(id=name, prompt=f"a red {name}", num_frames=1) for name in ("key", "circle")]
    queue, _, _ = queued(*requests)
    bad, good = queue.tasks.values()
    pipe = finisher._model.pipe
    pipe.tokenizer = Hostile(pipe.tokenizer)
    assert finisher.encode(bad) == ClipFault(reason="KeyError: 'vocab'")
    assert finisher.encode(good) == ()

    hook = rank._model.pipe.transformer.register_forward_pre_hook(_raise_once())
    assert rank.denoise(good) == ClipFault(reason="IndexError: list index out of range", fault="step")
    hook.remove()
    assert isinstance(rank.denoise(good), Denoised)

    hook = pipe.vae.decoder.register_forward_pre_hook(_raise_once())
    assert finisher.finish(good) == ClipFault(reason="IndexError: list index out of range")
    assert finisher.finish(replace(good, warnings=("w",)))["warnings"] == ["w"]
    hook.remove()


def test_a_rank_that_cannot_prepare_a_clip_says_it_is_the_input(work, new_request):
    queued, rank, finisher = work
    queue, _, _ = queued(new_request(num_frames=1))
    (task,) = queue.tasks.values()
    finisher.encode(task)
    factor = rank._model.pipe.vae_scale_factor_temporal
    rank._model.pipe.vae_scale_factor_temporal = 0
    reason = "ZeroDivisionError: integer division or modulo by zero"
    assert rank.denoise(task) == ClipFault(reason=reason, fault="input")
    rank._model.pipe.vae_scale_factor_temporal = factor
    assert isinstance(rank.denoise(task), Denoised)


def test_a_clip_that_cannot_be_looked_up_fails_alone(work, new_request, tmp_path):
    queued, _, _ = work
    _, new, results = queued(new_request(id="a", image=str(tmp_path / "gone.png")), new_request(id="b"))
    assert [(result.id, result.status) for result in results] == [("a", "failed")]
    assert [clip.id for clip in new] == ["b"]


def test_the_queue_gives_a_clip_what_is_to_be_said_of_it(work, new_request):
    queued, _, _ = work
    queue, (new,), _ = queued(new_request(guidance_scale=1.0, negative_prompt="x"))
    said = "the negative prompt has no effect: guidance of 1 or less is off"
    assert queue.warned(new.name, ("cut",)).warnings == queue.tasks[new.name].warnings == (said, "cut")


STEP = RankOutcome(kind="raised", reason="KeyError: 'x'", fault="step")
INPUT = RankOutcome(kind="raised", reason="OSError: broken image", fault="input")
SHORT = RankOutcome(kind="raised", reason="out of memory", fault="memory")
PEERS = RankOutcome(kind="raised", reason="Connection reset by peer")


@pytest.mark.parametrize(
    ("ends", "clip", "keep_gang"),
    [
        ([STEP, STEP], "failed", False),
        ([STEP], "failed", False),
        ([STEP, replace(STEP, reason="KeyError: 'y'")], "strike", False),
        ([STEP, RankOutcome(kind="silent")], "strike", False),
        ([STEP, RankOutcome(kind="answered")], "strike", False),
        ([STEP, PEERS], "strike", False),
        ([PEERS, PEERS], "strike", False),
        ([STEP, RankOutcome(kind="died", reason="SIGKILL")], "strike", False),
        ([INPUT, INPUT], "failed", True),
        ([SHORT], "elsewhere", True),
        ([SHORT, SHORT], "elsewhere", False),
        ([RankOutcome(kind="silent")] * 3 + [SHORT], "elsewhere", False),
        ([SHORT, STEP], "elsewhere", False),
        ([SHORT, RankOutcome(kind="died", reason="SIGKILL")], "strike", False),
    ],
)
def test_an_error_of_a_step_is_the_clips_if_every_rank_says_the_same(ends, clip, keep_gang):
    verdict = classify_failure(ends)
    assert (verdict.clip, verdict.keep_gang) == (clip, keep_gang)


def test_a_run_that_saw_fewer_clips_than_it_was_promised_is_not_complete():
    assert not RunReport(results=ResultLog(), wall_s=1.0, num_missing=1).is_complete
