"""Threads of a process on CPUs: how many, and how they wait. Measured in docs/benchmarks.md.

A thread of OpenMP that waits spins, unless it is told not to; on cores that other processes use too it then takes
their time and its own: one clip took forty times as long beside two busy processes.
"""

import os
from collections.abc import Mapping, MutableMapping
from typing import Any

_WAITING = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0", "KMP_BLOCKTIME": "0"}
# Steps of a transformer with 9 million parameters took 0.9 times as long on one thread as on two, with 36 million
# 1.3 times (320 tokens, two cores).
ONE_THREAD_PARAMETERS = 20_000_000
ONE = 1
LOADING_PROCESSES = 8  # that load at once on one machine: a rank per GPU of the largest


def wait_passively(environment: MutableMapping[str, str] = os.environ) -> None:
    """Threads that wait sleep. To be called before torch is imported; what the user has set stays."""
    if not any(name in environment for name in _WAITING):
        environment.update(_WAITING)


def num_threads(
    transformer: Mapping[str, Any], counts: tuple[str, ...], environment: Mapping[str, str] = os.environ
) -> int | None:
    """Threads of a process that renders alone on a CPU; None leaves them to torch: OMP_NUM_THREADS, else all cores.

    Small models take one, as every rank does: they gain nothing by more, and a sum that is split among threads may
    have other last bits.

    Args:
        transformer: its configuration.
        counts: names of the entries that say how many blocks it has.
    """
    if _asked_for(environment) is not None:
        return None
    width = _number(transformer, "num_attention_heads") * _number(transformer, "attention_head_dim")
    blocks = sum(_number(transformer, name) for name in counts)
    # attention to itself and to the text: 8 width^2; feed-forward of four times the width: 8 more
    return ONE if 16 * width**2 * blocks < ONE_THREAD_PARAMETERS else None


def rank_threads(environment: Mapping[str, str] = os.environ) -> int:
    """Threads of a rank or a finisher, which share the machine with others: one, unless OMP_NUM_THREADS says more.

    Ray itself sets OMP_NUM_THREADS to an actor's number of CPUs, which is one.
    """
    return _asked_for(environment) or ONE


def loading_threads(device: str, environment: Mapping[str, str] = os.environ) -> int:
    """Threads of a process that loads weights, which are cast on the CPU: with CUDA its share of all cores.

    On a CPU the same as to render: ranks may be as many as cores.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or ONE
    return max(rank_threads(environment), cores // LOADING_PROCESSES) if device == "cuda" else rank_threads(environment)


def _asked_for(environment: Mapping[str, str]) -> int | None:
    given = environment.get("OMP_NUM_THREADS", "").split(",")[0].strip()
    return int(given) if given.isascii() and given.isdecimal() and 0 < int(given) < 10_000 else None


def _number(config: Mapping[str, Any], name: str) -> int:
    value = config.get(name)
    return value if isinstance(value, int) else 0
