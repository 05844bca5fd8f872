"""Who calls the poll: a daemon thread in earnest, a simulated clock in tests."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Protocol


class Pace(Protocol):
    """Runs a poll again and again beside the caller."""

    def start(self, poll: Callable[[], None], period_s: float) -> None:
        """Calls ``poll`` from now on, ``period_s`` seconds after each return."""
        ...

    def stop(self) -> None:
        """Returns when no poll runs any more."""
        ...

    def wait(self, seconds: float) -> None:
        """Lets ``seconds`` pass in the caller, with polls going on."""
        ...


class ThreadPace:
    """Polls from one daemon thread."""

    def __init__(self) -> None:
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self, poll: Callable[[], None], period_s: float) -> None:
        self._stop.clear()

        def loop() -> None:
            while not self._stop.wait(period_s):
                poll()

        self._thread = threading.Thread(target=loop, name="hestctl-meter", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        if self._thread is not None:
            # Bounded: a driver call that hangs must not hang the program; the thread is a daemon.
            self._thread.join(timeout=5.0)
            self._thread = None

    def wait(self, seconds: float) -> None:
        time.sleep(seconds)
