"""Ranks that see different data act alike: the case that hangs diffusers' FirstBlockCache, and what happens without.

At the second step only the second half of the frames changes, so the ranks' own numbers lie far apart.
"""

import logging
from dataclasses import dataclass, replace
from datetime import timedelta

import pytest
import tiny_transformers as tiny
import torch
import torch.distributed as dist

from cineray.caching.consensus import SingleProcess
from cineray.caching.policies.dicache import DiCacheConfig
from cineray.distributed.attention import NativeAttention
from cineray.distributed.consensus import GangConsensus
from cineray.distributed.layout import parse_layout
from cineray.distributed.mesh import new_mesh
from cineray.jobs.measure.local_ranks import RankFailed, run_on_local_ranks
from cineray.pipeline.adapters.cache_plan import plan_cache
from cineray.pipeline.caches.enable import attach_cache
from cineray.pipeline.parallel.sharding import ShardedTransformer

TIMEOUT_S = 300.0  # of a collective and of a whole job, however busy the machine is
HANG_S = 6.0  # until a collective that never ends fails
STEPS = 12
CPU = torch.device("cpu")


@dataclass
class Seen:
    """One rank's run."""

    compute: list[bool]
    statistics: list[float | None]
    gammas: list[float | None]
    reasons: list[str]
    outputs: list[torch.Tensor]
    logged: list[str]


def frames_that_change(step):
    """Step 0 is noise; later the second half of 4 frames drifts and the first half stays."""
    latents = tiny.draw(1, 4, 4, 16, 16)
    latents[:, :, 2:] += 0.3 * step * tiny.draw(1, 4, 2, 16, 16, seed=1)
    return latents


def call(model, step, num_steps=STEPS):
    kwargs = {"encoder_hidden_states": tiny.draw(1, 512, 32)}
    if "Hunyuan" in type(model).__name__:
        kwargs = {
            "encoder_hidden_states": tiny.draw(1, 8, 32),
            "encoder_attention_mask": torch.arange(8)[None] < 5,
            "pooled_projections": tiny.draw(1, 16),
            "guidance": torch.tensor([3.0]),
        }
    with torch.no_grad(), model.cache_context("cond", step_index=step, num_inference_steps=num_steps):
        return model(frames_that_change(step), timestep=torch.tensor([500.0]), return_dict=False, **kwargs)[0]


class Lines(logging.Handler):
    """What is logged, as text."""

    def __init__(self):
        super().__init__()
        self.lines = []

    def emit(self, record):
        self.lines.append(record.getMessage())


def run_steps(model, config, mesh, consensus, steps, before_step=None):
    plan = plan_cache(config, type(model).__name__, model.config)
    logged = Lines()
    logging.getLogger("cineray.caching").addHandler(logged)
    with attach_cache([model], plan, num_branches=1, consensus=consensus) as cache:
        outputs = []
        with ShardedTransformer(model, mesh, NativeAttention(mesh)):
            for step in range(steps):
                if before_step is not None:
                    before_step(step, cache)
                outputs.append(call(model, step))
    logging.getLogger("cineray.caching").removeHandler(logged)
    entries = cache.trace.entries
    return Seen(
        compute=[e.compute for e in entries],
        statistics=[e.statistic for e in entries],
        gammas=[e.gamma for e in entries],
        reasons=[e.reason for e in entries],
        outputs=outputs,
        logged=logged.lines,
    )


def mesh_of(layout, rank, init_method, timeout_s=TIMEOUT_S / 2):
    return new_mesh(parse_layout(layout), rank, CPU, timedelta(seconds=timeout_s), init_method=init_method)


def decide_on_rank(rank, num_ranks, init_method, builder, threshold, steps, mode, timeout_s=TIMEOUT_S / 2):
    mesh = mesh_of(f"ulysses{num_ranks}" if num_ranks > 1 else "1", rank, init_method, timeout_s)
    consensus = SingleProcess() if mode == "none" else GangConsensus(mesh=mesh, device=CPU, mode=mode)
    config = DiCacheConfig(threshold=threshold, warmup=0.0)
    return run_steps(getattr(tiny, builder)(), config, mesh, consensus, steps)


def decide_on(ranks, num_ranks, builder, threshold, steps=STEPS, mode="all"):
    return ranks.run(decide_on_rank, num_ranks, builder, threshold, steps, mode, timeout_s=TIMEOUT_S)


