"""Skipped steps are corrected when the next one is computed."""

from copy import deepcopy

import pytest
import torch
from conftest import build_hunyuan, build_wan
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    UniPCMultistepScheduler,
)
from every_model import call

import cineray
from cineray.caching.forecast import Forecasting
from cineray.caching.trace import Trace, TraceEntry
from cineray.pipeline.caches.corrector import CorrectedScheduler, is_flow
from cineray.pipeline.linear_runs import LinearRuns, is_linear

NUM_STEPS = 12
FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
SCHEDULERS = {
    "euler": lambda: FlowMatchEulerDiscreteScheduler(shift=3.0),
    "unipc": lambda: UniPCMultistepScheduler(**FLOW),
    "dpm": lambda: DPMSolverMultistepScheduler(**FLOW),
}
SKIPPED = {3, 5, 6, 8, 9}


def denoised(
    scheduler,
    clean_at,
    skipped=frozenset(),
    corrects=True,
    wrong=0.3,
    between=lambda latents: latents,
    last=None,
    curvature=0.0,
    runs=None,
):
    """Latents before the last step of a model whose clean latents at step i are `clean_at(i)`, and wrong where skipped.

    Args:
        between: what a loop does with the latents after each step.
        last: the outcomes; default: by `skipped`.
    """
    scheduler.set_timesteps(NUM_STEPS)
    outcome = "begun"
    stepper = CorrectedScheduler(scheduler, lambda: [outcome], curvature, runs) if corrects else scheduler
    latents = torch.randn(1, 4, 2, 3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for index, timestep in enumerate(stepper.timesteps[:-1]):
        outcome = "begun" if index == 0 else "skipped" if index in skipped else "computed"
        outcome = outcome if last is None else last(index)
        clean = clean_at(index) + wrong * (index in skipped)
        sigma = scheduler.sigmas[index].double()
        latents = between(stepper.step((latents - clean) / sigma, timestep, latents, return_dict=False)[0])
    return latents


def line(index):
    return torch.linspace(-1, 1, 18, dtype=torch.float64).view(1, 1, 2, 3, 3) * index / NUM_STEPS


def power(exponent):
    return lambda index: line(NUM_STEPS) * (index / NUM_STEPS - 0.4) ** exponent


@pytest.mark.parametrize("kind", SCHEDULERS)
def test_a_model_that_moves_evenly_is_rendered_as_if_nothing_had_been_skipped(kind):
    right = denoised(SCHEDULERS[kind](), line, corrects=False)
    uncorrected = denoised(SCHEDULERS[kind](), line, SKIPPED, corrects=False)
    corrected = denoised(SCHEDULERS[kind](), line, SKIPPED)
    # sigmas are float32: what they round off is all that is left
    assert (corrected - right).abs().max() < 1e-5 * right.abs().max() < (uncorrected - right).abs().max()


@pytest.mark.parametrize("kind", SCHEDULERS)
def test_a_model_that_moves_along_a_cubic_is_rendered_so_with_curvature(kind):
    right = denoised(SCHEDULERS[kind](), power(3), corrects=False)
    straight, halfway, curved = (
        (denoised(SCHEDULERS[kind](), power(3), SKIPPED, curvature=c) - right).abs().max() for c in (0.0, 0.5, 1.0)
    )
    assert curved < 1e-5 * right.abs().max() < halfway < straight


@pytest.mark.parametrize("kind", SCHEDULERS)
def test_what_was_skipped_before_the_last_computed_step_is_taken_again_once_more_is_known(kind):
    """When step 2 is computed only a straight line is known; the parabola shows at step 5."""
    right = denoised(SCHEDULERS[kind](), power(2), corrects=False)
    skipped = {1, 3, 4}
    straight, curved = (
        (denoised(SCHEDULERS[kind](), power(2), skipped, curvature=c) - right).abs().max() for c in (0.0, 1.0)
    )
    assert curved < 1e-5 * right.abs().max() < straight


@pytest.mark.parametrize("curvature", [0.0, 0.6])
@pytest.mark.parametrize("kind", SCHEDULERS)
def test_steps_are_taken_again_at_once_as_one_by_one(kind, curvature):
    """The second clip takes the runs that the first has found; one in which other steps are skipped takes its own."""
    runs, skips = LinearRuns(), (SKIPPED, SKIPPED, {4, 5, 7, 9})
    found = []
    for skipped in skips:
        one_by_one = denoised(SCHEDULERS[kind](), power(3), skipped, curvature=curvature)
        at_once = denoised(SCHEDULERS[kind](), power(3), skipped, curvature=curvature, runs=runs)
        found.append(len(runs._known))
        # in float64; sigmas are float32, and Euler's steps round to it
        assert (at_once - one_by_one).abs().max() < 1e-6 * one_by_one.abs().max()
    assert 0 < found[0] == found[1] < found[2]


def test_runs_of_another_schedule_are_not_taken():
    runs = LinearRuns()
    for scheduler in (SCHEDULERS["unipc"], lambda: UniPCMultistepScheduler(**FLOW | {"flow_shift": 5.0})):
        one_by_one = denoised(scheduler(), line, SKIPPED)
        at_once = denoised(scheduler(), line, SKIPPED, runs=runs)
        assert (at_once - one_by_one).abs().max() < 1e-6 * one_by_one.abs().max()


def test_schedulers_that_do_more_than_add_up_take_steps_one_by_one():
    assert all(is_linear(new()) for new in SCHEDULERS.values())
    assert not is_linear(FlowMatchEulerDiscreteScheduler(stochastic_sampling=True))
    assert not is_linear(DPMSolverMultistepScheduler(**FLOW, algorithm_type="sde-dpmsolver++"))
    assert not is_linear(UniPCMultistepScheduler(thresholding=True))
    assert not is_linear(FlowMatchHeunDiscreteScheduler())


@pytest.mark.parametrize("curvature", [0.0, 1.0])
@pytest.mark.parametrize("kind", SCHEDULERS)
def test_nothing_changes_where_nothing_is_skipped(kind, curvature):
    plain = denoised(SCHEDULERS[kind](), line, corrects=False)
    assert torch.equal(denoised(SCHEDULERS[kind](), line, curvature=curvature), plain)


def test_latents_that_the_loop_has_changed_are_not_taken_back():
    def between(latents):
        return latents + 1.0

    plain = denoised(SCHEDULERS["euler"](), line, SKIPPED, corrects=False, between=between)
    assert torch.equal(denoised(SCHEDULERS["euler"](), line, SKIPPED, between=between), plain)


def test_latents_that_the_loop_has_copied_are_corrected():
    assert torch.equal(
        denoised(SCHEDULERS["unipc"](), line, SKIPPED, between=torch.clone),
        denoised(SCHEDULERS["unipc"](), line, SKIPPED),
    )


def test_a_cache_that_begins_anew_corrects_nothing():
    def last(index):
        return "skipped" if index in SKIPPED else "begun"

    plain = denoised(SCHEDULERS["euler"](), line, SKIPPED, corrects=False)
    assert torch.equal(denoised(SCHEDULERS["euler"](), line, SKIPPED, last=last), plain)


@pytest.mark.parametrize("curvature", [0.0, 0.7])
@pytest.mark.parametrize("kind", SCHEDULERS)
def test_rows_of_a_batch_are_corrected_as_if_each_were_alone(kind, curvature):
    """The model's clean latents follow the row's own, so that a row's past matters."""
    skipped = [{3, 5, 6, 8, 9}, {4, 5, 6, 7}, set(), {2, 3, 9}]

    def run(rows):
        outcomes = []
        stepper = CorrectedScheduler(SCHEDULERS[kind](), lambda: outcomes, curvature)
        stepper.set_timesteps(NUM_STEPS)
        latents = torch.stack([torch.randn(4, 2, 3, 3, generator=torch.Generator().manual_seed(r)) for r in rows])
        for index, timestep in enumerate(stepper.timesteps):
            outcomes[:] = ["begun" if index == 0 else "skipped" if index in skipped[r] else "computed" for r in rows]
            wrong = torch.tensor([index in skipped[r] for r in rows]).view(-1, 1, 1, 1, 1)
            clean = torch.sin(index + latents) + wrong
            latents = stepper.step((latents - clean) / stepper.sigmas[index], timestep, latents, return_dict=False)[0]
        return latents

    together = run([0, 1, 2, 3])
    for row in range(4):
        assert torch.equal(together[row], run([row])[0])


def test_samples_that_are_no_rows_of_the_latents_are_not_corrected():
    scheduler, outcomes = SCHEDULERS["euler"](), ["computed", "skipped"]
    stepper = CorrectedScheduler(scheduler, lambda: outcomes)
    stepper.set_timesteps(NUM_STEPS)
    latents = [torch.zeros(1, 2, 3)]
    for timestep in stepper.timesteps:
        latents.append(stepper.step(torch.ones(1, 2, 3), timestep, latents[-1])[0])
    assert latents[-1].mean() == pytest.approx(-1, abs=1e-6)


def test_a_second_clip_knows_nothing_of_the_first():
    outcome = "begun"
    stepper = CorrectedScheduler(SCHEDULERS["unipc"](), lambda: [outcome])
    clips = []
    for _ in range(2):
        stepper.set_timesteps(NUM_STEPS)
        made = [torch.zeros(1, 4, 2, 3, 3)]
        outcomes = ("begun", "computed", "skipped", "skipped")  # broken off among skipped steps
        for timestep, outcome in zip(stepper.timesteps[:4], outcomes, strict=True):  # noqa: B007 - the stepper asks for it
            made.append(stepper.step(torch.ones_like(made[0]), timestep, made[-1])[0])
        clips.append(made)
    assert all(torch.equal(one, other) for one, other in zip(*clips, strict=True))


def test_it_is_the_inner_scheduler_in_all_else_and_can_be_copied():
    corrected = CorrectedScheduler(SCHEDULERS["unipc"](), lambda: ["computed"])
    corrected.set_timesteps(5)
    copy = deepcopy(corrected)
    assert copy.config.flow_shift == 3.0
    assert copy.inner is not corrected.inner
    assert torch.equal(copy.timesteps, corrected.inner.timesteps)
    assert not hasattr(corrected, "nothing_of_this_name")


def test_only_flows_are_corrected():
    assert all(is_flow(new()) for new in SCHEDULERS.values())
    assert not is_flow(DDIMScheduler())
    assert not is_flow(UniPCMultistepScheduler())


def entry(step, *, compute, branch="cond", reason="run", sample=0):
    return TraceEntry(
        step=step, branch=branch, sample=sample, compute=compute, cost=1.0, reason=reason, statistic=None, gamma=None
    )


def test_the_outcome_is_that_of_all_branches_and_samples_of_the_newest_step():
    trace = Trace(policy="", forecasting=Forecasting(), num_blocks=1, probe_depth=0)
    assert trace.last_outcomes == []
    for added, outcomes in (
        (entry(0, compute=True, reason="empty"), ["begun"]),
        (entry(1, compute=True), ["computed"]),
        (entry(1, compute=True, branch="uncond"), ["computed"]),
        (entry(2, compute=False), ["skipped"]),
        (entry(2, compute=True, sample=1), ["skipped", "computed"]),
        (entry(2, compute=True, branch="uncond"), ["begun", "computed"]),
        (entry(3, compute=True, reason="empty"), ["begun"]),
    ):
        trace.entries.append(added)
        assert trace.last_outcomes == outcomes


@pytest.mark.parametrize("build", [build_wan, build_hunyuan])
def test_a_pipeline_steps_with_it_while_its_cache_is_enabled_and_not_after(build):
    pipe = build()
    scheduler, config = pipe.scheduler, dict(pipe.config)
    policy = "dicache(threshold=100,profile=none,max_skips=2,corrector={})"
    uncached = call(pipe)
    with cineray.enable_cache(pipe, policy.format("false")):
        assert pipe.scheduler is scheduler
        plain = call(pipe)
    with cineray.enable_cache(pipe, policy.format("true")) as handle:
        assert pipe.scheduler is not scheduler
        assert dict(pipe.config) == config
        corrected = call(pipe)
        assert torch.equal(call(pipe), corrected)
    assert handle.trace.summary()["skipped_steps"] > 1
    assert pipe.scheduler is scheduler
    assert not torch.equal(corrected, plain)
    assert torch.equal(call(pipe), uncached)


def test_a_scheduler_that_was_exchanged_meanwhile_stays():
    pipe, other = build_wan(), SCHEDULERS["unipc"]()
    handle = cineray.enable_cache(pipe, "dicache")
    pipe.scheduler = other
    handle.disable()
    assert pipe.scheduler is other


def test_branches_that_decide_for_themselves_are_not_corrected():
    pipe = build_wan()
    with cineray.enable_cache(pipe, "dicache(branches=separate)") as handle:
        assert "corrector=False" in handle.policy
        assert not isinstance(pipe.scheduler, CorrectedScheduler)
