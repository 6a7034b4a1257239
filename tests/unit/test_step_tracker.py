"""Where the loop is, when only the scheduler knows."""

import pytest
import torch
from conftest import build_flux, build_wan
from diffusers import (
    DPMSolverMultistepScheduler,
    HeunDiscreteScheduler,
    KDPM2DiscreteScheduler,
    PNDMScheduler,
)
from every_model import build, call

import cineray

ALWAYS = "dicache(threshold=1e6)"


def steps_of(handle, branch="cond"):
    return [entry.step for entry in handle.trace.entries if entry.branch == branch]


@pytest.mark.parametrize("name", ["dit", "stable_audio"])
def test_pipelines_that_say_nothing_are_read_off_their_schedulers(name):
    pipe = build(name)
    for steps in (5, 12):  # a second clip is another list
        with cineray.enable_cache(pipe, ALWAYS) as handle:
            call(pipe, steps=steps)
            assert steps_of(handle) == steps_of(handle, "uncond") == list(range(steps))
            call(pipe, steps=steps)  # the same list again: a new clip
            assert steps_of(handle) == list(range(steps))
    assert handle.trace.summary()["skipped_steps"] > 0


@pytest.mark.parametrize(
    ("scheduler", "calls"),
    [
        (HeunDiscreteScheduler(), 23),  # twice a step, the last one excepted
        (KDPM2DiscreteScheduler(), 23),
        (DPMSolverMultistepScheduler(), 12),
        (DPMSolverMultistepScheduler(use_karras_sigmas=True), 12),
    ],
    ids=["heun", "kdpm2", "dpm", "dpm-karras"],
)
def test_schedulers_that_call_twice_a_step_or_repeat_a_timestep(scheduler, calls):
    pipe = build("dit")
    with cineray.enable_cache(pipe, "interval(interval=1)") as handle:  # before the scheduler is exchanged
        pipe.scheduler = scheduler
        cached = call(pipe)
        assert steps_of(handle) == list(range(calls))
    assert torch.equal(call(pipe), cached)
    with cineray.enable_cache(pipe, ALWAYS) as handle:
        call(pipe)
    assert steps_of(handle) == list(range(calls))
    assert 0 < handle.trace.summary()["skipped_steps"] < calls


def test_timesteps_that_were_rounded_to_the_same_number_are_told_apart():
    pipe = build("dit")
    pipe.scheduler = DPMSolverMultistepScheduler(use_karras_sigmas=True)
    steps = 150
    pipe.scheduler.set_timesteps(steps)
    assert len(pipe.scheduler.timesteps.unique()) < steps
    with cineray.enable_cache(pipe, ALWAYS) as handle:
        call(pipe, steps=steps)
    assert steps_of(handle) == list(range(steps))


def test_a_scheduler_that_repeats_a_timestep_and_keeps_no_place_is_refused():
    pipe = build("dit")
    pipe.scheduler = PNDMScheduler(skip_prk_steps=True)
    with (
        cineray.enable_cache(pipe, ALWAYS),
        pytest.raises(ValueError, match=r"PNDMScheduler comes to timestep .* 2 times and does not tell"),
    ):
        call(pipe)


def test_a_bare_transformer_needs_a_context_or_a_scheduler():
    pipe = build("dit")
    transformer, scheduler = pipe.transformer, pipe.scheduler
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))

    @torch.no_grad()
    def loop(x):
        scheduler.set_timesteps(10)
        for t in scheduler.timesteps:
            out = transformer(x.repeat(2, 1, 1, 1), t[None].expand(2), torch.tensor([7, 1000])).sample
            cond, uncond = out[:, :4].chunk(2)
            x = scheduler.step(uncond + 4.0 * (cond - uncond), t, x).prev_sample
        return x

    plain = loop(latents)
    with (
        cineray.enable_cache(transformer, ALWAYS),
        pytest.raises(ValueError, match=r"does not say which step it is: wrap it in .* or enable the cache with sch"),
    ):
        loop(latents)
    with cineray.enable_cache(transformer, "interval(interval=1)", scheduler=scheduler) as handle:
        assert torch.equal(loop(latents), plain)
    with cineray.enable_cache(transformer, ALWAYS, scheduler=scheduler) as handle:
        assert not torch.equal(loop(latents), plain)
    assert steps_of(handle) == steps_of(handle, "uncond") == list(range(10))
    with (
        cineray.enable_cache(transformer, ALWAYS, scheduler=scheduler),
        pytest.raises(ValueError, match="timestep 3 is not in the list of the pipeline's DDIMScheduler"),
    ):
        transformer(latents, torch.tensor([3]), torch.tensor([7]))


def test_where_branches_have_calls_of_their_own_their_order_tells_which_is_which():
    """The scheduler knows the step; in a transformer alone nobody does."""
    pipe = build_wan()
    pipe.scheduler.set_timesteps(4)
    texts = torch.randn(2, 1, 512, 64)
    latents = torch.randn(1, 4, 2, 4, 4)
    with cineray.enable_cache(pipe, ALWAYS) as handle, torch.no_grad():
        for timestep in pipe.scheduler.timesteps:
            for text in texts:
                pipe.transformer(latents, timestep[None], text)
    assert steps_of(handle) == steps_of(handle, "uncond") == [0, 1, 2, 3]
    with (
        cineray.enable_cache(pipe.transformer, ALWAYS),
        pytest.raises(ValueError, match="does not say which step it is"),
        torch.no_grad(),
    ):
        pipe.transformer(latents, pipe.scheduler.timesteps[:1], texts[0])


def test_a_position_is_as_good_as_a_name():
    """StableAudioPipeline passes the timestep by position; FLUX's divides it by 1000."""
    flux = build_flux()
    flux.set_progress_bar_config(disable=True)
    for pipe in (build("stable_audio"), flux):
        with cineray.enable_cache(pipe, "interval(interval=1)") as handle:
            call(pipe, steps=4)
        assert steps_of(handle) == list(range(4))
