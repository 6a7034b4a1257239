#!/usr/bin/env python
"""What it costs to decide together: exchanges per decision and their share of the denoising time, on this machine.

    python scripts/bench_consensus.py --ranks 2 4 --steps 50
    python scripts/bench_consensus.py --ranks 2 4 --quality 6   # frames as all ranks decide, or rank 0

Renders one clip of a shipped model on gangs of local processes (gloo) and times each exchange of the controller.
A rank that waits for a slower one counts the wait, so the share is an upper bound. With --quality it renders so many
clips and compares their frames with the uncached ones instead.
"""

import argparse
import json
import sys
import time
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

from cineray.distributed.consensus import Mode
from cineray.distributed.layout import parse_layout
from cineray.jobs.measure.local_ranks import run_on_local_ranks
from cineray.pipeline.gang import Gang
from cineray.pipeline.loading.checkpoint import open_checkpoint
from cineray.pipeline.loading.model import LoadOptions, load_model
from cineray.pipeline.media.compare import psnr_db
from cineray.pipeline.render import RenderedClip, render_clip_on_gang
from cineray.pipeline.request import ClipRequest

sys.path.insert(0, str(Path(__file__).parent))

from tiny_clips import tiny_clip

MODES: tuple[Mode, ...] = get_args(Mode)


class TimedConsensus:
    """A consensus that notes how long each of its exchanges took."""

    def __init__(self, consensus: Any) -> None:
        self._consensus = consensus
        self.seconds: dict[str, list[float]] = defaultdict(list)

    @property
    def num_ranks(self) -> int:
        return self._consensus.num_ranks

    @property
    def branches_are_split(self) -> bool:
        return self._consensus.branches_are_split

    def _timed(self, name: str, *arguments: Any) -> Any:
        began = time.perf_counter()
        result = getattr(self._consensus, name)(*arguments)
        self.seconds[name].append(time.perf_counter() - began)
        return result

    def sum_over_ranks(self, *arguments: Any) -> Any:
        return self._timed("sum_over_ranks", *arguments)

    def leader_value(self, *arguments: Any) -> Any:
        return self._timed("leader_value", *arguments)

    def count_tokens_before(self, num_tokens: int) -> int:
        return self._consensus.count_tokens_before(num_tokens)

    def leader_value_across_branches(self, *arguments: Any) -> Any:
        return self._timed("leader_value_across_branches", *arguments)

    def gather(self, *arguments: Any) -> Any:
        return self._timed("gather", *arguments)


def render_timed(rank: int, num_ranks: int, init_method: str, model_name: str, request: ClipRequest) -> dict[str, Any]:
    gang = Gang.join(parse_layout(str(num_ranks)), rank, num_ranks, init_method=init_method)
    consensus = TimedConsensus(gang.consensus)
    model = load_model(open_checkpoint(model_name), LoadOptions())
    with replace(gang, consensus=consensus) as timed:  # type: ignore[arg-type]  # it has the protocol's methods
        clip = render_clip_on_gang(timed, model, request, lambda *_: None)
    if clip is None or clip.trace is None:
        return {}
    spent = {name: sum(seconds) for name, seconds in consensus.seconds.items()}
    return {
        "ranks": num_ranks,
        "decisions": len(clip.trace.entries),
        "calls": {name: len(seconds) for name, seconds in consensus.seconds.items()},
        "median_us": {n: round(sorted(s)[len(s) // 2] * 1e6) for n, s in consensus.seconds.items()},
        "denoise_s": round(clip.denoise_s, 3),
        "share": round(sum(spent.values()) / clip.denoise_s, 5),
        "held_bytes": clip.trace.held_bytes,
    }


def render_all(
    rank: int, num_ranks: int, init_method: str, model_name: str, requests: list[ClipRequest], mode: Mode
) -> list[RenderedClip | None]:
    with Gang.join(parse_layout(str(num_ranks)), rank, num_ranks, init_method=init_method, consensus=mode) as gang:
        model = load_model(open_checkpoint(model_name), LoadOptions())
        return [render_clip_on_gang(gang, model, request, lambda *_: None) for request in requests]


def quality(num_ranks: int, mode: Mode, model: str, requests: list[ClipRequest], uncached: list[Any]) -> dict[str, Any]:
    """PSNR against the uncached clips and speed-up by blocks, with decisions made by `mode`."""
    clips = run_on_local_ranks(render_all, num_ranks, model, requests, mode, timeout_s=3600)[0]
    psnr = [psnr_db(clip.frames, frames) for clip, frames in zip(clips, uncached, strict=True)]
    cost = sum(clip.trace.summary()["cost"] for clip in clips) / len(clips)
    mean = round(sum(psnr) / len(psnr), 2)
    return {
        "ranks": num_ranks,
        "consensus": mode,
        "psnr_db": mean,
        "worst_psnr_db": round(min(psnr), 2),
        "speedup": round(1 / cost, 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny-wan")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--cache", default="dicache")
    parser.add_argument("--quality", type=int, metavar="CLIPS", help="compare the frames of so many clips")
    arguments = parser.parse_args()
    sizes = open_checkpoint(arguments.model).defaults
    requests = [
        ClipRequest(
            **tiny_clip(number),
            width=sizes.width,
            height=sizes.height,
            num_frames=sizes.num_frames,
            num_inference_steps=arguments.steps,
            guidance_scale=sizes.guidance_scale,
            fps=sizes.fps,
            cache=arguments.cache,
        )
        for number in range(arguments.quality or 1)
    ]
    if not arguments.quality:
        for num_ranks in arguments.ranks:
            results = run_on_local_ranks(render_timed, num_ranks, arguments.model, requests[0], timeout_s=3600)
            print(json.dumps(results[0]), flush=True)
        return
    plain = [replace(request, cache="none") for request in requests]
    uncached = [c.frames for c in run_on_local_ranks(render_all, 1, arguments.model, plain, "all", timeout_s=3600)[0]]
    for num_ranks in arguments.ranks:
        for mode in MODES if num_ranks > 1 else MODES[:1]:
            print(json.dumps(quality(num_ranks, mode, arguments.model, requests, uncached)), flush=True)


if __name__ == "__main__":
    main()
