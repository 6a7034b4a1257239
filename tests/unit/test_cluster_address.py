"""An address at which no Ray is, known within seconds."""

import socket
import threading

import pytest

from cineray.jobs.gangs import cluster_address
from cineray.jobs.gangs.cluster_address import check_address
from cineray.pipeline.request import InputError


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("ray://head:10001", "must be local, auto or HOST:PORT"),
        ("http://head:8265", "use cineray submit --cluster"),
        ("head", "must be local, auto or HOST:PORT"),
        ("head:", "must be local, auto or HOST:PORT"),
        (":6379", "must be local, auto or HOST:PORT"),
        ("head:99999", "must be local, auto or HOST:PORT"),
        ("127.0.0.1:1", "Connection refused"),
        ("[::1]:1", "no Ray cluster at --address"),
        ("no.such.host.invalid:6379", "no Ray cluster at --address"),
        ("a..b:6379", "no Ray cluster at --address"),
        ("\x1b]0;x\x07:6379", "no Ray cluster at --address"),
    ],
)
def test_it_says_what_is_wrong(address, said):
    with pytest.raises(InputError, match=said):
        check_address(address)


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", "not a Ray head node"),
        (b"SSH-2.0-x", "not a Ray head node"),
        (b"", "no Ray cluster"),
        (None, "nobody answers there within"),
        (bytes([0, 0, 6, 4, 0, 0, 0, 0, 0]), None),
    ],
)
def test_another_service_is_not_taken_for_ray(answer, said, monkeypatch):
    monkeypatch.setattr(cluster_address, "ANSWER_S", 0.5 if answer is None else 10.0)
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve():
            connection, _ = server.accept()
            with connection:
                if answer is None:
                    connection.recv(1000)
                    done.wait(10)
                else:
                    connection.sendall(answer)

        done = threading.Event()
        threading.Thread(target=serve, daemon=True).start()
        address = f"127.0.0.1:{server.getsockname()[1]}"
        try:
            if said is None:
                check_address(address)
            else:
                with pytest.raises(InputError, match=said):
                    check_address(address)
        finally:
            done.set()
