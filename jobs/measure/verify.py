"""Proves that a clip does not depend on the ranks that render it: the same clips on one rank and on gangs."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, get_args

import torch

from cineray.caching.trace import TraceEntry
from cineray.distributed.consensus import Mode
from cineray.distributed.layout import Layout, check_layout, fitting_layouts, parse_layout
from cineray.jobs.measure.local_ranks import run_on_local_ranks
from cineray.pipeline.finite import NotFiniteError
from cineray.pipeline.gang import SOLO, Attention, Gang
from cineray.pipeline.loading.checkpoint import Checkpoint, open_checkpoint
from cineray.pipeline.loading.model import LoadedModel, LoadOptions, load_model
from cineray.pipeline.media.compare import psnr_db
from cineray.pipeline.render import RenderedClip, decode_clip_on_gang, denoise_clip
from cineray.pipeline.request import ClipRequest, InputError
from cineray.pipeline.resume.encoded_prompts import encode_prompt, read_encoded

# Where the last bits may differ, a clip counts as the same from here on. Rings on a CPU in float32 came out at 88 to
# 97 dB or equal; 8-bit frames at 50 dB differ in places by one or two levels.
MIN_PSNR_DB = 50.0
# Bands of rows come out of a convolution with other last bits, so a few of 200,000 values round to the next of 256
# levels: at least 93 dB on the tiny models.
MIN_PSNR_DECODED_DB = 80.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Verified:
    """One clip on one layout against the same clip on one rank.

    Args:
        max_error: largest difference of latents.
        psnr_db: of the frames; infinite where they are equal.
        first_difference: "step N branch B" where the decisions part; None where they are equal.
        max_gamma_error: largest difference of a gamma.
        must_be_equal: every bit of the latents must agree: float32 on a CPU without a ring.
        decoded_by_rows: the frames may differ in their last level.
    """

    id: str
    layout: str
    ranks: int
    max_error: float
    psnr_db: float
    first_difference: str | None
    max_gamma_error: float
    skipped_steps: int
    must_be_equal: bool
    decoded_by_rows: bool
    denoise_s: float

    @property
    def ok(self) -> bool:
        if self.first_difference is not None:
            return False
        if self.must_be_equal:
            least_db = MIN_PSNR_DECODED_DB if self.decoded_by_rows else math.inf
            return self.max_error == 0 and self.max_gamma_error == 0 and self.psnr_db >= least_db
        return self.psnr_db >= MIN_PSNR_DB

    def to_dict(self) -> dict[str, Any]:
        """The comparison for JSON, which has no infinity."""
        return {
            "id": self.id,
            "layout": self.layout,
            "ranks": self.ranks,
            "max_error": self.max_error,
            "psnr_db": None if math.isinf(self.psnr_db) else round(self.psnr_db, 2),
            "decisions_equal": self.first_difference is None,
            "first_difference": self.first_difference,
            "max_gamma_error": self.max_gamma_error,
            "skipped_steps": self.skipped_steps,
            "denoise_s": round(self.denoise_s, 3),
            "ok": self.ok,
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class GangOptions:
    """What all gangs of a run share; `timeout_s` is that of one layout's clips."""

    attention: str = "native"
    consensus: str = "all"
    parallel_decode: bool | None = None
    timeout_s: float = 3600.0

    def __post_init__(self) -> None:
        for name, value, allowed in (
            ("attention", self.attention, get_args(Attention)),
            ("consensus", self.consensus, get_args(Mode)),
        ):
            if value not in allowed:
                raise InputError(f"--{name} must be one of {', '.join(allowed)}, got {value!r}")


def choose_layouts(checkpoint: Checkpoint, requests: list[ClipRequest], texts: list[str]) -> list[Layout]:
    """The layouts that were asked for, checked; by default those of 2 and 4 ranks that differ in kind and fit.

    Raises:
        InputError: a layout that does not fit the model or the clips.
    """
    heads = checkpoint.num_heads
    branches = checkpoint.num_calls if all(r.guidance_scale > 1 for r in requests) else 1
    if not texts:
        wanted = [parse_layout(text) for text in ("ulysses2", "ulysses4", "ring2", "cfg2", "cfg2xulysses2")]
        return [layout for layout in wanted if layout in fitting_layouts(layout.world_size, heads, branches)]
    try:
        layouts = [parse_layout(text) for text in texts]
        for layout in layouts:
            if layout.gangs > 1:
                raise ValueError(f"layout {layout.text}: verify renders on one gang; leave gangs{layout.gangs} out")
            check_layout(layout, heads, branches)
    except ValueError as error:
        raise InputError(str(error)) from None
    return layouts


def check_gpus(options: LoadOptions, layouts: list[Layout]) -> None:
    """Raises InputError where a layout takes more ranks than there are GPUs."""
    if options.device == "cuda":
        most, there = max(layout.world_size for layout in layouts), torch.cuda.device_count()
        if most > there:
            raise InputError(f"verify: a layout takes {most} ranks, this machine has {there} GPUs; use --layouts")


