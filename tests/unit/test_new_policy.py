"""A policy with a signal of its own, from outside: one class, one reader, and a line for each."""

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch
from every_model import build, call

import cineray
from cineray.caching.observation import Observation
from cineray.caching.plan import ModelFacts, check_field, plan_blocks
from cineray.caching.policy import Decision, Reason, forced
from cineray.caching.spec import POLICIES
from cineray.caching.token_sums import SignalValues
from cineray.pipeline.adapters import MODELS, by_transformer
from cineray.pipeline.caches.signals import SIGNAL_READERS

pytestmark = pytest.mark.slow


@dataclass(frozen=True, kw_only=True, slots=True)
class Drift:
    """Skips while what enters the blocks has moved by less than a threshold since the last computed step."""

    threshold: float = 0.1
    max_skips: int = 2

    signal: ClassVar = "blocks-input"
    plans_ahead: ClassVar = False

    def __post_init__(self):
        check_field(self, "threshold", self.threshold >= 0, "0 or more")

    def plan(self, name: str, model: ModelFacts):
        return plan_blocks(name, self, model, policy=self)

    def decide(self, observation: Observation) -> Decision:
        reason = forced(observation, is_off=self.threshold == 0, max_skips=self.max_skips)
        if reason is not None:
            return Decision.compute_because(reason)
        moved = observation.accumulated + (observation.relative_change or math.inf)
        if moved >= self.threshold:
            return Decision.compute_because(Reason.THRESHOLD)
        return Decision(compute=False, accumulated=moved, reason=Reason.SKIP)


class BlocksInput:
    """What enters the first block [B, S, D]."""

    def __init__(self, transformer):
        """Needs nothing of it."""

    def attach(self):
        """Nothing is attached."""

    def read(self, _block, hidden_states, _temb):
        return SignalValues(hidden_states, is_sharded=True)

    def detach(self):
        """Nothing was attached."""


KNOWN = {
    "policies": {**POLICIES, "drift": Drift()},
    "signals": {**SIGNAL_READERS, "blocks-input": BlocksInput},
}


@pytest.mark.parametrize("name", ["wan", "hunyuan", "open_sora"])
def test_a_policy_of_ones_own_skips_by_its_own_signal(name):
    pipe = build(name)
    plain = call(pipe)
    with cineray.enable_cache(pipe, "drift(threshold=0)", **KNOWN) as handle:
        assert torch.equal(call(pipe), plain)
        assert {e.reason for e in handle.trace.entries} == {"off"}
    with cineray.enable_cache(pipe, "drift(threshold=1.5)", **KNOWN) as handle:
        cached = call(pipe)
    assert handle.policy == "drift(threshold=1.5,max_skips=2)"
    assert not torch.equal(cached, plain)
    assert {e.reason for e in handle.trace.entries} >= {"empty", "skip", "cap"}
    assert all(e.statistic for e in handle.trace.entries if e.step)
    with cineray.enable_cache(pipe, Drift(threshold=1.5), **KNOWN):  # needs no name
        assert torch.equal(call(pipe), cached)
    assert torch.equal(call(pipe), plain)


def test_what_is_not_known_is_refused_and_leaves_the_transformer_as_it_was():
    pipe = build("wan")
    with pytest.raises(ValueError, match=r"unknown policy 'drift'; valid: none, dicache, .*replay:TRACE.json$"):
        cineray.enable_cache(pipe, "drift")
    with pytest.raises(ValueError, match=r"unknown option 'far=1' of drift; valid: threshold, max_skips"):
        cineray.enable_cache(pipe, "drift(far=1)", **KNOWN)
    with pytest.raises(ValueError, match=r"unknown policy 'drifts'; valid: .*taylorseer, drift, smoothcache"):
        cineray.enable_cache(pipe, "drifts", **KNOWN)
    with pytest.raises(ValueError, match=r"Drift: threshold must be 0 or more, got -1.0"):
        cineray.enable_cache(pipe, "drift(threshold=-1)", **KNOWN)
    with pytest.raises(
        ValueError,
        match=r"signal 'blocks-input' has no reader; known signals: probe, .*timestep-embedding, timestep-projection",
    ):
        cineray.enable_cache(pipe, Drift())
    with cineray.enable_cache(pipe, "dicache"):  # none of them left anything attached
        call(pipe, steps=2)


def test_a_policy_may_fit_only_models_that_name_it():
    """A class of options has none for all models: a model's `presets` name those that fit it."""
    policies = {"drift": Drift}
    with pytest.raises(ValueError, match="drift has no preset for wan; it has: none"):
        cineray.enable_cache(build("wan"), "drift", policies=policies, signals=KNOWN["signals"])
    wan = replace(MODELS["WanTransformer3DModel"], presets={"drift": Drift(threshold=1.5)})
    known = {"policies": policies, "signals": KNOWN["signals"], "models": {**MODELS, **by_transformer(wan)}}
    with pytest.raises(ValueError, match="drift has no preset for hunyuan-video; it has: wan"):
        cineray.enable_cache(build("hunyuan"), "drift", **known)
    with cineray.enable_cache(build("wan"), "drift(max_skips=1)", **known) as handle:
        assert handle.policy == "drift(threshold=1.5,max_skips=1)"
