"""`--shard-weights`: each rank holds a part of the blocks' weights, and every pixel is that of whole weights."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import build_wan
from safetensors.torch import save_file

from cineray.distributed.layout import Layout, parse_layout
from cineray.jobs.cli.main import main
from cineray.jobs.run_options import RunOptions
from cineray.pipeline.footprint.fit import RANK, Setup, demands
from cineray.pipeline.footprint.published import published_checkpoint
from cineray.pipeline.gang import SOLO, Gang
from cineray.pipeline.loading.checkpoint import open_checkpoint
from cineray.pipeline.loading.model import load_model
from cineray.pipeline.loading.options import LoadOptions, Lora
from cineray.pipeline.render import render_clip_on_gang
from cineray.pipeline.request import ClipRequest, InputError

CLIP = ClipRequest(
    id="1",
    prompt="a red circle",
    width=48,
    height=80,
    num_frames=9,
    num_inference_steps=9,
    guidance_scale=4.0,
    fps=8,
    cache="dicache-paper(threshold=0.3)",  # whose branches decide by themselves
)
PLAIN = replace(CLIP, cache="none")
CLASS = replace(CLIP, prompt="7", width=8, height=8, num_frames=1, fps=1, cache="interval(interval=2)")
SOUND = replace(PLAIN, width=1, height=1, num_frames=1, fps=64, seconds=1.5)
PLACES = replace(CLASS, prompt="a red circle", width=16, height=16, num_frames=17, fps=8)


def render_on_rank(rank, num_ranks, init_method, layout, source, options, request):
    """For whole and sharded weights: (latents and frames, share of the blocks' weights here, skipped steps, class)."""
    found = []
    with Gang.join(parse_layout(layout), rank, num_ranks, init_method=init_method, timeout_s=120) as gang:
        for is_sharded in (False, True):
            model = load_model(open_checkpoint(source), options, is_sharded=is_sharded)
            lists = [getattr(model.pipe.transformer, name) for name in model.checkpoint.model.layout.lists]
            whole = sum(p.numel() for blocks in lists for p in blocks.parameters())
            if is_sharded:
                gang.shard_weights(model)
            held = [p.to_local() if is_sharded else p for blocks in lists for p in blocks.parameters()]
            clip = render_clip_on_gang(gang, model, request, lambda *_: None)
            skipped = clip.trace.summary()["skipped_steps"] if clip and clip.trace else 0
            pixels = None if clip is None else (clip.latents, clip.frames)
            found.append((pixels, sum(p.numel() for p in held) / whole, skipped, type(model.pipe.transformer).__name__))
    return found


@pytest.mark.parametrize(
    ("name", "layout", "options", "clip"),
    [
        ("wan", "ulysses2", LoadOptions(), CLIP),
        ("wan", "cfg2xulysses2", LoadOptions(), CLIP),
        ("wan", "ring2", LoadOptions(dtype="bfloat16"), PLAIN),
        ("hunyuan", "ulysses2", LoadOptions(), PLAIN),
        ("dit", "ulysses2", LoadOptions(), CLASS),  # whose output layer reads an embedding of the first block
        ("stable_audio", "ulysses2", LoadOptions(), SOUND),
        ("open_sora", "ulysses2", LoadOptions(), PLACES),
    ],
)
def test_sharded_weights_render_the_same_pixels(ranks, checkpoint_folder, name, layout, options, clip):
    arguments = (layout, str(checkpoint_folder(name)), options, clip)
    results = ranks.run(render_on_rank, parse_layout(layout).world_size, *arguments, timeout_s=300)
    (whole, share_of_whole, skipped, kind), (sharded, _, skipped_too, kind_too) = results[0]
    assert torch.equal(sharded[0], whole[0])
    assert np.array_equal(sharded[1], whole[1])
    assert (share_of_whole, kind, skipped) == (1.0, kind_too, skipped_too)
    assert (skipped > 0) == (clip.cache != "none")
    for (_, _, _, _), (_, share, _, _) in results:
        assert share == pytest.approx(0.5, abs=0.05)


def test_a_lora_is_fused_before_weights_are_cut(ranks, tmp_path):
    build_wan().save_pretrained(tmp_path / "model")
    row = "transformer.blocks.1.attn1.to_q.lora_"
    lora = {f"{row}A.weight": torch.ones(2, 48), f"{row}B.weight": torch.ones(48, 2)}
    save_file(lora, tmp_path / "a.safetensors")
    pixels = []
    for options in (LoadOptions(), LoadOptions(lora=(Lora.parse(str(tmp_path / "a.safetensors")),))):
        arguments = ("ulysses2", str(tmp_path / "model"), options, PLAIN)
        (whole, *_), (sharded, *_) = ranks.run(render_on_rank, 2, *arguments, timeout_s=300)[0]
        assert torch.equal(sharded[0], whole[0])
        pixels.append(sharded[0])
    assert not torch.equal(*pixels)


def test_what_it_does_not_go_with_is_one_line():
    run = RunOptions(sp=2, shard_weights=True)
    run.check_goes_with(LoadOptions(device="cuda"))
    for options, said in (
        (LoadOptions(device="cuda", quantize="fp8"), "--quantize fp8"),
        (LoadOptions(device="cuda", offload="group"), "--offload group"),
        (LoadOptions(device="cuda", compile=True), "--compile"),
    ):
        with pytest.raises(InputError, match=f"--shard-weights does not go with {said}; leave one of them out"):
            run.check_goes_with(options)
    for layout in ({}, {"cfg_parallel": True}):
        with pytest.raises(InputError, match="needs ranks that share a clip's tokens"):
            RunOptions(shard_weights=True, **layout)
    with pytest.raises(ValueError, match="no ranks share a clip's tokens"):
        SOLO.shard_weights(load_model(open_checkpoint("tiny-wan"), LoadOptions(), ("text_encoder", "vae")))


def test_the_command_refuses_it_before_anything_loads(capsys, tmp_path):
    out = tmp_path / "out"
    command = ["render", "a cat", "--out", str(out), "--sp", "2", "--shard-weights", "--compile"]
    assert main(command) == 2
    assert "--shard-weights does not go with --compile" in capsys.readouterr().err
    assert not out.exists()


def test_the_forecast_has_a_part_of_the_weights_and_what_is_gathered_of_blocks():
    known = published_checkpoint("wan2.1-t2v-14b")
    clip = ClipRequest(
        id="1",
        prompt="a",
        width=1280,
        height=720,
        num_frames=81,
        num_inference_steps=50,
        guidance_scale=5.0,
        fps=16,
    )

    def weights(ulysses, shards):
        setup = Setup(
            options=LoadOptions(device="cuda"),
            layout=Layout(ulysses=ulysses),
            has_finishers=True,
            shards_weights=shards,
        )
        return next(d for d in demands(known, clip, setup) if d.place == RANK).parts["transformer"]

    whole = weights(8, shards=False)
    for ulysses in (8, 2):
        gathered = weights(ulysses, shards=True) / whole - 1 / ulysses
        assert 2 / 40 < gathered < 3 / 40  # two of 40 blocks, and whole what stands outside of them
