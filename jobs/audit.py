"""`cineray render --audit 0.02`: a share of a batch's cached clips rendered again without a cache, and compared.

The uncached clips are an output folder of their own, OUT/.audit, so that an audit that was broken off resumes, and one
that is done costs nothing when the command is repeated.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cineray.jobs.output.folder import clip_of
from cineray.jobs.pixels import refuse_sounds
from cineray.pipeline.media.output import Output
from cineray.pipeline.request import ClipRequest, InputError

if TYPE_CHECKING:
    from cineray.jobs.run import RunPlan
    from cineray.pipeline.loading.checkpoint import Checkpoint

FOLDER = ".audit"


@dataclass(frozen=True, kw_only=True, slots=True)
class Audit:
    """What the audited clips keep against the uncached ones.

    Args:
        psnr_db: by the clip's id; of the videos as they were encoded.
        missing: ids of clips that were to be audited, of which a video is not there or cannot be read.
    """

    share: float
    psnr_db: dict[str, float]
    missing: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """For run.json."""
        values = list(self.psnr_db.values())
        worst = min(self.psnr_db, key=lambda clip: self.psnr_db[clip], default=None)
        return {
            "share": self.share,
            "num_clips": len(values),
            "psnr_mean": round(math.fsum(values) / len(values), 2) if values else None,
            "psnr_worst": round(min(values), 2) if values else None,
            "worst_clip": worst,
            "missing": list(self.missing),
            "clips": {clip: round(value, 2) for clip, value in self.psnr_db.items()},
        }

    @property
    def line(self) -> str:
        content = self.to_dict()
        if not self.psnr_db:
            return "audit: no clip could be compared"
        missing = f"; {len(self.missing)} could not be compared" if self.missing else ""
        return (
            f"audit: {content['num_clips']} clips rendered again without a cache: PSNR {content['psnr_mean']:.1f} dB, "
            f"worst {content['psnr_worst']:.1f} dB ({content['worst_clip']}){missing}"
        )


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
    """The cached clips to audit, without their cache: spread evenly over the batch, the same ones each time."""
    number = 0
    for request in requests:
        if request.cache != "none":
            # the first, and each that takes the running share over another whole clip
            if math.floor(number * share) != math.floor((number - 1) * share):
                yield replace(request, cache="none")
            number += 1


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
    ids = [request.id for request in audited(requests(), share)]
    if ids:
        render_run(apart, lambda: (len(ids), audited(requests(), share)), False, about)
    found = Audit(share=share, **_compared(plan.checkpoint.model.output, plan.out, apart.out, ids))
    add_to_run(plan, {"audit": found.to_dict()})
    return found


def _compared(output: Output, cached: Path, uncached: Path, ids: list[str]) -> dict[str, Any]:
    from cineray.pipeline.media.compare import EQUAL_CLIPS_DB, psnr_db
    from cineray.pipeline.media.video import VideoError

    files = [_files(cached, output.suffix), _files(uncached, output.suffix)]
    psnr: dict[str, float] = {}
    for clip in ids:
        try:
            ours, reference = (output.read(folder[clip]) for folder in files)
        except (KeyError, VideoError):
            continue
        if ours.shape == reference.shape:
            psnr[clip] = min(psnr_db(ours, reference), EQUAL_CLIPS_DB)
    return {"psnr_db": psnr, "missing": tuple(clip for clip in ids if clip not in psnr)}


def _files(folder: Path, suffix: str) -> dict[str, Path]:
    """The clip of each id; of several, as after a changed prompt, the newest."""
    found: dict[str, Path] = {}
    for path in sorted(folder.glob(f"*{suffix}"), key=lambda path: path.stat().st_mtime):
        named = clip_of(path.name)
        if named is not None:
            found[named[0]] = path
    return found
