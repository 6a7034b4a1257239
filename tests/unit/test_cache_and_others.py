"""A cache leaves the transformer to everyone else: who walks its blocks, copies it, compiles it, caches it, takes it
off, or calls it from another thread."""

import copy
import io
import pickle
import threading

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from diffusers import FirstBlockCacheConfig, HookRegistry, PyramidAttentionBroadcastConfig, TaylorSeerCacheConfig
from diffusers.hooks import ModelHook as DiffusersHook
from diffusers.hooks import apply_first_block_cache
from every_model import EVERY_MODEL, build, call

import cineray
from cineray.pipeline.adapters import MODELS

pytestmark = pytest.mark.slow

NEVER, OFTEN = "interval(interval=1)", "interval(interval=2)"
KINDS = [OFTEN, "taylorseer", "teacache(threshold=0.4,coefficients=1:0)"]
STEPS = 4


def state_of(transformer):
    """All that a cache may have changed: attributes, hooks and children of every module, by identity."""
    return {
        name: (
            {key: id(value) for key, value in vars(module).items() if not isinstance(value, dict | bool)},
            {key: dict(value) for key, value in vars(module).items() if isinstance(value, dict)},
        )
        for name, module in transformer.named_modules()
    }


def lists_of(transformer):
    return [getattr(transformer, name) for name in MODELS[type(transformer).__name__].layout.lists]


@pytest.mark.parametrize(
    ("name", "policy"), [*((name, OFTEN) for name in EVERY_MODEL), ("wan", "taylorseer"), ("flux", "taylorseer")]
)
def test_while_a_cache_is_on_the_blocks_are_the_blocks(name, policy):
    """Also to those who look at them in the middle of a forward."""
    pipe = build(name)
    plain = call(pipe, STEPS)
    before = state_of(pipe.transformer)
    lists = lists_of(pipe.transformer)
    blocks = [list(blocks) for blocks in lists]

    def look(*_):
        for now, blocks_then in zip(lists_of(pipe.transformer), blocks, strict=True):
            assert isinstance(now, torch.nn.ModuleList)
            assert len(now) == len(blocks_then)
            for seen in (list(now), [b for _, b in enumerate(now)], list(now.children()), [*reversed(list(now))][::-1]):
                assert all(a is b for a, b in zip(seen, blocks_then, strict=True))
            assert now[0] is blocks_then[0]
            assert now[-1] is blocks_then[-1]
            assert list(now[:2]) == blocks_then[:2]
            assert type(now[1:]) is torch.nn.ModuleList
            assert [b for b, _ in zip(now, now, strict=True)] == blocks_then

    with cineray.enable_cache(pipe, policy) as handle:
        assert lists_of(pipe.transformer) == lists
        look()
        hooks = [blocks[0][0].register_forward_hook(look), pipe.transformer.register_forward_pre_hook(look)]
        hooks += [child.register_forward_hook(look) for child in pipe.transformer.children()]  # before and after them
        cached = call(pipe, STEPS)
        for hook in hooks:
            hook.remove()
        look()
    assert not torch.equal(cached, plain)
    assert handle.trace.summary()["skipped_steps"] > 0
    assert state_of(pipe.transformer) == before
    assert torch.equal(call(pipe, STEPS), plain)


def test_per_block_compilation_slices_and_group_offload():
    pipe = build("wan")
    with cineray.enable_cache(pipe, OFTEN):
        uncompiled = call(pipe, STEPS)
        for block in pipe.transformer.blocks:
            block.compile(backend="eager")
        assert all(block._compiled_call_impl is not None for block in pipe.transformer.blocks)
        assert torch.equal(call(pipe, STEPS), uncompiled)
    torch._dynamo.reset()
    for before in (True, False):
        pipe = build("wan")
        handle = None if before else cineray.enable_cache(pipe, OFTEN)
        pipe.transformer.enable_group_offload(
            onload_device=torch.device("cpu"),
            offload_device=torch.device("cpu"),
            offload_type="block_level",
            num_blocks_per_group=1,
        )
        handle = handle or cineray.enable_cache(pipe, OFTEN)
        assert torch.equal(call(pipe, STEPS), uncompiled)
        handle.disable()


