"""Rows of a product have the same bits however many stand beside them: what ranks that share a clip rest on."""

import os

import pytest
import torch

from cineray.jobs.exact_products import multiply_exactly
from cineray.pipeline.gang import MIN_TOKENS_PER_RANK


@pytest.mark.parametrize(
    ("cpus", "given", "then"),
    [
        ("vendor_id : GenuineIntel", {}, {"MKL_CBWR": "AUTO,STRICT"}),
        ("vendor_id : GenuineIntel", {"MKL_CBWR": "COMPATIBLE"}, {"MKL_CBWR": "COMPATIBLE"}),
        ("vendor_id : AuthenticAMD", {}, {}),
        (None, {}, {}),
    ],
)
def test_intel_s_cpus_are_asked_for_it_unless_the_user_has_said_otherwise(tmp_path, cpus, given, then):
    file = tmp_path / "cpuinfo"
    if cpus is not None:
        file.write_text(f"processor : 0\n{cpus}\n")
    environment = dict(given)
    multiply_exactly(environment, file)
    assert environment == then


@pytest.mark.skipif(os.environ.get("MKL_CBWR") != "AUTO,STRICT", reason="not an Intel CPU, or asked for otherwise")
@pytest.mark.parametrize("width", [64, 128, 512, 1536])
def test_a_part_of_the_rows_has_the_bits_of_all(width):
    generator = torch.Generator().manual_seed(0)
    for num_outputs in (32, 128, 512):
        weight, bias = (
            torch.randn(num_outputs, width, generator=generator),
            torch.randn(num_outputs, generator=generator),
        )
        rows = torch.randn(96, width, generator=generator)
        whole = torch.nn.functional.linear(rows, weight, bias)
        for num_rows in (MIN_TOKENS_PER_RANK, 5, 6, 8, 10, 12, 16, 20, 48):
            for start in range(0, 96 - num_rows + 1, num_rows):
                part = torch.nn.functional.linear(rows[start : start + num_rows], weight, bias)
                assert torch.equal(part, whole[start : start + num_rows])
