"""Ranks that stay: each takes one job after the other, so that what a rank imports is imported once."""

import multiprocessing
import os
import pickle
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

from cineray.jobs.console.terminal import begin_printing
from cineray.jobs.measure.local_ranks import PRELOAD, answer, collect, die_with_parent, sockets_at
from cineray.jobs.private_folder import private_folder, socket_place
from cineray.jobs.threads import rank_threads

# what ranks of these tests import beside what any rank does; a rank that is forked anew then starts at once
_TESTS_PRELOAD = [
    "cineray.pipeline.render",
    "cineray.pipeline.loading.model",
    "diffusers.pipelines.wan.pipeline_wan",
    "diffusers.pipelines.wan.pipeline_wan_i2v",
    "diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video",
]


class RankPool:
    """Runs functions on ranks as `run_on_local_ranks` does, on processes that are there already.

    Each job meets in a world of its own and leaves it. After a job that failed, or did not end in time, every rank is
    killed, and the next job gets new ones.
    """

    def __init__(self) -> None:
        self._pipes: list[Connection] = []
        self._ranks: list[BaseProcess] = []

    def run(self, function: Callable[..., Any], num_ranks: int, *arguments: Any, timeout_s: float) -> list[Any]:
        """Calls `function(rank, num_ranks, init_method, *arguments)` on each rank; what each returned.

        Raises:
            RankFailed: with the traceback or the end of every rank that did not return.
        """
        self._start_up_to(num_ranks)
        with private_folder() as folder:
            job = pickle.dumps((function, num_ranks, f"file://{folder}/rendezvous", arguments))
            try:
                for pipe in self._pipes[:num_ranks]:
                    pipe.send_bytes(job)
                return collect(self._pipes[:num_ranks], self._ranks[:num_ranks], timeout_s)
            except BaseException:
                self.close()
                raise

    def close(self) -> None:
        """Kills the ranks."""
        for rank in self._ranks:
            rank.kill()
            rank.join()
        for pipe in self._pipes:
            pipe.close()
        self._ranks, self._pipes = [], []

    def _start_up_to(self, num_ranks: int) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([*PRELOAD, *_TESTS_PRELOAD])
        with sockets_at(socket_place()):
            for rank in range(len(self._ranks), num_ranks):
                here, there = context.Pipe()
                process = context.Process(target=_serve, args=(there, rank), daemon=True)
                process.start()
                there.close()
                self._pipes.append(here)
                self._ranks.append(process)


def _serve(pipe: Connection, rank: int) -> None:
    die_with_parent()
    begin_printing()
    import torch
    import torch.distributed as dist

    torch.set_num_threads(rank_threads())
    while True:
        try:
            job = pipe.recv_bytes()
        except EOFError:
            os._exit(0)  # the tests are over

        def work(job: bytes = job) -> Any:
            function, num_ranks, init_method, arguments = pickle.loads(job)
            result = function(rank, num_ranks, init_method, *arguments)
            if dist.is_initialized():
                dist.destroy_process_group()
            return result

        answer(pipe, work)
