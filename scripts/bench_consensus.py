#!/usr/bin/env python
"""What it costs to decide together: exchanges per decision and their share of the denoising time, on this machine.

    python scripts/bench_consensus.py --ranks 2 4 --steps 50

Renders one clip of a shipped model on gangs of local processes (gloo) and times each exchange of the controller.
A rank that waits for a slower one counts the wait, so the share is an upper bound.
"""

import argparse
import json
import time
from collections import defaultdict
from dataclasses import replace
from typing import Any

from cineray.distributed.layout import parse_layout
from cineray.jobs.local_ranks import run_on_local_ranks
from cineray.pipeline.checkpoint import open_checkpoint
from cineray.pipeline.gang import Gang
from cineray.pipeline.loading import LoadOptions, load_model
from cineray.pipeline.render import render_clip_on_gang
from cineray.pipeline.request import ClipRequest


class TimedConsensus:
    """A consensus that notes how long each of its exchanges took."""

    def __init__(self, consensus: Any) -> None:
        self._consensus = consensus
        self.seconds: dict[str, list[float]] = defaultdict(list)

    @property
    def num_ranks(self) -> int:
        return self._consensus.num_ranks

    @property
    def branches_elsewhere(self) -> bool:
        return self._consensus.branches_elsewhere

    def _timed(self, name: str, *arguments: Any) -> Any:
        began = time.perf_counter()
        result = getattr(self._consensus, name)(*arguments)
        self.seconds[name].append(time.perf_counter() - began)
        return result

    def add(self, *arguments: Any) -> Any:
        return self._timed("add", *arguments)

    def agree(self, *arguments: Any) -> Any:
        return self._timed("agree", *arguments)

    def agree_across_branches(self, *arguments: Any) -> Any:
        return self._timed("agree_across_branches", *arguments)

    def compare(self, *arguments: Any) -> Any:
        return self._timed("compare", *arguments)


def render_timed(rank: int, num_ranks: int, init_method: str, model_name: str, request: ClipRequest) -> dict[str, Any]:
    gang = Gang.join(parse_layout(str(num_ranks)), rank, num_ranks, init_method=init_method)
    consensus = TimedConsensus(gang.consensus)
    model = load_model(open_checkpoint(model_name), LoadOptions())
    with replace(gang, consensus=consensus) as timed:  # type: ignore[arg-type]  # it has the protocol's methods
        clip = render_clip_on_gang(timed, model, request, lambda done, total: None)
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny-wan")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--cache", default="dicache")
    arguments = parser.parse_args()
    sizes = open_checkpoint(arguments.model).defaults
    request = ClipRequest(
        id="1",
        prompt="a red circle moving left on a navy background",
        width=sizes.width,
        height=sizes.height,
        num_frames=sizes.num_frames,
        num_inference_steps=arguments.steps,
        guidance_scale=sizes.guidance_scale,
        fps=sizes.fps,
        cache=arguments.cache,
    )
    for num_ranks in arguments.ranks:
        results = run_on_local_ranks(render_timed, num_ranks, arguments.model, request, timeout_s=3600)
        print(json.dumps(results[0]), flush=True)


if __name__ == "__main__":
    main()
