"""`cineray render --audit 0.02 --audit-adapt`: what audited clips keep sets the speed-up of the clips to come.

The batch goes in waves: a wave's clips are rendered, then its audited ones without a cache, and what they keep decides
with which settings the next wave begins (`caching/policies/adapting.py`). The first wave ends with the first audited
clip, which is the batch's first cached one, so that all others learn from it. Settings and scores are kept on disk
(`adapt_record`) before a clip is rendered with them.
"""

import bisect
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from typing import Any

from cineray.caching.policies.adapting import UNCACHED, AuditedClip, next_speedup, policy_at
from cineray.caching.policies.auto import FloorPlan
from cineray.caching.policies.fitted import MIN_STEPS
from cineray.jobs.adapt_record import NAME, AdaptRecord, Scored, Wave, read_adapt_record
from cineray.jobs.audit import FOLDER, UNITS, Audit, AuditedRow, Comparison, Setting, audited_places, uncached
from cineray.jobs.console.terminal import tell
from cineray.jobs.output.folder import OutputFolder
from cineray.jobs.output.lease import Lease
from cineray.jobs.output.results import ResultLog
from cineray.jobs.run import Renderer, RunPlan, RunReport, Work, held_folder, render_run
from cineray.jobs.run_options import RunOptions
from cineray.pipeline.loading.checkpoint import Checkpoint
from cineray.pipeline.request import ClipRequest, InputError

# A wave has at least one audited clip for so many that are known: what one more says matters less and less, and the
# record is written, and gangs are built, a few dozen times in a large batch.
KNOWN_PER_NEW = 20


