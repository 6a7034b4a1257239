"""What sidecars and events say of the machine, and how actors use a GPU's memory and a host's cores."""

import os
import subprocess
import sys

import pytest

from cineray.jobs.allocator import grow_segments
from cineray.jobs.gangs.rank_work import rank_options
from cineray.jobs.output.hardware import driver_version, hardware, summed_up
from cineray.jobs.threads import loading_threads
from cineray.pipeline.loading.options import LoadOptions

pytestmark = pytest.mark.process


@pytest.mark.parametrize(
    ("text", "version"),
    [
        ("NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.14  Thu Feb 22 01:44:30 UTC 2024", "550.54.14"),
        (
            "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.86.15  Release Build  (dvs-builder)",
            "570.86.15",
        ),
        ("GCC version:  gcc 12", None),
    ],
)
def test_the_driver_says_its_version(tmp_path, text, version):
    file = tmp_path / "version"
    file.write_text(text)
    assert driver_version(file) == version
    assert driver_version(tmp_path / "none") is None


def test_a_processor_is_named_and_its_peak_is_of_this_process():
    found = hardware("cpu")
    assert found["host"]
    assert found["cpu"]
    assert 10**7 < found["peak_bytes"] < 10**12  # an interpreter with PyTorch


def test_ranks_alike_are_told_once_with_the_highest_peak():
    h100 = {"host": "a", "gpu": "H100", "driver": "550", "cudnn": 91000}
    found = summed_up([{**h100, "peak_bytes": n} for n in (3, 5, 4)] + [{**h100, "host": "b", "peak_bytes": 9}])
    assert found == [
        {**h100, "peak_bytes": 5, "num_ranks": 3},
        {**h100, "host": "b", "peak_bytes": 9, "num_ranks": 1},
    ]
    assert summed_up([]) == []


def test_the_allocator_grows_segments_unless_the_user_has_said_otherwise():
    environment: dict[str, str] = {}
    grow_segments(environment)
    assert environment == {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
    for name in ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"):
        environment = {name: "max_split_size_mb:64"}
        grow_segments(environment)
        assert environment == {name: "max_split_size_mb:64"}


def test_every_command_lets_memory_grow_before_torch_is_there():
    program = """
import os, sys
from cineray.jobs.cli import main
main.run = lambda: print("torch" in sys.modules, os.environ["PYTORCH_CUDA_ALLOC_CONF"])
from cineray.__main__ import main
main()
"""
    environment = {name: value for name, value in os.environ.items() if "ALLOC_CONF" not in name}
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, env=environment)
    assert ran.stdout == "False expandable_segments:True\n"


def test_weights_are_cast_on_many_cores_only_where_a_gpu_renders():
    assert loading_threads("cpu", {}) == 1
    assert loading_threads("cpu", {"OMP_NUM_THREADS": "3"}) == 3
    assert loading_threads("cuda", {"OMP_NUM_THREADS": "200"}) == 200
    assert loading_threads("cuda", {}) >= 1


def test_a_rank_has_nothing_to_offload_part_by_part():
    assert rank_options(LoadOptions(device="cuda", offload="model")) == LoadOptions(device="cuda")
    two = LoadOptions(device="cuda", offload="model")
    assert rank_options(two, num_experts=2) == two  # the idle one is moved
    for options in (LoadOptions(device="cuda", offload="sequential"), LoadOptions()):
        assert rank_options(options) == options