def local_changes(ranks, num_ranks, builder):
    """Each rank's own relative change at step 1: a threshold of almost 0 computes on every rank."""
    return [seen.statistics[1] for seen in decide_on(ranks, num_ranks, builder, 1e-9, steps=2, mode="none")]


@pytest.mark.parametrize(
    ("num_ranks", "builder"),
    [
        (2, "hunyuan"),
        (4, "wan"),
        *(pytest.param(*case, marks=pytest.mark.exhaustive) for case in ((2, "wan"), (4, "hunyuan"))),
    ],
)
def test_thresholds_between_the_ranks_own_changes_decide_the_same_everywhere(ranks, builder, num_ranks):
    local = sorted(local_changes(ranks, num_ranks, builder))
    assert local[-1] > 3 * local[0]
    (alone,) = decide_on(ranks, 1, builder, 1e-9, steps=2)
    overall = alone.statistics[1]
    assert local[0] < overall < local[-1]
    for threshold in ((local[0] + overall) / 2, (overall + local[-1]) / 2):
        (expected,) = decide_on(ranks, 1, builder, threshold)
        for seen in decide_on(ranks, num_ranks, builder, threshold):
            assert seen.compute == expected.compute
            assert seen.gammas == expected.gammas
            assert seen.statistics == expected.statistics
            assert all(torch.equal(a, b) for a, b in zip(seen.outputs, expected.outputs, strict=True))
        assert expected.compute[1] == (overall >= threshold)
        assert False in expected.compute


def test_without_consensus_the_same_case_hangs_until_the_timeout(ranks):
    """What the test above would do if its ranks decided alone: this is why there is a consensus."""
    local = local_changes(ranks, 2, "wan")
    with pytest.raises(RankFailed, match=r"[Tt]imed out|[Cc]onnection (closed|reset)"):
        run_on_local_ranks(decide_on_rank, 2, "wan", sum(local) / 2, STEPS, "none", HANG_S, timeout_s=TIMEOUT_S)


def test_rank0_judges_by_its_own_tokens_and_all_obey(ranks):
    """Its half of the frames hardly changes: it skips where the whole clip would not."""
    local = local_changes(ranks, 2, "wan")
    (alone,) = decide_on(ranks, 1, "wan", 1e-9, steps=2)
    threshold = (local[0] + alone.statistics[1]) / 2
    first, second = decide_on(ranks, 2, "wan", threshold, mode="rank0")
    assert first.compute == second.compute
    assert first.gammas == second.gammas
    assert first.statistics[1] == pytest.approx(local[0])
    assert not first.compute[1]
    (expected,) = decide_on(ranks, 1, "wan", threshold)
    assert expected.compute[1]


def decide_per_sample(rank, num_ranks, init_method):
    """A batch of two: the first sample drifts in its second half, the second one stands still until step 6."""
    mesh = mesh_of(f"ulysses{num_ranks}" if num_ranks > 1 else "1", rank, init_method)
    model = tiny.wan()
    plan = plan_cache(DiCacheConfig(threshold=0.1, warmup=0.2), type(model).__name__, model.config)
    still = tiny.draw(1, 4, 4, 16, 16, seed=2)
    text = tiny.draw(2, 512, 32)
    outputs = []
    consensus = GangConsensus(mesh=mesh, device=CPU)
    with (
        attach_cache([model], plan, num_branches=1, consensus=consensus) as cache,
        torch.no_grad(),
        ShardedTransformer(model, mesh, NativeAttention(mesh)),
    ):
        for step in range(STEPS):
            latents = torch.cat([frames_that_change(step), still * (1 + max(0, step - 6))])
            with model.cache_context("cond", step_index=step, num_inference_steps=STEPS):
                timestep = torch.full((2,), 500.0 - step)
                outputs.append(model(latents, timestep, text, return_dict=False)[0])
    return [(e.step, e.sample, e.compute, e.gamma) for e in cache.trace.entries], outputs


def test_each_sample_of_a_batch_has_its_own_schedule_on_every_rank(ranks):
    ((alone, expected),) = ranks.run(decide_per_sample, 1, timeout_s=TIMEOUT_S)
    first, second = ([e[2] for e in alone if e[1] == sample] for sample in range(2))
    assert first != second
    assert False in first
    assert False in second
    for entries, outputs in ranks.run(decide_per_sample, 4, timeout_s=TIMEOUT_S):
        assert entries == alone
        assert all(torch.equal(a, b) for a, b in zip(outputs, expected, strict=True))


