"""How tests wait for other processes: asking now and then, and not for ever."""

import time
from collections.abc import Callable
from typing import Any

PATIENCE_S = 300.0  # no test is about time: as long as the busiest machine may take


def wait_for(condition: Callable[[], Any], timeout_s: float = PATIENCE_S) -> Any:
    """What the condition gives as soon as it is true; its last answer after the timeout."""
    deadline = time.monotonic() + timeout_s
    while not (answer := condition()) and time.monotonic() < deadline:
        time.sleep(0.02)
    return answer
