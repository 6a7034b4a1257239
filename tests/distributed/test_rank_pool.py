"""Ranks that stay from job to job, and new ones after a job that went wrong."""

import os
import time

import pytest
import torch.distributed as dist
from rank_pool import RankPool

from cineray.jobs.measure.local_ranks import RankFailed

TIMEOUT_S = 300.0


@pytest.fixture
def pool():
    pool = RankPool()
    yield pool
    pool.close()


def who(rank, num_ranks, init_method):
    dist.init_process_group("gloo", init_method=init_method, rank=rank, world_size=num_ranks)
    pids = [None] * num_ranks
    dist.all_gather_object(pids, os.getpid())
    return pids


def test_jobs_of_any_size_meet_on_the_same_ranks_one_after_the_other(pool):
    two, four, again = (pool.run(who, num_ranks, timeout_s=TIMEOUT_S) for num_ranks in (2, 4, 2))
    assert two == again == [four[0][:2]] * 2
    assert len(set(four[0])) == 4


def fail(rank, num_ranks, init_method):
    if rank == 1:
        raise ValueError("of rank 1 alone")
    dist.init_process_group("gloo", init_method=init_method, rank=rank, world_size=num_ranks)


def sleep_on(_rank, _num_ranks, _init_method):
    time.sleep(600)


def die(_rank, _num_ranks, _init_method):
    os._exit(7)


@pytest.mark.parametrize(
    ("job", "timeout_s", "said"),
    [
        (fail, 3, r"rank 0: did not end within 3 s\nrank 1: (?s:.*)in fail\n(?s:.*)ValueError: of rank 1 alone"),
        (sleep_on, 1, "rank 0: did not end within 1 s"),
        (die, TIMEOUT_S, "rank 0: died, exit code 7"),
    ],
)
def test_after_a_job_that_fails_the_next_one_has_new_ranks(pool, job, timeout_s, said):
    (before, _) = pool.run(who, 2, timeout_s=TIMEOUT_S)
    with pytest.raises(RankFailed, match=said):
        pool.run(job, 2, timeout_s=timeout_s)
    (after, _) = pool.run(who, 2, timeout_s=TIMEOUT_S)
    assert not set(before) & set(after)
