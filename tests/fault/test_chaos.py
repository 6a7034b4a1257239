"""A small run of scripts/chaos.py with fixed incidents: nodes that are drained and lost, a driver that sleeps."""

import random

import pytest
from chaos import Chaos

pytestmark = [pytest.mark.ray, pytest.mark.exhaustive]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # pipes of nodes that were killed
def test_a_batch_survives_lost_nodes_and_a_sleeping_driver(checkpoint_folder, tmp_path):
    chaos = Chaos(tmp_path, str(checkpoint_folder("wan")), num_clips=6, steps=300, random=random.Random(0), ranks=1)
    try:
        chaos.run(["drain node", "kill node", "freeze driver"])
    finally:
        chaos.close()
    chaos.check()
    assert chaos.incidents == ["drain node", "kill node", "freeze driver"]
    assert chaos.exits[75] == 1
    assert chaos.exits[0] >= 1
    kinds = [event["event"] for event in chaos.events()]
    done = [event["id"] for event in chaos.events() if event["event"] == "done"]
    assert len(set(done)) == len(done) > 0  # not all: a driver that sleeps may never tell what it had done
    assert "lost" in kinds
    yielded = [event for event in chaos.events() if event["event"] == "yielded"]
    assert yielded  # by the drained node's gang, at no strike
    assert all(event["kept"] for event in yielded)
    assert "quarantined" not in kinds
