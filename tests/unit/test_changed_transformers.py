"""Caching transformers that were compiled, adapted or cast, before the cache was enabled or after."""

import json
import shutil

import peft
import pytest
import torch
from every_model import EVERY_MODEL, blocks_of, build, call, in_double, layout_of

import cineray
from cineray.pipeline.caches.layers import layers_of
from cineray.pipeline.calibrate.smoothcache import measure_layer_errors

pytestmark = pytest.mark.slow

SOME = ("wan", "hunyuan", "dit")  # the others run by scripts/test --all
MODELS = [name if name in SOME else pytest.param(name, marks=pytest.mark.exhaustive) for name in EVERY_MODEL]
NEVER, OFTEN = "interval(interval=1)", "interval(interval=3)"
STEPS = 6
EVERY_OTHER = [1, 0, 1, 0, 1, 1]
SERIES = ("wan", "hunyuan", "flux")  # of which TaylorSeer's authors publish settings


@pytest.fixture
def fresh_dynamo():
    """What one test compiled counts towards the next one's recompile limit."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compile_blocks(transformer, backend):
    if transformer._repeated_blocks:
        transformer.compile_repeated_blocks(backend=backend)
    else:  # diffusers names no repeated blocks for DiT and Stable Audio
        for block in blocks_of(transformer):
            block.compile(backend=backend)


# "eager" ends where the tracing does, which is what a cache may break; "aot_eager" also makes the graphs functional
@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("name", MODELS)
def test_compiled_blocks(name):
    backend = "aot_eager" if name in ("wan", "dit") else "eager"
    pipe = in_double(build(name))
    with cineray.enable_cache(pipe, OFTEN):
        uncompiled = call(pipe, STEPS)
    compile_blocks(pipe.transformer, backend)
    plain = call(pipe, STEPS)
    with cineray.enable_cache(pipe, NEVER) as handle:
        assert torch.equal(call(pipe, STEPS), plain)
    with cineray.enable_cache(pipe, OFTEN) as handle:
        cached = call(pipe, STEPS)
    assert handle.trace.summary()["skipped_steps"] == 3
    torch.testing.assert_close(cached, uncompiled, atol=1e-4, rtol=1e-4)
    later = in_double(build(name))
    with cineray.enable_cache(later, OFTEN):
        compile_blocks(later.transformer, backend)
        assert torch.equal(call(later, STEPS), cached)
    assert torch.equal(call(later, STEPS), plain)


@pytest.mark.exhaustive
@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.skipif(shutil.which("c++") is None, reason="inductor needs a C++ compiler")
def test_blocks_compiled_to_machine_code():
    pipe = build("dit")
    compile_blocks(pipe.transformer, "inductor")
    plain = call(pipe, STEPS)
    with cineray.enable_cache(pipe, NEVER):
        assert torch.equal(call(pipe, STEPS), plain)
    with cineray.enable_cache(pipe, OFTEN) as handle:
        assert not torch.equal(call(pipe, STEPS), plain)
    assert handle.trace.summary()["skipped_steps"] == 3


@pytest.mark.usefixtures("fresh_dynamo")
def test_what_is_compiled_as_a_whole_is_refused():
    pipe = build("dit")
    whole = torch.compile(pipe.transformer, backend="eager")
    with pytest.raises(ValueError, match="this DiTTransformer2DModel is compiled as a whole"):
        cineray.enable_cache(whole, NEVER)
    with cineray.enable_cache(pipe, NEVER):
        pipe.transformer.compile(backend="eager")
        with pytest.raises(ValueError, match=r"compile the blocks instead: transformer.compile_repeated_blocks\(\)"):
            call(pipe, STEPS)
    with pytest.raises(ValueError, match="compiled as a whole"):
        cineray.enable_cache(pipe, NEVER)


def counted():
    """The graphs that are compiled from now on, and a backend that runs them as they were traced."""
    graphs = []

    def backend(graph, _inputs):
        graphs.append(graph)
        return graph.forward

    return graphs, backend


def cached(pipe, policy):
    with cineray.enable_cache(pipe, policy) as handle:
        latents = call(pipe, STEPS)
    assert handle.trace.summary()["skipped_steps"] > 0
    return latents


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("name", SOME)
def test_layers_of_compiled_blocks(name, tmp_path):
    """What was compiled for a first clip serves the next, and gives what uncompiled blocks give."""
    path = tmp_path / "schedule.json"
    pipe = in_double(build(name))
    layers = {layer for layer, _, _ in layers_of(pipe.transformer, layout_of(pipe.transformer))}
    path.write_text(json.dumps(dict.fromkeys(sorted(layers), EVERY_OTHER)))
    policies = [f"smoothcache:{path}", *(["taylorseer(interval=2,order=1)"] if name in SERIES else [])]
    uncompiled = [cached(pipe, policy) for policy in policies]
    graphs, backend = counted()
    compile_blocks(pipe.transformer, backend)
    for policy, expected in zip(policies, uncompiled, strict=True):
        found = cached(pipe, policy)
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
        num_graphs = len(graphs)
        assert torch.equal(cached(pipe, policy), found)
        assert len(graphs) == num_graphs > 1


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("compiles_in_place", [True, False])
def test_one_compiled_layer_serves_all_blocks(compiles_in_place):
    pipe = build("wan")
    blocks = pipe.transformer.blocks
    assert len(blocks) > 2
    graphs, backend = counted()
    for number, block in enumerate(list(blocks)):
        if compiles_in_place:
            block.compile(backend=backend)
        else:
            blocks[number] = torch.compile(block, backend=backend)
    # a hook that is compiled, or told from another block's, is a function compiled anew for each block
    with torch._dynamo.config.patch(recompile_limit=2, fail_on_recompile_limit_hit=True):
        cached(pipe, "taylorseer(interval=2,order=1)")
    assert len(graphs) > 1


@pytest.mark.usefixtures("fresh_dynamo")
def test_errors_of_layers_are_measured_within_compiled_blocks():
    pipe = build("dit")
    errors = measure_layer_errors(pipe, [lambda: call(pipe, STEPS)], STEPS, max_lag=1)
    _, backend = counted()
    compile_blocks(pipe.transformer, backend)
    compiled = measure_layer_errors(pipe, [lambda: call(pipe, STEPS)], STEPS, max_lag=1)
    assert list(compiled) == list(errors)
    for layer, by_lag in errors.items():
        assert compiled[layer] == [pytest.approx(row, rel=1e-3, nan_ok=True) for row in by_lag]


def add_lora(transformer):
    """An adapter on what feeds the attention, and on single-stream feed-forwards; its weights are not zero."""
    names = {name.rpartition(".")[2] for name, _ in transformer.named_modules()}
    config = peft.LoraConfig(r=2, target_modules=sorted(names & {"to_q", "qkv", "proj_mlp"}), init_lora_weights=False)
    torch.manual_seed(7)
    if hasattr(transformer, "add_adapter"):
        transformer.add_adapter(config)
    else:  # diffusers' DiT and Stable Audio, and STDiT3, have no such method
        peft.inject_adapter_in_model(config, transformer)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("policy", ["blocks", "layers"])
def test_lora(name, policy, tmp_path):
    pipe = build(name)
    kinds = dict.fromkeys(layer for layer, _, _ in layers_of(pipe.transformer, layout_of(pipe.transformer)))
    (tmp_path / "ones.json").write_text(json.dumps({kind: [1] * STEPS for kind in kinds}))
    (tmp_path / "skips.json").write_text(json.dumps({kind: [1, 0, 1, 0, 1, 1] for kind in kinds}))
    never = NEVER if policy == "blocks" else f"smoothcache:{tmp_path / 'ones.json'}"
    often = OFTEN if policy == "blocks" else f"smoothcache:{tmp_path / 'skips.json'}"
    without = call(pipe, STEPS)
    add_lora(pipe.transformer)
    plain = call(pipe, STEPS)
    assert not torch.equal(plain, without)
    with cineray.enable_cache(pipe, never):
        assert torch.equal(call(pipe, STEPS), plain)
    with cineray.enable_cache(pipe, often) as handle:
        assert not torch.equal(call(pipe, STEPS), plain)
    assert handle.trace.summary()["skipped_steps"] > 0
    later = build(name)
    with cineray.enable_cache(later, never):
        add_lora(later.transformer)
        assert torch.equal(call(later, STEPS), plain)
    assert torch.equal(call(later, STEPS), plain)
    later = build(name)
    with cineray.enable_cache(later, often) as handle:
        add_lora(later.transformer)
        call(later, STEPS)
    assert handle.trace.summary()["skipped_steps"] > 0
    assert torch.equal(call(later, STEPS), plain)  # no hook stayed on a layer that LoRA has wrapped


@pytest.mark.parametrize("name", MODELS)
def test_a_block_that_is_exchanged_while_the_cache_is_on_is_the_one_that_runs(name):
    pipe, other = build(name), EVERY_MODEL[name](seed=1)
    with cineray.enable_cache(pipe, NEVER):
        names = [n for n, child in pipe.transformer.named_children() if isinstance(child, torch.nn.ModuleList)]
        lists = [n for n in names if len(getattr(pipe.transformer, n)) > 1]
        getattr(pipe.transformer, lists[-1])[1] = getattr(other.transformer, lists[-1])[1]
        cached = call(pipe, STEPS)
    assert torch.equal(call(pipe, STEPS), cached)
    assert not torch.equal(call(build(name), STEPS), cached)


@pytest.mark.parametrize("name", MODELS)
def test_bfloat16(name):
    def cast(pipe):
        (pipe.transformer if name == "open_sora" else pipe).to(torch.bfloat16)

    pipe = build(name)
    cast(pipe)
    plain = call(pipe, STEPS)
    for policy in (NEVER, "dicache(threshold=0)"):
        with cineray.enable_cache(pipe, policy):
            assert torch.equal(call(pipe, STEPS), plain)
    with cineray.enable_cache(pipe, "dicache(threshold=5)") as handle:
        cached = call(pipe, STEPS)
    assert cached.isfinite().all()
    assert not torch.equal(cached, plain)
    assert handle.trace.summary()["skipped_steps"] > 0
    later = build(name)
    with cineray.enable_cache(later, NEVER) as handle:
        cast(later)
        assert torch.equal(call(later, STEPS), plain)
    assert torch.equal(call(later, STEPS), plain)
