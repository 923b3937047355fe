"""How much of the time the network works, and how much it waits."""

import contextlib
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Use:
    """What a run of the engine spent.

    `lanes` : network calls that can be under way at once (threads on a CPU, 1 on a GPU).
    `wall_s` : from the first window asked for to the last one predicted, `network_s` : in the
    network, summed over lanes, `read_s` : reading, summed over threads (it runs beside the
    network).
    """

    windows: int
    lanes: int
    wall_s: float
    network_s: float
    read_s: float

    @property
    def waiting(self) -> float:
        """Share of the lanes' time in which they do not run the network, whatever the cause.

        Reading that lags behind, blending or writing that hold up the next window, hand-over
        between threads: all of it counts.
        """
        available_s = self.lanes * self.wall_s
        return max(0.0, 1 - self.network_s / available_s) if available_s > 0 else 0.0


def total(uses: Sequence[Use]) -> Use:
    """Return what several runs, one after the other, spent together; there is at least one."""
    return Use(
        windows=sum(use.windows for use in uses),
        lanes=uses[0].lanes,
        wall_s=sum(use.wall_s for use in uses),
        network_s=sum(use.network_s for use in uses),
        read_s=sum(use.read_s for use in uses),
    )


class Meter:
    """Adds up times from several threads."""

    def __init__(self, lanes: int) -> None:
        self._lanes = lanes
        self._lock = threading.Lock()
        self._began_s: float | None = None
        self._ended_s = 0.0
        self._network_s = 0.0
        self._read_s = 0.0
        self._windows = 0

    def begin(self) -> None:
        """Start the clock."""
        self._began_s = time.perf_counter()

    @contextlib.contextmanager
    def reading(self) -> Iterator[None]:
        """Count what is done inside as reading."""
        began_s = time.perf_counter()
        yield
        with self._lock:
            self._read_s += time.perf_counter() - began_s

    @contextlib.contextmanager
    def network(self) -> Iterator[None]:
        """Count what is done inside, in this thread, as one window in the network."""
        began_s = time.perf_counter()
        yield
        self.add_network(time.perf_counter() - began_s, windows=1)

    def add_network(self, seconds: float, *, windows: int) -> None:
        """Count network time that was measured elsewhere, such as on a GPU; it ends now."""
        with self._lock:
            self._network_s += seconds
            self._windows += windows
            self._ended_s = time.perf_counter()

    @property
    def use(self) -> Use:
        """What was counted so far."""
        with self._lock:
            began_s = self._ended_s if self._began_s is None else self._began_s
            return Use(
                windows=self._windows,
                lanes=self._lanes,
                wall_s=max(0.0, self._ended_s - began_s),
                network_s=self._network_s,
                read_s=self._read_s,
            )
