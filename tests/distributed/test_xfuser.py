"""xfuser's USP code on gloo, through a shim: the same attention as ours, within the last bits of the sum."""

import pytest
import tiny_transformers as tiny
import torch
from rank_pool import RankPool
from test_sharded_transformers import CALLS, EVEN, ODD, TIMEOUT_S, new_test_mesh

from cineray.distributed.layout import parse_layout
from cineray.jobs.measure.local_ranks import RankFailed, run_on_local_ranks
from cineray.pipeline.parallel.sharding import ShardedTransformer

BOUND = 1e-6  # relative to the largest output, as for our ring
REFUSED = {"divisible": ("wan", ODD), "masks of their own": ("hunyuan", {"valid_text": (8, 5)})}


def errors_with_xfuser(rank, _num_ranks, init_method, layout, calls):
    import xfuser_on_cpu

    xfuser_on_cpu.install()
    from cineray.distributed.xfuser_attention import new_xfuser_attention

    mesh = new_test_mesh(layout, rank, init_method)
    attention = new_xfuser_attention(mesh)
    results = []
    for builder, arguments in calls:
        model = getattr(tiny, builder)()
        plain = tiny.call(model, **arguments)
        with ShardedTransformer(model, mesh, attention):
            sharded = tiny.call(model, **arguments)
        results.append(((sharded - plain).abs().max() / plain.abs().max()).item())
    attention.close()
    mesh.close()
    return results


@pytest.fixture(scope="module")
def usp_ranks():
    """Ranks of their own: what the shim changes stays changed."""
    pool = RankPool()
    yield pool
    pool.close()


@pytest.mark.parametrize(
    "layout",
    ["ring2xulysses2", *(pytest.param(x, marks=pytest.mark.exhaustive) for x in ("ulysses2", "cfg2xulysses2"))],
)
def test_usp_gives_what_one_rank_gives(usp_ranks, layout):
    calls = [("wan", EVEN), ("wan_i2v", EVEN), ("hunyuan", EVEN), ("hunyuan", {"valid_text": (5,)}), ("flux", EVEN)]
    assert {builder for builder, _ in calls} <= {builder for builder, _ in CALLS.values()}
    num_ranks = parse_layout(layout).world_size
    for result in usp_ranks.run(errors_with_xfuser, num_ranks, layout, calls, timeout_s=TIMEOUT_S):
        assert max(result) <= BOUND


@pytest.mark.parametrize("reason", REFUSED)
def test_what_it_would_get_wrong_is_refused(usp_ranks, reason):
    with pytest.raises(RankFailed, match=reason):
        usp_ranks.run(errors_with_xfuser, 2, "ulysses2", [REFUSED[reason]], timeout_s=TIMEOUT_S)


def test_without_a_gpu_it_says_so():
    if torch.cuda.is_available():
        pytest.skip("xfuser imports where there is a GPU")
    with pytest.raises(RankFailed, match="attention xfuser does not import here"):
        run_on_local_ranks(join_with_xfuser, 1, timeout_s=TIMEOUT_S)


def join_with_xfuser(rank, num_ranks, init_method):
    from cineray.pipeline.gang import Gang

    Gang.join(parse_layout("1"), rank, num_ranks, init_method=init_method, attention="xfuser").close()
