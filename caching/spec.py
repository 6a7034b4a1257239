"""The text form of a cache policy: `name`, `name(option=value,...)` or `name:FILE`; and what it means for a model."""

import hashlib
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from pydantic import TypeAdapter, ValidationError

from cineray.caching.dicache import PAPER, DiCacheConfig
from cineray.caching.first_block import FirstBlockConfig
from cineray.caching.forecast import Forecasting
from cineray.caching.magcache import MAGCACHE, MagCacheConfig
from cineray.caching.policy import Policy
from cineray.caching.schedule import IntervalConfig, ReplayPolicy
from cineray.caching.smoothcache import LayerSchedule, parse_schedule, read_schedule
from cineray.caching.taylorseer import TAYLORSEER, TaylorSeerConfig
from cineray.caching.teacache import TeaCacheConfig
from cineray.caching.trace import parse_trace, read_trace
from cineray.text import printable, shorten

# No option counts more than this: a render has at most 1,000 steps, a model at most 1,000 blocks.
MAX_COUNT = 1_000_000
MAX_NUMBERS = 16  # in one option; a polynomial of TeaCache has five

FAMILIES: tuple[str, ...] = ("wan", "hunyuan-video", "flux", "dit", "stable-audio", "open-sora")
# Ours (docs/caching.md): one decision for both guidance branches; one look, at the start of a run of skips; steps weigh
# what it costs to skip them. The weights take the warm-up's place: two computed steps are what a forecast needs.
OURS: dict[str, DiCacheConfig] = dict.fromkeys(
    FAMILIES, DiCacheConfig(branches="joint", look="run", profile="auto", warmup=0.0, last_step_full=True)
)

BlockConfig = DiCacheConfig | FirstBlockConfig | IntervalConfig | TeaCacheConfig | MagCacheConfig
PolicyConfig = BlockConfig | TaylorSeerConfig
# name -> family -> preset
CONFIGS: dict[str, Mapping[str, PolicyConfig]] = {
    "dicache": OURS,
    "dicache-paper": PAPER,
    "fbcache": dict.fromkeys(OURS, FirstBlockConfig()),
    "interval": dict.fromkeys(OURS, IntervalConfig()),
    "teacache": dict.fromkeys(PAPER, TeaCacheConfig()),
    "magcache": MAGCACHE,
    "taylorseer": TAYLORSEER,
}
NAMES = ("none", *CONFIGS, "smoothcache:SCHEDULE.json", "replay:TRACE.json")
_WITH_FILE = {"smoothcache": "SCHEDULE.json", "replay": "TRACE.json"}

_SPEC = re.compile(r"(?P<name>[a-z0-9][a-z0-9-]*)(?:\((?P<options>[^()]*)\)|:(?P<file>.+))?")


@dataclass(frozen=True, kw_only=True, slots=True)
class CacheSpec:
    """A policy by name, with the options that were given; not yet tied to a model."""

    name: str
    options: Mapping[str, str] = field(default_factory=dict)
    file: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class CachePlan:
    """A policy for a model: when, how, and its whole text, which names every option."""

    text: str
    policy: Policy
    forecasting: Forecasting
    probe_depth: int
    num_blocks: int


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerPlan:
    """A schedule of layers for a model, and its whole text."""

    text: str
    schedule: LayerSchedule
    num_blocks: int


@dataclass(frozen=True, kw_only=True, slots=True)
class SeriesPlan:
    """A Taylor series of each layer for a model, and its whole text."""

    text: str
    config: TaylorSeerConfig
    num_blocks: int


AnyPlan = CachePlan | LayerPlan | SeriesPlan


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelFacts:
    """What a policy must know of a model.

    Args:
        num_probeable: the deepest probe that the model allows, in blocks.
        layers: the layer types that a schedule may name.
        transformer: the transformer's configuration, by which calibrated profiles are found.
    """

    family: str
    num_blocks: int
    num_probeable: int
    layers: tuple[str, ...]
    transformer: Mapping[str, Any] = field(default_factory=dict)


def policies_for(family: str) -> list[str]:
    """Names of the policies that a model of this family can be cached with."""
    return [name.partition(":")[0] for name in NAMES if family in CONFIGS.get(name, (family,))]


def parse_spec(text: str) -> CacheSpec:
    """Reads a policy.

    Raises:
        ValueError: not of the form above, an unknown name, or an unknown option; lists the valid ones.
    """
    valid = ", ".join(NAMES)
    match = _SPEC.fullmatch(text.strip())
    if match is None:
        raise ValueError(
            f"cache {shorten(text)} is not of the form name, name(option=value,...) or name:FILE; names: {valid}"
        )
    name, file = match["name"], match["file"]
    if name not in CONFIGS and name != "none" and name not in _WITH_FILE:
        raise ValueError(f"cache: unknown policy {shorten(name)}; valid: {valid}")
    if (name in _WITH_FILE) != (file is not None):
        wants = f"a file, as {name}:{_WITH_FILE[name]}" if name in _WITH_FILE else "no file"
        raise ValueError(f"cache: {name} takes {wants}")
    allowed = list(get_type_hints(type(next(iter(CONFIGS[name].values()))))) if name in CONFIGS else []
    options = {}
    for option in filter(None, (o.strip() for o in (match["options"] or "").split(","))):
        key, equals, value = (part.strip() for part in option.partition("="))
        if key not in allowed or not equals:
            raise ValueError(
                f"cache: unknown option {shorten(option)} of {name}; valid: {', '.join(allowed) or 'it has none'}"
            )
        if key in options:
            raise ValueError(f"cache: option {key} of {name} is given twice: {shorten(options[key])}, {shorten(value)}")
        options[key] = value
    return CacheSpec(name=name, options=options, file=file)


