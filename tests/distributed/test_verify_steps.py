"""`cineray verify` in 16 bits: each step from the same latents, against the distance between two kernels."""

import json
import math
import shutil
from dataclasses import replace

import pytest
import torch
from conftest import build_wan
from safetensors.torch import load_file, save_file

from cineray.caching.forecast import Forecasting
from cineray.caching.observation import Observation
from cineray.caching.policies.dicache import DiCacheConfig
from cineray.caching.trace import Trace, TraceEntry
from cineray.distributed.layout import parse_layout
from cineray.jobs.cli.main import main
from cineray.jobs.measure import verify_steps
from cineray.jobs.measure.forced_steps import FollowingPolicy, Judged, RecordedPolicy, Recording, Teacher
from cineray.jobs.measure.verify import GangOptions
from cineray.pipeline.loading.checkpoint import open_checkpoint
from cineray.pipeline.loading.options import LoadOptions
from cineray.pipeline.render import denoise_clip, denoise_prepared, prepare_clip
from cineray.pipeline.request import ClipRequest

SMALL = ["--width", "32", "--height", "48", "--frames", "5", "--steps", "4", "--dtype", "bfloat16"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wan") / "wan"
    build_wan().save_pretrained(folder)
    return str(folder)


@pytest.mark.slow
@pytest.mark.process
def test_layouts_are_as_near_as_kernels(model, capsys):
    words = ["--cache", "dicache(threshold=1)", "--layouts", "2,cfg2,ring2", "--json"]
    code = main(["verify", "--model", model, *SMALL, *words])
    output = capsys.readouterr()
    summary = json.loads(output.out.splitlines()[-1])
    assert code == 0, output.err
    assert [clip["layout"] for clip in summary["clips"]] == ["ulysses2", "cfg2", "ring2"]
    for clip in summary["clips"]:
        assert clip["steps"] == 4
        assert 0 <= clip["step_error"] <= clip["step_bound"] < 0.1
        assert clip["decisions"] == 4  # of the branch that decides for both, whichever rank computes it
        assert clip["decisions_apart"] == []
    assert summary["clips"][2]["step_error"] > 0  # a ring adds up in another order
    assert "may be" in output.err


@pytest.mark.slow
@pytest.mark.process
def test_another_model_on_the_ranks_is_told(model, tmp_path, capsys, monkeypatch):
    folder, run = tmp_path / "wan", verify_steps.run_on_local_ranks
    shutil.copytree(model, folder)

    def run_and_change(function, *arguments, **how):
        if function is verify_steps._step_on_rank:
            weights = folder / "transformer" / "diffusion_pytorch_model.safetensors"
            tensors = load_file(weights)
            save_file(tensors | {"proj_out.weight": tensors["proj_out.weight"] * 1.2}, weights, {"format": "pt"})
        return run(function, *arguments, **how)

    monkeypatch.setattr(verify_steps, "run_on_local_ranks", run_and_change)
    words = ["--cache", "none", "--layouts", "2", "--json"]
    assert main(["verify", "--model", str(folder), *SMALL, *words]) == 1
    output = capsys.readouterr()
    assert "NOT THE SAME" in output.err
    (clip,) = json.loads(output.out.splitlines()[-1])["clips"]
    assert not clip["ok"]
    assert clip["step_error"] > 2 * clip["step_bound"]


def verified(model, cache, layouts, change=None):
    """Rows of a clip in bfloat16; `change` is what becomes of the layouts' clip."""
    checkpoint, run = open_checkpoint(model), verify_steps.run_on_local_ranks
    request = ClipRequest(
        id="1",
        prompt="a red circle",
        width=32,
        height=48,
        num_frames=5,
        num_inference_steps=6,
        guidance_scale=4.0,
        fps=8,
        cache=cache,
    )

    def run_changed(function, num_ranks, job, *arguments, **how):
        if function is verify_steps._step_on_rank and change is not None:
            job = replace(job, requests=(change(request),))
        return run(function, num_ranks, job, *arguments, **how)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(verify_steps, "run_on_local_ranks", run_changed)
        options, gang = LoadOptions(dtype="bfloat16"), GangOptions(timeout_s=120.0)
        return list(verify_steps.verify_steps(checkpoint, options, [request], list(map(parse_layout, layouts)), gang))


@pytest.mark.slow
@pytest.mark.process
def test_a_decision_at_the_threshold_is_told_from_one_that_has_no_reason_to_differ(model):
    (ring,) = verified(model, "dicache-paper(threshold=1e9)", ["ring2"])
    assert (ring.num_near, ring.apart) == (0, ())
    # the first change that is judged: nothing has accumulated before it, so a threshold between the two parts them
    first = next(d for d in ring.decisions if d.step == 1 and d.here != d.recorded)
    between = (first.here + first.recorded) / 2
    assert min(first.here, first.recorded) < between < max(first.here, first.recorded)
    (near,) = verified(model, f"dicache-paper(threshold={between!r})", ["ring2"])
    assert near.num_near >= 1
    assert near.ok
    assert near.to_dict()["decisions_near"] == near.num_near
    (apart,) = verified(
        model,
        "dicache-paper(threshold=1e9)",
        ["ring2"],
        lambda clip: replace(clip, cache="dicache-paper(threshold=1e-9)"),
    )
    assert apart.apart
    assert not apart.ok


def test_decisions_are_compared_by_what_they_were_judged_by():
    def judged(change, compute, step=3, of_recorded=False):
        return Judged(
            step=step,
            branch=0,
            sample=0,
            change_sum=change,
            previous_sum=1.0,
            accumulated=0.0,
            compute=compute,
            compute_of_recorded=of_recorded,
        )

    def row(here, floor=0.01):
        recorded, other = judged(0.5, compute=False), judged(0.5 + floor, compute=False)
        (decision,) = verify_steps.compare_decisions([recorded], [other], [judged(9.0, compute=True, step=2), here])
        return verify_steps.VerifiedSteps(
            id="1",
            layout="ring2",
            ranks=2,
            errors=(0.0,),
            floors=(0.0,),
            decisions=(decision,),
            psnr_db=math.inf,
            denoise_s=1.0,
        )

    near, equal = row(judged(0.52, compute=True)), row(judged(0.9, compute=False))
    assert (near.num_near, near.apart, near.ok) == (1, (), True)
    assert (equal.num_near, equal.apart, equal.ok) == (0, (), True)
    far, unseen = (row(judged(change, compute=True)) for change in (0.54, None))
    another_policy = row(judged(0.501, compute=True, of_recorded=True))
    for differing in (far, unseen, another_policy):
        assert (differing.num_near, len(differing.apart), differing.ok) == (0, 1, False)
    assert far.to_dict()["decisions_apart"] == ["step 3 branch cond"]


def test_a_following_policy_judges_with_the_recorded_memory_and_does_what_was_done():
    def seen(step, change, accumulated):
        return Observation(
            step_index=step,
            num_steps=10,
            branch_index=0,
            num_branches=1,
            sample=0,
            change_sum=change,
            previous_sum=1.0,
            accumulated=accumulated,
            num_skips_in_a_row=0,
            num_pairs=2,
        )

    policy = DiCacheConfig(threshold=0.5, warmup=0.0).policy()
    recording = RecordedPolicy(policy)
    done = [recording.decide(seen(step, 0.3, accumulated)) for step, accumulated in ((4, 0.0), (5, 0.3), (6, 0.0))]
    assert [decision.compute for decision in done] == [False, True, False]
    entries = [
        TraceEntry(
            step=step,
            branch="cond",
            sample=0,
            compute=decision.compute,
            cost=1.0,
            reason=decision.reason.value,
            statistic=0.3,
            gamma=None if decision.compute else 1.25,
        )
        for step, decision in zip((4, 5, 6), done, strict=True)
    ]
    trace = Trace(policy="dicache", forecasting=Forecasting(), num_blocks=2, probe_depth=1, entries=entries)
    following = FollowingPolicy(policy, recording.judged, trace)
    acted = [following.decide(seen(step, change, 7.0)) for step, change in ((4, 0.6), (5, 0.1), (6, 0.3))]
    assert [decision.compute for decision in acted] == [False, True, False]
    assert [decision.gamma for decision in acted] == [1.25, None, 1.25]
    assert [one.compute for one in following.judged] == [True, False, False]  # 0.6; 0.3 + 0.1; 0.3
    assert [one.compute_of_recorded for one in following.judged] == [False, True, False]
    assert following.judged[1].accumulated == 0.3


def test_a_taught_clip_steps_from_what_was_recorded(loaded, new_request, tmp_path):
    model, request = loaded("wan"), new_request(num_inference_steps=3)
    expected = denoise_clip(model, request, lambda *_: None).latents

    def denoise(make_advance):
        prepared = prepare_clip(model, request)
        advance = make_advance(prepared.denoising.advance)
        prepared = replace(prepared, denoising=replace(prepared.denoising, advance=advance))
        return advance, denoise_prepared(model, request, prepared, lambda *_: None).latents

    _, recorded = denoise(lambda advance: Recording(advance, tmp_path))
    assert torch.equal(recorded, expected)
    teacher, taught = denoise(lambda _: Teacher(tmp_path))
    assert teacher.errors == [0.0, 0.0, 0.0]
    assert torch.equal(taught, expected)
    wrong = Teacher(tmp_path)
    following = [wrong(None, torch.zeros_like(expected), torch.zeros(()), expected) for _ in range(3)]
    assert wrong.errors == [1.0, 1.0, 1.0]
    assert torch.equal(following[-1], expected)  # an output that is all wrong changes no latents


def test_what_counts_as_the_same_step():
    row = verify_steps.VerifiedSteps(
        id="1",
        layout="ulysses2",
        ranks=2,
        errors=(0.001, 0.002, 0.0),
        floors=(0.001, 0.001, 0.0),
        psnr_db=math.inf,
        denoise_s=1.0,
    )
    assert row.ok
    assert row.worst_step == 1
    assert not replace(row, errors=(0.001, 0.0031, 0.0)).ok
    assert replace(row, errors=(0.001, 0.002, 0.0029)).ok  # the floor of most steps counts where one has next to none
    assert not replace(row, psnr_db=45.0).ok
    assert replace(row, errors=(0.0, 0.0, 0.0), floors=(0.0, 0.0, 0.0)).ok
    assert not replace(row, errors=(0.0, 1e-9, 0.0), floors=(0.0, 0.0, 0.0)).ok