@pytest.mark.parametrize("policy", KINDS)
def test_a_copy_works_without_a_cache_and_takes_one_of_its_own(policy, tmp_path):
    pipe = build("wan")
    plain = call(pipe, STEPS)
    handle = cineray.enable_cache(pipe, policy)
    cached = call(pipe, STEPS)
    entries = list(handle.trace.entries)
    pickled = io.BytesIO()
    torch.save(pipe.transformer, pickled)
    pickled.seek(0)
    shallow = copy.copy(pipe)
    shallow.transformer = copy.copy(pipe.transformer)
    read_back = copy.copy(pipe)
    read_back.transformer = torch.load(pickled, weights_only=False)
    for other in (copy.deepcopy(pipe), read_back, shallow):
        assert torch.equal(call(other, STEPS), plain)
        assert handle.trace.entries == entries
    other = copy.deepcopy(pipe)
    for weights in other.transformer.parameters():
        weights.data.mul_(0.5)
    for _ in range(2):
        with cineray.enable_cache(other, policy) as its_own:
            assert not torch.equal(call(other, STEPS), cached)
            assert its_own.trace.summary()["steps"] == STEPS
    assert handle.trace.entries == entries
    assert torch.equal(call(pipe, STEPS), cached)
    handle.disable()
    assert torch.equal(call(pipe, STEPS), plain)
    assert pickle.loads(pickle.dumps(torch.nn.Linear(1, 1))) is not None
    pipe.transformer.save_pretrained(tmp_path)
    assert (tmp_path / "config.json").exists()


def others(pipe):
    transformer, marked = pipe.transformer, torch.nn.Module.__setattr__
    first_block = FirstBlockCacheConfig(threshold=0.1)
    return {
        "FirstBlockCache": lambda: transformer.enable_cache(first_block),
        "FBCHeadBlockHook": lambda: apply_first_block_cache(transformer, first_block),
        "TaylorSeerCache": lambda: transformer.enable_cache(TaylorSeerCacheConfig()),
        "PyramidAttentionBroadcast": lambda: transformer.enable_cache(
            PyramidAttentionBroadcastConfig(spatial_attention_block_skip_range=2, current_timestep_callback=lambda: 500)
        ),
        "cache-dit or ParaAttention": lambda: marked(transformer, "_is_cached", True),
    }


@pytest.mark.parametrize("name", list(others(build("wan"))))
def test_another_cache_at_once_is_refused_whichever_came_first(name):
    pipe = build("wan")
    others(pipe)[name]()
    with pytest.raises(ValueError, match=f"this WanTransformer3DModel has .*{name}.* on it too, and two caches at"):
        cineray.enable_cache(pipe, NEVER)
    pipe = build("wan")
    plain = call(pipe, STEPS)
    with cineray.enable_cache(pipe, NEVER):
        others(pipe)[name]()
        with pytest.raises(ValueError, match="two caches at once give neither's result; take one off"):
            call(pipe, STEPS)
        if pipe.transformer.is_cache_enabled:
            pipe.transformer.disable_cache()
            assert torch.equal(call(pipe, STEPS), plain)


def test_a_forward_that_was_replaced_is_refused_and_one_that_only_adds_something_is_not():
    pipe = build("wan")
    forward = pipe.transformer.forward
    pipe.transformer.forward = lambda *args, **kwargs: (forward(*args, **kwargs)[0] * 1,)
    with cineray.enable_cache(pipe, OFTEN) as handle:
        call(pipe, STEPS)
        assert handle.trace.summary()["skipped_steps"] == 1
        pipe.transformer.forward = lambda hidden_states, **kwargs: (hidden_states,)
        for _ in range(2):
            with pytest.raises(ValueError, match="did not run its blocks through it: it has been replaced"):
                call(pipe, STEPS)
    with (
        cineray.enable_cache(pipe, "taylorseer"),
        pytest.raises(ValueError, match="ran none of its layers: it has been replaced"),
    ):
        call(pipe, STEPS)


