"""Runs a function on several local processes that meet through a file, and brings back what each returned."""

import ctypes
import multiprocessing
import pickle
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

from cineray.jobs.console.terminal import begin_printing
from cineray.jobs.private_folder import private_folder, socket_place
from cineray.jobs.threads import rank_threads

# imported once, in the server that the ranks are forked from: 4 ranks then start in 0.4 s instead of 10 s
PRELOAD = [
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
        context.set_forkserver_preload(PRELOAD)
    with private_folder() as folder, sockets_at(socket_place()):
        init_method = f"file://{folder}/rendezvous"  # of plain characters: torch would not unescape others
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
            return collect(pipes, ranks, timeout_s)
        finally:
            for process in ranks:
                if process.is_alive():
                    process.kill()
                process.join()


@contextmanager
def sockets_at(place: str) -> Iterator[None]:
    """multiprocessing's server listens below the folder for temporary files, whose path may be too long for that."""
    before = tempfile.tempdir
    tempfile.tempdir = place
    try:
        yield
    finally:
        tempfile.tempdir = before


def collect(pipes: list[Connection], ranks: list[BaseProcess], timeout_s: float) -> list[Any]:
    """One answer of each rank, in their order; raises RankFailed as `run_on_local_ranks` does, and ends no rank."""
    results: dict[int, Any] = {}
    failures: dict[int, str] = {}
    deadline = time.monotonic() + timeout_s
    open_pipes = {pipe: rank for rank, pipe in enumerate(pipes)}
    while open_pipes:
        ready = wait(list(open_pipes), timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            failures |= dict.fromkeys(open_pipes.values(), f"did not end within {timeout_s:g} s")
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
    die_with_parent()
    begin_printing()
    import torch

    torch.set_num_threads(rank_threads())
    answer(pipe, lambda: function(rank, num_ranks, init_method, *arguments))


def answer(pipe: Connection, work: Callable[[], Any]) -> None:
    """Sends what `collect` takes: the result, or the traceback."""
    try:
        result = (True, work())
    except BaseException:  # noqa: BLE001  # the parent raises it
        result = (False, traceback.format_exc())
    # not pipe.send: torch would send a handle of shared memory, which ends with this process
    pipe.send_bytes(pickle.dumps(result))


def die_with_parent() -> None:
    """A rank in a collective hears of nothing: the kernel ends it with the process that it was forked from."""
    if sys.platform == "linux":
        pr_set_pdeathsig = 1  # linux/prctl.h
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
