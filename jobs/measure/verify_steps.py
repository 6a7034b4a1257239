"""Proves that a step does not depend on the ranks that compute it, where the last bits may differ: in 16 bits.

What may differ is measured, not set: the same steps on one rank with another attention kernel, which is as right.
"""

import math
import statistics
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch.nn.attention import SDPBackend, sdpa_kernel

from cineray.caching.observation import BRANCH_ORDER
from cineray.distributed.layout import Layout
from cineray.jobs.measure.forced_steps import (
    Judged,
    Recording,
    Teacher,
    following_plan,
    keep_decisions,
    recorded_judgments,
    recorded_plan,
)
from cineray.jobs.measure.local_ranks import run_on_local_ranks
from cineray.jobs.measure.verify import MIN_PSNR_DB, GangOptions, encode_on_rank, joined, prompt_path
from cineray.pipeline.finite import NotFiniteError
from cineray.pipeline.gang import SOLO, Gang
from cineray.pipeline.loading.checkpoint import Checkpoint
from cineray.pipeline.loading.model import LoadedModel, LoadOptions
from cineray.pipeline.media.compare import psnr_db
from cineray.pipeline.render import DenoisedClip, decode_clip_on_gang, denoise_prepared, prepare_clip
from cineray.pipeline.request import ClipRequest
from cineray.pipeline.resume.encoded_prompts import read_encoded

# A gang's products have other numbers of rows than one rank's, and are rounded at other places; two kernels differ in
# the attention alone. Seen in bfloat16 on a CPU, 20 steps: 1.06 times (docs/sequence_parallel.md); GPUs have not been.
MAX_RATIO = 3.0


@dataclass(frozen=True, kw_only=True, slots=True)
class ComparedDecision:
    """What a cache wanted at one place on a layout, against what it did on one rank.

    Args:
        is_pure: the layout's policy wants what was recorded of the change that was recorded.
        recorded, here, other_kernel: the relative change that was judged: on one rank, on the layout, and on one rank
            with another kernel; None where none was seen.
    """

    step: int
    branch: int
    sample: int
    is_equal: bool
    is_pure: bool
    recorded: float | None
    here: float | None
    other_kernel: float | None

    @property
    def error(self) -> float:
        """0 where neither saw a change, infinite where one alone did."""
        return _distance(self.here, self.recorded)

    @property
    def floor(self) -> float:
        """The same between two kernels on one rank."""
        return _distance(self.other_kernel, self.recorded)

    def is_apart(self, bound: float) -> bool:
        """It differs, and not because its change is on the threshold's other side, as near as two right runs are."""
        return not self.is_pure or not (self.is_equal or self.error <= bound)

    @property
    def text(self) -> str:
        return f"step {self.step} branch {BRANCH_ORDER[self.branch]}"


@dataclass(frozen=True, kw_only=True, slots=True)
class VerifiedSteps:
    """One clip's steps on one layout against the same steps on one rank.

    Args:
        errors: of each step's output, relative to its norm, in float64.
        floors: the same between two kernels on one rank.
        decisions: of a cache that judges, each from the same past.
        psnr_db: of the frames that the layout decodes of the same latents.
    """

    id: str
    layout: str
    ranks: int
    errors: tuple[float, ...]
    floors: tuple[float, ...]
    decisions: tuple[ComparedDecision, ...] = ()
    psnr_db: float
    denoise_s: float

    @property
    def bounds(self) -> tuple[float, ...]:
        """Of each step: a multiple of its floor; a step whose floor is below most has that of most."""
        return _bounds(self.floors)

    @property
    def apart(self) -> tuple[ComparedDecision, ...]:
        """Decisions that differ for another reason than the last bits of what they were judged by."""
        bounds = _bounds(tuple(decision.floor for decision in self.decisions))
        return tuple(d for d, bound in zip(self.decisions, bounds, strict=True) if d.is_apart(bound))

    @property
    def num_near(self) -> int:
        """Decisions that differ within the distance of two right runs: the change was at the threshold."""
        return sum(not decision.is_equal for decision in self.decisions) - len(self.apart)

    @property
    def worst_step(self) -> int:
        """Where the error is the largest part of its bound."""
        shares = [error / bound if bound else error for error, bound in zip(self.errors, self.bounds, strict=True)]
        return shares.index(max(shares))

    @property
    def ok(self) -> bool:
        are_within = all(error <= bound for error, bound in zip(self.errors, self.bounds, strict=True))
        return are_within and not self.apart and self.psnr_db >= MIN_PSNR_DB

    def to_dict(self) -> dict[str, Any]:
        """The comparison for JSON, which has no infinity."""
        step = self.worst_step
        return {
            "id": self.id,
            "layout": self.layout,
            "ranks": self.ranks,
            "steps": len(self.errors),
            "worst_step": step,
            "step_error": self.errors[step],
            "step_bound": self.bounds[step],
            "decisions": len(self.decisions),
            "decisions_near": self.num_near,
            "decisions_apart": [decision.text for decision in self.apart],
            "psnr_db": None if self.psnr_db == float("inf") else round(self.psnr_db, 2),
            "denoise_s": round(self.denoise_s, 3),
            "ok": self.ok,
        }


