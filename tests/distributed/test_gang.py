"""Joining and leaving: under a world that is up already, as with torchrun, and by a store, as with Ray actors."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from cineray.distributed.layout import parse_layout
from cineray.jobs.measure.local_ranks import RankFailed, run_on_local_ranks
from cineray.pipeline.gang import Gang

TIMEOUT_S = 300.0


def sum_over(group):
    values = torch.ones(1)
    dist.all_reduce(values, group=group)
    return values.item()


def join_a_world_of_ones_own(rank, num_ranks, init_method):
    dist.init_process_group("gloo", init_method=init_method, rank=rank, world_size=num_ranks)
    sums = []
    for text in ("cfg2xulysses2", "ulysses4", "gangs2xring2"):
        with Gang.join(parse_layout(text), rank, num_ranks) as gang:
            sums.append((sum_over(gang.mesh.gang.group), gang.mesh.sequence.size, gang.mesh.is_leader))
        sums.append(sum_over(None))
    with pytest.raises(ValueError, match="takes 2 ranks, there are 4"):
        Gang.join(parse_layout("2"), rank, num_ranks)
    dist.destroy_process_group()
    return sums


def test_it_leaves_the_callers_world_as_it_was(ranks):
    for rank, sums in enumerate(ranks.run(join_a_world_of_ones_own, 4, timeout_s=TIMEOUT_S)):
        first = rank == 0
        assert sums == [(4, 2, first), 4, (4, 4, first), 4, (2, 2, rank % 2 == 0), 4]


def join_by_store(rank, num_ranks, _init_method, folder):
    sums = []
    for generation in range(2):
        store = dist.PrefixStore(f"g{generation}", dist.FileStore(str(Path(folder) / f"store{generation}"), num_ranks))
        with Gang.join(parse_layout("2"), rank, num_ranks, store=store, timeout_s=120) as gang:
            sums.append(sum_over(gang.mesh.gang.group))
        assert not dist.is_initialized()
    return sums


def test_it_takes_down_the_world_that_it_made_and_can_be_made_anew(ranks, tmp_path):
    assert ranks.run(join_by_store, 2, str(tmp_path), timeout_s=TIMEOUT_S) == [[2, 2], [2, 2]]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"consensus": "some"}, "consensus must be one of all, rank0, got 'some'"),
        ({"consensus": ["all"]}, "consensus must be one of all, rank0"),
        ({"attention": "flash"}, "attention must be one of native, xfuser, got 'flash'"),
        ({"attention": "xfuser"}, None),  # found out once the mesh is up: there is no GPU
    ],
)
def test_a_gang_that_cannot_be_leaves_nothing_behind(tmp_path, options, said):
    for number in range(2):
        store = dist.FileStore(str(tmp_path / f"store{number}"), 1)
        with pytest.raises((ValueError, ImportError, RuntimeError), match=said):
            Gang.join(parse_layout("1"), 0, 1, store=store, timeout_s=20, **options)
        assert not dist.is_initialized()


def leave_early(rank, num_ranks, init_method):
    with Gang.join(parse_layout("2"), rank, num_ranks, init_method=init_method, timeout_s=3) as gang:
        if rank == 0:
            sum_over(gang.mesh.gang.group)  # the other rank is not there


def test_a_rank_that_is_missing_is_an_error_and_not_a_hang():
    with pytest.raises(RankFailed, match=r"rank 0: (?s:.*)([Tt]imed out|[Cc]onnection)"):
        run_on_local_ranks(leave_early, 2, timeout_s=TIMEOUT_S)


def die(rank, _num_ranks, _init_method):
    import os

    if rank == 1:
        os._exit(7)
    return rank


def test_a_rank_that_dies_is_named():
    with pytest.raises(RankFailed, match="rank 1: died, exit code 7"):
        run_on_local_ranks(die, 2, timeout_s=TIMEOUT_S)


def sleep_on(_rank, _num_ranks, _init_method):
    import time

    time.sleep(600)


def test_a_rank_that_does_not_end_is_killed():
    with pytest.raises(RankFailed, match="rank 0: did not end within 1 s"):
        run_on_local_ranks(sleep_on, 1, timeout_s=1)


def test_unknown_options_are_refused():
    for option in ("attention", "consensus"):
        with pytest.raises(RankFailed, match=f"{option} must be one of"):
            run_on_local_ranks(join_with, 1, option, timeout_s=TIMEOUT_S)


def join_with(rank, num_ranks, init_method, option):
    Gang.join(parse_layout("1"), rank, num_ranks, init_method=init_method, **{option: "other"})
