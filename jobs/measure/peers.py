"""Other caches as rivals in `cineray bench quality`: `diffusers:seacache(threshold=0.35)`, `cache-dit:dbcache`.

Each is the installed library's own code (`diffusers.hooks`), attached to the transformer for one clip and taken off.
MagCache takes its ratios from the profile that cineray's own `magcache` would take.
"""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from functools import partial
from typing import Any

from pydantic import TypeAdapter, ValidationError
from torch import nn

from cineray.caching.profile import MagCacheProfile, find_profile
from cineray.jobs.measure.cache_dit import DBCache
from cineray.pipeline.loading.model import LoadedModel
from cineray.pipeline.request import ClipRequest, InputError
from cineray.text import shorten

FAMILIES = ("diffusers:", "cache-dit:")
NUM_TRAIN_TIMESTEPS = 1000  # of flow matching, whose timestep is 1000 sigma
_SEA_HOOK = "sea_cache_root"
_PEER = re.compile(r"(?P<name>(?:diffusers|cache-dit):[a-z-]+)(?:\((?P<options>[^()]*)\))?")


class OfDiffusers:
    """A cache of diffusers': its own configuration, which `config` gives."""

    __slots__ = ()

    def config(self, here: "Here", /) -> Any:
        raise NotImplementedError

    def attach(self, transformer: Any, here: "Here") -> Callable[[], None]:
        transformer.enable_cache(self.config(here))
        return transformer.disable_cache


