#!/usr/bin/env python
"""What a cache costs that never skips: the same clip with and without it, in turn, in one process and on one thread.

    python scripts/bench_attached.py --model tiny-wan tiny-hunyuan --pairs 24

Prints one JSON object per model: by what share denoising takes longer with the cache, of CPU time and of wall time,
mean over the pairs of clips with its 95 % interval (bootstrap). Latents must be equal.
"""

import argparse
import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import stats

from cineray.pipeline.loading.checkpoint import open_checkpoint
from cineray.pipeline.loading.model import LoadOptions, load_model
from cineray.pipeline.render import denoise_prepared, prepare_clip
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

    prepared = prepare_clip(model, request)

    def denoise(policy: str) -> tuple[np.ndarray, torch.Tensor]:
        began = time.process_time(), time.perf_counter()
        clip = denoise_prepared(model, replace(request, cache=policy), prepared, lambda *_: None)
        took = np.array([time.process_time() - began[0], time.perf_counter() - began[1]])
        if clip.trace is not None and clip.trace.summary()["skipped_steps"]:
            raise SystemExit(f"{policy} skipped; give one that never does")
        return took, clip.latents

    more: list[np.ndarray] = []  # of each pair: CPU, wall
    for pair in range(num_pairs + 1):
        order = ("none", cache) if pair % 2 else (cache, "none")  # neither always comes first
        by_policy = {policy: denoise(policy) for policy in order}
        (took, latents), (bare_took, bare_latents) = by_policy[cache], by_policy["none"]
        if not torch.equal(latents, bare_latents):
            raise SystemExit(f"{cache} changed the latents of {model_name}")
        if pair:  # the first warms up
            more.append(took / bare_took - 1)
    found: dict[str, Any] = {"model": model_name, "cache": cache, "pairs": num_pairs, "steps": num_steps}
    for name, values in zip(("cpu", "wall"), np.array(more).T, strict=True):
        interval = stats.bootstrap((values,), np.mean, rng=0).confidence_interval
        found[f"{name}_more"] = round(float(values.mean()), 4)
        found[f"{name}_interval"] = [round(float(interval.low), 4), round(float(interval.high), 4)]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", default=["tiny-wan", "tiny-hunyuan"])
    parser.add_argument("--cache", default=NEVER_SKIPS)
    parser.add_argument("--pairs", type=int, default=24)
    parser.add_argument("--steps", type=int, default=50)
    arguments = parser.parse_args()
    if arguments.pairs < 2:
        raise SystemExit("--pairs: at least 2")
    torch.set_num_threads(1)
    for model in arguments.model:
        print(json.dumps(compare(model, arguments.cache, arguments.pairs, arguments.steps)), flush=True)


if __name__ == "__main__":
    main()
