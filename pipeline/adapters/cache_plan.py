"""What a cache policy means for a model, from its configuration alone."""

from collections.abc import Mapping
from typing import Any

from cineray.caching.plan import AnyPlan, ModelFacts, PolicyConfig
from cineray.caching.spec import POLICIES, CacheSpec, Policies, parse_spec, resolve
from cineray.pipeline.adapters import MODELS


def plan_cache(
    policy: str | PolicyConfig,
    transformer_class: str,
    transformer_config: Mapping[str, Any],
    policies: Policies = POLICIES,
) -> AnyPlan | None:
    """What a policy means for a transformer of this class and configuration; None for `none`.

    Args:
        policies: the known ones by name.

    Raises:
        ValueError: a policy that is unknown, or that does not fit the transformer.
    """
    spec = parse_spec(policy, policies) if isinstance(policy, str) else policy
    if isinstance(spec, CacheSpec) and spec.name == "none":
        return None
    if transformer_class not in MODELS:
        raise ValueError(f"cache: {transformer_class} is not supported; supported: {', '.join(MODELS)}")
    model = MODELS[transformer_class]
    first, *others = (transformer_config[name] for name in model.layout.counts)
    facts = ModelFacts(
        family=model.family,
        num_blocks=first + sum(others),
        num_probeable=first if others else first - 1,  # within the first list, and before the last block
        layers=model.layout.layers,
        transformer=transformer_config,
    )
    return resolve(spec, facts, policies)
