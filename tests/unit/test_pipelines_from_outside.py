"""A cache on pipelines whose loops say little: calls without a name, loops that begin late, two transformers."""

from typing import Any

import pytest
import torch
from conftest import _wan_parts, build_flux, build_hunyuan, build_wan
from diffusers import (
    FluxControlImg2ImgPipeline,
    FluxControlInpaintPipeline,
    FluxControlNetModel,
    FluxControlNetPipeline,
    FluxControlPipeline,
    FluxImg2ImgPipeline,
    FluxInpaintPipeline,
    FluxKontextInpaintPipeline,
    FluxKontextPipeline,
    HunyuanSkyreelsImageToVideoPipeline,
    WanPipeline,
    WanVideoToVideoPipeline,
)
from every_model import build, call
from PIL import Image

import cineray
from cineray.pipeline.caches.step_tracker import StepTracker

pytestmark = pytest.mark.slow

OFTEN = "interval(interval=2)"
POLICIES = [OFTEN, "taylorseer", "dicache(threshold=0.3,warmup=0.1)", "fbcache(threshold=0.3)"]


def flux_parts():
    pipe = build_flux()
    pipe.vae.register_to_config(shift_factor=0.0, scaling_factor=1.0)
    return {n: part for n, part in pipe.components.items() if n not in ("image_encoder", "feature_extractor")}


WITH_TRUE_GUIDANCE = {
    "img2img": FluxImg2ImgPipeline,
    "inpaint": FluxInpaintPipeline,
    "kontext": FluxKontextPipeline,
    "kontext_inpaint": FluxKontextInpaintPipeline,
}
CONTROLS = {  # one call a step: diffusers guides them by embedded guidance alone
    "control": FluxControlPipeline,
    "control_img2img": FluxControlImg2ImgPipeline,
    "control_inpaint": FluxControlInpaintPipeline,
}


def build_outside(name: str) -> Any:
    if name == "wan_v2v":
        pipe = WanVideoToVideoPipeline(**_wan_parts(0))
    elif name == "skyreels":
        hunyuan = build_hunyuan()
        hunyuan.transformer = type(hunyuan.transformer)(**{**hunyuan.transformer.config, "in_channels": 8}).eval()
        pipe = HunyuanSkyreelsImageToVideoPipeline(**hunyuan.components)
    elif name == "flux_controlnet":
        torch.manual_seed(5)
        parts = flux_parts()
        config = {k: v for k, v in parts["transformer"].config.items() if k not in ("out_channels", "patch_size")}
        controlnet = FluxControlNetModel(**(config | {"num_layers": 2, "num_single_layers": 1})).eval()
        for weights in controlnet.parameters():
            torch.nn.init.normal_(weights, std=0.05)  # else it adds nothing
        pipe = FluxControlNetPipeline(**parts, controlnet=controlnet)
    elif name in CONTROLS:
        parts = flux_parts()
        torch.manual_seed(6)
        config = {
            **parts["transformer"].config,
            "in_channels": 32,
            "out_channels": 16,
        }  # the control beside the latents
        pipe = CONTROLS[name](**{**parts, "transformer": type(parts["transformer"])(**config).eval()})
    else:
        pipe = WITH_TRUE_GUIDANCE[name](**flux_parts())
    pipe.set_progress_bar_config(disable=True)
    return pipe


OUTSIDE = [*WITH_TRUE_GUIDANCE, "flux_controlnet", "wan_v2v", "skyreels"]
SOME = ("img2img", "flux_controlnet", "wan_v2v")  # the others call the transformer as one of these does


def _more(name: str) -> Any:
    """A case for `scripts/test --all`."""
    return pytest.param(name, marks=pytest.mark.exhaustive)


