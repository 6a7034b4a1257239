"""Renders clips on the ranks of a gang, from test processes."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from rank_pool import RankPool

from cineray.distributed.layout import parse_layout
from cineray.pipeline.gang import Gang
from cineray.pipeline.loading.checkpoint import open_checkpoint
from cineray.pipeline.loading.model import LoadOptions, load_model
from cineray.pipeline.render import render_clip, render_clip_on_gang

TIMEOUT_S = 300.0  # of a whole job; a collective that hangs fails after GANG_TIMEOUT_S
GANG_TIMEOUT_S = 120.0


@dataclass
class Outcome:
    """A clip as it came out of the gang's first rank."""

    latents: torch.Tensor
    frames: np.ndarray
    entries: list[Any]
    held_bytes: int
    reasons: list[str]

    @property
    def decisions(self) -> list[tuple[Any, ...]]:
        return [(e.step, e.branch, e.sample, e.compute, e.gamma) for e in self.entries]


def _outcome(clip) -> Outcome:
    entries = list(clip.trace.entries) if clip.trace else []
    held = clip.trace.held_bytes if clip.trace else 0
    return Outcome(clip.latents.clone(), clip.frames, entries, held, [e.reason for e in entries])


def _render(rank, num_ranks, init_method, layout, source, requests, options):
    gang = Gang.join(
        parse_layout(layout), rank, num_ranks, init_method=init_method, timeout_s=GANG_TIMEOUT_S, **options
    )
    model = load_model(open_checkpoint(source), LoadOptions())
    requests = requests[gang.mesh.coordinates.gang]
    with gang:
        clips = [render_clip_on_gang(gang, model, request, lambda done, total: None) for request in requests]
    assert all((clip is None) == (not gang.is_leader) for clip in clips)
    return [_outcome(clip) for clip in clips if clip is not None]


def render_on(ranks: RankPool, layout: str, source: str, requests, **options) -> list[Outcome]:
    """What a gang's first rank returns for each request."""
    (outcomes,) = render_on_gangs(ranks, layout, source, {0: requests}, **options)
    return outcomes


def render_on_gangs(
    ranks: RankPool, layout: str, source: str, requests: dict[int, list], **options
) -> list[list[Outcome]]:
    """The same for each gang of one world; `requests` by gang."""
    degrees = parse_layout(layout)
    arguments = (layout, str(source), requests, options)
    results = ranks.run(_render, degrees.world_size, *arguments, timeout_s=TIMEOUT_S)
    return [outcomes for rank, outcomes in enumerate(results) if rank % degrees.ranks_per_gang == 0]


def _render_alone(_rank, _num_ranks, _init_method, source, requests):
    model = load_model(open_checkpoint(source), LoadOptions())
    return [_outcome(render_clip(model, request, lambda done, total: None)) for request in requests]


def render_alone(ranks: RankPool, source: str, requests) -> list[Outcome]:
    """The same without any gang, in a process like those of the ranks."""
    return ranks.run(_render_alone, 1, str(source), requests, timeout_s=TIMEOUT_S)[0]
