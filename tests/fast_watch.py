"""What a test marked `fast` must not do: start another program or process, open torch.distributed, take a Ray."""

import sys
from collections.abc import Callable
from typing import Any

import torch.distributed as dist

# Python's audit events (docs.python.org/3/library/audit_events.html); ray.init starts programs
STARTING = ("subprocess.Popen", "os.system", "os.fork", "os.forkpty", "os.posix_spawn", "os.exec")


class FastWatch:
    """Notes what a test starts, between `begin` and `end`; what it started goes on."""

    def __init__(self) -> None:
        self._seen: list[str] | None = None
        sys.addaudithook(self._hear)
        self._init_process_group = dist.init_process_group

    def begin(self) -> None:
        self._seen = []
        dist.init_process_group = self._noting(self._init_process_group)

    def end(self) -> list[str]:
        """What was started, in order."""
        seen, self._seen = self._seen or [], None
        dist.init_process_group = self._init_process_group
        return seen

    def _hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self._seen is None:
            return
        # multiprocessing reaches its forkserver by a path; what has a number may be a server of the test's own
        to_a_forkserver = event == "socket.connect" and isinstance(arguments[1], str | bytes)
        lists_fonts = event == "subprocess.Popen" and arguments[0] == "fc-list"  # matplotlib, once on each machine
        if (event in STARTING and not lists_fonts) or to_a_forkserver:
            self._seen.append(f"{event} {arguments[1:2] if event == 'subprocess.Popen' else arguments}"[:200])

    def _noting(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def noted(*arguments: Any, **options: Any) -> Any:
            is_fake = (arguments[0] if arguments else options.get("backend")) == "fake"  # it knows no other process
            if self._seen is not None and not is_fake:
                self._seen.append("torch.distributed.init_process_group")
            return original(*arguments, **options)

        return noted
