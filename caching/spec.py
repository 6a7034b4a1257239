"""The text form of a cache policy: `name`, `name(option=value,...)` or `name:FILE`."""

import re
from dataclasses import dataclass

# Every policy that can be named, with its options. `none` computes every block of every step.
POLICIES: dict[str, tuple[str, ...]] = {"none": ()}

_SPEC = re.compile(r"(?P<name>[a-z0-9][a-z0-9-]*)(?:\((?P<options>[^()]*)\)|:(?P<file>.+))?")


@dataclass(frozen=True, kw_only=True, slots=True)
class CacheSpec:
    """A policy by name; `str()` gives the form that it was read from, in a canonical spelling."""

    name: str

    def __str__(self) -> str:
        return self.name


def parse_spec(text: str) -> CacheSpec:
    """Reads a policy.

    Raises:
        ValueError: not of the form above, an unknown name, or an unknown option; lists the valid ones.
    """
    valid = ", ".join(POLICIES)
    match = _SPEC.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"cache {text!r} is not of the form name, name(option=value,...) or name:FILE; names: {valid}")
    name = match["name"]
    if name not in POLICIES:
        raise ValueError(f"cache: unknown policy {name!r}; valid: {valid}")
    if match["file"] is not None:
        raise ValueError(f"cache: {name} takes no file, got {match['file']!r}")
    for option in filter(None, (o.strip() for o in (match["options"] or "").split(","))):
        allowed = ", ".join(POLICIES[name]) or "it has none"
        raise ValueError(f"cache: unknown option {option.partition('=')[0]!r} of {name}; valid: {allowed}")
    return CacheSpec(name=name)
