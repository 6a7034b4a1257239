"""Whether a Ray cluster can be reached, known before Ray is asked: its own attempts last for minutes."""

import os
import socket

from cineray.pipeline.request import InputError

CONNECT_S = 5.0  # a TCP connection across continents takes 0.3 s
ANSWER_S = 8.0
SETTINGS = 4  # type of the frame that begins every HTTP/2 connection


def check_address(address: str) -> None:
    """Looks whether Ray's head node listens at HOST:PORT, or where `auto` points to.

    Raises:
        InputError: another form, no such host, nobody there, or somebody who does not answer as Ray does.
    """
    if "://" in address:
        raise InputError(
            f"--address must be local, auto or HOST:PORT of the head node, got {address}; for a cluster behind a "
            "gateway use cineray submit --cluster http://HOST:8265"
        )
    found = _where_auto_points() if address == "auto" else address
    if found is None:
        return  # ray.init says that there is none
    host, port = _host_and_port(found, address)
    try:
        with socket.create_connection((host, port), timeout=CONNECT_S) as connection:
            if not os.environ.get("RAY_USE_TLS"):
                _check_answer(connection)
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise _no_cluster(address, found, reason) from None


def _host_and_port(found: str, address: str) -> tuple[str, int]:
    host, colon, port = found.rpartition(":")
    if not (colon and port.isascii() and port.isdecimal() and 0 < len(port) <= 5 and 0 < int(port) < 65536 and host):
        raise InputError(f"--address must be local, auto or HOST:PORT of the head node, got {address}")
    return host.removeprefix("[").removesuffix("]"), int(port)


def _no_cluster(address: str, found: str, reason: str) -> InputError:
    where = f"{address} (that is {found})" if found != address else address
    return InputError(
        f"no Ray cluster at --address {where}: {reason}; leave --address out to render on this machine alone"
    )


def _where_auto_points() -> str | None:
    try:
        from ray._private.services import canonicalize_bootstrap_address

        return canonicalize_bootstrap_address("auto")
    except Exception:  # noqa: BLE001  # private; and what it finds wrong, ray.init says too
        return None


def _check_answer(connection: socket.socket) -> None:
    """
    Raises:
        OSError: whoever listens does not speak HTTP/2, as every gRPC server does (RFC 9113, section 3.4).
    """
    connection.settimeout(ANSWER_S)
    settings = bytes([0, 0, 0, SETTINGS, 0, 0, 0, 0, 0])
    connection.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + settings)
    answer = b""
    while len(answer) < len(settings):
        try:
            more = connection.recv(len(settings) - len(answer))
        except TimeoutError:
            raise OSError(f"nobody answers there within {ANSWER_S:g} s") from None
        if not more:
            break
        answer += more
    if len(answer) < len(settings) or answer[3] != SETTINGS:
        raise OSError("what listens there is not a Ray head node")
