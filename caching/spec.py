"""The text form of a cache policy: `name`, `name(option=value,...)` or `name:FILE`; and what it means for a model."""

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from pydantic import TypeAdapter, ValidationError

from cineray.caching.plan import AnyPlan, CachePlan, ModelFacts, PolicyConfig, check_depth
from cineray.caching.policies import dicache
from cineray.caching.policies.auto import AutoConfig, FloorPlan
from cineray.caching.policies.dicache import DiCacheConfig
from cineray.caching.policies.first_block import FirstBlockConfig
from cineray.caching.policies.fitted import FittedConfig
from cineray.caching.policies.magcache import MagCacheConfig
from cineray.caching.policies.schedule import IntervalConfig, ReplayPolicy
from cineray.caching.policies.smoothcache import LayerPlan, parse_schedule, read_schedule
from cineray.caching.policies.taylorseer import TaylorSeerConfig
from cineray.caching.policies.teacache import TeaCacheConfig
from cineray.caching.trace import parse_trace, read_trace
from cineray.text import printable, shorten

# No option counts more than this: a render has at most 1,000 steps, a model at most 1,000 blocks.
MAX_COUNT = 1_000_000
MAX_NUMBERS = 16  # in one option; a polynomial of TeaCache has five

# name -> the options where none is given. A class of options instead: only models that have a preset of their own
# (`Model.presets` in `pipeline.adapters`) can be cached with it.
Policies = Mapping[str, PolicyConfig | type[PolicyConfig]]
POLICIES: Policies = {
    "dicache": dicache.OURS,
    "dicache-paper": DiCacheConfig,
    "fitted": FittedConfig(),
    "auto": AutoConfig(),
    "fbcache": FirstBlockConfig(),
    "interval": IntervalConfig(),
    "teacache": TeaCacheConfig,
    "magcache": MagCacheConfig,
    "taylorseer": TaylorSeerConfig,
}
_FLOORS = "auto"  # the policy whose options may be floors, written psnr>=30
_SHORT = "short"  # the option that every policy takes
_WITH_FILE = {"smoothcache": "SCHEDULE.json", "replay": "TRACE.json"}


def names_of(policies: Policies) -> tuple[str, ...]:
    """What may be written for a cache, in short."""
    return ("none", *policies, *(f"{name}:{file}" for name, file in _WITH_FILE.items()))


NAMES = names_of(POLICIES)

_SPEC = re.compile(r"(?P<name>[a-z0-9][a-z0-9-]*)(?:\((?P<options>[^()]*)\)|:(?P<file>.+))?")


@dataclass(frozen=True, kw_only=True, slots=True)
class CacheSpec:
    """A policy by name, with the options that were given; not yet tied to a model.

    `is_short` insists on it for a clip of few steps; it changes nothing else.
    """

    name: str
    options: Mapping[str, str] = field(default_factory=dict[str, str])
    file: str | None = None
    is_short: bool = False


def fits(name: str, presets: Mapping[str, PolicyConfig], policies: Policies = POLICIES) -> bool:
    """Whether a model with these presets can be cached with the policy of this name."""
    return name in presets or not isinstance(policies.get(name), type)


def options_class(policy: PolicyConfig | type[PolicyConfig]) -> type[PolicyConfig]:
    """The class of a policy's options, whether it is registered by that or by a value of it."""
    return policy if isinstance(policy, type) else type(policy)


def parse_spec(text: str, policies: Policies = POLICIES) -> CacheSpec:
    """Reads a policy as it is written for --cache.

    Args:
        policies: the known ones by name, beside those with a file.

    Raises:
        ValueError: not of the form above, an unknown name, or an unknown option; lists the valid ones.
    """
    valid = ", ".join(names_of(policies))
    match = _SPEC.fullmatch(text.strip())
    if match is None:
        raise ValueError(
            f"cache {shorten(text)} is not of the form name, name(option=value,...) or name:FILE; names: {valid}"
        )
    name, file = match["name"], match["file"]
    if name not in policies and name != "none" and name not in _WITH_FILE:
        raise ValueError(f"cache: unknown policy {shorten(name)}; valid: {valid}")
    if (name in _WITH_FILE) != (file is not None):
        wants = f"a file, as {name}:{_WITH_FILE[name]}" if name in _WITH_FILE else "no file"
        raise ValueError(f"cache: {name} takes {wants}")
    own = [f.name for f in fields(policies[name])] if name in policies else []  # type: ignore[arg-type]
    allowed = [*own, *([_SHORT] if name in policies else [])]
    options: dict[str, str] = {}
    for option in filter(None, (o.strip() for o in (match["options"] or "").split(","))):
        key, equals, value = (part.strip() for part in option.partition(">=" if name == _FLOORS else "="))
        if name == _FLOORS and not equals:
            key, equals, value = (part.strip() for part in option.partition("="))
        if key not in allowed or not equals:
            raise ValueError(
                f"cache: unknown option {shorten(option)} of {name}; valid: {', '.join(allowed) or 'it has none'}"
            )
        if key in options:
            raise ValueError(f"cache: option {key} of {name} is given twice: {shorten(options[key])}, {shorten(value)}")
        options[key] = value
    short = options.pop(_SHORT, "false")
    if short not in ("true", "false"):
        raise ValueError(f"cache: option {_SHORT} of {name} must be true or false, got {shorten(short)}")
    return CacheSpec(name=name, options=options, file=file, is_short=short == "true")


def resolve(spec: CacheSpec | PolicyConfig, model: ModelFacts, policies: Policies = POLICIES) -> AnyPlan:
    """What a policy other than `none` means for a model.

    Args:
        policies: as in `parse_spec`.

    Raises:
        ValueError: no preset for this model, an option's value, a probe deeper than the model allows, or a file or
            profile that is not there or not for this model.
    """
    if not isinstance(spec, CacheSpec):
        return spec.plan(type(spec).__name__, model)
    if spec.name == "replay":
        return _replay(Path(spec.file or ""), model)
    if spec.name == "smoothcache":
        path = Path(spec.file or "")
        content = read_schedule(path)  # once: what is checked, named and used are the same bytes
        layers = parse_schedule(content, path, model.layers, model.num_blocks, model.layer_names)
        return LayerPlan(text=f"smoothcache({_digest(content)})", schedule=layers, num_blocks=model.num_blocks)
    return _config(spec, model, policies).plan(spec.name, model)


def resolve_floors(spec: CacheSpec, model: ModelFacts) -> FloorPlan | None:
    """The floors that a policy is to keep of a model; None where it has none.

    Raises:
        ValueError: as `resolve`.
    """
    if spec.name != _FLOORS:
        return None
    return _config(spec, model, POLICIES).plan_floors(spec.name, model)


def _config(spec: CacheSpec, model: ModelFacts, policies: Policies) -> Any:
    """The options of a policy without a file."""
    if not fits(spec.name, model.presets, policies):
        raise ValueError(f"cache: {spec.name} has no preset for {model.family}")
    config: Any = model.presets.get(spec.name, policies[spec.name])
    values = {name: _value(spec.name, options_class(config), name, text) for name, text in spec.options.items()}
    return replace(config, **values)


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
    check_depth(trace.probe_depth, model)
    return CachePlan(
        text=f"replay({_digest(content)})",
        policy=ReplayPolicy(trace),
        forecasting=replace(trace.forecasting, branches="separate"),  # the trace says what each branch does
        probe_depth=trace.probe_depth,
        num_blocks=model.num_blocks,
    )