def count_on_rank(rank, num_ranks, init_method, look, threshold):
    """Collectives by name outside of attention and of the gathering of outputs."""
    mesh = mesh_of(f"ulysses{num_ranks}", rank, init_method)
    counts = {"all_reduce": 0, "broadcast": 0}
    sizes = []

    def counted(original, name):

        def call(values, *args, **kwargs):
            counts[name] += 1
            sizes.append(values.numel() * values.element_size())
            return original(values, *args, **kwargs)

        return call

    config = DiCacheConfig(threshold=threshold, warmup=0.0, look=look)
    with pytest.MonkeyPatch.context() as patch:
        for name in counts:
            patch.setattr(dist, name, counted(getattr(dist, name), name))
        seen = run_steps(tiny.wan(), config, mesh, GangConsensus(mesh=mesh, device=CPU), STEPS)
    return counts, max(sizes), len(seen.compute)


def test_a_decision_costs_one_all_reduce_and_one_broadcast_of_a_few_numbers(ranks):
    for counts, most_bytes, num_decisions in ranks.run(count_on_rank, 2, "step", 0.05, timeout_s=TIMEOUT_S):
        assert counts == {"all_reduce": num_decisions, "broadcast": num_decisions}
        assert most_bytes == 9 * 8  # two sums of the change, four of the alignment, three flags


def test_within_a_run_of_skips_ranks_only_compare_their_plans(ranks):
    for counts, _, num_steps in ranks.run(count_on_rank, 2, "run", 1e6, timeout_s=TIMEOUT_S):
        num_looks = 3  # two computed steps, then one run to the end
        assert counts == {"all_reduce": num_steps + num_looks, "broadcast": num_looks}


def forget_on_rank(rank, num_ranks, init_method):
    """Rank 1 loses what it cached before step 5."""
    mesh = mesh_of(f"ulysses{num_ranks}", rank, init_method)

    def before_step(step, cache):
        if rank == 1 and step == 5:
            cache._attached[0].tracker.listener.free()

    config = DiCacheConfig(threshold=1e6, warmup=0.0)
    return run_steps(tiny.wan(), config, mesh, GangConsensus(mesh=mesh, device=CPU), STEPS, before_step)


def test_a_rank_that_lost_its_history_makes_all_compute(ranks):
    for seen in ranks.run(forget_on_rank, 2, timeout_s=TIMEOUT_S):
        assert [step for step, compute in enumerate(seen.compute) if compute] == [0, 5]


def drift_on_rank(rank, num_ranks, init_method):
    """Rank 1 has another decision in its trace at step 5, as a rank would that did not obey."""
    mesh = mesh_of(f"ulysses{num_ranks}", rank, init_method)

    def before_step(step, cache):
        if rank == 1 and step == 6:
            cache.trace.entries[5] = replace(cache.trace.entries[5], compute=True)

    config = DiCacheConfig(threshold=1e6, warmup=0.0)
    return run_steps(tiny.wan(), config, mesh, GangConsensus(mesh=mesh, device=CPU), STEPS, before_step)


def test_the_guard_finds_a_rank_that_differs_and_all_compute(ranks):
    for seen in ranks.run(drift_on_rank, 2, timeout_s=TIMEOUT_S):
        assert seen.compute[8]  # the first comparison after step 6
        assert seen.compute[9:] == [False] * 3
        (said,) = seen.logged
        assert "before step 8 of branch cond" in said
        assert "rank 0: step 8, 1 of 8 computed" in said
        assert "rank 1: step 8, 2 of 8 computed" in said


def keep_some_tokens(rank, num_ranks, init_method):
    mesh = mesh_of(f"ulysses{num_ranks}" if num_ranks > 1 else "1", rank, init_method)
    config = DiCacheConfig(threshold=0.05, warmup=0.0, keep_every=3)
    return run_steps(tiny.wan(), config, mesh, GangConsensus(mesh=mesh, device=CPU), STEPS)


def test_the_tokens_that_are_kept_are_the_same_on_any_number_of_ranks(ranks):
    (alone,) = ranks.run(keep_some_tokens, 1, timeout_s=TIMEOUT_S)
    for seen in ranks.run(keep_some_tokens, 4, timeout_s=TIMEOUT_S):
        assert (seen.compute, seen.gammas, seen.statistics) == (alone.compute, alone.gammas, alone.statistics)
