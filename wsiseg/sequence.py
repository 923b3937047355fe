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


def run_in_sequence(
    function: Callable[..., object],
    items: Sequence[ItemT],
    *,
    on_result: Callable[[int, Outcome], None],
    second_try: Callable[[int, Outcome], ItemT | None] | None,
    progress: Progress | None,
) -> list[Outcome]:
    """Return the outcomes of items that are worked on one at a time; see `cluster.map_items`."""
    call = functools.partial(_call, function, progress is not None)
    shown = progress or SilentProgress()
    outcomes = []
    with contextlib.closing(Child(call)) as child:
        work = functools.partial(call, progress=shown)
        if len(items) != 1:
            work = functools.partial(_call_in_child, child, progress=shown)
        for index, item in enumerate(items):
            ask = None if second_try is None else functools.partial(second_try, index)
            outcomes.append(_outcome_of(work, item, ask))
            shown.finish()
            on_result(index, outcomes[index])
    return outcomes


def _outcome_of(
    work: Callable[[ItemT], Outcome],
    item: ItemT,
    second_try: Callable[[Outcome], ItemT | None] | None,
) -> Outcome:
    """Try an item until it is done, has failed, or died too often."""
    deaths = 0
    while True:
        began = time.perf_counter()
        try:
            outcome = work(item)
        except ChildDiedError as error:
            deaths += 1
            is_memory = error.exit_code == -signal.SIGKILL  # as the system ends what takes too much
            outcome = death(deaths, str(error), began, is_memory=is_memory)
        again = None
        if outcome.error is not None and second_try is not None:
            again, second_try = second_try(outcome), None
        if deaths == MAX_DEATHS or not (outcome.is_death or again is not None):
            return outcome
        item = item if again is None else again


def _call(
    function: Callable[..., object],
    takes_progress: bool,
    item: object,
    *,
    progress: Progress,
) -> Outcome:
    options = {"progress": progress} if takes_progress else {}
    return attempt(function, item, **options)


def _call_in_child(child: Child, item: object, *, progress: Progress) -> Outcome:
    began = time.perf_counter()
    try:
        outcome: Outcome = child.run(item, progress)
    except UnsentError as error:
        return failure(error, began)
    return outcome
