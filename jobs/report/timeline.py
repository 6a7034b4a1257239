"""What ran when, from the lines of `events.jsonl`: pure, no files.

The log tells when a gang got a clip and when the clip was committed, but not when the gang let go of it: decoding and
writing follow in a finisher while the gang is at the next clip. A sidecar says how many seconds the denoising took, so
a clip is drawn from its start for so long, and never beyond the gang's next event.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from cineray.jobs.report.event_log import Event

GAP_S = 600.0  # without a line and without a clip in the works: twice the default of --hang-timeout
PROCESS = "process"  # the lane of runs without gangs
MAX_BINS = 60  # as many columns as a phone shows
MIN_BINS = 6
CLIPS_PER_BIN = 3  # fewer bins for fewer clips: a column then says more than that a clip was done

Kind = Literal["rendered", "lost", "preempted", "failed", "running", "down"]


@dataclass(frozen=True, slots=True)
class Bar:
    """Something on a lane; `clip` is None where the gang was lost and not yet built again."""

    kind: Kind
    begin_s: float
    end_s: float
    clip: str | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Lane:
    """One gang. `busy_s` is the time in which it denoised what became a video, `num_lost` how often it was lost."""

    name: str
    bars: tuple[Bar, ...]
    busy_s: float
    down_s: float
    num_clips: int
    num_lost: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Session:
    """One run, or what of a run stands between two long pauses; times are seconds since 1970.

    Args:
        done: when each of its clips was committed.
        bins: how many of them in each equal part of the session.
    """

    begin_s: float
    end_s: float
    lanes: tuple[Lane, ...]
    done: tuple[float, ...]
    num_failed: int
    num_retries: int

    @property
    def span_s(self) -> float:
        return self.end_s - self.begin_s

    @property
    def clips_per_hour(self) -> float | None:
        return len(self.done) / self.span_s * 3600 if self.span_s else None

    @property
    def bins(self) -> tuple[int, ...]:
        num_bins = min(max(len(self.done) // CLIPS_PER_BIN, MIN_BINS), MAX_BINS)
        counts = [0] * num_bins
        for time_s in self.done:
            place = int((time_s - self.begin_s) / self.span_s * num_bins) if self.span_s else 0
            counts[min(max(place, 0), num_bins - 1)] += 1
        return tuple(counts)


def sessions_of(
    events: Iterable[Event], denoise_s: Mapping[tuple[str, str], float], now_s: float | None
) -> tuple[Session, ...]:
    """What ran when, oldest first.

    Args:
        denoise_s: of clips by id and fingerprint, as their sidecars say.
        now_s: if a driver is at work: what has no end goes on until now.
    """
    sessions, current = [], _Open(denoise_s)
    for event in events:
        if current.is_over_before(event):
            sessions.append(current.closed(None))
            current = _Open(denoise_s)
        current.take(event)
    sessions.append(current.closed(now_s))
    return tuple(session for session in sessions if session is not None)


@dataclass(slots=True)
class _Open:
    """A session while its lines are read."""

    denoise_s: Mapping[tuple[str, str], float]
    begin_s: float | None = None
    last_s: float = 0.0
    bars: dict[str, list[Bar]] = field(default_factory=dict)
    at_work: dict[str, tuple[str, str, float]] = field(default_factory=dict)  # lane: id, fingerprint, since
    up: set[str] = field(default_factory=set)
    down: dict[str, float] = field(default_factory=dict)
    lost: dict[str, int] = field(default_factory=dict)
    done: list[float] = field(default_factory=list)
    num_failed: int = 0
    num_retries: int = 0

    def is_over_before(self, event: Event) -> bool:
        if self.begin_s is None:
            return False
        built_again = event.event == "built" and (event.actor in self.up or PROCESS in self.bars)
        paused = event.time - (event.wall_s or 0.0) - self.last_s > GAP_S and not self.at_work
        paused = paused and event.event != "wave"  # audited clips were rendered meanwhile, in a folder of their own
        alone = self._is_of_process(event) and bool(self.up)
        return built_again or paused or alone or event.time < self.last_s - 1  # a clock that was set back

    def take(self, event: Event) -> None:
        began_s = event.time - (event.wall_s or 0.0) if self._is_of_process(event) else event.time
        self.begin_s = began_s if self.begin_s is None else min(self.begin_s, began_s)
        match event.event:
            case "wave":  # of one run: its gangs are built anew
                self.up.clear()
            case "built" if event.actor is not None:
                self.up.add(event.actor)
                if event.actor in self.down:
                    self._add(event.actor, "down", self.down.pop(event.actor), event.time, None)
                self.bars.setdefault(event.actor, [])
            case "running" if event.gang is not None and event.id is not None:
                self._end_rendered(event.gang, event.time)
                self.at_work[event.gang] = (event.id, event.fingerprint or "", event.time)
                self.bars.setdefault(event.gang, [])
            case "lost" if event.actor is not None and event.actor in self.bars:  # of a finisher no start is logged
                self._end(event.actor, "lost", event.time)
                self.up.discard(event.actor)
                self.lost[event.actor] = self.lost.get(event.actor, 0) + 1
                self.down[event.actor] = event.time
            case "retrying":
                self.num_retries += 1
                self._end_of(event, "lost")
            case "yielded":
                self._end_of(event, "preempted")
            case "failed" | "quarantined":
                self.num_failed += 1
                if self._is_of_process(event):
                    self._add(PROCESS, "failed", began_s, event.time, event.id)
                self._end_of(event, "failed" if event.event == "failed" else "lost")
            case "done":
                self.done.append(event.time)
                if self._is_of_process(event):
                    self._add(PROCESS, "rendered", began_s, event.time, event.id)
                for lane in self._lanes_of(event):
                    self._end_rendered(lane, event.time)
        self.last_s = max(self.last_s, event.time)

    def closed(self, now_s: float | None) -> Session | None:
        """What it was; None if nothing happened."""
        if self.begin_s is None:
            return None
        end_s = self.last_s if now_s is None or not self.at_work else max(now_s, self.last_s)
        for lane, (clip, fingerprint, since_s) in list(self.at_work.items()):
            known_s = self.denoise_s.get((clip, fingerprint))
            if known_s is not None and since_s + known_s <= end_s:
                self._add(lane, "rendered", since_s, since_s + known_s, clip)
            else:
                self._add(lane, "preempted" if now_s is None else "running", since_s, end_s, clip)
        for lane, since_s in self.down.items():
            self._add(lane, "down", since_s, end_s, None)
        lanes = [_lane(name, bars, self.lost.get(name, 0)) for name, bars in sorted(self.bars.items(), key=_by_number)]
        return Session(
            begin_s=self.begin_s,
            end_s=end_s,
            lanes=tuple(lane for lane in lanes if lane.bars),
            done=tuple(self.done),
            num_failed=self.num_failed,
            num_retries=self.num_retries,
        )

    def _is_of_process(self, event: Event) -> bool:
        """Of a run without gangs: its lines about a clip's end have a fingerprint."""
        return event.event in ("done", "failed") and event.fingerprint is not None

    def _add(self, lane: str, kind: Kind, begin_s: float, end_s: float, clip: str | None) -> None:
        self.bars.setdefault(lane, []).append(Bar(kind, begin_s, max(begin_s, end_s), clip))

    def _end(self, lane: str, kind: Kind, time_s: float) -> None:
        if lane in self.at_work:
            clip, _, since_s = self.at_work.pop(lane)
            self._add(lane, kind, since_s, time_s, clip)

    def _end_rendered(self, lane: str, time_s: float) -> None:
        if lane in self.at_work:
            clip, fingerprint, since_s = self.at_work.pop(lane)
            known_s = self.denoise_s.get((clip, fingerprint))
            self._add(lane, "rendered", since_s, time_s if known_s is None else min(time_s, since_s + known_s), clip)

    def _end_of(self, event: Event, kind: Kind) -> None:
        for lane in self._lanes_of(event):
            self._end(lane, kind, event.time)

    def _lanes_of(self, event: Event) -> list[str]:
        return [lane for lane, (clip, _, _) in self.at_work.items() if clip == event.id]


def _lane(name: str, bars: list[Bar], num_lost: int) -> Lane:
    rendered = [bar for bar in bars if bar.kind == "rendered"]
    return Lane(
        name=name,
        bars=tuple(bars),
        busy_s=sum(bar.end_s - bar.begin_s for bar in rendered),
        down_s=sum(bar.end_s - bar.begin_s for bar in bars if bar.kind == "down"),
        num_clips=len(rendered),
        num_lost=num_lost,
    )


def _by_number(item: tuple[str, object]) -> tuple[int, str]:
    return len(item[0]), item[0]  # gang-2 before gang-10