def test_handles_take_off_what_is_theirs_and_nothing_else():
    pipe = build("wan")
    plain = call(pipe, STEPS)
    first = cineray.enable_cache(pipe, OFTEN)
    cached = call(pipe, STEPS)
    first.disable()
    first.disable()
    second = cineray.enable_cache(pipe, OFTEN)
    first.disable()
    assert torch.equal(call(pipe, STEPS), cached)
    assert second.trace.summary()["steps"] == STEPS
    # the user exchanges the blocks: they stay, and are the ones that run
    blocks = torch.nn.ModuleList(list(pipe.transformer.blocks)[:2])
    pipe.transformer.blocks = blocks
    fewer = call(pipe, STEPS)
    second.disable()
    assert pipe.transformer.blocks is blocks
    assert not torch.equal(fewer, plain)
    # the user takes the hook out of diffusers' registry: the handle has nothing left
    third = cineray.enable_cache(pipe, OFTEN)
    HookRegistry.check_if_exists_or_initialize(pipe.transformer).remove_hook("cineray_whereabouts")
    fourth = cineray.enable_cache(pipe, OFTEN)
    third.disable()
    assert torch.equal(call(pipe, STEPS), fewer)
    assert fourth.trace.summary()["skipped_steps"] == 1
    # another transformer in the pipeline: the cache is on the old one
    old, pipe.transformer = pipe.transformer, build("wan").transformer
    assert torch.equal(call(pipe, STEPS), plain)
    fourth.disable()
    assert torch.equal(call(pipe, STEPS), plain)
    pipe.transformer = old
    cineray.enable_cache(pipe, OFTEN).disable()


class Doubling(DiffusersHook):
    def new_forward(self, _module, *args, **kwargs):
        return (self.fn_ref.original_forward(*args, **kwargs)[0] * 2,)


class Offloading(ModelHook):
    pass


@pytest.mark.parametrize("hung", ["before", "while"])
@pytest.mark.parametrize("removed", ["while", "after"])
def test_hooks_of_others_come_and_go_in_any_order(hung, removed):
    """diffusers' registry and accelerate's offloading, which hangs itself anew at the end of each pipeline call."""
    pipe = build("wan")
    plain = call(pipe, STEPS)
    with cineray.enable_cache(pipe, OFTEN):
        cached = call(pipe, STEPS)
    before = state_of(pipe.transformer)
    registry = HookRegistry.check_if_exists_or_initialize(pipe.transformer)

    def hang():
        registry.register_hook(Doubling(), "doubling")
        add_hook_to_module(pipe.transformer, Offloading())

    def remove():
        remove_hook_from_module(pipe.transformer)
        registry.remove_hook("doubling")

    if hung == "before":
        hang()
    handle = cineray.enable_cache(pipe, OFTEN)
    if hung == "while":
        hang()
    doubled = call(pipe, STEPS)
    assert not torch.equal(doubled, cached)
    remove_hook_from_module(pipe.transformer)
    add_hook_to_module(pipe.transformer, Offloading())
    assert torch.equal(call(pipe, STEPS), doubled)
    assert handle.trace.summary()["skipped_steps"] == 1
    if removed == "while":
        remove()
        assert torch.equal(call(pipe, STEPS), cached)
        handle.disable()
    else:
        handle.disable()
        remove()
    assert torch.equal(call(pipe, STEPS), plain)
    assert registry.hooks == {}
    assert set(before) == set(state_of(pipe.transformer))


