"""`cineray study`: the same clips on several layouts, models and caches, timed on the ranks of this machine."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from cineray.distributed.layout import Layout, check_layout, parse_layout
from cineray.jobs.console.measure import progress_bar
from cineray.jobs.measure.local_ranks import run_on_local_ranks
from cineray.jobs.measure.study_law import StudiedClips
from cineray.jobs.measure.study_log import (
    COMMAND,
    ROWS_FILE,
    begin_log,
    read_rows,
    study_folder,
)
from cineray.jobs.measure.study_ranks import SentSample, Todo, Visit, encode_on_rank, time_on_rank
from cineray.jobs.measure.study_rows import Place, TimedClip
from cineray.jobs.out_file import ended_by_sigterm
from cineray.jobs.output.record import fingerprint_of, render_options, software_versions
from cineray.jobs.planning.gpus import gpu_name
from cineray.jobs.threads import rank_threads
from cineray.pipeline.loading.checkpoint import Checkpoint
from cineray.pipeline.loading.options import LoadOptions
from cineray.pipeline.loading.weights import identify
from cineray.pipeline.media.inputs import Pictures
from cineray.pipeline.request import ClipRequest, InputError

# One visit renders some clips on one layout; a hung collective ends by itself after minutes, this is for the rest.
VISIT_S = 12 * 3600.0
MAX_REPEATS, MAX_CLIPS = 100, 100


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """The clips of one model, uncached; all of one size and number of steps."""

    checkpoint: Checkpoint
    options: LoadOptions
    clips: tuple[ClipRequest, ...]

    @property
    def steps(self) -> int:
        return self.clips[0].num_inference_steps

    @property
    def num_branches(self) -> int:
        """Calls of the transformer per step."""
        is_guided = self.clips[0].guidance_scale > 1
        return min(self.checkpoint.num_calls, 1 + is_guided)

    @property
    def size(self) -> str:
        clip = self.clips[0]
        return f"{clip.width}x{clip.height}, {clip.num_frames} frames, {self.steps} steps"


@dataclass(frozen=True, kw_only=True, slots=True)
class StudyPlan:
    """What is to be measured.

    Args:
        caches: as typed; `cache_of` says what they are of a model.
        repeats: of every clip on every layout.
    """

    samples: tuple[Sample, ...]
    layouts: tuple[Layout, ...]
    caches: tuple[str, ...]
    repeats: int


def take_sample(
    checkpoint: Checkpoint, options: LoadOptions, requests: Sequence[ClipRequest], num_clips: int
) -> Sample:
    """The first clips of a model.

    Raises:
        InputError: there are none, or they differ in size, steps or guidance.
    """
    if not 1 <= num_clips <= MAX_CLIPS:
        raise InputError(f"{COMMAND}: --num-clips must be 1 to {MAX_CLIPS}, got {num_clips}")
    if not requests:
        raise InputError(f"{COMMAND}: there are no clips; give a prompt or a manifest with one clip or more")
    pictures = Pictures()
    clips = tuple(pictures.pinned(replace(request, cache="none")) for request in requests[:num_clips])
    for name in ("width", "height", "num_frames", "num_inference_steps", "guidance_scale"):
        found = sorted({getattr(clip, name) for clip in clips})
        if len(found) > 1:
            raise InputError(
                f"{COMMAND}: the clips that are timed must have one {name}, got {', '.join(map(str, found))}; "
                "take others, or a smaller --num-clips"
            )
    return Sample(checkpoint=checkpoint, options=options, clips=clips)


def check_plan(plan: StudyPlan) -> None:
    """Refuses what cannot be measured before anything is.

    Raises:
        InputError: a layout or cache that does not fit, too few GPUs, repeats out of range, something given twice.
    """
    if not 1 <= plan.repeats <= MAX_REPEATS:
        raise InputError(f"{COMMAND}: --repeats must be 1 to {MAX_REPEATS}, got {plan.repeats}")
    names = [sample.checkpoint.name for sample in plan.samples]
    for what, values in (
        ("--model", names),
        ("--layouts", [layout.text for layout in plan.layouts]),
        ("--cache", list(plan.caches)),
    ):
        if twice := sorted({value for value in values if values.count(value) > 1}):
            raise InputError(f"{COMMAND}: {what} {twice[0]} is given twice; give it once")
    for sample in plan.samples:
        heads = sample.checkpoint.num_heads
        for layout in plan.layouts:
            try:
                check_layout(replace(layout, gangs=1), heads, sample.num_branches)
            except ValueError as error:
                raise InputError(f"{COMMAND}: {sample.checkpoint.name}: {error}") from None
        for cache in plan.caches:
            try:
                sample.checkpoint.plan_cache(cache_of(cache, sample.checkpoint.name))
            except (ValueError, OSError) as error:
                raise InputError(f"{COMMAND}: {sample.checkpoint.name}: --cache {error}") from None
        most = max(layout.world_size for layout in plan.layouts)
        if sample.options.device == "cuda" and most > torch.cuda.device_count():
            raise InputError(
                f"{COMMAND}: a layout takes {most} ranks, this machine has {torch.cuda.device_count()} GPUs; "
                "use --layouts"
            )


def cache_of(cache: str, model: str) -> str:
    """A policy as typed, with the name of the model or of its folder for `{model}`: a schedule is of one model."""
    return cache.replace("{model}", Path(model).name)


def parse_layouts(text: str) -> tuple[Layout, ...]:
    """`1,2,cfg2,gangs2`; a number means ulysses.

    Raises:
        InputError: one is no layout.
    """
    try:
        return tuple(parse_layout(part) for part in text.split(","))
    except ValueError as error:
        raise InputError(f"{COMMAND}: --layouts: {error}") from None


def run_study(plan: StudyPlan, folder: Path) -> list[TimedClip]:
    """Measures what is not in the folder yet; returns all rows that were asked for, in order.

    Layouts are visited in turn and, at every other repeat, in the opposite order, so that a machine that slows down
    slows all of them alike.

    Raises:
        InputError: the folder cannot be used, or holds rows of another setup.
        RankFailed: a rank died, raised or hung; the rows before it are kept.
    """
    log = folder / ROWS_FILE
    with ended_by_sigterm(), study_folder(folder):
        begin_log(log, {sample.checkpoint.name: _setup(sample) for sample in plan.samples})
        wanted = list(wanted_places(plan))
        with progress_bar("clips", len(wanted)) as on_done, TemporaryDirectory(prefix="cineray-study-") as scratch:
            for sample in plan.samples:
                _measure(sample, plan, log, Path(scratch), lambda said: on_done(_count(log, wanted), said))
            on_done(_count(log, wanted))
        known = read_rows(log)
    return [known[place] for place in wanted if place in known]


def wanted_places(plan: StudyPlan) -> Iterator[Place]:
    """Every row of the study: whole clips of every kind, and uncached ones of half the steps."""
    for sample in plan.samples:
        for layout in plan.layouts:
            for cache, steps in _kinds(sample, plan):
                for clip in sample.clips:
                    for repeat in range(plan.repeats):
                        for gang in range(layout.gangs):
                            yield Place(sample.checkpoint.name, cache, layout.text, steps, clip.id, repeat, gang)


def visits(layouts: Sequence[Layout], repeats: int) -> Iterator[tuple[int, Layout]]:
    """(repeat, layout) in the order A B B A."""
    for repeat in range(repeats):
        for layout in layouts if repeat % 2 == 0 else reversed(layouts):
            yield repeat, layout


def _kinds(sample: Sample, plan: StudyPlan) -> list[tuple[str, int]]:
    """(cache, steps) of the clips that are rendered."""
    kinds = [(cache_of(cache, sample.checkpoint.name), sample.steps) for cache in plan.caches]
    if "none" in plan.caches and sample.steps > 1:
        kinds.append(("none", sample.steps // 2))
    return kinds


def _count(log: Path, wanted: Sequence[Place]) -> int:
    return len(read_rows(log).keys() & set(wanted))


def _measure(sample: Sample, plan: StudyPlan, log: Path, scratch: Path, on_visit: Callable[[str], None]) -> None:
    """All rows of one model that are not there."""
    name = sample.checkpoint.name
    sent = SentSample(model=name, options=sample.options, clips=sample.clips)
    text_s: tuple[float, ...] | None = None
    for repeat, layout in visits(plan.layouts, plan.repeats):
        on_visit(f"{name} on {layout.text}")
        todo = _missing(sample, plan, layout, repeat, read_rows(log).keys())
        if not todo:
            continue
        text_s = text_s or tuple(_run(encode_on_rank, 1, sample, sent, scratch)[0])  # once, if at all
        visit = Visit(sample=sent, layout=layout, todo=todo, text_s=text_s, log=log, scratch=scratch)
        _run(time_on_rank, layout.world_size, sample, visit)


def _run(function: Callable[..., Any], num_ranks: int, sample: Sample, *arguments: Any) -> list[Any]:
    return run_on_local_ranks(function, num_ranks, *arguments, timeout_s=VISIT_S, device=sample.options.device)


def _missing(
    sample: Sample, plan: StudyPlan, layout: Layout, repeat: int, known: Collection[Place]
) -> tuple[Todo, ...]:
    """What a visit has to render: every other time in the opposite order."""
    name, kinds = sample.checkpoint.name, _kinds(sample, plan)
    return tuple(
        Todo(cache=cache, steps=steps, number=number, repeat=repeat)
        for cache, steps in (kinds if repeat % 2 == 0 else reversed(kinds))
        for number, clip in enumerate(sample.clips)
        if any(
            Place(name, cache, layout.text, steps, clip.id, repeat, gang) not in known for gang in range(layout.gangs)
        )
    )


def _setup(sample: Sample) -> dict[str, Any]:
    """What a model's numbers depend on beside layout and cache."""
    checkpoint, options = sample.checkpoint, sample.options
    digest, pixels = identify(checkpoint).digest, render_options(options, lossless=False)
    clips = [fingerprint_of(clip, checkpoint, digest, pixels) for clip in sample.clips]
    return {
        "weights": digest,
        "clips": hashlib.sha256(" ".join(clips).encode()).hexdigest()[:16],
        "options": pixels | {"offload": options.offload, "attention": options.attention, "compile": options.compile},
        "device": device_title(options.device),
        "cores": num_cores(),
        "threads": rank_threads(),
        "versions": software_versions(),
    }


def studied_clips(sample: Sample) -> StudiedClips:
    """The same for the file that a plan reads."""
    clip, is_cuda = sample.clips[0], sample.options.device == "cuda"
    device = device_title(sample.options.device)
    return StudiedClips(
        model=sample.checkpoint.name,
        width=clip.width,
        height=clip.height,
        frames=clip.num_frames,
        steps=sample.steps,
        guided=sample.num_branches > 1,
        device=device,
        gpu=gpu_name(device) if is_cuda else "cpu",
        num_units=torch.cuda.device_count() if is_cuda else max(1, num_cores() // rank_threads()),
    )


def where(sample: Sample) -> str:
    """Device and how many, for titles."""
    title = device_title(sample.options.device)
    if sample.options.device == "cuda":
        return f"{torch.cuda.device_count()} x {title}"
    cores = num_cores()
    return f"{cores} {'core' if cores == 1 else 'cores'} of {title}, {sample.options.dtype_name}"


def num_cores() -> int:
    """That this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def device_title(device: str) -> str:
    """The GPU's or processor's name, as its maker gives it."""
    if device == "cuda":
        return torch.cuda.get_device_name(0)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return " ".join((names or ["a CPU"])[0].split())[:80]
