"""What the ranks of a study do: encode the prompts in one process, then time clips on a gang."""

from __future__ import annotations

import hashlib
import os
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from cineray.distributed.attention import JointSequence, Kernel, SequenceAttention
from cineray.distributed.layout import Layout
from cineray.jobs.measure.study_log import append_row
from cineray.jobs.measure.study_rows import TimedClip
from cineray.pipeline.gang import Gang
from cineray.pipeline.loading.checkpoint import Checkpoint, open_checkpoint
from cineray.pipeline.loading.model import LoadedModel, LoadOptions, load_model
from cineray.pipeline.render import RenderedClip, decode_clip_on_gang, denoise_clip
from cineray.pipeline.request import ClipRequest
from cineray.pipeline.resume.encoded_prompts import encode_prompt, read_encoded

WARM_UP_STEPS = 2  # as many as touch every kernel, also those of a step that follows another


@dataclass(frozen=True, kw_only=True, slots=True)
class Todo:
    """A clip to be timed; `number` is its place in the sample."""

    cache: str
    steps: int
    number: int
    repeat: int


@dataclass(frozen=True, kw_only=True, slots=True)
class SentSample:
    """A sample as it goes to another process, which opens the checkpoint by its name."""

    model: str
    options: LoadOptions
    clips: tuple[ClipRequest, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Visit:
    """What the ranks of one layout do; `text_s` is of each clip."""

    sample: SentSample
    layout: Layout
    todo: tuple[Todo, ...]
    text_s: tuple[float, ...]
    log: Path
    scratch: Path


def encode_on_rank(
    _rank: int, _num_ranks: int, _init_method: str, sample: SentSample, scratch: Path
) -> tuple[float, ...]:
    checkpoint = open_checkpoint(sample.model)
    model = load_model(checkpoint, sample.options, skip_components=checkpoint.model.denoiser_parts)
    model.adapter.encode(model.pipe, sample.clips[0])  # warm
    seconds = []
    for number, request in enumerate(sample.clips):
        began = time.monotonic()
        encode_prompt(model, request, _prompt_path(scratch, checkpoint, number))
        seconds.append(time.monotonic() - began)
    return tuple(seconds)


def _prompt_path(scratch: Path, checkpoint: Checkpoint, number: int) -> Path:
    kind = hashlib.sha256(checkpoint.name.encode()).hexdigest()[:16]  # a name may be a path
    return scratch / f"{kind}-{number}.safetensors"


def time_on_rank(rank: int, num_ranks: int, init_method: str, visit: Visit) -> None:
    """Renders the clips of a visit; the first rank of each gang adds its rows to the log."""
    options = visit.sample.options
    device = f"cuda:{rank}" if options.device == "cuda" else "cpu"
    # decoded whole by the first rank, on GPUs too: a plan counts it as what one rank does while the others wait
    with Gang.join(
        visit.layout, rank, num_ranks, device=device, init_method=init_method, parallel_decode=False
    ) as gang:
        checkpoint = open_checkpoint(visit.sample.model)
        model = load_model(checkpoint, options, skip_components=checkpoint.model.encoder_parts)
        warm = replace(visit.todo[0], steps=min(WARM_UP_STEPS, visit.todo[0].steps), cache="none")
        _time_clip(gang, model, visit, warm)
        for todo in visit.todo:
            row = _time_clip(gang, model, visit, todo)
            if gang.is_leader:
                append_row(visit.log, row)


def _time_clip(gang: Gang, model: LoadedModel, visit: Visit, todo: Todo) -> TimedClip:
    request = replace(visit.sample.clips[todo.number], cache=todo.cache, num_inference_steps=todo.steps)
    encoded = read_encoded(_prompt_path(visit.scratch, model.checkpoint, todo.number)).tensors
    attention = StopwatchAttention(gang.attention)
    timed = replace(gang, attention=attention) if gang.device.type == "cpu" else gang
    dist.barrier()
    began = time.monotonic()
    denoised = denoise_clip(model, request, lambda *_: None, gang=timed, encoded=encoded)
    decode_began = time.monotonic()
    clip = decode_clip_on_gang(gang, model, denoised, request)
    decoded = time.monotonic()
    if clip is not None:
        output = model.checkpoint.model.output
        video = visit.scratch / f"{os.getpid()}{output.suffix}"
        output.write(clip.frames, video, request, {"prompt": request.prompt})
        video.unlink()
    ended = time.monotonic()
    mine = [decode_began - began, decoded - decode_began, ended - decoded, ended - began, attention.exchange_s]
    ranks = gang.exchange(mine)
    text_s = visit.text_s[todo.number]
    clip_s = text_s + max(end for *_, end, _ in ranks)
    busy_s = text_s + sum(denoise + decode + write for denoise, decode, write, _, _ in ranks)
    denoise_s, decode_s, write_s, _, _ = ranks[0]
    return TimedClip(
        model=model.checkpoint.name,
        cache=todo.cache,
        layout=visit.layout.text,
        steps=todo.steps,
        clip=request.id,
        repeat=todo.repeat,
        gang=gang.mesh.coordinates.gang,
        clip_s=clip_s,
        text_s=text_s,
        denoise_s=denoise_s,
        exchange_s=sum(ranks_s for *_, ranks_s in ranks) / len(ranks) if _is_exchange_seen(gang) else None,
        decode_s=decode_s,
        write_s=write_s,
        idle_s=max(0.0, clip_s - busy_s / len(ranks)),
        computed_share=_computed_share(clip),
    )


def _computed_share(clip: RenderedClip | None) -> float:
    return 1.0 if clip is None or clip.trace is None else float(clip.trace.summary()["cost"])


def _is_exchange_seen(gang: Gang) -> bool:
    """Whether all of a clip's exchange but small numbers is in its attention, where it is timed."""
    layout = gang.mesh.layout
    return gang.device.type == "cpu" and layout.ring == 1 and layout.cfg == 1


class StopwatchAttention:
    """An attention that adds up what it spends outside its kernel. For CPUs, where calls end when done."""

    def __init__(self, attention: SequenceAttention) -> None:
        self._attention = attention
        self.exchange_s = 0.0

    def __call__(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        sequence: JointSequence,
        kernel: Kernel,
    ) -> torch.Tensor:
        kernel_s = 0.0

        def timed(*arguments: Any) -> torch.Tensor:
            nonlocal kernel_s
            began = time.monotonic()
            out = kernel(*arguments)
            kernel_s += time.monotonic() - began
            return out

        began = time.monotonic()
        out = self._attention(query, key, value, mask, sequence, timed)
        self.exchange_s += time.monotonic() - began - kernel_s
        return out

    def close(self) -> None:
        """Nothing: the attention belongs to its gang."""
