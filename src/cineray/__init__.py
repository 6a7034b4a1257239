"""cineray renders batches of video clips with WAN 2.1 and HunyuanVideo.

The code stands in four folders at the top of the repository, which `src/cineray` links to: `pipeline` (models
and the denoising loop), `distributed` (ranks and sharding), `caching` (when to skip a step), `jobs` (batches
and the command line).
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cineray.caching.policies.dicache import DiCacheConfig
    from cineray.pipeline.caches.enable import enable_cache

__all__ = ["DiCacheConfig", "__version__", "enable_cache"]
__version__ = "0.1.0"

# A zip archive or a Windows checkout turns the four links into text files or drops them; the folders
# themselves still stand two levels up.
if not (Path(__file__).parent / "pipeline" / "__init__.py").exists():
    _checkout = Path(__file__).parents[2]
    if not (_checkout / "pipeline" / "__init__.py").exists():
        raise ImportError(
            f"cineray's folders pipeline, distributed, caching and jobs are neither in {Path(__file__).parent} "
            f"nor in {_checkout}; clone the repository again, or install the wheel"
        )
    __path__.append(str(_checkout))


def __getattr__(name: str) -> Any:
    """Imports the public names when they are first used: torch and diffusers take seconds."""
    if name == "enable_cache":
        from cineray.pipeline.caches.enable import enable_cache

        return enable_cache
    if name == "DiCacheConfig":
        from cineray.caching.policies.dicache import DiCacheConfig

        return DiCacheConfig
    raise AttributeError(f"module 'cineray' has no attribute {name!r}")
