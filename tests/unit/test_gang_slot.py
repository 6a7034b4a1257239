"""What a gang's slot makes of its ranks' answers."""

import pytest

from cineray.jobs.gangs import gang_slot
from cineray.jobs.gangs.gang_slot import GRACE_S, GangSlot, Resources
from cineray.jobs.output.folder import OutputError


def test_a_fault_of_the_folder_that_one_rank_meets_ends_the_wait_for_the_others(monkeypatch):
    """They wait for that rank: until their collective gives up, ten minutes later."""

    class TwoRanks(GangSlot):
        num_ranks = 2  # type: ignore[assignment]

    slot = TwoRanks(number=0, spec=None, group=None, shapes={}, resources=Resources(num_cpus=1, num_gpus=0), actor=None)  # type: ignore[arg-type]
    monkeypatch.setattr(gang_slot, "outcome", lambda ref: OutputError("output folder o: .tmp is a file"))
    slot._calls = {"first rank": 0, "second rank": 1}
    slot.stage = "busy"
    assert slot.on_ready("first rank") == []
    assert slot.first_end_s is not None
    assert slot.settle(slot.first_end_s) == []
    with pytest.raises(OutputError):
        slot.settle(slot.first_end_s + GRACE_S + 1)
