"""SIGINT and SIGTERM: the first asks the work to stop, the second ends the process at once.

Ending at once is safe because every output survives a SIGKILL; stopping in order only saves work.
"""

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType

GRACE_S = 8.0
"""From the first signal to the end of the process, whatever it does: clusters that preempt a job
kill it after 30 s or more, and a person waits no longer than ten."""

SAME_REQUEST_S = 0.5
"""A terminal signals the whole group, and a workflow manager in it passes the signal on: what comes
within this time of the first is no second request."""

ASK_AGAIN_S = 0.02

_SHOW_CURSOR = b"\x1b[?25h\n"


class Terminated(KeyboardInterrupt):
    """SIGTERM arrived; unwinds like Ctrl-C so that locks and partial files are tidied up."""


class Interrupts:
    """The handler of both signals."""

    def __init__(self) -> None:
        self._first: int | None = None
        self._at_s = 0.0
        self._is_lost = False
        self._timer: threading.Timer | None = None

    def __call__(self, signum: int, frame: FrameType | None) -> None:
        """Handle a signal, in the main thread."""
        now_s = time.monotonic()
        if self._first is not None and not self._is_lost:
            if now_s - self._at_s >= SAME_REQUEST_S:
                _end_at_once(signum)
            return
        if self._first is None:
            self._first, self._at_s = signum, now_s
            self._timer = _start_timer(GRACE_S, _end_at_once, signum)
        self._is_lost = False
        raise Terminated if self.is_terminated else KeyboardInterrupt

    @property
    def is_terminated(self) -> bool:
        """Whether the first signal was SIGTERM."""
        return self._first == signal.SIGTERM

    @contextlib.contextmanager
    def handling(self) -> Iterator[None]:
        """Handle both signals in here; the former handlers come back afterwards."""
        numbers = (signal.SIGINT, signal.SIGTERM)
        former = [signal.signal(number, self) for number in numbers]
        former_hook, sys.unraisablehook = sys.unraisablehook, self._ask_again_if_lost
        try:
            yield
        finally:
            sys.unraisablehook = former_hook
            for number, handler in zip(numbers, former, strict=True):
                signal.signal(number, handler)
            if self._timer is not None:
                self._timer.cancel()

    def _ask_again_if_lost(self, unraisable: "sys.UnraisableHookArgs") -> None:
        """Repeat the signal where Python dropped our exception, as in a destructor's callback."""
        if self._first is None or not isinstance(unraisable.exc_value, KeyboardInterrupt):
            sys.__unraisablehook__(unraisable)
            return
        self._is_lost = True
        _start_timer(ASK_AGAIN_S, _signal_main_thread, self._first)


def _start_timer(after_s: float, function: Callable[[int], object], signum: int) -> threading.Timer:
    timer = threading.Timer(after_s, function, [signum])
    timer.daemon = True
    timer.start()
    return timer


def _signal_main_thread(signum: int) -> None:
    identity = threading.main_thread().ident
    assert identity is not None
    signal.pthread_kill(identity, signum)  # to it, so that a call it waits in returns


def _end_at_once(signum: int) -> None:
    if sys.stderr.isatty():
        os.write(2, _SHOW_CURSOR)  # a progress bar hides it
    word = b"terminated" if signum == signal.SIGTERM else b"interrupted"
    os.write(2, word + b"; run the same command again to go on\n")
    os._exit(128 + signum)
