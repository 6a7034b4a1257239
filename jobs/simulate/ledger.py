"""Where the time of GPUs went, and what became of clips; summed up as the simulation goes."""

from collections import Counter
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

HOUR_S = 3600.0


class Use(Enum):
    """What GPUs were used for; together all of their time."""

    COMPUTING = "computing"
    LOST = "computing_lost"
    SAVING = "saving"
    STARTING = "starting"
    NO_CLIP = "waiting_for_clips"
    NO_PROMPT = "waiting_for_prompts"
    NO_FINISHER = "waiting_for_finishers"
    TAIL = "tail"
    NO_NODE = "without_node"
    RETIRED = "retired"
    LEFT_OVER = "left_over"


MEANING = {
    Use.COMPUTING: "steps of clips that are done",
    Use.LOST: "steps done again, or of clips that never were done",
    Use.SAVING: "saving step states",
    Use.STARTING: "starting up, loading weights",
    Use.NO_CLIP: "waiting for clips to be read",
    Use.NO_PROMPT: "waiting for prompts to be encoded",
    Use.NO_FINISHER: "waiting for finishers, which are behind",
    Use.TAIL: "idle at the end: no clip is left",
    Use.NO_NODE: "gone, or going: from a notice or a loss to the next node",
    Use.RETIRED: "retired: lost several times in a row",
    Use.LEFT_OVER: "in no gang",
}


@dataclass(slots=True)
class Ledger:
    """Sums; seconds of GPUs, not of gangs.

    Attributes:
        ended: clips by status.
        per_hour: clips done in each hour.
    """

    gpu_s: dict[Use, float] = field(default_factory=lambda: dict.fromkeys(Use, 0.0))
    ended: Counter[str] = field(default_factory=Counter)
    per_hour: list[int] = field(default_factory=list)
    num_nodes_lost: int = 0

    def end_clip(self, status: str, now_s: float, gpu_s: float) -> None:
        """A clip ended, whose kept steps took so long."""
        self.ended[status] += 1
        if status != "done":
            self.gpu_s[Use.LOST] += gpu_s
            return
        self.gpu_s[Use.COMPUTING] += gpu_s
        hour = int(now_s // HOUR_S)
        while len(self.per_hour) <= hour:
            self.per_hour.append(0)
        self.per_hour[hour] += 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Simulated:
    """What a batch comes to in simulated time; no figure here was measured.

    Args:
        ended: clips by status: done, failed, quarantined.
        num_unfinished: clips that were read and did not end, because the run was aborted.
        gpu_hours: by use; their sum is that of all GPUs over the makespan.
        per_hour: clips done in each hour; the last one is not a whole hour.
        num_retries, num_gangs_lost, num_preempted: as the run counts them.
        num_grown: clips that went on in the room of several gangs.
        aborted: why the run would end early.
        num_events: that the run's state was told.
    """

    makespan_s: float
    ended: dict[str, int]
    num_unfinished: int
    gpu_hours: dict[Use, float]
    per_hour: tuple[int, ...]
    num_retries: int
    num_gangs_lost: int
    num_preempted: int
    num_grown: int
    num_nodes_lost: int
    num_retired: int
    aborted: str | None
    num_events: int

    @property
    def clips_per_hour(self) -> float:
        return self.ended.get("done", 0) / self.makespan_s * HOUR_S if self.makespan_s else 0.0

    def content(self) -> dict[str, Any]:
        """For `--json`."""
        return {
            "makespan_s": round(self.makespan_s, 3),
            "clips_per_hour": round(self.clips_per_hour, 3),
            "clips": {"done": 0, "failed": 0, "quarantined": 0, **self.ended, "unfinished": self.num_unfinished},
            "gpu_hours": {use.value: round(hours, 4) for use, hours in self.gpu_hours.items()},
            "retries": self.num_retries,
            "gangs_lost": self.num_gangs_lost,
            "preempted": self.num_preempted,
            "grown": self.num_grown,
            "nodes_lost": self.num_nodes_lost,
            "gangs_retired": self.num_retired,
            "clips_done_per_hour": list(self.per_hour),
            "aborted": self.aborted,
        }
