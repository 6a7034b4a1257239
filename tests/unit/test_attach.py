"""What is put on a transformer is put on it whole or not at all."""

import pytest
import torch
from conftest import _wan_parts
from diffusers import WanPipeline
from every_model import build, call

import cineray
from cineray.distributed.attention import NativeAttention
from cineray.distributed.mesh import mesh_alone
from cineray.pipeline.blocks import is_sharded
from cineray.pipeline.caches.step_tracker import StepTracker
from cineray.pipeline.parallel.sharding import ShardedTransformer

pytestmark = pytest.mark.slow


def two_experts():
    pipe = WanPipeline(**_wan_parts(0), transformer_2=_wan_parts(1)["transformer"], boundary_ratio=0.85)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_a_cache_that_fails_on_the_second_expert_is_on_neither(monkeypatch):
    pipe = two_experts()
    plain = call(pipe)

    def fail(*_, **__):
        raise RuntimeError("no more hooks")

    monkeypatch.setattr(pipe.transformer_2, "register_forward_hook", fail)
    with pytest.raises(RuntimeError, match="no more hooks"):
        cineray.enable_cache(pipe, "interval(interval=2)")
    monkeypatch.undo()
    for transformer in (pipe.transformer, pipe.transformer_2):
        assert not StepTracker.is_attached(transformer)
        assert not transformer._forward_hooks
        assert not transformer._forward_pre_hooks
        assert not hasattr(transformer, "_diffusers_hook") or not transformer._diffusers_hook.hooks
    assert torch.equal(call(pipe), plain)
    with cineray.enable_cache(pipe, "interval(interval=2)"):
        assert not torch.equal(call(pipe), plain)


def test_the_first_expert_s_tensors_are_dropped_when_the_second_takes_over():
    pipe = two_experts()
    with cineray.enable_cache(pipe, "dicache(threshold=0.3)"):
        (hook,) = pipe.transformer._diffusers_hook.hooks.values()
        held = []
        for transformer in (pipe.transformer, pipe.transformer_2):
            transformer.register_forward_hook(lambda *_: held.append(len(hook.listener._controller._histories)))
        call(pipe)
    assert max(held) == 2  # both branches', while the first expert runs
    assert held[-1] == 0


class OwnProcessor:
    def __call__(self, _attn, hidden_states, *_):
        return hidden_states


def test_sharding_that_fails_at_the_last_block_changes_none():
    transformer = build("wan").transformer
    processors = [block.attn1.processor for block in transformer.blocks]
    processors[-1] = transformer.blocks[-1].attn1.processor = OwnProcessor()
    mesh = mesh_alone()
    sharded = ShardedTransformer(transformer, mesh, NativeAttention(mesh))
    assert not is_sharded(transformer)  # it does nothing before it is attached
    with pytest.raises(ValueError, match=r"OwnProcessor calls neither dispatch_attention_fn nor F\.scaled_dot"):
        sharded.attach()
    assert not is_sharded(transformer)
    assert [block.attn1.processor for block in transformer.blocks] == processors
    assert not transformer.proj_out._forward_hooks
