"""The batch benchmark at toy size: that it measures, not how much. Its mode `overhead` takes too long for a test."""

import json
import os
import subprocess
import sys

import pytest
from conftest import REPOSITORY

pytestmark = pytest.mark.ray


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("arguments", "measured"),
    [
        (("dispatch", "--clips", "20", "--gangs", "2"), ("wall_s", "clips_per_s", "driver_cpu_ms_per_clip")),
        (("million", "--lines", "3", "--steps", "1"), ("first_clip_begins_s", "first_clip_done_s", "driver_peak_mb")),
    ],
)
def test_it_measures(arguments, measured):
    run = subprocess.run(
        [sys.executable, str(REPOSITORY / "scripts" / "bench_batch.py"), *arguments],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONSAFEPATH": "1"},
    )
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout.splitlines()[-1])
    assert all(isinstance(found[name], int | float) for name in measured)
    assert found.get("clips", found.get("lines")) == int(arguments[2])