@dataclass(frozen=True, kw_only=True, slots=True)
class TaylorSeer(OfDiffusers):
    """`before`: steps computed at the start; `after`: from which step on all are computed, 0 for none."""

    interval: int = 5
    order: int = 1
    before: int = 3
    after: int = 0

    def config(self, _here: "Here", /, **more: Any) -> Any:
        import torch
        from diffusers.hooks import TaylorSeerCacheConfig

        # its own patterns must match a name to the end, and Wan's attn1, attn2 and ffn do not
        more = more or {"cache_identifiers": [r".*blocks\.\d+\.(attn\d?|ffn?|ff_context|proj_out)"]}
        return TaylorSeerCacheConfig(
            cache_interval=self.interval,
            max_order=self.order,
            disable_cache_before_step=self.before,
            disable_cache_after_step=self.after or None,
            taylor_factors_dtype=torch.float32,  # bfloat16 is its default, of half the memory; this is its best
            **more,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class TaylorSeerLite(TaylorSeer):
    """Forecasts the transformer's output alone; no block runs on a skipped step."""

    def config(self, here: "Here", /, **more: Any) -> Any:
        return TaylorSeer.config(self, here, use_lite_mode=True, **more)


@dataclass(frozen=True, kw_only=True, slots=True)
class FirstBlock(OfDiffusers):
    threshold: float = 0.05

    def config(self, _here: "Here", /) -> Any:
        from diffusers.hooks import FirstBlockCacheConfig

        return FirstBlockCacheConfig(threshold=self.threshold)


@dataclass(frozen=True, kw_only=True, slots=True)
class MagCache(OfDiffusers):
    threshold: float = 0.06
    max_skips: int = 3
    retention: float = 0.2

    def config(self, here: "Here", /) -> Any:
        from diffusers.hooks import MagCacheConfig

        checkpoint = here.model.checkpoint
        known, configs = checkpoint.model, checkpoint.configs
        ratios = find_profile(MagCacheProfile, "", known.family, configs.transformer).ratios["cond"]
        return MagCacheConfig(
            threshold=self.threshold,
            max_skip_steps=self.max_skips,
            retention_ratio=self.retention,
            num_inference_steps=here.request.num_inference_steps,
            mag_ratios=list(ratios),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class SeaCache(OfDiffusers):
    """diffusers' form of it: it judges by the filtered latents, where the paper's judges by the first block's input."""

    threshold: float = 0.25
    order: int = 1
    retention: int = 1
    end: int = 1
    max_skips: int = 2

    def config(self, _here: "Here", /) -> Any:
        from diffusers.hooks import SeaCacheConfig

        def latents(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            values = args[0] if args else kwargs["hidden_states"]
            return list(values.unbind(dim=0))

        return SeaCacheConfig(
            threshold=self.threshold,
            residual_order=self.order,
            retention_steps=self.retention,
            cache_end_steps=self.end,
            max_consecutive_cached=self.max_skips,
            raw_vision_callback=latents,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class PyramidAttention(OfDiffusers):
    """`spatial` and `cross`: how often attention is computed, between timesteps `low` and `high`; 0: always."""

    spatial: int = 2
    cross: int = 0
    low: int = 100
    high: int = 800

    def config(self, here: "Here", /) -> Any:
        from diffusers.hooks import PyramidAttentionBroadcastConfig

        between = (self.low, self.high)
        return PyramidAttentionBroadcastConfig(
            spatial_attention_block_skip_range=self.spatial or None,
            cross_attention_block_skip_range=self.cross or None,
            spatial_attention_timestep_skip_range=between,
            cross_attention_timestep_skip_range=between,
            spatial_attention_block_identifiers=_BLOCKS,
            cross_attention_block_identifiers=_BLOCKS,
            current_timestep_callback=here.timestep,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class FasterCache(OfDiffusers):
    """Without its skipping of the unconditional branch, which wants both branches in one batch."""

    spatial: int = 2
    low: int = -1
    high: int = 681

    def config(self, here: "Here", /) -> Any:
        from diffusers.hooks import FasterCacheConfig

        return FasterCacheConfig(
            spatial_attention_block_skip_range=self.spatial,
            spatial_attention_timestep_skip_range=(self.low, self.high),
            spatial_attention_block_identifiers=_BLOCKS,
            attention_weight_callback=lambda _module: 0.5,
            is_guidance_distilled=True,
            tensor_format="BCFHW",
            current_timestep_callback=here.timestep,
        )


_BLOCKS = (r"blocks.*attn", r"transformer_blocks.*attn", r"single_transformer_blocks.*attn")

PEERS: dict[str, type[Any]] = {
    "diffusers:taylorseer-lite": TaylorSeerLite,
    "diffusers:taylorseer": TaylorSeer,
    "diffusers:seacache": SeaCache,
    "diffusers:fbcache": FirstBlock,
    "diffusers:magcache": MagCache,
    "diffusers:pab": PyramidAttention,
    "diffusers:fastercache": FasterCache,
    "cache-dit:dbcache": DBCache,
}


@dataclass(slots=True)
class Here:
    """Where a rival runs: the model, the clip, and the timestep of the call in flight."""

    model: LoadedModel
    request: ClipRequest
    now: Any = None

    def timestep(self) -> int:
        return int(self.now.flatten()[0]) if self.now is not None else 1000

    def see(self, module: nn.Module, _args: Any, kwargs: dict[str, Any]) -> None:
        """Notes the timestep, and tells SeaCache's hook the sigma, which a pipeline says in its cache context."""
        self.now = kwargs.get("timestep")
        hook = getattr(module, "_diffusers_hook").hooks.get(_SEA_HOOK)  # noqa: B009  # no attribute of a module's type
        context = None if hook is None else hook.state_manager._context
        if hook is not None and context is not None:
            hook.state_manager.set_context(replace(context, sigma=self.timestep() / NUM_TRAIN_TIMESTEPS))


def is_peer(text: str) -> bool:
    return text.startswith(FAMILIES)


def option_types(text: str) -> dict[str, type]:
    """The options of the rival that a text names.

    Raises:
        InputError: it names none.
    """
    match = _PEER.fullmatch(text.strip())
    if match is None or match["name"] not in PEERS:
        raise InputError(f"bench quality: {shorten(text)} is no rival that is known; known: {', '.join(PEERS)}")
    return {option.name: type(option.default) for option in fields(PEERS[match["name"]])}


def parse_peer(text: str) -> Any:
    """A rival with its options.

    Raises:
        InputError: an unknown rival or option, or a bad value.
    """
    types, match = option_types(text), _PEER.fullmatch(text.strip())
    assert match is not None  # else it would have been refused
    values: dict[str, Any] = {}
    for part in filter(None, (p.strip() for p in (match["options"] or "").split(","))):
        name, _, value = (p.strip() for p in part.partition("="))
        if name not in types or name in values:
            raise InputError(
                f"bench quality: {shorten(text)}: unknown or repeated option {shorten(name)}; valid: {', '.join(types)}"
            )
        try:
            values[name] = TypeAdapter(types[name]).validate_python(value)
        except ValidationError as error:
            reason = error.errors()[0]["msg"]
            raise InputError(f"bench quality: {shorten(text)}: {name}: {reason}, got {shorten(value)}") from None
    try:
        return PEERS[match["name"]](**values)
    except ValueError as error:
        raise InputError(f"bench quality: {shorten(text)}: {error}") from None


@dataclass(slots=True)
class Attached:
    """A rival on the transformer; `cost` of what it has rendered since: products of the blocks' linear layers that
    ran, as a share of those of the uncached clip."""

    full_per_call: float
    ran: float = 0.0
    calls: int = field(default=0)

    @property
    def cost(self) -> float:
        return self.ran / (self.full_per_call * self.calls) if self.calls else 1.0


@contextmanager
def attached(text: str, model: LoadedModel, request: ClipRequest, full_per_call: float) -> Iterator[Attached]:
    """Within it, the model's transformer renders with the rival.

    Args:
        full_per_call: from `products_per_call`.

    Raises:
        InputError: the rival refuses this model.
    """
    transformer: Any = model.pipe.transformer
    here = Here(model, request)
    seen = transformer.register_forward_pre_hook(here.see, with_kwargs=True)
    try:
        with _counting(model) as counted:
            counted.full_per_call = full_per_call
            try:
                detach = parse_peer(text).attach(transformer, here)
            except (ValueError, TypeError, ImportError, AssertionError) as error:
                raise InputError(f"bench quality: {text}: {error}") from None
            try:
                yield counted
            finally:
                detach()
    except (AttributeError, KeyError) as error:
        raise InputError(f"bench quality: {text} does not work on this model: {error}") from None
    finally:
        seen.remove()


def products_per_call(model: LoadedModel, run: Callable[[], Any]) -> float:
    """Products of the blocks' linear layers in one uncached call of the transformer, while `run` renders."""
    with _counting(model) as counted:
        run()
    return counted.ran / counted.calls


@contextmanager
def _counting(model: LoadedModel) -> Iterator[Attached]:
    transformer, counted = model.pipe.transformer, Attached(full_per_call=1.0)

    def add(module: nn.Linear, args: tuple[Any, ...], _output: Any) -> None:
        counted.ran += args[0].numel() * module.out_features

    def call(*_: Any) -> None:
        counted.calls += 1

    lists = model.checkpoint.model.layout.lists
    linear = [m for name in lists for m in getattr(transformer, name).modules() if isinstance(m, nn.Linear)]
    handles = [*map(partial(_hook, hook=add), linear), transformer.register_forward_hook(call)]
    try:
        yield counted
    finally:
        for handle in handles:
            handle.remove()


def _hook(module: nn.Module, hook: Callable[..., None]) -> Any:
    return module.register_forward_hook(hook)
