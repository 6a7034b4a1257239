"""How many threads a process on CPUs has, and that they do not spin."""

import json
import os
import subprocess
import sys

import pytest

from cineray.jobs.threads import num_threads, rank_threads, wait_passively
from cineray.pipeline.adapters import MODELS
from cineray.pipeline.loading.checkpoint import open_checkpoint


def test_threads_wait_passively_unless_the_user_has_said_how():
    environment = {}
    wait_passively(environment)
    assert environment == {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0", "KMP_BLOCKTIME": "0"}
    for given in ({"OMP_WAIT_POLICY": "ACTIVE"}, {"GOMP_SPINCOUNT": "100"}, {"KMP_BLOCKTIME": "200"}):
        environment = dict(given)
        wait_passively(environment)
        assert environment == given


def test_small_models_take_one_thread_as_every_rank_does():
    for name in ("tiny-wan", "tiny-hunyuan"):
        config = open_checkpoint(name).configs.transformer
        counts = MODELS[config["_class_name"]].layout.counts
        assert num_threads(config, counts, {}) == rank_threads({}) == 1
    large = {"num_attention_heads": 12, "attention_head_dim": 128, "num_layers": 30}  # Wan 2.1 1.3B
    assert num_threads(large, ("num_layers",), {}) is None
    assert num_threads({"num_layers": None, "num_attention_heads": "4"}, ("num_layers",), {}) == 1


@pytest.mark.parametrize(("given", "threads"), [("4", 4), ("3,2", 3), ("", None), ("0", None), ("many", None)])
def test_what_the_user_has_set_stays(given, threads):
    environment = {"OMP_NUM_THREADS": given}
    small = {"num_attention_heads": 4, "attention_head_dim": 32, "num_layers": 16}
    assert num_threads(small, ("num_layers",), environment) == (None if threads else 1)
    assert rank_threads(environment) == (threads or 1)


@pytest.mark.process
def test_the_command_line_sets_it_before_torch_is_imported():
    script = """
import json, os, sys
from cineray.__main__ import main
sys.argv = ["cineray", "--version"]
try:
    main()
except SystemExit:
    pass
print(json.dumps(["torch" in sys.modules, os.environ["OMP_WAIT_POLICY"], os.environ["GOMP_SPINCOUNT"]]))
"""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_", "KMP_"))}
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=clean, check=True)
    assert json.loads(run.stdout.splitlines()[-1]) == [False, "PASSIVE", "0"]