def test_threads_that_share_a_transformer_are_refused_and_others_are_not():
    one = build("wan")
    together = threading.Barrier(2)
    errors, results = [], {}

    def run(number, pipe):
        try:
            results[number] = call(pipe, STEPS)
        except ValueError as error:
            errors.append(error)

    def meet(*_):
        together.wait(30)

    def start(pipes):
        errors.clear()
        threads = [threading.Thread(target=run, args=pair) for pair in enumerate(pipes)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)

    with cineray.enable_cache(one, OFTEN) as handle:
        cached = call(one, STEPS)
        other = build("wan")
        with cineray.enable_cache(other, OFTEN):
            start([one, other])
        assert not errors
        assert torch.equal(results[0], cached)
        assert torch.equal(results[1], cached)
        # within the first thread's first block the second one calls
        calls = []
        block = one.transformer.blocks[0]
        entered, tried = threading.Event(), threading.Event()

        def hold(*_):
            if not calls:
                calls.append(1)
                entered.set()
                tried.wait(60)

        hook = block.register_forward_hook(hold)
        first = threading.Thread(target=run, args=(0, one))
        first.start()
        assert entered.wait(60)
        with pytest.raises(ValueError, match="called while another thread's call of it runs"), torch.no_grad():
            one.transformer(torch.randn(1, 4, 2, 4, 4), torch.tensor([999]), torch.randn(1, 512, 64))
        tried.set()
        first.join(120)
        hook.remove()
        assert not errors
        assert torch.equal(results[0], cached)
        assert torch.equal(call(one, STEPS), cached)
        assert handle.trace.summary()["steps"] == STEPS


@pytest.mark.parametrize("how", ["module", "forward", "around"])
def test_compiled_as_a_whole_after_the_cache_was_enabled(how):
    pipe = build("dit")
    with cineray.enable_cache(pipe, NEVER):
        transformer = pipe.transformer
        if how == "module":
            pipe.transformer = torch.compile(transformer, backend="eager")
        elif how == "forward":
            transformer.forward = torch.compile(transformer.forward, backend="eager")

        @torch.no_grad()
        def step(latents):
            return pipe.transformer(latents, torch.tensor([999]), torch.tensor([7])).sample

        run = torch.compile(step, backend="eager") if how == "around" else step
        with pytest.raises(ValueError, match="compiled as a whole, and a cache decides between its blocks"):
            run(torch.randn(1, 4, 8, 8))
    torch._dynamo.reset()


def test_training_with_checkpoints_is_refused_and_without_a_gradient_is_not():
    pipe = build("wan")
    plain = call(pipe, STEPS)
    pipe.transformer.enable_gradient_checkpointing()
    pipe.transformer.train()
    with cineray.enable_cache(pipe, NEVER):
        assert torch.equal(call(pipe, STEPS), plain)
        with (
            pipe.transformer.cache_context("cond", step_index=0, num_inference_steps=4),
            pytest.raises(ValueError, match="gradient checkpointing runs blocks twice"),
        ):
            pipe.transformer(torch.randn(1, 4, 2, 4, 4), torch.tensor([999]), torch.randn(1, 512, 64))


@pytest.mark.parametrize("policy", [OFTEN, "taylorseer(interval=2,warmup_steps=1)"])
def test_a_transformer_or_prompt_that_changes_midway_computes(policy):
    """Type, text length and batch size; the next step finds nothing that fits."""
    pipe = build("flux")
    pipe.scheduler.set_timesteps(8, mu=1.0)
    places = {"img_ids": torch.zeros(4, 3), "guidance": torch.ones(1)}
    changes = {3: "text", 5: "batch", 7: "type"}
    length, rows, dtype = 8, 1, torch.float32
    with cineray.enable_cache(pipe, policy) as handle, torch.no_grad():
        for index, t in enumerate(pipe.scheduler.timesteps):
            change = changes.get(index)
            length, rows = (6 if change == "text" else length), (2 if change == "batch" else rows)
            if change == "type":
                dtype = torch.bfloat16
                pipe.transformer.to(dtype)
            out = pipe.transformer(
                torch.ones(rows, 4, 16, dtype=dtype),
                timestep=(t[None] / 1000).expand(rows).to(dtype),
                encoder_hidden_states=torch.ones(rows, length, 64, dtype=dtype),
                pooled_projections=torch.ones(rows, 64, dtype=dtype),
                txt_ids=torch.zeros(length, 3),
                **places,
            ).sample
            assert out.dtype == dtype
            assert out.isfinite().all()
    computed = {e.step for e in handle.trace.entries if e.compute}
    assert {5, 7} <= computed
    assert 1 not in computed
