"""Where the actors run: a Ray inside this process, or a cluster that is up already."""

import logging
import os
import secrets
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import ray
from ray._private.state import available_resources_per_node, state

from cineray.jobs.gangs.cluster_address import check_address
from cineray.jobs.gangs.placement import NodeRoom
from cineray.jobs.planning.machines import Machines
from cineray.jobs.private_folder import private_folder
from cineray.jobs.stopping import Stopped, kept_handlers
from cineray.pipeline.request import InputError

# latents and prompts cross as files; the store holds control messages alone (Ray's least is 75 MiB)
OBJECT_STORE_BYTES = 100 * 2**20
_CARD = "accelerator_type:"  # how Ray names a node's GPUs among its resources


@contextmanager
def connected(address: str | None, num_actors: int) -> Iterator[None]:
    """Joins the cluster at `address`, or starts a Ray of this process's own that listens on localhost alone.

    A process that has joined one already stays there.

    Args:
        num_actors: that a Ray of its own has CPUs for.

    Raises:
        InputError: there is no cluster at the address.
    """
    if ray.is_initialized():
        yield
        return
    os.environ.setdefault("RAY_IGNORE_UNHANDLED_ERRORS", "1")  # the driver says what was lost, once
    os.environ.setdefault("RAY_COLOR_PREFIX", "0")  # of actors' lines
    # that there is a token is nobody's business
    logging.getLogger("ray._private.authentication").setLevel(logging.ERROR)
    try:
        if address is None:
            with private_folder() as folder, _own_token(folder):
                _start(folder, num_actors)
                try:
                    yield
                finally:
                    ray.shutdown()
        else:
            _join(address)
            yield
    finally:
        ray.shutdown()


def _start(folder: Path, num_cpus: int) -> None:
    """A Ray of this process's own. `folder` keeps others out; what Ray makes below it, anybody could write."""
    # a small /dev/shm is no reason for advice: nearly nothing goes through the store
    logging.getLogger("ray._private.services").setLevel(logging.ERROR)
    try:
        with _ray_handles_signals_meanwhile():
            ray.init(
                address="local",
                num_cpus=num_cpus,
                object_store_memory=OBJECT_STORE_BYTES,
                include_dashboard=False,
                logging_level=logging.WARNING,
                _temp_dir=str(folder / "r"),
                _plasma_directory=None if _has_shared_memory() else str(folder),
            )
    except Exception as error:  # noqa: BLE001  # Ray raises that very class where a machine is too busy to start it within 30 s
        raise InputError(f"Ray does not start on this machine: {_reason(error)}") from None


def _join(address: str) -> None:
    """
    Raises:
        InputError: there is no cluster at the address.
    """
    check_address(address)
    try:
        with _ray_handles_signals_meanwhile():
            ray.init(address=address, logging_level=logging.WARNING)
    except (OSError, ValueError, RuntimeError) as error:
        raise InputError(
            f"no Ray cluster at --address {address}: {_reason(error)}; leave --address out to render on this machine "
            "alone"
        ) from None


@contextmanager
def _ray_handles_signals_meanwhile() -> Iterator[None]:
    """ray.init leaves a handler of SIGTERM behind, which would end a driver that still cleans up."""
    with kept_handlers():
        try:
            yield
        except SystemExit as end:
            if end.code == signal.SIGTERM:
                raise Stopped(signal.SIGTERM) from None
            raise


@contextmanager
def _own_token(folder: Path) -> Iterator[None]:
    """A token for this Ray alone, that other users cannot read; the user's own, where there is one, is used instead."""
    given = {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & os.environ.keys()
    if given:
        yield
        return
    path = folder / "token"
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(secrets.token_hex(32))
    os.environ["RAY_AUTH_TOKEN_PATH"] = str(path)
    _read_token_again()
    try:
        yield
    finally:
        del os.environ["RAY_AUTH_TOKEN_PATH"]
        _read_token_again()


def _read_token_again() -> None:
    """This process may have had another Ray before."""
    try:
        from ray._raylet import AuthenticationTokenLoader  # type: ignore[attr-defined]  # compiled

        AuthenticationTokenLoader.instance().reset_cache()
    except (ImportError, AttributeError):
        pass  # a Ray without tokens


def _has_shared_memory() -> bool:
    try:
        return shutil.disk_usage("/dev/shm").free > 1.2 * OBJECT_STORE_BYTES
    except OSError:
        return False


def _reason(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]


def nodes_now() -> dict[str, NodeRoom]:
    """The nodes that are up and what of them is free, by id. What is free may be a moment old."""
    free = _free_by_node()
    up = [node for node in ray.nodes() if node["Alive"]]
    return {node["NodeID"]: _room(node["Resources"], free.get(node["NodeID"]) or node["Resources"]) for node in up}


def machines_at(address: str, device: str) -> Machines:
    """What the nodes of a cluster have that are up now.

    Raises:
        InputError: there is no cluster at the address.
    """
    with connected(address, 0):
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    scarce = "GPU" if device == "cuda" else "CPU"
    places = tuple(int(node[scarce]) for node in nodes if node.get(scarce, 0) >= 1)
    cards = {name.removeprefix(_CARD) for node in nodes if node.get("GPU") for name in node if name.startswith(_CARD)}
    card = cards.pop() if device == "cuda" and len(cards) == 1 else ""  # of several kinds no plan is made
    return Machines(device=device, card=card, places=places)


def _room(total: dict[str, float], free: dict[str, float]) -> NodeRoom:
    def known(amounts: dict[str, float]) -> dict[str, float]:
        return {name: float(amounts.get(name, 0.0)) for name in ("CPU", "GPU")}

    return NodeRoom(total=known(total), free=known(free))


def _free_by_node() -> dict[str, dict[str, float]]:
    try:
        return available_resources_per_node()
    except Exception:  # noqa: BLE001  # private: no public call tells it by node
        return {}


def draining_nodes() -> frozenset[str]:
    """Ids of the nodes that will be taken away soon; empty where this Ray cannot say."""
    try:
        return frozenset(state.get_draining_nodes())
    except Exception:  # noqa: BLE001  # private: Ray Train's PreemptionWatcher reads it, there is no public way
        return frozenset()
