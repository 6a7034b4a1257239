"""What a fingerprint covers: pixels, and nothing else."""

import hashlib
from dataclasses import replace

import pytest

from cineray.pipeline.adapters import MODELS
from cineray.pipeline.render import render_clip
from cineray.pipeline.request import fingerprint, prompt_key

WAN = MODELS["WanTransformer3DModel"].pipelines["WanPipeline"]
HUNYUAN = MODELS["HunyuanVideoTransformer3DModel"].pipelines["HunyuanVideoPipeline"]
OPTIONS = {"dtype": "float32", "vae_tiling": False, "lossless": False}


def mark(adapter, request):
    return fingerprint(adapter.effective(request), request.cache, "0123456789abcdef", OPTIONS)


def key(adapter, request):
    return prompt_key(adapter.encode_inputs(request), "d", "float32")


@pytest.mark.parametrize(
    ("adapter", "changes", "known", "known_key"),
    [
        (WAN, {}, "4c45c4e26f0c", "773e128f20cb060a9c12e4ff81fd7a15"),
        (WAN, {"negative_prompt": "blurry", "seed": 7}, "3c4d2e0aa6b0", "460bf8cbcb037b123fbee3bea0742a85"),
        (WAN, {"guidance_scale": 1.0}, "6f870b070719", "f032e0c85028f579a4488300c89f0697"),
        (
            WAN,
            {"prompt": "a  \u00e9 b\n", "cache": "dicache"},
            "f821be159458",
            "babb38d5a14dc5473e63c4a6170e8c1d",
        ),
        (HUNYUAN, {"guidance_scale": 0.5}, "2d2a35f731e6", "7e0e6e130599a776fa3cbd629bb53d8b"),
    ],
)
def test_folders_of_earlier_versions_are_found_again(new_request, adapter, changes, known, known_key):
    request = new_request(**changes)
    assert (mark(adapter, request), key(adapter, request)) == (known, known_key)


ALIKE = [
    ({"guidance_scale": 1.0}, {"guidance_scale": 0.3, "negative_prompt": "blurry"}),
    ({"guidance_scale": 1.0}, {"guidance_scale": 0.0}),
    ({"negative_prompt": None}, {"negative_prompt": ""}),
    ({"negative_prompt": None}, {"negative_prompt": " \n"}),
]


@pytest.mark.parametrize(("changes", "others"), ALIKE)
def test_requests_that_render_the_same_pixels_have_one_fingerprint(loaded, new_request, changes, others):
    model = loaded("wan")
    requests = [new_request(num_inference_steps=2, num_frames=1, **c) for c in (changes, others)]
    first, second = ((mark(WAN, r), key(WAN, r)) for r in requests)
    assert first == second
    frames = [render_clip(model, request, lambda done, total: None).frames for request in requests]
    assert len({hashlib.sha256(f.tobytes()).hexdigest() for f in frames}) == 1


def test_requests_that_do_not_have_two(new_request):
    marks = {mark(WAN, new_request(negative_prompt=text)) for text in (None, "a", "b")}
    assert len(marks) == 3
    assert len({mark(HUNYUAN, new_request(guidance_scale=g)) for g in (0.3, 1.0)}) == 2


def test_a_negative_prompt_without_guidance_is_told(new_request):
    off = new_request(guidance_scale=1.0, negative_prompt="blurry")
    assert WAN.unused(off) == ["the negative prompt has no effect: guidance of 1 or less is off"]
    assert WAN.unused(replace(off, guidance_scale=1.1)) == WAN.unused(replace(off, negative_prompt=" ")) == []


WORDS = ("red", "circle", "moving")


@pytest.mark.parametrize(("name", "limit", "fits"), [("wan", 512, 511), ("hunyuan", 256, 256)])
def test_what_the_text_encoder_does_not_read_is_told(loaded, new_request, name, limit, fits):
    model = loaded(name)
    whole = " ".join(WORDS[i % 3] for i in range(fits))
    assert model.adapter.cut_prompts(model.pipe, new_request(prompt=whole)) == []
    (said,) = model.adapter.cut_prompts(model.pipe, new_request(prompt=whole + " IN THE END a Dragon appears"))
    assert said.startswith(f"the text encoder reads {limit} tokens, the prompt has {limit + 6}; not read: ")
    assert said.endswith('not read: "IN THE END a Dragon appears"')
    (said,) = model.adapter.cut_prompts(model.pipe, new_request(prompt=whole * 10 + " dragon"))
    assert said.endswith('dragon"')
    assert len(said) < 400


def test_the_negative_prompt_is_cut_alike_if_it_is_used(loaded, new_request):
    model = loaded("wan")
    long = new_request(negative_prompt="blurry " * 600)
    (said,) = model.adapter.cut_prompts(model.pipe, long)
    assert "512 tokens, the negative prompt has 601;" in said
    assert model.adapter.cut_prompts(model.pipe, replace(long, guidance_scale=1.0)) == []


def test_text_after_the_cut_changes_no_pixel(loaded, new_request):
    """So the sentences above are true, one token more or less."""
    for name, fits in (("wan", 511), ("hunyuan", 256)):
        model = loaded(name)
        base = " ".join(WORDS[i % 3] for i in range(fits - 1))
        frames = [
            render_clip(
                model,
                new_request(prompt=base + end, num_inference_steps=1, num_frames=1),
                lambda done, total: None,
            )
            .latents.sum()
            .item()
            for end in (" blue red", " blue circle", " green red")
        ]
        if name == "wan":  # CLIP reads its 77 tokens alone, and these are far behind
            assert frames[0] == frames[1]
        assert frames[0] != frames[2]
