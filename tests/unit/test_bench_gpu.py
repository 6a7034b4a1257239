"""The GPU benchmark runs at toy size on a CPU; its numbers say nothing there, its arithmetic does."""

import importlib.util
import json

import pytest
from conftest import REPOSITORY

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def bench():
    spec = importlib.util.spec_from_file_location("bench_gpu", REPOSITORY / "scripts" / "bench_gpu.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_it_measures_and_names_a_backend_that_is_not_here(bench, capsys):
    arguments = ["--model", "tiny", "--size", "tiny", "--device", "cpu", "--frames", "9", "--repeats", "2"]
    bench.main([*arguments, "--attention", "native", "_flash_3", "--peak-tflops", "1"])
    native, missing = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert native["best"]
    assert not missing["best"]
    assert "error" in missing
    assert native["tokens"] == 3 * 3 * 4
    assert native["held_bytes"] == native["forecast_bytes"] == 5 * 36 * 128 * 2
    for name in ("full_step_s", "computed_step_s", "skipped_step_s", "controller_computed_s", "controller_skipped_s"):
        assert native[name] > 0
    assert native["share_of_peak"] == pytest.approx(native["flops"] / native["full_step_s"] / 1e12)


@pytest.mark.parametrize(("model", "billions"), [("wan2.1-1.3b", 1.42), ("wan2.1-14b", 14.3), ("hunyuan-video", 12.8)])
def test_published_shapes_have_the_published_sizes(bench, model, billions):
    transformer = bench.new_subject(model, "tiny", 9, "meta").transformer
    assert sum(p.numel() for p in transformer.parameters()) / 1e9 == pytest.approx(billions, rel=0.01)


def test_operations_of_a_step_are_those_of_its_products(bench):
    """Wan 1.3B at 480p: 30 blocks, 32,760 tokens of 1536 channels, 512 of text."""
    tokens, width, text, ffn, blocks = 32_760, 1536, 512, 8960, 30
    self_attention = tokens * 4 * width**2 + 2 * tokens**2 * width
    cross_attention = (2 * tokens + 2 * text) * width**2 + 2 * tokens * text * width
    expected = 2 * blocks * (self_attention + cross_attention + 2 * tokens * width * ffn)
    assert bench.flops_of_a_step("wan2.1-1.3b", "480p", 81) == pytest.approx(expected, rel=0.01)
