"""What a cache policy means for a model, from its configuration alone."""

from collections.abc import Mapping
from typing import Any

from cineray.caching.plan import AnyPlan, ModelFacts, PolicyConfig
from cineray.caching.policies.auto import FloorPlan
from cineray.caching.spec import NAMES, POLICIES, CacheSpec, Policies, fits, parse_spec, resolve, resolve_floors
from cineray.pipeline.adapters import MODELS, Model, Models, transformers_in


def policies_for(model: Model) -> list[str]:
    """Names of the policies that a model can be cached with."""
    return [name.partition(":")[0] for name in NAMES if fits(name, model.presets)]


def plan_cache(
    policy: str | PolicyConfig,
    transformer_class: str,
    transformer_config: Mapping[str, Any],
    policies: Policies = POLICIES,
    models: Models = MODELS,
) -> AnyPlan | None:
    """What a policy means for a transformer of this class and configuration; None for `none`.

    Args:
        policies: the known ones by name.
        models: the known ones, one for each class of transformers.

    Raises:
        ValueError: a policy that is unknown, or that does not fit the transformer.
    """
    spec = parse_spec(policy, policies) if isinstance(policy, str) else policy
    if isinstance(spec, CacheSpec) and spec.name == "none":
        return None
    if transformer_class not in models:
        supported = ", ".join(transformers_in(models.values()))
        raise ValueError(f"cache: {transformer_class} is not supported; supported: {supported}")
    model = models[transformer_class]
    if isinstance(spec, CacheSpec) and not fits(spec.name, model.presets, policies):
        families = ", ".join(other.family for other in models.values() if spec.name in other.presets)
        raise ValueError(f"cache: {spec.name} has no preset for {model.family}; it has: {families or 'none'}")
    return resolve(spec, _facts(model, transformer_config), policies)


def plan_floors(
    policy: str, transformer_class: str, transformer_config: Mapping[str, Any], models: Models = MODELS
) -> FloorPlan | None:
    """The floors of a policy that `plan_cache` takes; None where it has none.

    Raises:
        ValueError: as `plan_cache`.
    """
    if transformer_class not in models:
        return None
    return resolve_floors(parse_spec(policy), _facts(models[transformer_class], transformer_config))


def _facts(model: Model, transformer_config: Mapping[str, Any]) -> ModelFacts:
    """
    Raises:
        ValueError: no cache can work on such a transformer.
    """
    first, *others = (transformer_config[name] for name in model.layout.counts)
    num_hints = model.layout.num_hints(transformer_config)
    if num_hints and max(transformer_config[str(model.layout.hinted)]) == first - 1:
        raise ValueError(f"cache: {model.layout.hinted} names the last block, behind which no cache can work")
    num_probeable = first if others else first - 1  # within the first list, and before the last block
    return ModelFacts(
        family=model.family,
        num_blocks=first + sum(others) + num_hints,
        num_probeable=min(num_probeable, 1) if num_hints else num_probeable,  # before any hint is needed
        layers=model.layout.layers,
        layer_names=model.layout.layer_names,
        transformer=transformer_config,
        presets=model.presets,
        signals=tuple(model.signals),
        is_guided=len(model.branches) > 1,
    )