def call_outside(pipe: Any, steps: int = 12, seed: int = 3, **changes: Any) -> torch.Tensor:
    kind = type(pipe).__name__
    picture = Image.new("RGB", (32, 32), (90, 10, 10))
    arguments: dict[str, Any] = {
        "prompt": "a red circle",
        "negative_prompt": "blue square blurry",
        "num_inference_steps": steps,
        "width": 32,
        "height": 32,
        "output_type": "latent",
        "generator": torch.Generator().manual_seed(seed),
    }
    if kind.startswith("Flux"):
        arguments |= {"true_cfg_scale": 4.0, "image": picture}
    if "Img2Img" in kind or "Inpaint" in kind:
        arguments["strength"] = 1.0
    if "Inpaint" in kind:
        arguments["mask_image"] = Image.new("L", (32, 32), 255)
    if kind.startswith("FluxKontext"):
        arguments |= {"max_area": 32 * 32, "_auto_resize": False}
    if kind in ("FluxControlNetPipeline", "FluxControlPipeline"):
        arguments["control_image"] = arguments.pop("image")
    if kind.startswith("FluxControl") and kind != "FluxControlNetPipeline":
        arguments["control_image"] = picture
        del arguments["negative_prompt"], arguments["true_cfg_scale"]
    if kind == "WanVideoToVideoPipeline":
        arguments |= {"video": [picture] * 5, "strength": 1.0, "guidance_scale": 4.0}
    if kind == "HunyuanSkyreelsImageToVideoPipeline":
        arguments |= {"image": picture, "num_frames": 5, "guidance_scale": 1.0, "true_cfg_scale": 4.0}
    return pipe(**(arguments | changes))[0]


def name_calls(pipe: Any) -> None:
    """Wraps each call in the context that diffusers' newer loops set: conditional first."""
    transformer, calls = pipe.transformer, []
    forward = type(transformer).__call__

    class Named(type(transformer)):
        def __call__(self, *args, **kwargs):
            timesteps = pipe.scheduler.timesteps
            first = len(timesteps) - pipe._num_timesteps
            step, branch = divmod(len(calls), 2)
            calls.append(1)
            name = ("cond", "uncond")[branch]
            with self.cache_context(name, step_index=first + step, num_inference_steps=len(timesteps)):
                return forward(self, *args, **kwargs)

    Named.__name__ = type(transformer).__name__
    transformer.__class__ = Named


@pytest.mark.parametrize("name", [name if name in SOME else _more(name) for name in OUTSIDE])
def test_a_second_call_at_a_step_is_the_other_branch(name):
    """Equal, bit for bit, to the same pipeline whose loop names its calls; and a cache that never skips to none."""
    pipe = build_outside(name)
    plain = call_outside(pipe)
    with cineray.enable_cache(pipe, "interval(interval=1)"):
        assert torch.equal(call_outside(pipe), plain)
    for policy in POLICIES if name in ("img2img", "wan_v2v") else [OFTEN]:
        with cineray.enable_cache(pipe, policy) as handle:
            ours = call_outside(pipe)
            entries = list(handle.trace.entries)
            assert torch.equal(call_outside(pipe), ours)
            assert handle.trace.entries == entries
        named = build_outside(name)
        name_calls(named)
        with cineray.enable_cache(named, policy) as handle:
            assert torch.equal(call_outside(named), ours)
        assert handle.trace.entries == entries
        assert [(e.step, e.branch) for e in entries] == [(s, b) for s in range(12) for b in ("cond", "uncond")]
        assert 0 < handle.trace.summary()["skipped_steps"] < 12
    assert torch.equal(call_outside(pipe), plain)


@pytest.mark.parametrize("branches", ["joint", "separate"])
def test_the_branches_of_such_a_pipeline_decide_jointly_or_for_themselves(branches):
    pipe = build_outside("img2img")
    with cineray.enable_cache(pipe, f"dicache(threshold=0.1,warmup=0.1,branches={branches})") as handle:
        call_outside(pipe, steps=20)
    cond, uncond = ([e.compute for e in handle.trace.entries if e.branch == b] for b in ("cond", "uncond"))
    assert len(cond) == len(uncond) == 20
    assert 0 < sum(cond) < 20
    assert (cond == uncond) or branches == "separate"


def test_the_error_is_that_of_branches_told_apart():
    pipe = build_outside("img2img")
    plain = call_outside(pipe, steps=20)
    with cineray.enable_cache(pipe, OFTEN) as handle:
        cached = call_outside(pipe, steps=20)
    assert (cached - plain).norm() / plain.norm() < 0.01  # 0.0034; 0.027 where the branches share a cache
    assert handle.trace.summary()["cost"] == pytest.approx(11 / 20)  # the last step is computed


