"""What HunyuanVideo 1.5 alone has: attention without a mask, text in quotes, mean flows, a guider."""

from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from every_model import build, call
from more_models import CLIPS, build_hunyuan15, clip_of
from PIL import Image

import cineray
from cineray.pipeline.adapters import MODELS
from cineray.pipeline.adapters.hunyuan15 import TEXTS, HunyuanImageToVideo15, HunyuanVideo15, _text_arguments
from cineray.pipeline.adapters.hunyuan15_attention import attend_without_mask
from cineray.pipeline.blocks import calling_without_mask
from cineray.pipeline.denoise import denoise
from cineray.pipeline.render import denoise_clip

pytestmark = pytest.mark.slow
LAYOUT = MODELS["HunyuanVideo15Transformer3DModel"].layout


def quiet(_done, _total):
    """Tells nobody."""


@torch.no_grad()
def output_of(transformer, encoded, branch, dtype, trims, image_tokens=4):
    """Of one call as `start` has it: with padding, or without."""
    text = _text_arguments(encoded, branch, torch.device("cpu"), dtype, trims)
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(1, 9, 2, 4, 4, generator=generator, dtype=dtype)
    picture = torch.zeros(1, 0 if trims else image_tokens, 16, dtype=dtype)
    return transformer(latents, torch.full((1,), 500.0, dtype=dtype), **text, image_embeds=picture).sample


def encoded_by(pipe, prompt):
    return {f"cond_{name}": values for name, values in zip(TEXTS, pipe.encode_prompt(prompt=prompt), strict=True)}


@pytest.mark.parametrize("prompt", ["a red circle", 'a red circle that says "go"'])
def test_without_padding_and_without_a_mask_the_transformer_gives_the_same(prompt):
    """In float64, and against diffusers' own processors: a sum over fewer keys is another sum in its last bits."""
    pipe = build("hunyuan15")
    encoded = encoded_by(pipe, prompt)
    plain = pipe.transformer.double()
    bare = deepcopy(plain)
    attend_without_mask(bare)
    right = output_of(plain, encoded, "cond", torch.float64, trims=False)
    assert (output_of(bare, encoded, "cond", torch.float64, trims=False) - right).abs().max() < 1e-12
    masks = []
    for block in bare.transformer_blocks:
        block.register_forward_pre_hook(lambda _, args: masks.append(args[LAYOUT.mask]))
    with calling_without_mask(bare, LAYOUT):
        short = output_of(bare, encoded, "cond", torch.float64, trims=True)
    assert len(masks) == 3
    assert (short - right).abs().max() < 1e-12 < right.abs().max()
    other = encoded_by(pipe, "a blue square")
    assert (output_of(plain, other, "cond", torch.float64, trims=False) - right).abs().max() > 1e-6  # text counts


def test_a_kernel_that_was_chosen_is_kept():
    pipe = build("hunyuan15")
    pipe.transformer.set_attention_backend("native")
    before = pipe.transformer.transformer_blocks[0].attn.processor._attention_backend
    attend_without_mask(pipe.transformer)
    assert pipe.transformer.transformer_blocks[0].attn.processor._attention_backend == before is not None


def test_branches_are_known_by_their_guiders_names():
    pipe = build("hunyuan15")
    with cineray.enable_cache(pipe, "dicache(threshold=1e6,branches=joint)") as handle:
        call(pipe)
    entries = handle.trace.entries
    assert [entry.branch for entry in entries[:2]] == ["cond", "uncond"]
    decisions = {branch: [e.compute for e in entries if e.branch == branch] for branch in ("cond", "uncond")}
    assert decisions["cond"] == decisions["uncond"]
    assert len(decisions["cond"]) == 12
    assert False in decisions["cond"]


def test_text_in_quotes_is_read_by_the_second_encoder_and_told_of_where_it_is_cut(loaded, new_request):
    model, adapter = loaded("hunyuan15"), HunyuanVideo15()
    request = new_request(prompt=CLIPS["hunyuan15"]["prompt"])
    table = adapter.encode(model.pipe, request)
    assert table["cond_glyph_mask"].sum() == len('Text "go". Text "stop". ') + 1  # bytes and the end
    assert table["uncond_glyph_mask"].sum() == 0
    assert adapter.cut_prompts(model.pipe, request) == []
    long = replace(request, prompt=f'a circle that says "{"x" * 300}"')
    (said,) = adapter.cut_prompts(model.pipe, long)
    assert "the text encoder reads 256 tokens, the text in quotes of the prompt has " in said
    words = replace(request, prompt="red " * 1000)
    (said,) = adapter.cut_prompts(model.pipe, replace(words, prompt=words.prompt + "blue circle"))
    assert said.endswith('the prompt has 1002; not read: "blue circle"')
    assert adapter.cut_prompts(model.pipe, words) == []


@pytest.mark.parametrize("guidance", [0.5, 1.0])
def test_without_guidance_there_is_one_branch_and_no_negative_prompt(loaded, new_request, guidance):
    model, adapter = loaded("hunyuan15"), HunyuanVideo15()
    request = new_request(guidance_scale=guidance, negative_prompt="white")
    assert not any(name.startswith("uncond") for name in adapter.encode(model.pipe, request))
    assert adapter.effective(request) == new_request(guidance_scale=1.0)
    assert adapter.unused(request) == ["the negative prompt has no effect: guidance of 1 or less is off"]


def test_a_transformer_of_mean_flows_is_told_where_a_step_goes(new_request, tmp_path):
    """As HunyuanVideo15ImageToVideoPipeline, bit for bit."""
    pipe = build_hunyuan15(takes_image=True, guidance_scale=1.0, use_meanflow=True)
    pipe.set_progress_bar_config(disable=True)
    request = clip_of("hunyuan15_image", new_request, tmp_path, guidance_scale=1.0, num_inference_steps=3)
    adapter = HunyuanImageToVideo15()
    clip = adapter.start(pipe, request, adapter.encode(pipe, request), torch.Generator().manual_seed(request.seed))
    assert clip.step_arguments is not None
    assert clip.step_arguments(0)["timestep_r"] == clip.timesteps[1]
    assert clip.step_arguments(2)["timestep_r"] == 0
    theirs = pipe(
        prompt=request.prompt,
        image=Image.open(request.image),
        num_frames=request.num_frames,
        num_inference_steps=3,
        generator=torch.Generator().manual_seed(request.seed),
        output_type="latent",
    ).frames
    assert torch.equal(denoise(clip, quiet), theirs)
    assert not torch.equal(denoise(replace(clip, step_arguments=None), quiet), theirs)


def test_a_picture_of_another_shape_is_fitted_as_asked(loaded, new_request, tmp_path):
    model = loaded("hunyuan15_image")
    made = {}
    for fit in ("stretch", "crop", "pad"):
        request = clip_of("hunyuan15_image", new_request, tmp_path, image="other", image_fit=fit, num_inference_steps=2)
        made[fit] = denoise_clip(model, request, quiet).latents
    assert not torch.equal(made["stretch"], made["crop"])
    assert not torch.equal(made["crop"], made["pad"])