def _bounds(floors: tuple[float, ...]) -> tuple[float, ...]:
    middle = statistics.median(floors) if floors else 0.0
    return tuple(MAX_RATIO * max(floor, middle) for floor in floors)


def compare_decisions(
    recorded: Sequence[Judged], other_kernel: Sequence[Judged], here: Sequence[Judged]
) -> tuple[ComparedDecision, ...]:
    """Every decision of the recorded clip against that on a layout.

    Args:
        here: of all ranks; each judges the branches that it computes.
    """
    ours, theirs = ({one.place: one for one in judged} for judged in (here, other_kernel))
    return tuple(
        ComparedDecision(
            step=one.step,
            branch=one.branch,
            sample=one.sample,
            is_equal=ours[one.place].compute == one.compute,
            is_pure=ours[one.place].compute_of_recorded == one.compute,
            recorded=one.change,
            here=ours[one.place].change,
            other_kernel=theirs[one.place].change,
        )
        for one in recorded
    )


def _distance(change: float | None, other: float | None) -> float:
    if change is None or other is None:
        return 0.0 if change is other else math.inf
    return 0.0 if change == other else abs(change - other)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Job:
    """What the ranks of a job are told; `folder` holds prompts and recorded steps."""

    layout: Layout
    model_name: str
    options: LoadOptions
    requests: tuple[ClipRequest, ...]
    gang: GangOptions
    folder: str


def verify_steps(
    checkpoint: Checkpoint,
    options: LoadOptions,
    requests: list[ClipRequest],
    layouts: list[Layout],
    gang: GangOptions,
) -> Iterator[VerifiedSteps]:
    """Records the clips on one rank, steps them with another kernel, then on each layout, from the same latents.

    Raises:
        RankFailed: a rank died, raised or hung.
        NotFiniteError: of a clip that cannot be compared.
    """
    with TemporaryDirectory(prefix="cineray-verify-") as folder:
        job = _Job(
            layout=Layout(),
            model_name=checkpoint.name,
            options=options,
            requests=tuple(requests),
            gang=gang,
            folder=folder,
        )
        timeout_s, device = gang.timeout_s, options.device
        encoding = (checkpoint.name, options, requests, gang, folder)
        run_on_local_ranks(encode_on_rank, 1, *encoding, timeout_s=timeout_s, device=device)
        (recorded,) = run_on_local_ranks(_record_on_rank, 1, job, timeout_s=timeout_s, device=device)
        for frames in recorded:
            if isinstance(frames, NotFiniteError):
                raise frames
        (others,) = run_on_local_ranks(_step_with_another_kernel, 1, job, timeout_s=timeout_s, device=device)
        judged = [recorded_judgments(_clip_folder(job, number)) for number in range(len(requests))]
        for layout in layouts:
            on_layout = replace(job, layout=layout)
            ranks = run_on_local_ranks(_step_on_rank, layout.world_size, on_layout, timeout_s=timeout_s, device=device)
            for number, request in enumerate(requests):
                first, other = ranks[0][number], others[number]
                here = [one for rank in ranks for one in rank[number].judged]
                yield VerifiedSteps(
                    id=request.id,
                    layout=layout.text,
                    ranks=layout.world_size,
                    errors=first.errors,
                    floors=other.errors,
                    decisions=compare_decisions(judged[number], other.judged, here),
                    psnr_db=psnr_db(first.frames, recorded[number]),
                    denoise_s=first.denoise_s,
                )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Stepped:
    """A clip's steps on one rank; `frames` are those that a layout's first rank decodes of the recorded latents."""

    errors: tuple[float, ...]
    judged: tuple[Judged, ...]
    denoise_s: float
    frames: Any = None