def verify(
    checkpoint: Checkpoint,
    options: LoadOptions,
    requests: list[ClipRequest],
    layouts: list[Layout],
    gang: GangOptions,
) -> Iterator[Verified]:
    """Renders the clips on one rank, then on each layout, in processes of this machine.

    Prompts are encoded once, before: the text encoders of the largest models do not fit into memory once per rank.

    Raises:
        RankFailed: a rank died, raised or hung.
        NotFiniteError: of a clip that cannot be compared.
    """
    with TemporaryDirectory(prefix="cineray-verify-") as prompts:
        arguments = (checkpoint.name, options, requests, gang, prompts)
        run_on_local_ranks(encode_on_rank, 1, *arguments, timeout_s=gang.timeout_s, device=options.device)
        reference = _render(Layout(), *arguments)
        for layout in layouts:
            must_be_equal = layout.ring == 1 and options.device == "cpu" and options.dtype_name == "float32"
            for request, clip, single in zip(requests, _render(layout, *arguments), reference, strict=True):
                compared = _compare(request, layout, clip, single)
                yield replace(
                    compared,
                    must_be_equal=must_be_equal and gang.attention == "native",
                    decoded_by_rows=bool(gang.parallel_decode),
                )


def _render(
    layout: Layout,
    model_name: str,
    options: LoadOptions,
    requests: list[ClipRequest],
    gang: GangOptions,
    prompts: str,
) -> list[RenderedClip]:
    arguments = (layout, model_name, options, requests, gang, prompts)
    per_rank = run_on_local_ranks(
        _render_on_rank, layout.world_size, *arguments, timeout_s=gang.timeout_s, device=options.device
    )
    for clip in per_rank[0]:
        if isinstance(clip, NotFiniteError):
            raise clip
    return per_rank[0]


def encode_on_rank(
    _rank: int,
    _num_ranks: int,
    _init_method: str,
    model_name: str,
    options: LoadOptions,
    requests: list[ClipRequest],
    _gang_options: GangOptions,
    prompts: str,
) -> None:
    """Encodes every clip's prompts, in a process that takes the text encoders with it."""
    checkpoint = open_checkpoint(model_name)
    model = load_model(checkpoint, options, skip_components=checkpoint.model.denoiser_parts)
    for number, request in enumerate(requests):
        encode_prompt(model, request, prompt_path(prompts, number))


def _render_on_rank(
    rank: int,
    num_ranks: int,
    init_method: str,
    layout: Layout,
    model_name: str,
    options: LoadOptions,
    requests: list[ClipRequest],
    gang_options: GangOptions,
    prompts: str,
) -> list[RenderedClip | NotFiniteError | None]:
    with joined(layout, rank, num_ranks, init_method, model_name, options, gang_options) as (gang, model):
        clips: list[RenderedClip | NotFiniteError | None] = []
        for number, request in enumerate(requests):
            encoded = read_encoded(prompt_path(prompts, number)).tensors
            try:
                denoised = denoise_clip(model, request, lambda *_: None, gang=gang, encoded=encoded)
                clips.append(decode_clip_on_gang(gang, model, denoised, request))
            except NotFiniteError as error:  # the ranks go on together: frames are judged by the first alone
                clips.append(error)
        return clips


@contextmanager
def joined(
    layout: Layout,
    rank: int,
    num_ranks: int,
    init_method: str,
    model_name: str,
    options: LoadOptions,
    gang_options: GangOptions,
) -> Iterator[tuple[Gang, LoadedModel]]:
    """This rank's gang and its model, without text encoders; one rank alone meets nobody.

    Loading comes first: it takes ranks unequally long, and a collective would not wait for it.
    """
    device = "cpu"
    if options.device == "cuda":
        device = f"cuda:{rank}"
        torch.cuda.set_device(device)
    checkpoint = open_checkpoint(model_name)
    model = load_model(checkpoint, options, skip_components=checkpoint.model.encoder_parts)
    if num_ranks == 1:
        yield SOLO, model
        return
    with Gang.join(
        layout,
        rank,
        num_ranks,
        device=device,
        init_method=init_method,
        timeout_s=gang_options.timeout_s,
        attention=gang_options.attention,  # type: ignore[arg-type]  # join checks it
        consensus=gang_options.consensus,  # type: ignore[arg-type]
        parallel_decode=gang_options.parallel_decode,
    ) as gang:
        yield gang, model


def prompt_path(prompts: str, number: int) -> Path:
    return Path(prompts) / f"{number}.safetensors"


def _compare(request: ClipRequest, layout: Layout, clip: RenderedClip, single: RenderedClip) -> Verified:
    ours, theirs = (c.trace.entries if c.trace else [] for c in (clip, single))
    pairs = list(zip(ours, theirs, strict=False))
    apart = next((a for a, b in pairs if _decision_key(a) != _decision_key(b)), None)
    if apart is None and len(ours) != len(theirs):
        apart = (ours or theirs)[-1]
    gammas = [abs(a.gamma - b.gamma) for a, b in pairs if a.gamma is not None and b.gamma is not None]
    return Verified(
        id=request.id,
        layout=layout.text,
        ranks=layout.world_size,
        max_error=(clip.latents - single.latents).abs().max().item(),
        psnr_db=psnr_db(clip.frames, single.frames),
        first_difference=None if apart is None else f"step {apart.step} branch {apart.branch}",
        max_gamma_error=max(gammas, default=0.0),
        skipped_steps=clip.trace.summary()["skipped_steps"] if clip.trace else 0,
        must_be_equal=True,
        decoded_by_rows=False,
        denoise_s=clip.denoise_s,
    )


def _decision_key(entry: TraceEntry) -> tuple[Any, ...]:
    return entry.step, entry.branch, entry.sample, entry.compute