@pytest.mark.parametrize("guided", [True, False])
def test_guidance_that_ends_midway_or_is_not_there(guided):
    pipe = build_outside("wan_v2v")

    def switch_off(pipe, step, _timestep, kwargs):
        if step == 5:
            pipe._guidance_scale = 1.0
        return kwargs

    with cineray.enable_cache(pipe, OFTEN) as handle:
        guidance = {"guidance_scale": 4.0, "callback_on_step_end": switch_off} if guided else {"guidance_scale": 1.0}
        call_outside(pipe, **guidance)
    assert [e.step for e in handle.trace.entries if e.branch == "cond"] == list(range(12))
    assert [e.step for e in handle.trace.entries if e.branch == "uncond"] == (list(range(6)) if guided else [])


@pytest.mark.parametrize("name", CONTROLS)
def test_a_pipeline_of_one_call_a_step_has_one_branch(name):
    pipe = build_outside(name)
    plain = call_outside(pipe)
    with cineray.enable_cache(pipe, "interval(interval=1)"):
        assert torch.equal(call_outside(pipe), plain)
    late = {} if name == "control" else {"strength": 0.5}
    first = 6 if late else 0
    with cineray.enable_cache(pipe, OFTEN) as handle:
        cached = call_outside(pipe, **late)
        assert torch.equal(call_outside(pipe, **late), cached)
    assert [(e.step, e.branch) for e in handle.trace.entries] == [(step, "cond") for step in range(first, 12)]
    assert handle.trace.summary()["skipped_steps"] > 0


@pytest.mark.parametrize("name", ["img2img", "wan_v2v", *map(_more, ("inpaint", "kontext_inpaint"))])
@pytest.mark.parametrize("num_steps", [6, 1])
def test_a_loop_that_begins_late_has_a_trace_of_its_own(name, num_steps):
    """Where one step is left, the next clip begins at the step at which the last one ended."""
    pipe = build_outside(name)
    strength = 0.5 if num_steps == 6 else 0.09 if name == "wan_v2v" else 0.08  # they round another way
    plain = call_outside(pipe, strength=strength)
    first = 12 - num_steps
    with cineray.enable_cache(pipe, OFTEN) as handle:
        cached = call_outside(pipe, strength=strength)
        for _ in range(2):
            assert torch.equal(call_outside(pipe, strength=strength), cached)
            assert [e.step for e in handle.trace.entries if e.branch == "cond"] == list(range(first, 12))
            assert [e.step for e in handle.trace.entries if e.branch == "uncond"] == list(range(first, 12))
        # another clip, beginning one step after the last one's end would be an end of it
        call_outside(pipe, steps=6, strength=1.0)
        call_outside(pipe, strength=strength)
        assert handle.trace.entries[0].step == first
        assert handle.trace.entries[0].reason == "empty"
    assert torch.equal(plain, cached) == (num_steps == 1)


class Stop(Exception):
    pass


@pytest.mark.parametrize("where", ["callback", "before the blocks", "in a block"])
@pytest.mark.parametrize("kind", [Stop, KeyboardInterrupt])
def test_a_call_that_was_broken_off_leaves_nothing_to_the_next(where, kind):
    """Also where the next call begins at the very step, with the same latents and another prompt."""
    pipe = build_outside("img2img")
    with cineray.enable_cache(pipe, OFTEN):
        alone = call_outside(pipe, steps=8, strength=0.5, prompt="white square black")
    calls, blocks = [], list(pipe.transformer.transformer_blocks)

    def stop(*_):
        calls.append(1)
        if len(calls) == {"callback": 1, "before the blocks": 2, "in a block": 3}[where]:
            raise kind

    transformer, arguments, hook = pipe.transformer, {}, None
    if where == "callback":
        arguments = {"callback_on_step_end": stop}
    elif where == "before the blocks":
        hook = transformer.time_text_embed.register_forward_hook(stop)
    else:
        hook = transformer.single_transformer_blocks[1].register_forward_hook(stop)
    with cineray.enable_cache(pipe, OFTEN) as handle:
        with pytest.raises(kind):
            call_outside(pipe, steps=8, strength=0.5, **arguments)
        if hook is not None:
            hook.remove()
        assert all(a is b for a, b in zip(transformer.transformer_blocks, blocks, strict=True))
        assert torch.equal(call_outside(pipe, steps=8, strength=0.5, prompt="white square black"), alone)
        assert len(handle.trace.entries) == 8
        assert type(pipe.transformer.transformer_blocks) is torch.nn.ModuleList


