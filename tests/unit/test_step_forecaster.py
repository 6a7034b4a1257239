"""Steps that are skipped whole: no transformer is called, and their clean latents are forecast at the scheduler."""

import json
from collections import Counter
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from conftest import build_wan
from every_model import build, call
from test_corrector import NUM_STEPS, SCHEDULERS, denoised, line

import cineray
from cineray.caching.trace import TraceEntry
from cineray.pipeline.blocks import BlockListProxy
from cineray.pipeline.caches.corrector import CorrectedScheduler
from cineray.pipeline.caches.enable import attach_cache
from cineray.pipeline.caches.step_forecaster import CleanHistory, ForecastingScheduler
from cineray.pipeline.denoise import denoise
from cineray.pipeline.render import denoise_clip, prepare_clip
from cineray.pipeline.resume.step_state import Beginning, StepState

SKIPPED = {3, 5, 6, 8, 9}
FASTER = "fitted(speedup=2)"
ENTRY = TraceEntry(step=0, branch="cond", sample=0, compute=True, cost=1.0, reason="", statistic=None, gamma=None)


def quiet(_done, _total):
    pass


def forecast(scheduler, gamma, corrects):
    """As `denoised`, of a model whose clean latents are `line`, and whose output is never read where it skips."""
    scheduler.set_timesteps(NUM_STEPS)
    entries, held = [], []
    inner = scheduler
    if corrects:
        outcomes = {True: "computed", False: "skipped"}
        inner = CorrectedScheduler(scheduler, lambda: ["begun" if len(entries) == 1 else outcomes[entries[-1].compute]])
    stepper = ForecastingScheduler(inner, True, CleanHistory(), lambda: entries[-1], held.append)
    latents = torch.randn(1, 4, 2, 3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for index, timestep in enumerate(stepper.timesteps[:-1]):
        compute = index not in SKIPPED
        entries.append(replace(ENTRY, step=index, compute=compute, gamma=None if compute else gamma(index)))
        output = (latents - line(index)) / scheduler.sigmas[index].double()
        output = output if compute else torch.full_like(output, torch.nan)
        latents = stepper.step(output, timestep, latents, return_dict=False)[0]
    assert max(held) == 2 * latents.numel() * 8
    return latents


def along(index):
    """The gamma of a straight line."""
    older, newest = [step for step in range(index) if step not in SKIPPED][-2:]
    return 1 + (index - newest) / (newest - older)


@pytest.mark.parametrize("corrects", [False, True])
@pytest.mark.parametrize("kind", SCHEDULERS)
def test_clean_latents_that_move_evenly_are_forecast_exactly(kind, corrects):
    right = denoised(SCHEDULERS[kind](), line, corrects=False)
    found = forecast(SCHEDULERS[kind](), along, corrects)
    reused = forecast(SCHEDULERS[kind](), lambda _: 1.0, False)
    # sigmas are float32: what they round off is all that is left
    assert (found - right).abs().max() < 1e-5 * right.abs().max() < (reused - right).abs().max()


def test_the_loop_calls_no_transformer_on_a_skipped_step(loaded, new_request):
    model, request = loaded("wan"), new_request(cache=FASTER, num_inference_steps=20)
    calls = Counter()
    handle = model.pipe.transformer.register_forward_pre_hook(lambda *_: calls.update(["call"]))
    clip = denoise_clip(model, request, quiet)
    handle.remove()
    assert calls["call"] == 2 * 10
    assert [entry.step for entry in clip.trace.entries] == [step for step in range(20) for _ in ("cond", "uncond")]
    assert clip.trace.summary()["cost"] == 0.5
    assert {entry.compute for entry in clip.trace.entries if entry.step in (0, 1, 19)} == {True}
    # bytes of two steps' latents, whatever the branches
    assert clip.trace.held_bytes == 2 * clip.latents.numel() * 4


@pytest.mark.parametrize(("cache", "has_gates"), [(FASTER, False), ("interval(interval=2)", True)])
def test_nothing_stands_between_the_blocks_of_a_step_that_is_computed(loaded, new_request, cache, has_gates):
    model, request = loaded("wan"), new_request(cache=cache, num_inference_steps=16)
    transformer, seen = model.pipe.transformer, set()
    handle = transformer.blocks[0].register_forward_pre_hook(lambda *_: seen.add(type(transformer.blocks)))
    denoise_clip(model, request, quiet)
    handle.remove()
    assert seen == ({BlockListProxy} if has_gates else {torch.nn.ModuleList})


@pytest.mark.parametrize("breaks_off", [True, False])
def test_a_step_that_was_decided_and_broke_off_is_forgotten(loaded, breaks_off):
    """Nothing is skipped before two steps have been computed to their end; here the third would be."""
    pipe = loaded("wan").pipe
    transformer = pipe.transformer
    latents, text = torch.zeros(1, 4, 1, 6, 6), torch.zeros(1, 4, transformer.config.text_dim)

    def run(step):
        with transformer.cache_context("cond", step_index=step, num_inference_steps=20):
            transformer(latents, torch.tensor([999.0 - step]), text)

    with cineray.enable_cache(pipe, "fitted(speedup=4)") as handle:
        broken = transformer.blocks[1].register_forward_pre_hook(lambda *_: 1 / 0) if breaks_off else None
        for step in range(2):
            with pytest.raises(ZeroDivisionError) if breaks_off else nullcontext():
                run(step)
        if broken is None:
            with pytest.raises(ValueError, match="knows nothing of it"):
                run(2)
            return
        broken.remove()
        run(2)
        assert handle.trace.entries[-1].compute


@pytest.mark.parametrize("name", ["wan", "hunyuan", "wan22"])
def test_the_loop_makes_what_a_pipeline_with_this_cache_makes(loaded, new_request, name):
    model, experts = loaded(name), {"guidance_scale_2": 3.0} if name == "wan22" else {}
    shift = model.pipe.scheduler.config.get("flow_shift")  # else ours is the authors'
    request = new_request(cache=FASTER, num_inference_steps=20, flow_shift=shift, **experts)
    ours = denoise_clip(model, request, quiet).latents
    pipe = model.pipe
    with cineray.enable_cache(pipe, FASTER) as handle:
        theirs = [
            pipe(
                prompt=request.prompt,
                width=request.width,
                height=request.height,
                num_frames=request.num_frames,
                num_inference_steps=20,
                guidance_scale=request.guidance_scale,
                generator=torch.Generator("cpu").manual_seed(request.seed),
                output_type="latent",
                **experts,
            ).frames
            for _ in range(2)
        ]
    assert handle.trace.summary()["skipped_steps"] == 10 - len(experts)  # the second expert begins anew
    assert torch.equal(theirs[0], ours)
    assert torch.equal(theirs[1], ours)  # nothing of the clip before


@pytest.mark.parametrize("name", ["dit", "stable_audio", "flux", "hunyuan15", "vace"])
def test_every_pipeline_is_forecast_and_as_before_without(name):
    pipe = build(name)
    scheduler, plain = pipe.scheduler, call(pipe, steps=20)
    with cineray.enable_cache(pipe, FASTER) as handle:
        cached = call(pipe, steps=20)
        assert torch.equal(call(pipe, steps=20), cached)
    assert handle.trace.summary()["skipped_steps"] == 10
    assert cached.isfinite().all()
    assert not torch.equal(cached, plain)
    assert pipe.scheduler is scheduler
    assert torch.equal(call(pipe, steps=20), plain)


def test_a_loop_that_steps_by_itself_is_told_what_to_step_with():
    pipe = build("open_sora")
    with (
        cineray.enable_cache(pipe.transformer, FASTER),
        pytest.raises(ValueError, match=r"fitted\(.*step with handle.corrected\(scheduler\)"),
    ):
        call(pipe, steps=20)


def test_a_scheduler_that_was_exchanged_behind_the_cache_is_noticed():
    pipe = build_wan()
    pipe.set_progress_bar_config(disable=True)
    with cineray.enable_cache(pipe, FASTER):
        call(pipe, steps=20)
        pipe.scheduler = SCHEDULERS["unipc"]()
        with pytest.raises(ValueError, match="exchange a pipeline's scheduler before enable_cache"):
            call(pipe, steps=20)


def test_each_expert_begins_with_steps_of_its_own(loaded, new_request):
    model, request = loaded("wan22"), new_request(cache=FASTER, num_inference_steps=20, guidance_scale_2=3.0)
    prepared = prepare_clip(model, request).denoising
    boundary = prepared.experts[1].first_step
    assert 2 < boundary < 17
    clip = denoise_clip(model, request, quiet)
    computed = {entry.step for entry in clip.trace.entries if entry.compute}
    assert {0, 1, boundary, boundary + 1, 19} <= computed
    reasons = {entry.step: entry.reason for entry in clip.trace.entries}
    assert reasons[boundary] == reasons[boundary + 1] == "empty"
    assert len(computed) < 20


class _From:
    """A keeper that begins at a step with what another one was offered there."""

    def __init__(self, state: StepState | None = None) -> None:
        self.offered: dict[int, StepState] = {}
        self._state = state

    def begin(self, _beginning: Beginning) -> StepState | None:
        return self._state

    def after_step(self, take) -> None:
        state = take()
        self.offered[state.step] = replace(state, latents=state.latents.clone())


def test_a_clip_that_resumes_computes_two_steps_and_goes_on_as_planned(loaded, new_request):
    model, request = loaded("wan"), new_request(cache=FASTER, num_inference_steps=40)
    first = _From()
    whole = denoise_clip(model, request, quiet, keeper=first)
    planned = {entry.step for entry in whole.trace.entries if entry.compute}
    at = min(step for step in range(10, 30) if step not in planned and step + 1 not in planned)
    resumed = denoise_clip(model, request, quiet, keeper=_From(first.offered[at]))
    computed = {entry.step for entry in resumed.trace.entries if entry.compute and entry.step >= at}
    assert computed == {at, at + 1} | {step for step in planned if step >= at}
    assert (resumed.latents - whole.latents).abs().max() < 0.5 * whole.latents.abs().max()


def test_a_trace_is_replayed(loaded, new_request, tmp_path):
    model, request = loaded("wan"), new_request(cache=FASTER, num_inference_steps=20)
    clip = denoise_clip(model, request, quiet)
    (tmp_path / "trace.json").write_text(json.dumps(clip.trace.to_dict()))
    again = denoise_clip(model, replace(request, cache=f"replay:{tmp_path / 'trace.json'}"), quiet)
    assert torch.equal(again.latents, clip.latents)


def test_clips_of_a_batch_are_forecast_as_if_each_were_alone():
    pipe = build_wan().to(torch.float64)
    pipe.set_progress_bar_config(disable=True)
    noise = torch.randn(2, 4, 2, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with cineray.enable_cache(pipe, FASTER):
        together = call(pipe, steps=20, prompt=["a red circle", "a blue square"], latents=noise)
        alone = [
            call(pipe, steps=20, prompt=prompt, latents=noise[number : number + 1])
            for number, prompt in enumerate(["a red circle", "a blue square"])
        ]
    assert torch.allclose(together, torch.cat(alone), rtol=1e-9, atol=1e-9)


def test_a_loop_of_ones_own_steps_with_the_handle(loaded, new_request):
    """Our loop's own protocol, from outside."""
    model = loaded("wan")
    clip = prepare_clip(model, new_request(num_inference_steps=20)).denoising
    plan = model.checkpoint.plan_cache(FASTER)
    with attach_cache(clip.transformers, plan, len(clip.branches)) as handle:
        latents = denoise(clip, quiet, cache=handle)
        assert handle.trace.summary()["skipped_steps"] == 10
    assert torch.equal(latents, denoise_clip(model, new_request(num_inference_steps=20, cache=FASTER), quiet).latents)
