"""DBCache of cache-dit (github.com/vipshop/cache-dit) as a rival: `cache-dit:dbcache(threshold=0.1,taylor=1)`.

It is the installed library's own code, with its own adapters of the models; `pip install "cineray[bench]"` has it.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

_MASKS = ("", "slow", "medium", "fast", "ultra")


@dataclass(frozen=True, kw_only=True, slots=True)
class DBCache:
    """Options by cache-dit's words, shorter.

    Args:
        threshold: of the change of what the first blocks add, `residual_diff_threshold`.
        first, last: blocks that always run at both ends, `Fn` and `Bn`.
        warmup: steps at the start that are computed.
        max_skips: in a row; 0 means no limit.
        taylor: order of the TaylorSeer calibrator; 0: none.
        mask: a step mask of its own, "slow", "medium", "fast" or "ultra"; then the threshold says nothing.
    """

    threshold: float = 0.08
    first: int = 1
    last: int = 0
    warmup: int = 8
    max_skips: int = 0
    taylor: int = 0
    mask: str = ""

    def __post_init__(self) -> None:
        if self.mask not in _MASKS:
            raise ValueError(f"mask must be one of {', '.join(_MASKS[1:])}, got {self.mask!r}")

    def attach(self, transformer: nn.Module, here: Any) -> Callable[[], None]:
        """Puts it on the transformer; what is returned takes it off.

        Args:
            here: whose `request` is the clip.

        Raises:
            ImportError: cache-dit is not installed.
            ValueError: it does not know the model.
        """
        try:
            import cache_dit  # pyright: ignore[reportMissingImports]  # an extra
        except ImportError:
            raise ImportError('cache-dit is not installed: pip install "cineray[bench]"') from None
        logging.getLogger("CACHE_DIT").setLevel(logging.WARNING)
        library: Any = cache_dit
        num_steps: int = here.request.num_inference_steps
        masked = {}
        if self.mask:
            steps = library.steps_mask(total_steps=num_steps, mask_policy=self.mask)
            masked = {"steps_computation_mask": steps, "steps_computation_policy": "static"}
        library.enable_cache(
            transformer,
            cache_config=library.DBCacheConfig(
                Fn_compute_blocks=self.first,
                Bn_compute_blocks=self.last,
                residual_diff_threshold=self.threshold,
                max_warmup_steps=self.warmup,
                max_continuous_cached_steps=self.max_skips or -1,
                num_inference_steps=num_steps,
                **masked,
            ),
            calibrator_config=library.TaylorSeerCalibratorConfig(taylorseer_order=self.taylor) if self.taylor else None,
            attention_backend="native",
        )
        return lambda: library.disable_cache(transformer)
