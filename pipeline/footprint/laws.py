"""How transients grow with a clip's size and its ranks. The numbers are provisional until the harness's table is in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from cineray.pipeline.footprint.published import published

# bytes: measured in the same way (fake tensors) by hand, before the harness was here
_PROVISIONAL: dict[str, dict[str, Any]] = {
    "wan2.1-t2v-1.3b": {"weights": 2_850_000_000, "channels": 1536},
    "wan2.1-t2v-14b": {"weights": 28_640_000_000, "channels": 5120},
    "wan2.1-i2v-14b-480p": {"weights": 32_850_000_000 + 1_770_000_000, "channels": 5120},
    "wan2.1-i2v-14b-720p": {"weights": 32_850_000_000 + 1_770_000_000, "channels": 5120},
    "hunyuan-video": {"weights": 25_640_000_000, "channels": 3072},
}


@dataclass(frozen=True, slots=True)
class Laws:
    """Of one model."""

    rank_weights: int
    text_encoder_bytes: int
    text_flop: float
    channels: int
    is_hunyuan: bool
    takes_image: bool

    def step_bytes(self, here: int, everywhere: int, *, is_cached: bool) -> int:
        """Transient of a step on a rank.

        Args:
            here, everywhere: image tokens of the rank, and of all.
        """
        tensors = (18.0 if self.is_hunyuan else 11.0) + 3.0 * is_cached
        return round((tensors * here + 1.0 * everywhere) * self.channels * 2)

    def layer_cache_bytes(self, cache: str, here: int) -> int:
        """Tensors that a policy by layer holds."""
        return 0

    def image_encode_bytes(self, width: int, height: int, frames: int) -> int:
        """Transient of the encoding of a first frame on a rank; 0 for text-to-video."""
        return round(14_100 * width * height) if self.takes_image else 0

    def decode_bytes(self, width: int, height: int, frames: int, how: str, num_ranks: int) -> int:
        """Weights and transient of a decode."""
        pixels, video = width * height, 3 * frames * width * height
        if self.is_hunyuan:
            whole, fixed = pixels * 40_000, 500_000_000
            if how == "tiled":
                return fixed + 2_700_000_000 + 4 * video
        else:
            whole, fixed = pixels * 20_500, 510_000_000
            if how == "tiled":
                return fixed + 4_200_000_000
        if how == "gang":
            whole = max(whole // num_ranks, 35 * 1000 * pixels if self.is_hunyuan else 4_000 * pixels)
        return fixed + whole

    def decode_flop(self, width: int, height: int, frames: int, how: str, num_ranks: int) -> float:
        """Operations of a decode on one device; of each rank where the gang decodes."""
        flop = 639e12 * width * height * frames / (1280 * 720 * 81)
        return flop / num_ranks if how == "gang" else flop


def laws_of(model: str) -> Laws:
    """The laws of a named checkpoint.

    Raises:
        InputError: it has no published configuration.
    """
    found = published(model)
    known = _PROVISIONAL[model]
    is_hunyuan = model == "hunyuan-video"
    return Laws(
        rank_weights=known["weights"],
        text_encoder_bytes=15_300_000_000 if is_hunyuan else 11_400_000_000,
        text_flop=5e12 if is_hunyuan else 1.2e13,
        channels=known["channels"],
        is_hunyuan=is_hunyuan,
        takes_image=found.has("image_encoder"),
    )
