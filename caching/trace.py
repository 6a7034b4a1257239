"""What a cache did to a clip, step by step: kept to be told, replayed, and compared between ranks."""

import math
from collections import Counter
from dataclasses import asdict, dataclass, field
from itertools import takewhile
from pathlib import Path
from typing import Any, Literal, TypedDict

from pydantic import TypeAdapter

from cineray.caching.forecast import Forecasting
from cineray.caching.observation import BRANCH_ORDER
from cineray.caching.policy import Reason
from cineray.files import parse_json, read_regular, shaped
from cineray.text import printable

# "begun": there is nothing to go by before this step, or the branches differ
StepOutcome = Literal["computed", "skipped", "begun"]
_OUTCOMES: dict[frozenset[tuple[bool, bool]], StepOutcome] = {
    frozenset({(True, True)}): "computed",
    frozenset({(False, True)}): "skipped",
}
MAX_COUNT = 10**6  # of steps, blocks, samples: far above any model's


@dataclass(frozen=True, kw_only=True, slots=True)
class TraceEntry:
    """One sample of one branch at one step.

    `cost` is the share of the step's block evaluations that ran; `statistic` the relative change that was
    judged, where one was: not of a branch that follows the first one.
    """

    step: int
    branch: str
    sample: int
    compute: bool
    cost: float
    reason: str
    statistic: float | None
    gamma: float | None


class StepCounts(TypedDict):
    """What a clip's steps came to; `cost` is the share of the uncached block evaluations that ran."""

    policy: str
    steps: int
    computed_steps: int
    skipped_steps: int
    cost: float


class TraceSummary(StepCounts):
    """The same of a clip with a cache: the range of its gammas, the most bytes held, decisions by their reason."""

    gamma: list[float] | None
    held_bytes: int
    reasons: dict[str, int]


@dataclass(slots=True)
class Trace:
    """All entries of a clip, in order.

    Args:
        policy: the policy in its text form.
        forecasting: how skipped steps were forecast; a replay does the same.
        num_blocks: blocks of the transformer; `probe_depth` of them also run on skipped steps.
        held_bytes: most bytes that the cache held at once.
        by_layer: single layers were skipped, which a replay cannot do.
    """

    policy: str
    forecasting: Forecasting
    num_blocks: int
    probe_depth: int
    entries: list[TraceEntry] = field(default_factory=list[TraceEntry])
    held_bytes: int = 0
    by_layer: bool = False

    def clear(self) -> None:
        self.entries.clear()
        self.held_bytes = 0

    @property
    def last_outcomes(self) -> list[StepOutcome]:
        """What was done at the newest step, by sample; the branches of a sample are taken together."""
        done: dict[int, set[tuple[bool, bool]]] = {}  # by sample: (computed, knew of an earlier step)
        for entry in takewhile(lambda entry: entry.step == self.entries[-1].step, reversed(self.entries)):
            done.setdefault(entry.sample, set()).add((entry.compute, entry.reason != Reason.EMPTY))
        return [_OUTCOMES.get(frozenset(done[sample]), "begun") for sample in sorted(done)]

    def summary(self) -> TraceSummary:
        """Steps, skips, cost (block evaluations as a share of the uncached ones, mean over branches), gammas, bytes.

        A step counts as skipped if any branch of any sample skipped it.
        """
        steps = {entry.step for entry in self.entries}
        skipped = {entry.step for entry in self.entries if not entry.compute}
        gammas = [entry.gamma for entry in self.entries if entry.gamma is not None]
        costs = [entry.cost for entry in self.entries]
        return {
            "policy": self.policy,
            "steps": len(steps),
            "computed_steps": len(steps - skipped),
            "skipped_steps": len(skipped),
            "cost": round(math.fsum(costs) / len(costs), 6) if costs else 1.0,
            "gamma": [round(min(gammas), 6), round(max(gammas), 6)] if gammas else None,
            "held_bytes": self.held_bytes,
            "reasons": dict(Counter(entry.reason for entry in self.entries)),
        }

    def to_dict(self) -> dict[str, Any]:
        """All of it as JSON can hold it; `load_trace` reads it back."""
        return {
            "policy": self.policy,
            "forecasting": asdict(self.forecasting),
            "num_blocks": self.num_blocks,
            "probe_depth": self.probe_depth,
            "by_layer": self.by_layer,
            "held_bytes": self.held_bytes,
            "entries": [asdict(entry) for entry in self.entries],
        }


def trace_from(content: Any) -> Trace:
    """The inverse of `Trace.to_dict`.

    Raises:
        ValueError: it is not such a content; says where, in one line.
    """
    trace = shaped(content, _TRACE)
    low, high = trace.forecasting.gamma_clip
    for name, good in (
        ("num_blocks", 1 <= trace.num_blocks <= MAX_COUNT),
        ("probe_depth", 0 <= trace.probe_depth <= trace.num_blocks),
        ("held_bytes", 0 <= trace.held_bytes < 2**63),
        ("forecasting.gamma_clip", -math.inf < low <= high < math.inf),
        ("forecasting.keep_every", 1 <= trace.forecasting.keep_every <= MAX_COUNT),
    ):
        if not good:
            raise ValueError(f"{name}: out of range")
    _check_entries(trace.entries)
    return trace


def entries_from(content: Any) -> list[TraceEntry]:
    """The `entries` of a `Trace.to_dict`.

    Raises:
        ValueError: as `trace_from`.
    """
    entries = shaped(content, _ENTRIES)
    _check_entries(entries)
    return entries


def load_trace(path: Path) -> Trace:
    """Reads a file that holds a `Trace.to_dict`.

    Raises:
        ValueError: no such file, or not a trace.
    """
    return parse_trace(read_trace(path), path)


def read_trace(path: Path) -> bytes:
    """The bytes of a trace's file.

    Raises:
        ValueError: it cannot be read.
    """
    try:
        return read_regular(path)
    except (OSError, ValueError) as error:  # ValueError: a null character in the name
        reason = error.strerror if isinstance(error, OSError) else error
        raise ValueError(f"trace {printable(path, 200)} cannot be read: {reason}") from None


def parse_trace(content: bytes, path: Path) -> Trace:
    """The trace that a file's bytes stand for.

    Raises:
        ValueError: they are not a trace's.
    """
    try:
        return trace_from(parse_json(content))
    except ValueError as error:
        raise ValueError(f"{printable(path, 200)} is not a cineray trace: {printable(error, 200)}") from None


def _check_entries(entries: list[TraceEntry]) -> None:
    for number, entry in enumerate(entries):
        good = (
            0 <= entry.step < MAX_COUNT
            and entry.branch in BRANCH_ORDER
            and 0 <= entry.sample < MAX_COUNT
            and 0 <= entry.cost < math.inf
            and (entry.gamma is None or math.isfinite(entry.gamma))  # a statistic may be NaN: then the step computes
        )
        if not good:
            raise ValueError(f"entries.{number}: out of range")


_TRACE, _ENTRIES = TypeAdapter(Trace), TypeAdapter(list[TraceEntry])
