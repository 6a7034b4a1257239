"""`cineray verify` in 16 bits: each step from the same latents, against the distance between two kernels."""

import json
import math
import shutil
from dataclasses import replace

import pytest
import torch
from conftest import build_wan
from safetensors.torch import load_file, save_file

from cineray.jobs.cli.main import main
from cineray.jobs.measure import verify_steps
from cineray.jobs.measure.forced_steps import Recording, Teacher
from cineray.pipeline.render import denoise_clip, denoise_prepared, prepare_clip

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
