"""The driver of a batch on Ray: what it must not import, because it costs seconds and hundreds of megabytes."""

import os
import subprocess
import sys

import pytest

from cineray.pipeline.loading.device import sees_cuda

DRIVER = """
import sys
from pathlib import Path
import cineray.jobs.cli.main
import cineray.jobs.run
from cineray.jobs.gangs import driver, metrics, progress, queue, slots, state
from cineray.jobs.manifest.check import RequestCheck
from cineray.pipeline.loading.checkpoint import open_checkpoint
from cineray.pipeline.loading.device import default_device
from cineray.pipeline.loading.weights import identify
checkpoint = open_checkpoint("tiny-wan")
assert checkpoint.plan_cache("dicache")
identify(checkpoint)
print(*(name for name in ("torch", "diffusers", "transformers") if name in sys.modules))
print(default_device())
"""


@pytest.mark.process
def test_it_reads_models_and_policies_without_torch():
    run = subprocess.run(
        [sys.executable, "-c", DRIVER],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONSAFEPATH": "1"},
        check=True,
    )
    heavy, device = run.stdout.split("\n")[:2]
    assert heavy == ""
    assert device == ("cuda" if sees_cuda() else "cpu")