def two_experts(boundary=0.85):
    pipe = WanPipeline(**_wan_parts(0), transformer_2=_wan_parts(1)["transformer"], boundary_ratio=boundary)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("policy", [OFTEN, "taylorseer", "dicache(threshold=0.3,warmup=0.1)"])
def test_both_experts_are_cached_and_one_trace_tells_of_both(policy):
    pipe = two_experts()
    plain = call(pipe)
    with cineray.enable_cache(pipe, "interval(interval=1)"):
        assert torch.equal(call(pipe), plain)
    with cineray.enable_cache(pipe, policy) as handle:
        cached = call(pipe)
        assert torch.equal(call(pipe), cached)
        entries = list(handle.trace.entries)
    assert [e.step for e in entries if e.branch == "cond"] == list(range(12))
    assert not torch.equal(cached, plain)
    first_skips = {e.step for e in entries if not e.compute}
    calls = {"transformer": 0, "transformer_2": 0}
    for name in calls:
        getattr(pipe, name).register_forward_hook(lambda *_, name=name: calls.__setitem__(name, calls[name] + 1))
    assert torch.equal(call(pipe), plain)  # off on both
    boundary = calls["transformer"] // 2
    assert 0 < boundary < 12
    assert boundary not in first_skips  # the second expert knows nothing yet
    assert any(step < boundary for step in first_skips)
    assert any(step > boundary for step in first_skips)


def test_experts_that_cannot_share_a_trace_or_have_a_cache_are_refused_and_left_alone():
    pipe = two_experts()
    with cineray.enable_cache(pipe.transformer_2, OFTEN), pytest.raises(ValueError, match="has a cache already"):
        cineray.enable_cache(pipe, OFTEN)
    call(pipe)
    assert not hasattr(pipe.transformer, "_diffusers_hook") or not pipe.transformer._diffusers_hook.hooks
    pipe.transformer_2 = build_wan(1).transformer.__class__(**{**pipe.transformer.config, "num_layers": 2}).eval()
    with pytest.raises(ValueError, match=r"transformers differ, and one trace cannot tell of both; enable a cache on"):
        cineray.enable_cache(pipe, OFTEN)
    low_noise = two_experts(boundary=1.0)
    low_noise.transformer = None
    with cineray.enable_cache(low_noise, OFTEN):
        assert StepTracker.is_attached(low_noise.transformer_2)


def test_calls_that_cannot_be_told_apart_are_refused():
    """Parts of a batch, one after the other, and three calls of a step."""
    pipe = build("flux")
    pipe.scheduler.set_timesteps(4, mu=1.0)
    text = {"encoder_hidden_states": torch.randn(1, 8, 64), "pooled_projections": torch.randn(1, 64)}
    places = {"txt_ids": torch.zeros(8, 3), "img_ids": torch.zeros(4, 3), "guidance": torch.ones(1)}

    @torch.no_grad()
    def loop(latents_of_calls, named=False):
        for index, t in enumerate(pipe.scheduler.timesteps):
            for number, latents in enumerate(latents_of_calls):
                if named:
                    with pipe.transformer.cache_context(f"part {number}", step_index=index, num_inference_steps=4):
                        pipe.transformer(latents, timestep=t[None] / 1000, **text, **places)
                else:
                    pipe.transformer(latents, timestep=t[None] / 1000, **text, **places)

    one, other = torch.randn(1, 4, 16), torch.randn(1, 4, 16)
    with cineray.enable_cache(pipe, OFTEN) as handle:
        for calls in ([one, other], [one, one, one]):
            with pytest.raises(ValueError, match=r"step 1 is called again without a name.*cache_context\(NAME"):
                loop(calls)
        loop([one, one])  # what was refused leaves nothing behind
        assert len(handle.trace.entries) == 8
        loop([one, other, one], named=True)
        assert {e.branch for e in handle.trace.entries} == {"part 0", "part 1", "part 2"}

        @torch.no_grad()
        def call_cond(index):
            with pipe.transformer.cache_context("cond", step_index=index, num_inference_steps=4):
                pipe.transformer(one, timestep=torch.tensor([0.5]), **text, **places)

        call_cond(0)
        call_cond(1)
        with pytest.raises(ValueError, match="branch 'cond' is called twice at step 1 of one clip"):
            call_cond(1)
