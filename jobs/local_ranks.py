"""Runs a function on several local processes that meet through a file, and brings back what each returned."""

import multiprocessing
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

# imported once, in the server that the ranks are forked from: 4 ranks then start in 0.4 s instead of 10 s
_PRELOAD = [
    "torch",
    "diffusers",
    "diffusers.models.transformers.transformer_wan",
    "diffusers.models.transformers.transformer_hunyuan_video",
    "cineray.pipeline.gang",
]


class RankFailed(RuntimeError):
    """A rank raised, died or did not end in time; the message has every rank's reason."""


def run_on_local_ranks(
    function: Callable[..., Any], num_ranks: int, *arguments: Any, timeout_s: float, device: str = "cpu"
) -> list[Any]:
    """Calls `function(rank, num_ranks, init_method, *arguments)` on each rank.

    Args:
        function: of a module, so that other processes find it.
        timeout_s: ranks that have not ended by then are killed.
        device: "cuda" starts new interpreters, since CUDA does not survive a fork.

    Returns:
        What each rank returned, in the order of the ranks.

    Raises:
        RankFailed: with the traceback or the end of every rank that did not return.
    """
    if device == "cuda":
        context = multiprocessing.get_context("spawn")
    else:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(_PRELOAD)
    with tempfile.TemporaryDirectory(prefix="cineray-ranks-") as folder:
        init_method = (Path(folder) / "meeting").as_uri()
        pipes, ranks = [], []
        try:
            for rank in range(num_ranks):
                here, there = context.Pipe(duplex=False)
                process = context.Process(
                    target=_run, args=(there, function, rank, num_ranks, init_method, arguments), daemon=True
                )
                process.start()
                there.close()
                pipes.append(here)
                ranks.append(process)
            return _collect(pipes, ranks, timeout_s)
        finally:
            for process in ranks:
                if process.is_alive():
                    process.kill()
                process.join()


def _collect(pipes: list[Connection], ranks: list[BaseProcess], timeout_s: float) -> list[Any]:
    results: dict[int, Any] = {}
    failures: dict[int, str] = {}
    deadline = time.monotonic() + timeout_s
    open_pipes = {pipe: rank for rank, pipe in enumerate(pipes)}
    while open_pipes:
        ready = wait(list(open_pipes), timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            failures |= {rank: f"did not end within {timeout_s:g} s" for rank in open_pipes.values()}
            break
        for pipe in ready:
            assert isinstance(pipe, Connection)
            rank = open_pipes.pop(pipe)
            try:
                good, value = pickle.loads(pipe.recv_bytes())
            except EOFError:
                ranks[rank].join(5)
                good, value = False, f"died, exit code {ranks[rank].exitcode}"
            (results if good else failures)[rank] = value
    if failures:
        raise RankFailed("\n".join(f"rank {rank}: {reason}" for rank, reason in sorted(failures.items())))
    return [results[rank] for rank in range(len(ranks))]


def _run(
    pipe: Connection, function: Callable[..., Any], rank: int, num_ranks: int, init_method: str, arguments: tuple
) -> None:
    import torch

    # the ranks share the machine's cores; and another number of threads would change the last bits of a product
    torch.set_num_threads(1)
    try:
        answer = (True, function(rank, num_ranks, init_method, *arguments))
    except BaseException:
        answer = (False, traceback.format_exc())
    # not pipe.send: torch would send a handle of shared memory, which ends with this process
    pipe.send_bytes(pickle.dumps(answer))
