"""How a process ends that is told to: after its step where it can, within seconds wherever it stands.

A handler of Python's runs between two steps of the interpreter: not while the main thread waits inside a library. So a
thread hears of every signal too, and ends the process where the main thread does not.
"""

import os
import select
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from cineray.jobs.console.terminal import tell

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
UNWIND_S = 6.0  # to give back lease and actors, which takes one to three seconds
# a batch that was asked: the step in flight, the clean-up; above RayBatch's DRAIN_S, within submit's STOP_WAIT_S
PATIENCE_S = 38.0


class Stopped(KeyboardInterrupt):
    """Raised in the main thread by a signal; `number` is the signal's."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


class StopRequest:
    """A handler: the first signal is kept in `number`, for a loop to look at; the next one interrupts at once.

    Args:
        on_stop: called with the first signal's number.
    """

    def __init__(self, on_stop: Callable[[int], None] | None = None) -> None:
        self.number: int | None = None
        self._on_stop = on_stop

    def __call__(self, number: int, _frame: FrameType | None) -> None:
        if self.number is not None:
            raise Stopped(number)
        self.number = number
        if self._on_stop is not None:
            self._on_stop(number)


@contextmanager
def stop_requested(on_stop: Callable[[int], None] | None = None) -> Iterator[StopRequest]:
    """While it lasts, SIGTERM, Ctrl-C and SIGHUP ask instead of ending the process."""
    request = StopRequest(on_stop)
    with _handled_by(request):
        yield request


@contextmanager
def kept_handlers() -> Iterator[None]:
    """Puts the handlers back that a library replaces meanwhile, as ray.init does."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def ending_on_signals() -> Iterator[None]:
    """Around all that a process does: a signal raises `Stopped`, and ends the process if that does not."""

    def interrupt(number: int, _frame: FrameType | None) -> None:
        raise Stopped(number)

    read, write = os.pipe()
    os.set_blocking(write, False)
    before = signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    threading.Thread(target=_watch, args=(read,), name="cineray-signals", daemon=True).start()
    try:
        with _handled_by(interrupt):
            yield
    finally:
        signal.set_wakeup_fd(before)
        os.close(write)


@contextmanager
def _handled_by(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """What is ignored stays so: SIGHUP under nohup, Ctrl-C for a job in the background of a script."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    caught = {number: old for number, old in before.items() if old is not signal.SIG_IGN}
    for number in caught:
        signal.signal(number, handler)
    try:
        yield
    finally:
        for number, old in caught.items():
            signal.signal(number, old if old is not None else signal.SIG_DFL)


def _watch(read: int) -> None:
    """Ends the process by force where its main thread does not end it in time, or was asked three times."""
    deadline_s, last, num_asked = float("inf"), 0, 0
    while True:
        wait_s = max(0.0, deadline_s - time.monotonic())
        ready, _, _ = select.select([read], [], [], None if wait_s == float("inf") else wait_s)
        if not ready:
            end_now(last)
        numbers = os.read(read, 64)
        if not numbers:
            os.close(read)
            return  # the command is over
        for number in numbers:
            if number not in SIGNALS:
                continue
            last, num_asked = number, num_asked + 1
            if num_asked > 2:
                end_now(number)
            is_patient = num_asked == 1 and isinstance(signal.getsignal(number), StopRequest)
            deadline_s = min(deadline_s, time.monotonic() + (PATIENCE_S if is_patient else UNWIND_S))


def end_now(number: int) -> None:
    """Ends this process and those that it started, at once."""
    tell(f"cineray: ended by {signal.Signals(number).name}; finished clips are kept")
    try:
        import psutil

        for child in psutil.Process().children(recursive=True):
            child.kill()
    finally:
        os._exit(128 + number)
