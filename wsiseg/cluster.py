"""Map a function over slides: one at a time, on this machine's cores, or on a dask cluster.

One item is one task. What goes wrong with an item, the death of its worker process included,
becomes an `Outcome` of that item; nothing that one item does fails another. Knows nothing of
slides or of what the function writes. Functions must be idempotent (every stage is:
it goes on where it stopped), for an item whose worker died is tried again. The caller may give
another item for that, such as one that takes less memory.
"""

import contextlib
import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from wsiseg.errors import ConfigError
from wsiseg.outcome import MAX_DEATHS, Outcome, attempt, death, failure
from wsiseg.progress import Progress
from wsiseg.sequence import run_in_sequence

if TYPE_CHECKING:
    from distributed import Client, Future, LocalCluster

ItemT = TypeVar("ItemT")

CONNECT_TIMEOUT_S = 15
"""A scheduler that is there answers within a second, over a slow network within a few."""


def map_items(
    function: Callable[[ItemT], object],
    items: Sequence[ItemT],
    *,
    workers: int = 1,
    scheduler: str | None = None,
    on_result: Callable[[int, Outcome], None],
    second_try: "Callable[[int, Outcome], ItemT | None] | None" = None,
    progress: Progress | None = None,
) -> list[Outcome]:
    """Return the outcome of `function(item)` for each item, in the order of the items.

    Parameters
    ----------
    function
        Importable by name, as are the items' types: they travel to other processes. With one
        worker and no scheduler dask is not even imported: a single item runs in this process, and
        of several one after the other runs in a child, whose death costs the item only.
    workers
        Processes on this machine, each with one item at a time.
    scheduler
        Address of a dask scheduler ("tcp://10.0.0.5:8786") to use instead.
    on_result
        Called in this thread with the item's index as each outcome arrives, in any order.
    second_try
        Called in this thread when an item failed, or lost its worker, for the first time, and not
        again for that item. Gives the item to go on with, or None: a failure is then the outcome,
        and after a death the same item is tried again.
    progress
        With one worker and no scheduler passed on to the function as `progress`; else not used.

    Raises
    ------
    ConfigError
        No scheduler answers at the address.
    KeyboardInterrupt
        Passed on after all items were cancelled and the local workers ended.
    """
    if scheduler is None and workers <= 1:
        return run_in_sequence(
            function, items, on_result=on_result, second_try=second_try, progress=progress
        )
    if not items:
        return []
    opened = _local_client(min(workers, len(items))) if scheduler is None else _client(scheduler)
    with opened as client:
        return _Mapping(client, function, items, on_result=on_result, second_try=second_try).run()


class _Mapping:
    """One call of `map_items` on a dask cluster.

    When a worker dies, dask blames every task that it had been sent, not only the one that was
    running. So an item is judged only by a death it met alone: those that lost a worker in company
    go back to the pool, then wait until the pool is empty and are tried one by one.
    """

    def __init__(
        self,
        client: "Client",
        function: Callable[[Any], object],
        items: Sequence[Any],
        *,
        on_result: Callable[[int, Outcome], None],
        second_try: Callable[[int, Outcome], Any] | None,
    ) -> None:
        self._client = client
        self._function = function
        self._items = list(items)
        self._on_result = on_result
        self._second_try = second_try
        self._began = time.perf_counter()
        self._deaths = [0] * len(items)
        self._attempts = [0] * len(items)
        self._had_second_try: set[int] = set()
        self._outcomes: dict[int, Outcome] = {}

    def run(self) -> list[Outcome]:
        """Work until every item has its outcome; cancel what is left if interrupted."""
        suspects = sorted(self._drain(range(len(self._items)), deaths_allowed=MAX_DEATHS - 1))
        for index in suspects:
            while index not in self._outcomes:
                self._drain([index], deaths_allowed=1)
                if index not in self._outcomes and self._deaths[index] >= MAX_DEATHS:
                    self._settle(index, self._death(index))
        return [self._outcomes[index] for index in range(len(self._items))]

    def _drain(self, indices: Sequence[int], *, deaths_allowed: int) -> set[int]:
        """Run items together; return those whose worker died `deaths_allowed` times or more."""
        from distributed import as_completed

        index_of = {self._submit(index): index for index in indices}
        died: set[int] = set()
        finished = as_completed(list(index_of), loop=self._client.loop)
        try:
            for future in finished:
                index = index_of.pop(future)
                outcome = self._outcome(index, future)
                is_changed = self._change_item(index, outcome or self._death(index))
                if outcome is None and self._deaths[index] >= deaths_allowed:
                    died.add(index)
                elif outcome is None or is_changed:
                    again = self._submit(index)
                    index_of[again] = index
                    finished.add(again)
                else:
                    self._settle(index, outcome)
        except BaseException:
            self._client.cancel(list(index_of), force=True)
            raise
        return died

    def _change_item(self, index: int, outcome: Outcome) -> bool:
        """Put what the caller gives for a second try in an item's place; whether it gave one."""
        if outcome.error is None or self._second_try is None or index in self._had_second_try:
            return False
        self._had_second_try.add(index)
        item = self._second_try(index, outcome)
        if item is None:
            return False
        self._items[index] = item
        return True

    def _submit(self, index: int) -> "Future[Outcome]":
        # The key is ours, so that equal items are not merged into one task, and names the
        # attempt, so that dask does not remember the failure of the one before.
        self._attempts[index] += 1
        return self._client.submit(
            attempt,
            self._function,
            self._items[index],
            key=(f"wsiseg-{id(self):x}", index, self._attempts[index]),
            pure=False,
        )

    def _outcome(self, index: int, future: "Future[Outcome]") -> Outcome | None:
        """Return what came of a finished future, or None if its worker died."""
        from distributed import KilledWorker

        try:
            outcome = future.result()
        except KilledWorker as error:
            self._deaths[index] += error.allowed_failures + 1
            return None
        except Exception as error:  # noqa: BLE001 - such as a value that cannot be sent back
            return failure(error, self._began)
        return outcome

    def _death(self, index: int) -> Outcome:
        how = "died (killed or out of memory)"
        return death(self._deaths[index], how, self._began, is_memory=True)

    def _settle(self, index: int, outcome: Outcome) -> None:
        self._outcomes[index] = outcome
        self._on_result(index, outcome)


