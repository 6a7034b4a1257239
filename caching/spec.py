"""The text form of a cache policy: `name`, `name(option=value,...)` or `name:FILE`; and what it means for a model."""

import hashlib
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, get_type_hints

from pydantic import TypeAdapter, ValidationError

from cineray.caching.dicache import PAPER, DiCacheConfig
from cineray.caching.first_block import FirstBlockConfig
from cineray.caching.forecast import Forecasting
from cineray.caching.policy import Policy
from cineray.caching.schedule import IntervalConfig, ReplayPolicy
from cineray.caching.trace import load_trace

# Ours: one decision for both guidance branches, a short warm-up, a cap on skips in a row.
OURS = {
    family: DiCacheConfig(threshold=paper.threshold, warmup=0.06, branches="joint", max_skips=4)
    for family, paper in PAPER.items()
}

PolicyConfig = DiCacheConfig | FirstBlockConfig | IntervalConfig
# name -> family -> preset
CONFIGS: dict[str, Mapping[str, PolicyConfig]] = {
    "dicache": OURS,
    "dicache-paper": PAPER,
    "fbcache": dict.fromkeys(PAPER, FirstBlockConfig()),
    "interval": dict.fromkeys(PAPER, IntervalConfig()),
}
NAMES = ("none", *CONFIGS, "replay:TRACE.json")

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


def parse_spec(text: str) -> CacheSpec:
    """Reads a policy.

    Raises:
        ValueError: not of the form above, an unknown name, or an unknown option; lists the valid ones.
    """
    valid = ", ".join(NAMES)
    match = _SPEC.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"cache {text!r} is not of the form name, name(option=value,...) or name:FILE; names: {valid}")
    name, file = match["name"], match["file"]
    if name not in CONFIGS and name not in ("none", "replay"):
        raise ValueError(f"cache: unknown policy {name!r}; valid: {valid}")
    if (name == "replay") != (file is not None):
        raise ValueError(f"cache: {name} takes {'a file, as replay:TRACE.json' if name == 'replay' else 'no file'}")
    allowed = list(get_type_hints(type(next(iter(CONFIGS[name].values()))))) if name in CONFIGS else []
    options = {}
    for option in filter(None, (o.strip() for o in (match["options"] or "").split(","))):
        key, equals, value = (part.strip() for part in option.partition("="))
        if key not in allowed or not equals:
            raise ValueError(
                f"cache: unknown option {option!r} of {name}; valid: {', '.join(allowed) or 'it has none'}"
            )
        options[key] = value
    return CacheSpec(name=name, options=options, file=file)


def resolve(spec: CacheSpec | PolicyConfig, family: str, num_blocks: int, num_probeable: int) -> CachePlan:
    """What a policy other than `none` means for a model family with that many blocks.

    Args:
        num_probeable: the deepest probe that the model allows.

    Raises:
        ValueError: no preset for this family, an option's value, or a probe deeper than the model allows.
    """
    if not isinstance(spec, CacheSpec):
        return _plan(type(spec).__name__, spec, num_blocks, num_probeable)
    if spec.name == "replay":
        return _replay(Path(spec.file or ""), num_blocks, num_probeable)
    presets = CONFIGS[spec.name]
    if family not in presets:
        raise ValueError(f"cache: {spec.name} has no preset for {family}; it has: {', '.join(presets)}")
    config = presets[family]
    values = {name: _value(spec.name, type(config), name, text) for name, text in spec.options.items()}
    return _plan(spec.name, replace(config, **values), num_blocks, num_probeable)


def _value(policy: str, config: type, name: str, text: str) -> Any:
    kind = get_type_hints(config)[name]
    raw: Any = text.split(":") if name == "gamma_clip" else text
    try:
        return TypeAdapter(kind).validate_python(raw)
    except ValidationError as error:
        reason = error.errors()[0]["msg"]
        raise ValueError(f"cache: option {name} of {policy}: {reason}, got {text!r}") from None


def _check_depth(probe_depth: int, num_probeable: int) -> None:
    if probe_depth > num_probeable:
        raise ValueError(f"cache: probe_depth must be at most {num_probeable} for this model, got {probe_depth}")


def _plan(name: str, config: PolicyConfig, num_blocks: int, num_probeable: int) -> CachePlan:
    _check_depth(config.probe_depth, num_probeable)
    options = ",".join(f"{k}={':'.join(map(str, v)) if isinstance(v, tuple) else v}" for k, v in asdict(config).items())
    return CachePlan(
        text=f"{name}({options})",
        policy=config.policy(),
        forecasting=config.forecasting(),
        probe_depth=config.probe_depth,
        num_blocks=num_blocks,
    )


def _replay(path: Path, num_blocks: int, num_probeable: int) -> CachePlan:
    trace = load_trace(path)
    if trace.num_blocks != num_blocks:
        raise ValueError(f"cache: trace {path} is of a model with {trace.num_blocks} blocks; this one has {num_blocks}")
    _check_depth(trace.probe_depth, num_probeable)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    return CachePlan(
        text=f"replay(sha256={digest})",
        policy=ReplayPolicy(trace),
        forecasting=trace.forecasting,
        probe_depth=trace.probe_depth,
        num_blocks=num_blocks,
    )
