"""Who is to blame when an attempt is lost."""

from pathlib import Path

import pytest

from cineray.jobs.gangs.retry import MAX_LOSSES_IN_A_ROW, MAX_STRIKES, RankOutcome, classify_failure, is_hung

DOCS = Path(__file__).resolve().parents[2] / "docs" / "ray.md"
NUMBERS = ("no", "one", "two", "three", "four", "five")
ANSWERED = RankOutcome(kind="answered")
SILENT = RankOutcome(kind="silent")
DIED = RankOutcome(kind="died", reason="SIGKILL")
RAISED = RankOutcome(kind="raised", reason="Connection reset by peer")


@pytest.mark.parametrize("others", [ANSWERED, SILENT, RAISED])
def test_a_death_explains_what_the_other_ranks_say(others):
    verdict = classify_failure([others, DIED])
    assert (verdict.clip, verdict.reason, verdict.keep_gang) == ("strike", "rank 1 died: SIGKILL", False)


def test_a_fault_that_every_rank_finds_is_the_clips_and_the_gang_goes_on():
    fault = RankOutcome(kind="raised", reason="OSError: broken image", fault="input")
    verdict = classify_failure([fault, fault])
    assert (verdict.clip, verdict.reason, verdict.keep_gang) == ("failed", "OSError: broken image", True)


@pytest.mark.parametrize("other", [ANSWERED, SILENT])
def test_a_fault_that_one_rank_finds_is_the_clips_and_the_gang_is_out_of_step(other):
    fault = RankOutcome(kind="raised", reason="OutOfMemoryError", fault="input")
    verdict = classify_failure([other, fault])
    assert (verdict.clip, verdict.keep_gang) == ("failed", False)


def test_an_error_between_ranks_is_a_strike():
    verdict = classify_failure([RAISED, SILENT])
    assert (verdict.clip, verdict.reason, verdict.keep_gang) == ("strike", "Connection reset by peer", False)


def test_the_limits_are_those_of_the_docs():
    """`test_batch_state` steps a batch up to them."""
    text = DOCS.read_text()
    assert f"| a clip loses {NUMBERS[MAX_STRIKES]} gangs | it is quarantined" in text
    assert f"| a gang is lost {NUMBERS[MAX_LOSSES_IN_A_ROW]} times in a row" in text


def test_a_step_may_take_as_long_as_is_allowed_and_no_longer():
    assert [is_hung(10.0, 4.0, limit) for limit in (5.0, 6.0, 7.0)] == [True, False, False]
