"""The seam of a policy's options: they make a plan for a model. One policy is one file beside this one and one line in
`spec.POLICIES`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol, cast

from cineray.caching.forecast import Forecasting
from cineray.caching.policy import Policy, Signal


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelFacts:
    """What a policy must know of a model.

    Args:
        num_probeable: the deepest probe that the model allows, in blocks.
        layers: the layer types that a schedule may name.
        layer_names: what SmoothCache's authors call a layer type, where it is another name -> the layer type.
        transformer: the transformer's configuration, by which calibrated profiles are found.
        presets: by the name of a policy, the options that its authors give it for this model.
        is_guided: guidance takes a second branch, whose output is weighed against the first one's.
        signals: that TeaCache may judge this model by; the second one comes with `ret_steps`.
    """

    family: str
    num_blocks: int
    num_probeable: int
    layers: tuple[str, ...]
    layer_names: Mapping[str, str] = field(default_factory=dict[str, str])
    transformer: Mapping[str, Any] = field(default_factory=dict[str, Any])
    presets: Mapping[str, PolicyConfig] = field(default_factory=dict[str, "PolicyConfig"])
    signals: tuple[Signal, ...] = ()
    is_guided: bool = True


@dataclass(frozen=True, kw_only=True, slots=True)
class CachePlan:
    """A policy for a model: when, how, and its whole text, which names every option."""

    text: str
    policy: Policy
    forecasting: Forecasting
    probe_depth: int
    num_blocks: int


class AnyPlan(Protocol):
    """A policy for a model, of whatever kind: `CachePlan`, or a plan of single layers, which stands with its policy."""

    @property
    def text(self) -> str:
        """The policy's whole text, which names every option."""
        ...

    @property
    def num_blocks(self) -> int: ...


class PolicyConfig(Protocol):
    """A policy's options: a frozen dataclass, whose fields may be given in brackets after the policy's name."""

    def plan(self, name: str, model: ModelFacts) -> AnyPlan:
        """What these options mean for a model.

        Args:
            name: of the policy, for the plan's text.

        Raises:
            ValueError: they do not fit the model.
        """
        ...


def plan_blocks(
    name: str,
    config: Any,
    model: ModelFacts,
    policy: Policy,
    forecasting: Forecasting | None = None,
    probe_depth: int = 0,
) -> CachePlan:
    """The plan of a policy that decides between the blocks.

    Args:
        config: the options with everything filled in that was left open.
        forecasting: None reuses the newest residual.
        probe_depth: blocks that run on every step that is probed.

    Raises:
        ValueError: a probe deeper than the model allows.
    """
    check_depth(probe_depth, model)
    return CachePlan(
        text=text_of(name, config),
        policy=policy,
        forecasting=forecasting or Forecasting(),
        probe_depth=probe_depth,
        num_blocks=model.num_blocks,
    )


def text_of(name: str, config: Any) -> str:
    """The policy's whole text: its name and every option."""
    values: dict[str, Any] = asdict(config)
    options = ",".join(f"{name}={_text(value)}" for name, value in values.items() if value != "")
    return f"{name}({options})"


def _text(value: object) -> str:
    return ":".join(map(str, cast("tuple[object, ...]", value))) if isinstance(value, tuple) else str(value)


def check_depth(probe_depth: int, model: ModelFacts) -> None:
    """
    Raises:
        ValueError: the model does not allow so deep a probe.
    """
    if probe_depth > model.num_probeable:
        raise ValueError(f"cache: probe_depth must be at most {model.num_probeable} for this model, got {probe_depth}")


def check_field(config: object, name: str, is_good: bool, allowed: str) -> None:
    """
    Raises:
        ValueError: a field is not good; names its class, what is allowed and what it is.
    """
    if not is_good:
        raise ValueError(f"{type(config).__name__}: {name} must be {allowed}, got {getattr(config, name)!r}")
