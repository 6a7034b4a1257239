#!/usr/bin/env python
"""What a cache costs that never skips: the same clip with and without it, step by step in turn, on one thread.

    python scripts/bench_attached.py --model tiny-wan tiny-hunyuan --clips 12

Two instances of a model denoise the same clip in lockstep, a step of one after the same step of the other. One has the
cache, and after each clip the other has it, so that neither where an instance lies in memory nor how the machine's
speed drifts counts. Prints one JSON object per model: the share by which the steps with the cache took longer, of CPU
time and of wall time, each with its 95 % interval (bootstrap over pairs of clips). Latents must be equal.
"""

import argparse
import json
import sys
import threading
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import stats

from cineray.pipeline.loading.checkpoint import open_checkpoint
from cineray.pipeline.loading.model import LoadedModel, LoadOptions, load_model
from cineray.pipeline.render import denoise_clip
from cineray.pipeline.request import ClipRequest

sys.path.insert(0, str(Path(__file__).parent))

from tiny_clips import tiny_clip

NEVER_SKIPS = "dicache(threshold=1e-12)"  # it looks at every step, and no change is so small
BY_STEP = ("cpu_s", "wall_s")


@dataclass(slots=True)
class Lockstep:
    """Two threads that take turns; each step's CPU and wall time in seconds [num_steps, 2], by thread."""

    turn: threading.Semaphore
    others: threading.Semaphore
    times: list[tuple[float, float]] = field(default_factory=list)
    latents: torch.Tensor | None = None

    def denoise(self, model: LoadedModel, request: ClipRequest) -> None:
        torch.set_num_threads(1)
        self.turn.acquire()
        began = time.thread_time(), time.perf_counter()

        def after_step(_done: int, _steps: int) -> None:
            nonlocal began
            self.times.append((time.thread_time() - began[0], time.perf_counter() - began[1]))
            self.others.release()
            self.turn.acquire()
            began = time.thread_time(), time.perf_counter()

        try:
            clip = denoise_clip(model, request, after_step)
            if clip.trace is not None and clip.trace.summary()["skipped_steps"]:
                raise SystemExit(f"{request.cache} skipped; give one that never does")
            self.latents = clip.latents
        finally:
            self.others.release()


def steps_in_turn(requests: list[tuple[LoadedModel, ClipRequest]]) -> np.ndarray:
    """Seconds of each step of both [2, num_steps, CPU and wall]; the first one goes first."""
    first, second = threading.Semaphore(1), threading.Semaphore(0)
    both = [Lockstep(first, second), Lockstep(second, first)]
    threads = [
        threading.Thread(target=lockstep.denoise, args=request)
        for lockstep, request in zip(both, requests, strict=True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    one, other = (lockstep.latents for lockstep in both)
    if one is None or other is None:
        raise SystemExit("a clip failed")
    if not torch.equal(one, other):
        raise SystemExit("the cache changed the latents")
    return np.array([lockstep.times for lockstep in both])


def compare(model_name: str, cache: str, num_clips: int, num_steps: int) -> dict[str, Any]:
    models = [load_model(open_checkpoint(model_name), LoadOptions()) for _ in range(2)]
    sizes = models[0].checkpoint.defaults
    taken: list[np.ndarray] = []  # per clip [cached and bare, CPU and wall]
    for number in range(num_clips + 1):
        request = ClipRequest(
            **tiny_clip(number),
            width=sizes.width,
            height=sizes.height,
            num_frames=sizes.num_frames,
            num_inference_steps=num_steps,
            guidance_scale=sizes.guidance_scale,
            fps=sizes.fps,
        )
        has_cache = number % 2  # the instance
        wanted = [replace(request, cache=cache if one == has_cache else "none") for one in range(2)]
        seconds = steps_in_turn(list(zip(models, wanted, strict=True)))
        if number:  # the first warms up
            # the median of a step's surplus and of the bare step: what disturbs a single step does not count
            cached, bare = seconds[has_cache], seconds[1 - has_cache]
            taken.append(np.median(cached - bare, axis=0) / np.median(bare, axis=0))
    # an instance that lies better in memory has the cache in every second clip: pairs of clips are what is independent
    pairs = np.array(taken[: num_clips // 2 * 2]).reshape(-1, 2, len(BY_STEP)).mean(axis=1)
    found: dict[str, Any] = {"model": model_name, "cache": cache, "clips": len(pairs) * 2, "steps": num_steps}
    for name, values in zip(BY_STEP, pairs.T, strict=True):
        interval = stats.bootstrap((values,), np.mean, rng=0).confidence_interval
        found |= {
            f"{name[:-2]}_more": round(float(values.mean()), 4),
            f"{name[:-2]}_interval": [round(float(interval.low), 4), round(float(interval.high), 4)],
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", default=["tiny-wan", "tiny-hunyuan"])
    parser.add_argument("--cache", default=NEVER_SKIPS)
    parser.add_argument("--clips", type=int, default=12)
    parser.add_argument("--steps", type=int, default=50)
    arguments = parser.parse_args()
    if arguments.clips < 4:
        raise SystemExit("--clips: at least 4")
    for model in arguments.model:
        print(json.dumps(compare(model, arguments.cache, arguments.clips, arguments.steps)), flush=True)


if __name__ == "__main__":
    main()
