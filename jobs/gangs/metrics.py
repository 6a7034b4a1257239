"""What Prometheus sees of a run; Ray exports it. A graph of all of it: examples/cluster/grafana.json."""

from collections.abc import Mapping, Sequence

from ray.util.metrics import Counter, Gauge, Histogram

from cineray.jobs.output.results import ClipResult

_SECONDS = [1.0, 3.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1200.0, 3600.0]


class RunMetrics:
    """Counted in the driver: what an actor counts vanishes with it. Ray puts `ray_` in front and `_total` after."""

    def __init__(self) -> None:
        self._clips = Counter("cineray_clips", "Clips by what became of them.", ("status", "model"))
        self._clip_s = Histogram("cineray_clip_seconds", "From the first attempt to the commit.", _SECONDS)
        self._events = {
            "retries": Counter("cineray_retries", "Attempts that were lost."),
            "losses": Counter("cineray_gangs_lost", "Gangs that died or hung."),
            "yields": Counter(
                "cineray_yields", "Clips that were preempted for a node that goes, a signal or a larger gang."
            ),
            "growths": Counter("cineray_growths", "Gangs that took the room of several."),
        }
        self._counted: dict[str, int] = {}
        self._idle_s = Counter("cineray_gang_idle_seconds", "Time that built gangs did not denoise.")
        self._busy_s = Counter("cineray_gang_busy_seconds", "Time that gangs denoised.")
        self._queue = Gauge("cineray_queue_length", "Clips in hand that wait for a gang.")
        self._gangs = Gauge("cineray_gangs", "Gangs by stage.", ("stage",))
        self._stages: set[str] = set()

    def count(self, result: ClipResult, model: str) -> None:
        self._clips.inc(1, {"status": result.status, "model": model})
        if result.status == "done":
            self._clip_s.observe(result.wall_s)

    def count_up(self, counts: Mapping[str, int]) -> None:
        """Brings retries, losses and yields to what they are now."""
        for name, number in counts.items():
            if number > self._counted.get(name, 0):
                self._events[name].inc(number - self._counted.get(name, 0))
                self._counted[name] = number

    def spent(self, busy_s: float, idle_s: float) -> None:
        """Seconds of all gangs together."""
        for counter, seconds in ((self._busy_s, busy_s), (self._idle_s, idle_s)):
            if seconds:
                counter.inc(seconds)

    def observe(self, num_waiting: int, stages: Sequence[str]) -> None:
        """What is so now; `stages` of all gangs."""
        self._queue.set(num_waiting)
        self._stages.update(stages)
        for stage in self._stages:
            self._gangs.set(stages.count(stage), {"stage": stage})
