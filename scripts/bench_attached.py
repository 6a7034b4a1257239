#!/usr/bin/env python
"""What a cache costs that never skips: the same clip with and without it, in turn, in one process and on one thread.

    python scripts/bench_attached.py --model tiny-wan tiny-hunyuan --pairs 8

Prints one JSON object per model: the median over the pairs of cached / bare, of wall time and of CPU time, and the
spread of the pairs. Frames must be equal.
"""

import argparse
import json
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cineray.pipeline.loading.checkpoint import open_checkpoint
from cineray.pipeline.loading.model import LoadOptions, load_model
from cineray.pipeline.render import render_clip
from cineray.pipeline.request import ClipRequest

sys.path.insert(0, str(Path(__file__).parent))

from tiny_clips import tiny_clip

NEVER_SKIPS = "dicache(threshold=1e-12)"  # it looks at every step, and no change is so small


def compare(model_name: str, cache: str, num_pairs: int, num_steps: int) -> dict[str, Any]:
    model = load_model(open_checkpoint(model_name), LoadOptions())
    sizes = model.checkpoint.defaults
    request = ClipRequest(
        **tiny_clip(0),
        width=sizes.width,
        height=sizes.height,
        num_frames=sizes.num_frames,
        num_inference_steps=num_steps,
        guidance_scale=sizes.guidance_scale,
        fps=sizes.fps,
    )

    def render(policy: str) -> tuple[float, float, np.ndarray]:
        began = time.process_time()
        clip = render_clip(model, replace(request, cache=policy), lambda *_: None)
        if clip.trace is not None and clip.trace.summary()["skipped_steps"]:
            raise SystemExit(f"{policy} skipped; give one that never does")
        return clip.denoise_s, time.process_time() - began, clip.frames

    ratios = []
    for pair in range(num_pairs + 1):
        order = ("none", cache) if pair % 2 else (cache, "none")  # neither always comes first
        by_policy = {policy: render(policy) for policy in order}
        (wall_s, cpu_s, frames), (bare_wall_s, bare_cpu_s, bare_frames) = by_policy[cache], by_policy["none"]
        if not np.array_equal(frames, bare_frames):
            raise SystemExit(f"{cache} changed the frames of {model_name}")
        if pair:  # the first warms up
            ratios.append((wall_s / bare_wall_s, cpu_s / bare_cpu_s))
    wall, cpu = zip(*ratios, strict=True)
    return {
        "model": model_name,
        "cache": cache,
        "pairs": num_pairs,
        "wall_ratio": round(statistics.median(wall), 4),
        "cpu_ratio": round(statistics.median(cpu), 4),
        "cpu_ratios": [round(ratio, 3) for ratio in sorted(cpu)],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", default=["tiny-wan", "tiny-hunyuan"])
    parser.add_argument("--cache", default=NEVER_SKIPS)
    parser.add_argument("--pairs", type=int, default=8)
    parser.add_argument("--steps", type=int, default=50)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for model in arguments.model:
        print(json.dumps(compare(model, arguments.cache, arguments.pairs, arguments.steps)), flush=True)


if __name__ == "__main__":
    main()
