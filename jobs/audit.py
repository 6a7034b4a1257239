"""`cineray render --audit 0.02`: a share of a batch's cached clips rendered again without a cache, and compared.

The uncached clips are an output folder of their own, OUT/.audit, so that an audit that was broken off resumes, and one
that is done costs nothing when the command is repeated. With `--audit-adapt` (`adapting`) the clips are compared while
the batch is under way.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cineray.jobs.output.record import fingerprint_of, render_options
from cineray.jobs.pixels import refuse_sounds
from cineray.pipeline.loading.weights import identify
from cineray.pipeline.media.inputs import Pictures
from cineray.pipeline.media.output import Output
from cineray.pipeline.request import ClipRequest, InputError

if TYPE_CHECKING:
    from cineray.jobs.run import RunPlan
    from cineray.pipeline.loading.checkpoint import Checkpoint

FOLDER = ".audit"
UNITS = {"psnr": " dB", "vmaf": ""}
_NAMES = tuple(UNITS)


@dataclass(frozen=True, kw_only=True, slots=True)
class AuditedRow:
    """What an audited clip keeps against the uncached one, of the videos as they were encoded.

    Args:
        cache: as it was asked for.
        floors: that it was to keep, by score.
        scores: "psnr" in dB, "vmaf" where this ffmpeg knows it; none where a video is not there or cannot be read.
    """

    clip: str
    cache: str
    floors: Mapping[str, float]
    scores: Mapping[str, float]

    @property
    def keeps_floors(self) -> bool:
        return all(self.scores.get(name, math.inf) >= floor for name, floor in self.floors.items())


@dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """From which clip on, counted from 0, clips of a cache were rendered at which speed-up; 1 is uncached."""

    begin: int
    cache: str
    speedup: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Audit:
    """What the audited clips of a batch keep.

    Args:
        settings: of `--audit-adapt`, the first ones and each that followed.
    """

    share: float
    rows: tuple[AuditedRow, ...]
    settings: tuple[Setting, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """For run.json."""
        compared = [row for row in self.rows if row.scores]
        with_floors = [row for row in compared if row.floors]
        content: dict[str, Any] = {"share": self.share, "num_clips": len(compared)}
        for name in _NAMES:
            found = self._of(name)
            content[f"{name}_mean"] = round(math.fsum(found.values()) / len(found), 2) if found else None
            content[f"{name}_worst"] = round(min(found.values()), 2) if found else None
        psnr = self._of("psnr")
        content["worst_clip"] = min(psnr, key=lambda clip: psnr[clip], default=None)
        content["missing"] = [row.clip for row in self.rows if not row.scores]
        if with_floors:
            content["with_floors"] = len(with_floors)
            content["below_floors"] = [row.clip for row in with_floors if not row.keeps_floors]
        content["clips"] = {clip: round(value, 2) for clip, value in psnr.items()}
        content["clips_vmaf"] = {clip: round(value, 2) for clip, value in self._of("vmaf").items()}
        if self.settings:
            content["settings"] = [{"from": s.begin, "cache": s.cache, "speedup": s.speedup} for s in self.settings]
        return content

    @property
    def line(self) -> str:
        content = self.to_dict()
        if not content["num_clips"]:
            return "audit: no clip could be compared"
        said = [f"PSNR {content['psnr_mean']:.1f} dB, worst {content['psnr_worst']:.1f} dB ({content['worst_clip']})"]
        if content["vmaf_mean"] is None:
            said.append("no VMAF, which this ffmpeg does not give")
        else:
            said.append(f"VMAF {content['vmaf_mean']:.1f}, worst {content['vmaf_worst']:.1f}")
        if "with_floors" in content:
            num_kept = content["with_floors"] - len(content["below_floors"])
            said.append(f"{num_kept} of {content['with_floors']} keep their floor")
        if content["missing"]:
            said.append(f"{len(content['missing'])} could not be compared")
        return f"audit: {content['num_clips']} clips rendered again without a cache: {'; '.join(said)}"

    def _of(self, name: str) -> dict[str, float]:
        return {row.clip: row.scores[name] for row in self.rows if name in row.scores}


def check_share(share: float, checkpoint: Checkpoint) -> float:
    """
    Raises:
        InputError: not a share; the model's clips have no pixels to be compared.
    """
    refuse_sounds(checkpoint, "--audit")
    if not 0 < share <= 1:
        raise InputError(f"--audit must be a share of the clips, above 0 and at most 1, as 0.02; got {share:g}")
    return share


def audited(requests: Iterable[ClipRequest], share: float) -> Iterator[ClipRequest]:
    """The cached clips to audit, spread evenly over the batch, the same ones each time."""
    return (request for _, request in audited_places(requests, share))


def audited_places(requests: Iterable[ClipRequest], share: float) -> Iterator[tuple[int, ClipRequest]]:
    """(place in the batch, clip) of the clips to audit."""
    number = 0
    for place, request in enumerate(requests):
        if request.cache != "none":
            if is_audited(number, share):
                yield place, request
            number += 1


def is_audited(number: int, share: float) -> bool:
    """Of cached clips, counted from 0: the first, and each that takes the running share over another whole clip."""
    return math.floor(number * share) != math.floor((number - 1) * share)


def uncached(request: ClipRequest) -> ClipRequest:
    return replace(request, cache="none")


def audit_run(
    plan: RunPlan, requests: Callable[[], Iterable[ClipRequest]], share: float, about: dict[str, Any]
) -> Audit:
    """Renders the audited clips uncached beside the run's own, compares them and adds what was found to run.json.

    Args:
        requests: gives the run's clips anew.

    Raises:
        InputError, OutputError, LeasedError: as `render_run`.
    """
    from cineray.jobs.run import add_to_run, render_run

    apart = replace(plan, out=plan.out / FOLDER, larger=())
    chosen = list(audited(requests(), share))
    if chosen:
        render_run(apart, lambda: (len(chosen), map(uncached, chosen)), False, about)
    compare, floors_of = Comparison(plan), cache(plan.checkpoint.plan_floors)
    rows = []
    for request in chosen:
        floors = floors_of(request.cache)
        scores = compare(request)
        rows.append(
            AuditedRow(
                clip=request.id, cache=request.cache, floors={} if floors is None else floors.floors, scores=scores
            )
        )
    found = Audit(share=share, rows=tuple(rows))
    add_to_run(plan, {"audit": found.to_dict()})
    return found


class Comparison:
    """Compares clips of a run with the uncached ones that were rendered beside it."""

    def __init__(self, plan: RunPlan) -> None:
        self._checkpoint = plan.checkpoint
        self._out = plan.out
        self._digest = identify(plan.checkpoint).digest
        self._options = render_options(plan.load_options, plan.lossless)
        self._pictures = Pictures()

    def __call__(self, request: ClipRequest) -> dict[str, float]:
        """The scores of a clip as it was rendered; none where a video is not there or cannot be read."""
        try:
            videos = self._out / self.name_of(request), self._out / FOLDER / self.name_of(uncached(request))
        except (OSError, ValueError):  # its picture went away
            return {}
        return scores_of(self._checkpoint.model.output, *videos)

    def name_of(self, request: ClipRequest) -> str:
        """The file of a clip, by what it is made of.

        Raises:
            OSError, ValueError: its picture, or its cache's file, cannot be read any more.
        """
        pinned = self._pictures.pinned(request)
        fingerprint = fingerprint_of(pinned, self._checkpoint, self._digest, self._options)
        return f"{request.id}.{fingerprint}{self._checkpoint.model.output.suffix}"


def scores_of(output: Output, video: Path, reference: Path) -> dict[str, float]:
    """ "psnr" in dB and "vmaf" of a video against another one, as far as they can be known."""
    from cineray.pipeline.media.compare import EQUAL_CLIPS_DB, psnr_db, vmaf_and_xpsnr
    from cineray.pipeline.media.video import VideoError

    try:
        frames, expected = output.read(video), output.read(reference)
    except (OSError, VideoError):
        return {}
    if frames.shape != expected.shape:
        return {}
    scores = {"psnr": min(psnr_db(frames, expected), EQUAL_CLIPS_DB)}
    with suppress(VideoError):  # an ffmpeg without it
        scores["vmaf"] = vmaf_and_xpsnr(frames, expected)[0]
    return scores
