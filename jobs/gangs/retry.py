"""What follows when a rank is lost or an attempt fails: pure rules over what was seen."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

MAX_STRIKES = 3  # attempts of one clip that ended with a lost gang; then it is quarantined
MAX_FRUITLESS = 3  # attempts that ended with their node before a step more was done; a further one is a strike
MAX_PROMPT_TRIES = 2  # an error of two attempts to encode a prompt, on two finishers if there are, is the prompt's own
MAX_LOSSES_IN_A_ROW = 4  # of one slot, without a clip done between; then it is retired


@dataclass(frozen=True, kw_only=True, slots=True)
class RankOutcome:
    """How one rank's part of an attempt ended.

    Args:
        kind: "answered"; "raised" an error of its own; "died"; "silent": said nothing before the others were judged.
        is_node_gone: it died with its node.
        fault: of what it raised. "input": the clip's, whose input cannot be used; "step": a step of the clip went
            wrong, for a reason of its own unless every rank says the same; "memory": the device had too little of it;
            "peers": another rank, or the machine.
    """

    kind: Literal["answered", "raised", "died", "silent"]
    reason: str = ""
    fault: Literal["input", "step", "memory", "peers"] = "peers"
    is_node_gone: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class FailureDecision:
    """What to do with the clip and with the gang.

    Args:
        clip: "strike": it may try again; "elsewhere": it may, and had better on another gang; "failed": the clip itself
            is at fault, and would be again.
        is_node_gone: the gang went with a node of its own: that says nothing of the clip, nor of the gang's slot.
    """

    clip: Literal["strike", "elsewhere", "failed"]
    reason: str
    keep_gang: bool
    is_node_gone: bool = False


def classify_failure(outcomes: Sequence[RankOutcome]) -> FailureDecision:
    """Classifies an attempt in which not every rank answered.

    A rank that dies makes its peers raise errors about connections: those say nothing about the clip.

    Args:
        outcomes: of all ranks, in their order.
    """
    died = [f"rank {rank} died: {end.reason}" for rank, end in enumerate(outcomes) if end.kind == "died"]
    if died:
        is_node_gone = any(end.is_node_gone for end in outcomes)
        return FailureDecision(clip="strike", reason="; ".join(died), keep_gang=False, is_node_gone=is_node_gone)
    raised = [end for end in outcomes if end.kind == "raised"]
    short = next((end for end in raised if end.fault == "memory"), None)
    if short is not None:
        # a rank alone has emptied its memory and is well; peers are left in the middle of an exchange
        return FailureDecision(clip="elsewhere", reason=short.reason, keep_gang=len(outcomes) == 1)
    all_raised = len(raised) == len(outcomes)
    if raised and all(end.fault == "input" for end in raised):
        return FailureDecision(clip="failed", reason=raised[0].reason, keep_gang=all_raised)
    said = {end.reason for end in raised}
    if all_raised and len(said) == 1 and all(end.fault != "peers" for end in raised):
        # it would be raised again; but who knows in what state it left the ranks
        return FailureDecision(clip="failed", reason=raised[0].reason, keep_gang=False)
    if raised:
        return FailureDecision(clip="strike", reason=raised[0].reason, keep_gang=False)
    return FailureDecision(clip="strike", reason="a rank did not answer", keep_gang=False)


def is_quarantined(num_strikes: int) -> bool:
    return num_strikes >= MAX_STRIKES


def is_retired(num_losses_in_a_row: int) -> bool:
    return num_losses_in_a_row >= MAX_LOSSES_IN_A_ROW


def is_hung(now_s: float, changed_s: float, limit_s: float) -> bool:
    """Whether a step counter has stood still for longer than allowed; all of one monotonic clock."""
    return now_s - changed_s > limit_s
