"""`--scheduler`: another class with the checkpoint's own settings, where the model's loop can be driven by it."""

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler

from cineray.jobs.output.record import fingerprint_of, render_options
from cineray.pipeline.loading.checkpoint import open_checkpoint
from cineray.pipeline.loading.options import LoadOptions
from cineray.pipeline.loading.prepare import other_scheduler
from cineray.pipeline.request import InputError

EULER, DPM, UNIPC = "FlowMatchEulerDiscreteScheduler", "DPMSolverMultistepScheduler", "UniPCMultistepScheduler"


FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (EULER, FlowMatchEulerDiscreteScheduler(shift=3.0)),
        (DPM, DPMSolverMultistepScheduler(flow_shift=3.0, **FLOW)),
    ],
)
def test_it_has_the_shift_of_the_checkpoints_own(name, expected):
    own = UniPCMultistepScheduler(flow_shift=3.0, **FLOW)
    other = other_scheduler(own, name)
    back = other_scheduler(other, UNIPC)
    for scheduler in (own, other, back, expected):
        scheduler.set_timesteps(num_inference_steps=5)
    assert type(other) is type(expected)
    assert torch.equal(other.sigmas, expected.sigmas)
    assert torch.equal(back.sigmas, own.sigmas)


def test_a_clip_is_another_one_with_it_and_the_same_with_the_checkpoints_own(new_request):
    checkpoint = open_checkpoint("tiny-wan")
    request = new_request()

    def fingerprint(name):
        options = LoadOptions(scheduler=checkpoint.scheduler_named(name))
        return fingerprint_of(request, checkpoint, "digest", render_options(options, lossless=False))

    assert fingerprint(UNIPC) == fingerprint("auto")
    assert len({fingerprint(name) for name in ("auto", EULER, DPM)}) == 3


@pytest.mark.parametrize(("model", "name"), [("tiny-wan", "DDIMScheduler"), ("tiny-hunyuan", UNIPC), ("tiny-wan", "x")])
def test_one_that_cannot_drive_the_loop_is_refused_with_those_that_can(model, name):
    with pytest.raises(InputError, match=rf"--scheduler must be one of .*{EULER}.* for model {model}, whose own is"):
        open_checkpoint(model).scheduler_named(name)


@pytest.mark.slow
def test_the_loop_takes_eulers_steps(loaded, new_request):
    """Euler's step by hand: latents += (next sigma - sigma) * velocity."""
    from cineray.pipeline.render import denoise_prepared, prepare_clip

    model = loaded("wan")
    pipe, own = model.pipe, model.pipe.scheduler
    request = new_request(num_inference_steps=3, guidance_scale=1.0)
    pipe.register_modules(scheduler=other_scheduler(own, EULER))
    try:
        prepared = prepare_clip(model, request)
        assert isinstance(prepared.denoising.scheduler, FlowMatchEulerDiscreteScheduler)
        got = denoise_prepared(model, request, prepared, lambda *_: None).latents
        start = prepare_clip(model, request).denoising
    finally:
        pipe.register_modules(scheduler=own)
    latents, sigmas = start.latents, start.scheduler.sigmas
    with torch.no_grad():
        for step, timestep in enumerate(start.timesteps):
            kwargs = start.branches[0].transformer_kwargs
            velocity = pipe.transformer(latents, timestep.expand(1), return_dict=False, **kwargs)[0]
            latents = latents + (sigmas[step + 1] - sigmas[step]) * velocity
    torch.testing.assert_close(got, latents, rtol=1e-4, atol=1e-5)
