"""A Ray head node in processes of its own, as `ray start --head` makes it, on this machine's localhost alone."""

import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
from waiting import PATIENCE_S, wait_for

STORE_BYTES = 80 * 2**20
MARK = "CINERAY_TEST_CLUSTER"  # in the environment of every process of the cluster, which they hand down


@dataclass(frozen=True)
class HeadNode:
    """Where jobs are submitted, and the environment in which its clients run."""

    dashboard: str
    env: dict[str, str]

    def ray(self, *arguments: str) -> subprocess.Popen[str]:
        """A command of Ray's, such as ("job", "stop", ID)."""
        return self._start("ray.scripts.scripts", *arguments)

    def cineray(self, *arguments: str) -> subprocess.Popen[str]:
        return self._start("cineray", *arguments)

    def _start(self, module: str, *arguments: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=self.env,
        )


@contextmanager
def head_node(num_cpus: int, timeout_s: float = PATIENCE_S) -> Iterator[HeadNode]:
    """A head node while the block runs; afterwards none of its processes is left, whatever happened."""
    mark = uuid.uuid4().hex
    with tempfile.TemporaryDirectory(prefix="cr-", ignore_cleanup_errors=True) as short:  # sockets have short names
        folder = Path(short)
        (folder / "home").mkdir()  # no token of another Ray
        env = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")} | {
            "HOME": str(folder / "home"),
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]),
            "PYTHONSAFEPATH": "1",
            "RAY_worker_niceness": "0",  # as in conftest.py
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # or it would listen on every interface
            MARK: mark,
        }
        dashboard, client = free_ports(2)
        node = HeadNode(f"http://127.0.0.1:{dashboard}", env)
        log = (folder / "start.log").open("w+")
        start = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--port", "0"]
        start += ["--node-ip-address", "127.0.0.1", "--dashboard-host", "127.0.0.1", "--dashboard-port", str(dashboard)]
        start += ["--ray-client-server-port", str(client), "--num-cpus", str(num_cpus), "--disable-usage-stats"]
        start += ["--object-store-memory", str(STORE_BYTES), "--temp-dir", str(folder / "ray")]
        try:
            process = subprocess.Popen(start, stdout=log, stderr=log, env=env)
            is_up = wait_for(lambda: process.poll() is not None or _answers(node.dashboard), timeout_s)
            log.seek(0)
            assert is_up, log.read()
            assert process.poll() is None, log.read()
            yield node
        finally:
            log.close()
            end_processes(mark)


def free_ports(number: int) -> list[int]:
    """Ports that were free a moment ago, each another one."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(number)]
    try:
        return [listening.getsockname()[1] for listening in sockets]
    finally:
        for listening in sockets:
            listening.close()


def end_processes(mark: str) -> None:
    """Kills every process that has the mark, those too that are born meanwhile; raises if one stays."""
    deadline = time.monotonic() + PATIENCE_S
    while left := marked(mark):
        assert time.monotonic() < deadline, f"processes of the cluster that do not end: {left}"
        for process in left:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(left, timeout=5)


def marked(mark: str) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.environ().get(MARK) == mark and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def _answers(address: str) -> bool:
    try:
        with urllib.request.urlopen(f"{address}/api/version", timeout=2) as response:
            return response.status == 200
    except (urllib.error.URLError, OSError):
        return False
