"""Other libraries' caches on a transformer: two at once give neither's result."""

from typing import Any

from torch import nn


def switched_on(transformer: Any) -> str | None:
    """What a transformer says of itself; quick enough for each call."""
    own, kind = vars(transformer), type(transformer)

    def said(name: str) -> Any:  # not by getattr, by which a module tells at length what it lacks
        return own.get(name, getattr(kind, name, None))

    config = said("_cache_config")  # diffusers' CacheMixin
    if config is not None:
        return f"diffusers' {type(config).__name__.removesuffix('Config')}"
    if said("_is_cached"):  # both libraries mark what they have changed
        return "the cache of cache-dit or ParaAttention"
    return "TeaCache" if said("enable_teacache") else None


def other_cache(transformer: nn.Module) -> str | None:
    """Name of another cache on this transformer, or None; also one of diffusers' applied without `enable_cache`."""
    name = switched_on(transformer)
    if name is not None:
        return name
    for module in transformer.modules():
        registry = getattr(module, "_diffusers_hook", None)
        for hook in registry.hooks.values() if registry is not None else ():
            *package, file = type(hook).__module__.split(".")
            if package == ["diffusers", "hooks"] and ("cache" in file or file == "pyramid_attention_broadcast"):
                return f"diffusers' {type(hook).__name__}"
    return None
