"""Work on items one after the other: a single one in this process, of several each in a child.

Started for a single slide, the child would take a second for what the shell tells as well; of a
folder, the slide that ends its process must not keep the others from their turn, run after run.
"""

import contextlib
import functools
import signal
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

from wsiseg.child import Child, ChildDiedError, UnsentError
from wsiseg.outcome import MAX_DEATHS, Outcome, attempt, death, failure
from wsiseg.progress import Progress, SilentProgress

ItemT = TypeVar("ItemT")

Attempt = Callable[[ItemT, int], Outcome]
"""Works on an item whose process died so often before."""


def run_in_sequence(
    function: Callable[..., object],
    items: Sequence[ItemT],
    *,
    on_result: Callable[[int, Outcome], None],
    second_try: Callable[[int, Outcome], ItemT | None] | None,
    progress: Progress | None,
) -> list[Outcome]:
    """Return the outcomes of items that are worked on one at a time; see `cluster.map_items`."""
    outcomes = []
    with contextlib.ExitStack() as stack:
        work: Attempt[ItemT]
        if len(items) == 1:
            work = functools.partial(_attempt_here, function, progress)
        else:
            child = stack.enter_context(contextlib.closing(Child(_Call(function, progress))))
            work = functools.partial(_attempt_in_child, child, progress)
        for index, item in enumerate(items):
            ask = None if second_try is None else functools.partial(second_try, index)
            outcomes.append(_outcome_of(work, item, ask))
            if progress is not None:
                progress.finish()
            on_result(index, outcomes[index])
    return outcomes


def _outcome_of(
    work: "Attempt[ItemT]", item: ItemT, second_try: Callable[[Outcome], ItemT | None] | None
) -> Outcome:
    """Try an item until it is done, has failed, or died too often."""
    deaths = 0
    while True:
        outcome = work(item, deaths)
        deaths += outcome.is_death
        again = None
        if outcome.error is not None and second_try is not None:
            again, second_try = second_try(outcome), None
        if deaths == MAX_DEATHS or not (outcome.is_death or again is not None):
            return outcome
        item = item if again is None else again


def _attempt_here(
    function: Callable[..., object], progress: Progress | None, item: object, _deaths: int
) -> Outcome:
    options = {} if progress is None else {"progress": progress}
    return attempt(function, item, **options)


def _attempt_in_child(
    child: Child, progress: Progress | None, item: object, deaths: int
) -> Outcome:
    began = time.perf_counter()
    try:
        outcome: Outcome = child.run(item, progress or SilentProgress())
    except ChildDiedError as error:
        is_memory = error.exit_code == -signal.SIGKILL  # as the system ends what takes too much
        return death(deaths + 1, str(error), began, is_memory=is_memory)
    except UnsentError as error:
        return failure(error, began)
    return outcome


class _Call:
    """What the child calls; travels to it."""

    def __init__(self, function: Callable[..., object], progress: Progress | None) -> None:
        self._function = function
        self._takes_progress = progress is not None

    def __call__(self, item: object, *, progress: Progress) -> Outcome:
        return _attempt_here(self._function, progress if self._takes_progress else None, item, 0)
