#!/usr/bin/env python
"""Quality against cost for cache policies on a shipped model: PSNR against the uncached clips.

    python scripts/bench_quality.py --model tiny-wan --num-captions 32 "fewer-steps(25)" dicache dicache-paper

Captions and seeds are drawn from the sentences that the tiny models know; the seeds serve no other purpose.
Prints a table and, with --json, one JSON object as the last line.
"""

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parent))

from tiny.shapes import all_captions

from cineray.jobs.quality import check_policies, measure_quality
from cineray.pipeline.checkpoint import open_checkpoint
from cineray.pipeline.loading import LoadOptions, default_device, load_model
from cineray.pipeline.request import ClipRequest

FIRST_SEED = 700_000_000  # neither training nor the obedience check uses seeds from here on
CAPTION_STRIDE = 89  # coprime to the 216 captions: neighbours differ in every word


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("policies", nargs="+", metavar="POLICY", help='as --cache, or "fewer-steps(N)"')
    parser.add_argument("--model", default="tiny-wan")
    parser.add_argument("--num-captions", type=int, default=32)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--guidance", type=float, help="default: the model's")
    parser.add_argument("--first", type=int, default=0, help="number of the first caption; calibrate on others")
    parser.add_argument("--threads", type=int, help="CPU threads")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    model = load_model(open_checkpoint(arguments.model), LoadOptions(device=default_device()))
    check_policies(arguments.policies, model)
    defaults, captions = model.checkpoint.defaults, all_captions()
    requests = [
        ClipRequest(
            id=str(number),
            prompt=str(captions[number * CAPTION_STRIDE % len(captions)]),
            seed=FIRST_SEED + number,
            width=defaults.width,
            height=defaults.height,
            num_frames=defaults.num_frames,
            num_inference_steps=arguments.steps,
            guidance_scale=arguments.guidance or defaults.guidance_scale,
            fps=defaults.fps,
        )
        for number in range(arguments.first, arguments.first + arguments.num_captions)
    ]
    table = Table("policy", "speedup by blocks", "PSNR dB", "worst clip dB", box=None)
    rows = []
    with Progress(console=Console(file=sys.stderr), transient=True) as bars:
        bar = bars.add_task("clips", total=len(requests) * (len(arguments.policies) + 1))
        for row in measure_quality(model, requests, arguments.policies, lambda *_: bars.advance(bar)):
            rows.append(row)
            table.add_row(row.policy, f"{row.speedup:.2f}x", f"{row.psnr_db:.1f}", f"{row.worst_psnr_db:.1f}")
    Console().print(table)
    if arguments.json:
        print(json.dumps({"model": arguments.model, "rows": [asdict(row) for row in rows]}))


if __name__ == "__main__":
    main()
