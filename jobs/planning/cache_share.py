"""How many of a clip's steps a cache computes: nobody knows before it ran, so who says it is said."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from cineray.caching.policies.fitted import FittedConfig
from cineray.caching.spec import parse_spec
from cineray.jobs.planning.sidecars import PastClips

# Speed-ups of 2.45x (Wan 2.1 1.3B) and 2.34x (HunyuanVideo), one A800, 50 steps: DiCache, arXiv 2508.17356, main table.
# A step that is skipped takes 5 % and 2 % of one that is computed (there, probe cost): share + (1 - share) x probe =
# 1 / speed-up.
_PAPER = "DiCache's paper (arXiv 2508.17356)"
_PUBLISHED = {
    "dicache-paper": {"wan": 0.38, "hunyuan": 0.42},
    "dicache": {"wan": 0.38, "hunyuan": 0.42},  # at its thresholds ours is made to be as fast, with more quality
}


def computed_share_of(
    cache: str, model: str, past: Sequence[PastClips], given: float | None
) -> tuple[float | None, str]:
    """(share of computed steps or None, who says so) of a cache policy.

    Args:
        cache: with all its options; "none" without.
        given: by the user, before all else.
    """
    if cache == "none":
        return None, ""
    name = cache.split("(")[0].split(":")[0]
    if given is not None:
        return given, f"{name} computes {given:.0%} of the steps, as --computed-share says"
    same = [p for p in past if p.kind.cache == cache]
    if same:
        share = statistics.median(p.computed_share for p in same)
        return share, f"{name} computes {share:.0%} of the steps, as it did in the clips of --out"
    speedup = _speedup_of(cache)
    if speedup is not None:
        return 1 / speedup, f"{name} computes one step in {speedup:g}, as it says"
    shares = _PUBLISHED.get(name)
    if shares is None:
        return None, ""
    share = shares["hunyuan" if model.startswith("hunyuan") else "wan"]
    return share, f"{name} is assumed to compute {share:.0%} of the steps, as in {_PAPER}; yours: --computed-share"


def _speedup_of(cache: str) -> float | None:
    """The speed-up that a policy of this text keeps by its own word."""
    try:
        spec = parse_spec(cache)
        if spec.name not in ("fitted", "auto") or {"psnr", "vmaf"} & set(spec.options):
            return None
        return FittedConfig(speedup=float(spec.options.get("speedup", FittedConfig().speedup))).speedup
    except ValueError:  # said where the cache is planned for the model
        return None