@dataclass(frozen=True, kw_only=True, slots=True)
class Adaptable:
    """A batch some of whose clips have floors.

    Args:
        places: of the audited clips, in order.
        plans: by the cache as it was asked for.
    """

    num_clips: int
    share: float
    places: tuple[int, ...]
    plans: Mapping[str, FloorPlan]

    @property
    def profiles(self) -> dict[str, str]:
        return {cache: plan.profile.digest for cache, plan in self.plans.items()}

    def end_of(self, begin: int, num_gangs: int) -> int:
        """The place behind a wave that begins there: behind as many audited clips as a wave has."""
        num_known = bisect.bisect_left(self.places, begin)
        num_new = max(num_gangs, num_known // KNOWN_PER_NEW) if num_known else 1
        last = num_known + num_new - 1
        return self.places[last] + 1 if last < len(self.places) else self.num_clips


def check_adapting(share: float | None, options: RunOptions) -> None:
    """
    Raises:
        InputError: nothing is audited, or the order of the clips would not be the same another time.
    """
    if share is None:
        raise InputError("--audit-adapt goes by audited clips: give their share too, as --audit 0.02")
    if options.picks_layout or options.elastic_tail:
        named = "--layout auto" if options.picks_layout else "--elastic-tail"
        raise InputError(f"--audit-adapt renders in waves, which {named} knows nothing of; leave one of them out")


def look_through(num_clips: int, requests: Iterable[ClipRequest], share: float, checkpoint: Checkpoint) -> Adaptable:
    """What of a batch can be adapted.

    Raises:
        InputError: no clip has a floor, or no floor can be checked.
    """
    plans: dict[str, FloorPlan] = {}
    for cache in dict.fromkeys(request.cache for request in requests):
        plan = checkpoint.plan_floors(cache)
        if plan is not None:
            plans[cache] = plan
    if not plans:
        raise InputError(
            '--audit-adapt sets the speed of clips with a floor, and none has one; give --cache "auto(psnr>=40)"'
        )
    for cache, plan in plans.items():
        for point in plan.profile.points:
            checkpoint.plan_cache(policy_at(plan, point.speedup))
        if "vmaf" in plan.floors:
            _check_vmaf(cache)
    places = tuple(place for place, _ in audited_places(requests, share))
    return Adaptable(num_clips=num_clips, share=share, places=places, plans=plans)


def render_adapting(
    plan: RunPlan,
    check: Callable[[], tuple[int, Iterable[ClipRequest]]],
    share: float,
    about: dict[str, Any],
) -> RunReport:
    """As `render_run`, in waves; the report has the audit.

    Raises:
        InputError, OutputError, LeasedError: as `render_run` and `look_through`; the record on disk is of another
            batch.
    """
    num_clips, requests = check()
    batch = look_through(num_clips, requests, share, plan.checkpoint)
    _read(plan, batch)  # refused before anything loads
    return render_run(plan, lambda: (num_clips, requests), False, about, partial(_render_waves, plan, batch))


def with_recorded_settings(
    plan: RunPlan, requests: Iterable[ClipRequest], share: float
) -> Callable[[], Iterator[ClipRequest]]:
    """The clips with the settings that an earlier run gave them; the rest begins as clips to come would.

    Raises:
        InputError: as `render_adapting`.
    """
    batch = look_through(sum(1 for _ in requests), requests, share, plan.checkpoint)
    waves = _read(plan, batch).waves or [_first_wave(batch)]
    begins = [wave.begin for wave in waves]

    def settled() -> Iterator[ClipRequest]:
        for place, request in enumerate(requests):
            yield _with_setting(request, batch, waves[bisect.bisect_right(begins, place) - 1].settings)

    return settled


def _read(plan: RunPlan, batch: Adaptable) -> AdaptRecord:
    """
    Raises:
        InputError: as `read_adapt_record`; a setting that the profile has not.
    """
    folder = plan.out / FOLDER
    record = read_adapt_record(folder, batch.share, batch.profiles)
    for wave in record.waves:
        for cache, speedup in wave.settings.items():
            known = {UNCACHED, *(point.speedup for point in batch.plans[cache].profile.points)}
            if speedup not in known:
                raise InputError(
                    f"--audit-adapt: {folder / NAME} has a setting that the quality profile has not: {speedup:g}; "
                    "remove it, and the clips get settings anew"
                )
    return record


def _first_wave(batch: Adaptable) -> Wave:
    settings = {cache: plan.speedup for cache, plan in batch.plans.items()}
    return Wave(begin=0, end=batch.end_of(0, 1), settings=settings)


def _with_setting(request: ClipRequest, batch: Adaptable, settings: Mapping[str, float]) -> ClipRequest:
    plan = batch.plans.get(request.cache)
    return request if plan is None else replace(request, cache=policy_at(plan, settings[request.cache]))


def _check_vmaf(cache: str) -> None:
    import numpy as np

    from cineray.pipeline.media.compare import vmaf_and_xpsnr
    from cineray.pipeline.media.video import VideoError

    frames = np.zeros((2, 64, 64, 3), np.uint8)
    try:
        vmaf_and_xpsnr(frames, frames)
    except VideoError as error:
        raise InputError(f"--audit-adapt: cache {cache}: VMAF cannot be measured here: {error}") from None


def _render_waves(plan: RunPlan, batch: Adaptable, render: Renderer, work: Work) -> RunReport:
    output, lease_s = plan.checkpoint.model.output, plan.options.lease_s
    with held_folder(plan.out / FOLDER, output, lease_s) as (apart, lease):
        waves = _Waves(plan=plan, batch=batch, render=render, work=work, apart=apart, lease=lease)
        report = waves.run()
        if report.has_ended:
            apart.write_json("run.json", {"model": plan.checkpoint.name, "num_clips": len(waves.rows)})
            apart.delete_stale_clips()
        return report


@dataclass(slots=True, kw_only=True)
class _Waves:
    """A batch under way.

    Args:
        work: the batch's clips, as they were asked for.
        apart, lease: folder of the uncached clips.

    Attributes:
        evidence: what the audited clips kept, by the cache that was asked for, in order.
        num_new: of them, in the newest wave.
    """

    plan: RunPlan
    batch: Adaptable
    render: Renderer
    work: Work
    apart: OutputFolder
    lease: Lease
    evidence: dict[str, list[AuditedClip]] = field(default_factory=dict)
    num_new: dict[str, int] = field(default_factory=dict)
    rows: list[AuditedRow] = field(default_factory=list)
    reports: list[RunReport] = field(default_factory=list)
    uncached_clips: ResultLog = field(default_factory=ResultLog)
    num_compared: int = 0
    record: AdaptRecord = field(init=False)
    compare: Comparison = field(init=False)

    def __post_init__(self) -> None:
        self.record, self.compare = _read(self.plan, self.batch), Comparison(self.plan)

    def run(self) -> RunReport:
        number = begin = 0
        while begin < self.batch.num_clips:
            wave = self._wave(number, begin)
            end = self._end_of(number, begin)
            audited: list[tuple[int, ClipRequest]] = []
            if number:
                self.work.folder.log_event("wave", number=number, begin=begin)
            clips = self._settled(islice(self.work.requests, end - begin), begin, wave.settings, audited)
            self.reports.append(self.render(replace(self.work, requests=clips, num_before=begin)))
            if not self.reports[-1].has_ended:
                break
            stopped = self._audit(audited, wave.settings)
            if stopped is not None:
                self.reports.append(replace(stopped, results=self.work.results, wall_s=0.0, gangs_busy=None))
                break
            number, begin = number + 1, end
        return self._report()

    def _wave(self, number: int, begin: int) -> Wave:
        """The settings of a wave: the recorded ones, or those that follow from what is known, which are recorded."""
        if number < len(self.record.waves):
            return self.record.waves[number]
        if number == 0:
            wave = _first_wave(self.batch)
        else:
            before = self.record.waves[-1].settings
            end = self.batch.end_of(begin, self.plan.options.num_gangs)
            wave = Wave(begin=begin, end=end, settings={cache: self._next(cache, before[cache]) for cache in before})
        self._keep(self.record.model_copy(update={"waves": [*self.record.waves, wave]}))
        return wave

    def _next(self, cache: str, now: float) -> float:
        evidence, plan = self.evidence.get(cache, []), self.batch.plans[cache]
        chosen = next_speedup(plan, now, evidence, self.num_new.get(cache, 0))
        if chosen != now:
            tell(f"cineray: {_change(cache, plan, now, chosen, evidence)}")
        return chosen

    def _end_of(self, number: int, begin: int) -> int:
        """Where a wave ends: where a recorded one follows, or where it was to end, whatever `--gangs` is now."""
        recorded, *follows = self.record.waves[number:]
        end = follows[0].begin if follows else recorded.end
        if end is not None and end > begin:
            return min(end, self.batch.num_clips)
        return self.batch.end_of(begin, self.plan.options.num_gangs)

    def _settled(
        self,
        requests: Iterator[ClipRequest],
        begin: int,
        settings: Mapping[str, float],
        audited: list[tuple[int, ClipRequest]],
    ) -> Iterator[ClipRequest]:
        """Clips with their settings; those that are to be audited are put aside as they were asked for."""
        places = self.batch.places
        for place, request in enumerate(requests, begin):
            following = bisect.bisect_left(places, place)
            if following < len(places) and places[following] == place:
                audited.append((place, request))
            yield _with_setting(request, self.batch, settings)

    def _audit(self, audited: list[tuple[int, ClipRequest]], settings: Mapping[str, float]) -> RunReport | None:
        """Renders a wave's audited clips uncached, and compares them; the report of a run that was stopped by that."""
        self.num_new = {}
        rendered = [(place, asked, _with_setting(asked, self.batch, settings)) for place, asked in audited]
        rendered = [(place, asked, request) for place, asked, request in rendered if request.cache != "none"]
        videos = [self._video(request) for _, _, request in rendered]
        known = {(scored.place, scored.video): scored for scored in self.record.scored if scored.scores}
        places = [place for place, _, _ in rendered]
        new = [r for (place, _, r), video in zip(rendered, videos, strict=True) if (place, video) not in known]
        if new:
            report = self.render(
                Work(
                    num_clips=len(self.batch.places),
                    num_before=self.num_compared,
                    requests=map(uncached, new),
                    folder=self.apart,
                    lease=self.lease,
                    results=self.uncached_clips,
                )
            )
            if not report.has_ended:
                return report
        self.num_compared += len(audited)
        found = [
            known.get((place, video)) or Scored(place=place, video=video, scores=self.compare(request))
            for (place, _, request), video in zip(rendered, videos, strict=True)
        ]
        if new:
            kept = [scored for scored in self.record.scored if scored.place not in places]
            in_order = sorted([*kept, *found], key=lambda scored: scored.place)
            self._keep(self.record.model_copy(update={"scored": in_order}))
        for (_, asked, _), scored in zip(rendered, found, strict=True):
            self._learn(asked, scored, settings)
        return None

    def _learn(self, asked: ClipRequest, scored: Scored, settings: Mapping[str, float]) -> None:
        plan = self.batch.plans.get(asked.cache)
        floors = {} if plan is None else plan.floors
        scores = {name: float(score) for name, score in scored.scores.items()}
        self.rows.append(AuditedRow(clip=asked.id, cache=asked.cache, floors=floors, scores=scores))
        # `fitted` computes every step of a short clip: that it keeps all says nothing of others
        if plan is not None and scores and asked.num_inference_steps >= MIN_STEPS:
            clip = AuditedClip(speedup=settings[asked.cache], scores=scores)
            self.evidence.setdefault(asked.cache, []).append(clip)
            self.num_new[asked.cache] = self.num_new.get(asked.cache, 0) + 1

    def _video(self, request: ClipRequest) -> str:
        try:
            return self.compare.name_of(request)
        except (OSError, ValueError):  # its picture went away
            return ""

    def _keep(self, record: AdaptRecord) -> None:
        self.lease.check()
        self.apart.write_json(NAME, record.model_dump())
        self.record = record

    def _report(self) -> RunReport:
        wall_s = sum(report.wall_s for report in self.reports)
        busy = [(report.wall_s, report.gangs_busy) for report in self.reports if report.gangs_busy is not None]
        known_s = sum(seconds for seconds, _ in busy)
        settings = tuple(_changes(self.record.waves))
        return replace(
            self.reports[-1],
            results=self.work.results,
            wall_s=wall_s,
            gangs_busy=round(sum(seconds * share for seconds, share in busy) / known_s, 4) if known_s else None,
            audit=Audit(share=self.batch.share, rows=tuple(self.rows), settings=settings),
        )


def _changes(waves: Iterable[Wave]) -> Iterator[Setting]:
    """The first settings, and each that is another than before."""
    before: dict[str, float] = {}
    for wave in waves:
        for cache, speedup in wave.settings.items():
            if before.get(cache) != speedup:
                yield Setting(begin=wave.begin, cache=cache, speedup=speedup)
        before = wave.settings


def _change(cache: str, plan: FloorPlan, now: float, chosen: float, evidence: list[AuditedClip]) -> str:
    """One line on a setting that changes."""
    num_below = sum(clip.falls_below(plan.floors) for clip in evidence)
    floors = ", ".join(f"{name}>={floor:g}{UNITS[name]}" for name, floor in plan.floors.items())
    known = f"{num_below} of {len(evidence)} audited clips fell below {floors}"
    if chosen == UNCACHED:
        return f"{cache}: no setting keeps the floor any more ({known}): the clips to come are rendered without a cache"
    return f"{cache}: the clips to come are rendered at {chosen:g}x after {now:g}x ({known})"
