#!/usr/bin/env python
"""What a skipped step takes beside a computed one, on this machine: one rank, and ranks that share the clip (gloo).

    python scripts/real_size.py make out/wan-2-layers --layers 2 --vocabulary 1000
    python scripts/bench_skipped_steps.py --model out/wan-2-layers --width 64 --frames 5 --steps 16 --ranks 1 2 4

Prints one JSON object for each number of ranks: medians of the first rank's steps, one thread each; the speed-up by
blocks, and what follows from the medians for the whole clip.
"""

import argparse
import json
import statistics
import time
from itertools import pairwise
from typing import Any

from cineray.distributed.layout import parse_layout
from cineray.jobs.measure.local_ranks import run_on_local_ranks
from cineray.pipeline.gang import Gang
from cineray.pipeline.loading.checkpoint import open_checkpoint
from cineray.pipeline.loading.model import LoadOptions, load_model
from cineray.pipeline.render import denoise_prepared, prepare_clip
from cineray.pipeline.request import ClipRequest


def timed_steps(
    rank: int, num_ranks: int, init_method: str, model_name: str, request: ClipRequest
) -> tuple[list[float], list[float], float]:
    """Seconds of each computed and of each skipped step, and the share of blocks that ran."""
    model = load_model(open_checkpoint(model_name), LoadOptions())
    with Gang.join(parse_layout(str(num_ranks)), rank, num_ranks, init_method=init_method, timeout_s=600) as gang:
        prepared = prepare_clip(model, request)
        ends = [time.perf_counter()]
        clip = denoise_prepared(model, request, prepared, lambda *_: ends.append(time.perf_counter()), gang=gang)
    assert clip.trace is not None
    computed = {entry.step for entry in clip.trace.entries if entry.compute}
    seconds = [end - begin for begin, end in pairwise(ends)]
    of_computed = [s for step, s in enumerate(seconds) if step in computed]
    of_skipped = [s for step, s in enumerate(seconds) if step not in computed]
    return of_computed, of_skipped, clip.trace.summary()["cost"]


def measure(num_ranks: int, model: str, request: ClipRequest) -> dict[str, Any]:
    computed, skipped, cost = run_on_local_ranks(timed_steps, num_ranks, model, request, timeout_s=3600)[0]
    full_s, skip_s = statistics.median(computed), statistics.median(skipped)
    num_steps = len(computed) + len(skipped)
    return {
        "ranks": num_ranks,
        "computed_steps": len(computed),
        "skipped_steps": len(skipped),
        "computed_s": round(full_s, 4),
        "skipped_s": round(skip_s, 5),
        "share": round(skip_s / full_s, 5),
        "speedup_by_blocks": round(1 / cost, 3),
        "speedup_by_time": round(num_steps * full_s / (len(computed) * full_s + len(skipped) * skip_s), 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny-wan")
    parser.add_argument("--cache", default="fitted(speedup=2)")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--width", type=int, default=64, help="and height")
    parser.add_argument("--frames", type=int, default=17)
    parser.add_argument("--steps", type=int, default=50)
    asked = parser.parse_args()
    request = ClipRequest(
        id="1",
        prompt="a red circle moving left on a navy background",
        width=asked.width,
        height=asked.width,
        num_frames=asked.frames,
        num_inference_steps=asked.steps,
        guidance_scale=open_checkpoint(asked.model).defaults.guidance_scale,
        fps=8,
        cache=asked.cache,
    )
    for num_ranks in asked.ranks:
        print(json.dumps(measure(num_ranks, asked.model, request)), flush=True)


if __name__ == "__main__":
    main()