def _record_on_rank(rank: int, num_ranks: int, init_method: str, job: _Job) -> list[Any]:
    """The frames of each clip, or why there are none; its steps are left in the job's folder."""
    with joined(job.layout, rank, num_ranks, init_method, job.model_name, job.options, job.gang) as (gang, model):
        found: list[Any] = []
        for number, request in enumerate(job.requests):
            folder = _clip_folder(job, number)
            folder.mkdir()
            prepared = _prepared(job, model, number, request)
            recording = Recording(prepared.denoising.advance, folder)
            prepared = replace(prepared, denoising=replace(prepared.denoising, advance=recording))
            try:
                plan, policy = recorded_plan(request, model.checkpoint)
                clip = denoise_prepared(model, request, prepared, lambda *_: None, gang=gang, plan=plan)
                keep_decisions(clip.trace, policy, folder)
                rendered = decode_clip_on_gang(gang, model, clip, request)
                found.append(None if rendered is None else rendered.frames)
            except NotFiniteError as error:
                found.append(error)
        return found


def _step_with_another_kernel(_rank: int, _num_ranks: int, _init_method: str, job: _Job) -> list[_Stepped]:
    """Each clip with another attention kernel, on one rank."""
    # of the kernels that need no more memory than the clip has: the formula would hold every score of a real clip
    options = replace(job.options, attention="native")
    with joined(job.layout, 0, 1, "", job.model_name, options, job.gang) as (_, model), another_kernel(options.device):
        return [_forced(SOLO, model, job, number, request)[0] for number, request in enumerate(job.requests)]


def another_kernel(device: str) -> AbstractContextManager[Any]:
    """Within it, attention does without PyTorch's first choice in 16 bits: flash attention."""
    return sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH] if device == "cuda" else [SDPBackend.MATH])


def _step_on_rank(rank: int, num_ranks: int, init_method: str, job: _Job) -> list[_Stepped]:
    with joined(job.layout, rank, num_ranks, init_method, job.model_name, job.options, job.gang) as (gang, model):
        found = []
        for number, request in enumerate(job.requests):
            stepped, clip = _forced(gang, model, job, number, request)
            rendered = decode_clip_on_gang(gang, model, clip, request)
            found.append(replace(stepped, frames=None if rendered is None else rendered.frames))
        return found


def _forced(
    gang: Gang, model: LoadedModel, job: _Job, number: int, request: ClipRequest
) -> tuple[_Stepped, DenoisedClip]:
    """Steps that begin at the recorded latents each, and the clip, whose latents are the recorded ones."""
    folder = _clip_folder(job, number)
    plan, policy = following_plan(request, model.checkpoint, folder)
    prepared, teacher = _prepared(job, model, number, request), Teacher(folder)
    prepared = replace(prepared, denoising=replace(prepared.denoising, advance=teacher))
    clip = denoise_prepared(model, request, prepared, lambda *_: None, gang=gang, plan=plan)
    judged = tuple(policy.judged) if policy is not None else ()
    return _Stepped(errors=tuple(teacher.errors), judged=judged, denoise_s=clip.denoise_s), clip


def _prepared(job: _Job, model: LoadedModel, number: int, request: ClipRequest) -> Any:
    return prepare_clip(model, request, read_encoded(prompt_path(job.folder, number)).tensors)


def _clip_folder(job: _Job, number: int) -> Path:
    return Path(job.folder) / f"clip-{number}"
