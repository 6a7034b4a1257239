"""`cineray verify`: what it prints, and when it fails."""

import json
import math
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import build_wan
from safetensors.torch import load_file, save_file

from cineray.caching.trace import TraceEntry
from cineray.distributed.layout import Layout
from cineray.jobs.cli.main import main
from cineray.jobs.measure import verify
from cineray.pipeline.loading.checkpoint import open_checkpoint
from cineray.pipeline.loading.model import LoadOptions, load_model
from cineray.pipeline.render import RenderedClip, render_clip

SMALL = ["--width", "32", "--height", "48", "--frames", "5", "--steps", "4", "--cache", "dicache(threshold=1)"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wan") / "wan"
    build_wan().save_pretrained(folder)
    return str(folder)


def test_equal_on_every_layout(model, capsys):
    code = main(["verify", "--model", model, *SMALL, "--layouts", "2,cfg2,ring2", "--json"])
    output = capsys.readouterr()
    summary = json.loads(output.out.splitlines()[-1])
    assert code == 0, output.err
    assert summary["ok"]
    assert [(clip["layout"], clip["ranks"]) for clip in summary["clips"]] == [
        ("ulysses2", 2),
        ("cfg2", 2),
        ("ring2", 2),
    ]
    for clip in summary["clips"][:2]:
        assert (clip["max_error"], clip["psnr_db"], clip["max_gamma_error"]) == (0, None, 0)
    for clip in summary["clips"]:
        assert clip["decisions_equal"]
        assert clip["skipped_steps"] > 0
    assert "NOT THE SAME" not in output.err


@pytest.mark.parametrize(
    ("layout", "factor"),
    [
        ("2", 1 + 1e-6),  # the last bits of the latents: too much where every bit must agree
        ("ring2", 2.0),  # another clip to look at
    ],
)
def test_another_clip_is_told_and_exits_with_1(model, tmp_path, capsys, monkeypatch, layout, factor):
    """The weights change between the clip on one rank and the clip on two."""
    folder, render = tmp_path / "wan", verify._render
    shutil.copytree(model, folder)

    def render_and_change(*arguments):
        clips = render(*arguments)
        weights = folder / "transformer" / "diffusion_pytorch_model.safetensors"
        tensors = load_file(weights)
        tensors["proj_out.weight"] *= factor
        save_file(tensors, weights, {"format": "pt"})
        return clips

    monkeypatch.setattr(verify, "_render", render_and_change)
    assert main(["verify", "--model", str(folder), *SMALL, "--layouts", layout, "--json"]) == 1
    output = capsys.readouterr()
    assert "NOT THE SAME" in output.err
    summary = json.loads(output.out.splitlines()[-1])
    assert not summary["ok"]
    (clip,) = summary["clips"]
    assert not clip["ok"]
    assert clip["max_error"] > 0
    assert clip["first_difference"] is None  # threshold 1: the clips are told apart by what they are
    if layout == "ring2":
        assert clip["psnr_db"] < verify.MIN_PSNR_DB


@pytest.mark.parametrize(
    ("layouts", "said"),
    [
        ("ulysses3", "ulysses must divide the model's 4 attention heads"),
        ("gangs2xulysses2", "leave gangs2 out"),
        ("two", "is not of the form"),
    ],
)
def test_layouts_that_cannot_be(model, capsys, layouts, said):
    assert main(["verify", "--model", model, *SMALL, "--layouts", layouts]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--consensus", "some"], "--consensus must be one of all, rank0, got 'some'"),
        (["--attention", "flash"], "attention flash is a kernel of GPUs; it needs --device cuda"),
    ],
)
def test_gangs_that_cannot_be(model, capsys, words, said):
    assert main(["verify", "--model", model, *SMALL, *words]) == 2
    assert said in capsys.readouterr().err


def test_ranks_do_without_text_encoders(model, tmp_path, new_request):
    """Encoded once; then the text encoder may change."""
    folder, prompts = tmp_path / "wan", tmp_path / "prompts"
    shutil.copytree(model, folder)
    prompts.mkdir()
    requests = [new_request(width=16, height=16, num_frames=1, num_inference_steps=2)]
    alone = render_clip(load_model(open_checkpoint(str(folder)), LoadOptions()), requests[0], lambda done, total: None)
    arguments = (str(folder), LoadOptions(), requests, verify.GangOptions(), str(prompts))
    verify.encode_on_rank(0, 1, "", *arguments)
    weights = folder / "text_encoder" / "model.safetensors"
    save_file({name: torch.zeros_like(value) for name, value in load_file(weights).items()}, weights, {"format": "pt"})
    (clip,) = verify._render_on_rank(0, 1, (tmp_path / "rendezvous").as_uri(), Layout(), *arguments)
    assert isinstance(clip, RenderedClip)
    assert torch.equal(clip.latents, alone.latents)
    assert np.array_equal(clip.frames, alone.frames)


def test_clips_that_are_not_finite_are_told_in_one_line(tmp_path, capsys):
    pipe = build_wan()
    pipe.vae.decoder.conv_out.bias.data[0] = float("nan")
    pipe.save_pretrained(tmp_path / "wan")
    assert main(["verify", "--model", str(tmp_path / "wan"), *SMALL, "--layouts", "2"]) != 0
    *_, line = capsys.readouterr().err.strip().splitlines()
    assert "finite" in line


def test_what_counts_as_the_same():
    equal = verify.Verified(
        id="1",
        layout="ulysses2",
        ranks=2,
        max_error=0.0,
        psnr_db=math.inf,
        first_difference=None,
        max_gamma_error=0.0,
        skipped_steps=3,
        must_be_equal=True,
        decoded_by_rows=False,
        denoise_s=1.0,
    )
    assert equal.ok
    for change in ({"max_error": 1e-9}, {"first_difference": "step 3 branch cond"}, {"max_gamma_error": 1e-9}):
        assert not replace(equal, **change).ok
    assert not replace(equal, psnr_db=93.0).ok
    assert replace(equal, psnr_db=93.0, decoded_by_rows=True).ok
    near = replace(equal, must_be_equal=False, max_error=1e-5, psnr_db=80.0)
    assert near.ok
    assert not replace(near, psnr_db=30.0).ok
    assert not replace(near, first_difference="step 3 branch cond").ok


def test_decisions_are_compared_entry_by_entry():
    entry = TraceEntry(
        step=3, branch="cond", sample=0, compute=True, cost=1.0, reason="empty", statistic=None, gamma=None
    )
    assert verify._decision_key(entry) == verify._decision_key(replace(entry, reason="warmup"))
    assert verify._decision_key(entry) != verify._decision_key(replace(entry, compute=False))
