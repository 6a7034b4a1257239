#!/usr/bin/env python
"""What `--audit-adapt` keeps where a model has another one's quality profile: replayed on the shipped profiles' clips.

    python scripts/replay_audits.py --clips 100 --share 0.1

Renders nothing: a shipped quality profile says what each of its clips kept at each speed-up. Batches are drawn from the
clips of one model, clips of a batch begin at the speed-up that the other model's profile gives, and what the audited
ones keep sets the others' by the rule of `render --audit-adapt`, in waves of one process.
"""

import argparse
import random
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from cineray.caching.policies.adapting import UNCACHED, AuditedClip, next_speedup
from cineray.caching.policies.auto import SCORES, FloorPlan, fastest
from cineray.caching.profile import ANY_FAMILY, SHIPPED, QualityProfile
from cineray.jobs.audit import is_audited

MODELS = {"tiny-wan": "tiny-hunyuan", "tiny-hunyuan": "tiny-wan"}
FLOORS = [("psnr", floor) for floor in (35.0, 40.0, 45.0, 50.0, 55.0)] + [("vmaf", 90.0), ("vmaf", 95.0)]
NUM_BATCHES = 50
Kept = Mapping[float, Sequence[float]]  # by speed-up, clip by clip


@dataclass(frozen=True)
class Batch:
    """Shares of clips that keep the floor, and times as against uncached clips; with one setting and adapted."""

    kept_alone: float
    kept: float
    speedup: float


def replay(plan: FloorPlan, kept: Kept, num_clips: int, share: float, draw: random.Random) -> Batch:
    ((score, floor),) = plan.floors.items()
    clips = [draw.randrange(len(kept[plan.speedup])) for _ in range(num_clips)]
    now, audited = plan.speedup, list[AuditedClip]()
    num_kept, cost = 0, 0.0
    for place, clip in enumerate(clips):
        value = kept[now][clip] if now != UNCACHED else float("inf")
        num_kept += value >= floor
        cost += 1 / now
        if now != UNCACHED and is_audited(place, share):
            audited.append(AuditedClip(speedup=now, scores={score: value}))
            now = next_speedup(plan, now, audited, 1)
    alone = sum(kept[plan.speedup][clip] >= floor for clip in clips)
    return Batch(alone / num_clips, num_kept / num_clips, num_clips / cost)


def hindsight(kept: Kept, floor: float) -> float:
    """The highest speed-up at which 95 % of the clips keep the floor; 1 where none does."""
    good = [speed for speed, values in kept.items() if sum(v >= floor for v in values) >= 0.95 * len(values)]
    return max(good, default=UNCACHED)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, default=100, help="of a batch")
    parser.add_argument("--share", type=float, default=0.1, help="of them that is audited")
    asked = parser.parse_args()
    profiles = {
        name: QualityProfile.model_validate_json((SHIPPED / "auto" / f"{name}.json").read_bytes()) for name in MODELS
    }
    print("| model, other's profile | floor | speed alone | kept | worst batch | adapted | kept | worst | hindsight |")
    print("|---|---|---|---|---|---|---|---|---|")
    for model, other in MODELS.items():
        others = profiles[other].model_copy(update={"family": ANY_FAMILY, "transformer": {}})
        for score, floor in FLOORS:
            begin = fastest(others.points, floor, SCORES[score])
            if begin is None:
                continue
            plan = FloorPlan(floors={score: floor}, profile=others, speedup=begin)
            kept = {point.speedup: SCORES[score](point) for point in profiles[model].points}
            draw = random.Random(0)
            batches = [replay(plan, kept, asked.clips, asked.share, draw) for _ in range(NUM_BATCHES)]
            alone, adapted = ([getattr(b, name) for b in batches] for name in ("kept_alone", "kept"))
            speed = statistics.fmean(batch.speedup for batch in batches)
            print(
                f"| {model} | {score}>={floor:g} | {begin:g}x | {statistics.fmean(alone):.1%} | {min(alone):.0%} "
                f"| {speed:.2f}x | {statistics.fmean(adapted):.1%} | {min(adapted):.0%} | {hindsight(kept, floor):g}x |"
            )


if __name__ == "__main__":
    main()