@contextlib.contextmanager
def _client(address: str) -> Iterator["Client"]:
    """Connect to a scheduler of the user's; it and its workers are left running."""
    from distributed import Client

    try:
        client = Client(address, timeout=CONNECT_TIMEOUT_S, set_as_default=False)
    except (OSError, ValueError) as error:
        msg = (
            f"--scheduler {address}: no dask scheduler answers there ({error}); "
            "start one with `dask scheduler`, or use --workers"
        )
        raise ConfigError(msg) from error
    with client:
        yield client


@contextlib.contextmanager
def _local_client(num_workers: int) -> Iterator["Client"]:
    """Start worker processes on this machine, reachable from this machine only."""
    import dask
    from distributed import Client, LocalCluster
    from distributed.system import MEMORY_LIMIT

    # `silence_logs` ends with the cluster, whose processes still talk of its end after it.
    logging.getLogger("distributed").setLevel(logging.CRITICAL)
    with (
        _restored_environment(),
        dask.config.set(_local_settings(num_workers)),
        LocalCluster(
            n_workers=num_workers,
            threads_per_worker=1,
            processes=True,
            host="127.0.0.1",
            dashboard_address=None,
            scheduler_kwargs={"dashboard_address": "127.0.0.1:0"},  # else a fixed port is taken
            memory_limit=MEMORY_LIMIT // num_workers,
            silence_logs="CRITICAL",  # a worker's death is told by its item's Outcome
        ) as cluster,
        Client(cluster, set_as_default=False) as client,
    ):
        try:
            yield client
        finally:
            cluster.sync(_kill_workers, cluster)


async def _kill_workers(cluster: "LocalCluster") -> None:
    """End the worker processes of a cluster whose work is over or given up.

    What they did is told or will be done again, so they need no farewell; and dask's own, which
    waits, never returns if a worker has just died and its successor is slow to start.
    """
    for nanny in cluster.workers.values():
        nanny.close_gracefully(reason="the mapping is over")  # else it starts a successor
        running = nanny.process and nanny.process.process
        if running is not None:
            await running.kill()


def _local_settings(num_workers: int) -> dict[str, object]:
    """Return dask's configuration for a cluster of ours."""
    num_threads = max(1, (os.cpu_count() or 1) // num_workers)
    libraries = ("OMP", "MKL", "OPENBLAS", "NUMBA")
    return {
        "distributed.scheduler.allowed-failures": 0,  # `_Mapping` counts deaths itself
        "distributed.scheduler.worker-saturation": 1.0,  # an item waits where nobody kills it
        "distributed.scheduler.http.routes": [],
        # A worker that died is replaced by its nanny; on a busy machine that takes longer than
        # the 15 s after which the cluster would drop both.
        "distributed.deploy.lost-worker-timeout": "1 hour",
        # One item's arrays are no data of dask's: nothing could be spilled, and a worker paused
        # for memory that the allocator keeps would never go on. Only the last resort stays.
        "distributed.worker.memory.target": False,
        "distributed.worker.memory.spill": False,
        "distributed.worker.memory.pause": False,
        "distributed.worker.memory.terminate": 0.95,
        "distributed.nanny.pre-spawn-environ": {
            f"{library}_NUM_THREADS": num_threads for library in libraries
        },
        "distributed.comm.timeouts.connect": f"{CONNECT_TIMEOUT_S}s",
    }


@contextlib.contextmanager
def _restored_environment() -> Iterator[None]:
    """Undo what dask sets in this process's environment so that its children inherit it."""
    before = dict(os.environ)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