def resolve(spec: CacheSpec | PolicyConfig, model: ModelFacts) -> AnyPlan:
    """What a policy other than `none` means for a model.

    Raises:
        ValueError: no preset for this family, an option's value, a probe deeper than the model allows, or a file or
            profile that is not there or not for this model.
    """
    if not isinstance(spec, CacheSpec):
        return _plan(type(spec).__name__, spec, model)
    if spec.name == "replay":
        return _replay(Path(spec.file or ""), model)
    if spec.name == "smoothcache":
        path = Path(spec.file or "")
        content = read_schedule(path)  # once: what is checked, named and used are the same bytes
        schedule = parse_schedule(content, path, model.layers, model.num_blocks)
        return LayerPlan(text=f"smoothcache({_digest(content)})", schedule=schedule, num_blocks=model.num_blocks)
    presets = CONFIGS[spec.name]
    if model.family not in presets:
        raise ValueError(f"cache: {spec.name} has no preset for {model.family}; it has: {', '.join(presets)}")
    config = presets[model.family]
    values = {name: _value(spec.name, type(config), name, text) for name, text in spec.options.items()}
    return _plan(spec.name, replace(config, **values), model)


def _digest(content: bytes) -> str:
    return f"sha256={hashlib.sha256(content).hexdigest()[:16]}"


def _value(policy: str, config: type, name: str, text: str) -> Any:
    kind = get_type_hints(config)[name]
    takes_several = tuple in (get_origin(kind), *map(get_origin, get_args(kind)))
    raw: Any = text.split(":") if takes_several else text
    if takes_several and len(raw) > MAX_NUMBERS:
        reason = f"must have at most {MAX_NUMBERS} numbers"
    else:
        try:
            value = TypeAdapter(kind).validate_python(raw)
        except ValidationError as error:
            reason = error.errors()[0]["msg"]
        else:
            if not isinstance(value, int) or abs(value) <= MAX_COUNT:
                return value  # what it may be beyond that, the policy's own class says
            reason = f"must be at most {MAX_COUNT}"
    raise ValueError(f"cache: option {name} of {policy}: {reason}, got {shorten(text)}")


def _check_depth(probe_depth: int, model: ModelFacts) -> None:
    if probe_depth > model.num_probeable:
        raise ValueError(f"cache: probe_depth must be at most {model.num_probeable} for this model, got {probe_depth}")


def _text(name: str, config: PolicyConfig) -> str:
    options = ",".join(
        f"{k}={':'.join(map(str, v)) if isinstance(v, tuple) else v}" for k, v in asdict(config).items() if v != ""
    )
    return f"{name}({options})"


def _plan(name: str, config: PolicyConfig, model: ModelFacts) -> CachePlan | SeriesPlan:
    if isinstance(config, TaylorSeerConfig):
        return SeriesPlan(text=_text(name, config), config=config, num_blocks=model.num_blocks)
    policy: Policy
    if isinstance(config, TeaCacheConfig):
        config = config.for_model(model.family, model.transformer)
        policy = config.policy(model.family)
    elif isinstance(config, DiCacheConfig):
        config, dicache_profile = config.for_model(model.family, model.transformer)
        policy = config.policy(dicache_profile)
    elif isinstance(config, MagCacheConfig):
        config, profile = config.for_model(model.family, model.transformer)
        policy = config.policy(profile)
    else:
        policy = config.policy()
    _check_depth(config.probe_depth, model)
    return CachePlan(
        text=_text(name, config),
        policy=policy,
        forecasting=config.forecasting(),
        probe_depth=config.probe_depth,
        num_blocks=model.num_blocks,
    )


def _replay(path: Path, model: ModelFacts) -> CachePlan:
    content = read_trace(path)
    trace, shown = parse_trace(content, path), printable(path, 200)
    if trace.num_blocks != model.num_blocks:
        raise ValueError(
            f"cache: trace {shown} is of a model with {trace.num_blocks} blocks; this one has {model.num_blocks}"
        )
    if trace.by_layer:
        raise ValueError(
            f"cache: trace {shown} is of {printable(trace.policy, 100)}, whose schedule file can be used again instead"
        )
    _check_depth(trace.probe_depth, model)
    return CachePlan(
        text=f"replay({_digest(content)})",
        policy=ReplayPolicy(trace),
        forecasting=replace(trace.forecasting, branches="separate"),  # the trace says what each branch does
        probe_depth=trace.probe_depth,
        num_blocks=model.num_blocks,
    )
