"""What came of one item of many: a value, an error, or the death of the process that had it."""

import gc
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from wsiseg.errors import WsisegError
from wsiseg.memory import is_out_of_memory

MAX_DEATHS = 3
"""Worker processes that one item may cost before it is given up. One death can be the machine's
doing (memory taken by a neighbour, a preempted node), three in a row are the item's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What came of one item: a value, or the text of an error.

    `error` is fit to show to a user: the message alone for our own errors, with the type in front
    for others. `traceback` is the worker's, for logs; None where the process died.
    """

    value: Any = None
    """Whatever the function returned; None if it failed. Only the caller knows the type."""
    error: str | None = None
    error_type: str | None = None
    traceback: str | None = None
    seconds: float = 0.0
    is_memory: bool = False
    """It failed for want of memory, or its process died as one does of that."""
    is_death: bool = False
    """Its process died."""


def attempt(function: Callable[..., object], item: object, **options: object) -> Outcome:
    """Call `function(item, **options)`; the one place where any error of an item is caught."""
    began = time.perf_counter()
    try:
        value = function(item, **options)
    except Exception as error:  # noqa: BLE001 - an item's failure must never reach another item
        failed = failure(error, began)
    else:
        return Outcome(value=value, seconds=time.perf_counter() - began)
    if failed.is_memory:
        # A future holds its error, whose traceback holds the frame that holds the future: until
        # the collector comes, so stays all that the failed attempt took.
        gc.collect()
    return failed


def failure(error: BaseException, began: float) -> Outcome:
    """Return the outcome of an item that raised an error."""
    name, text = type(error).__name__, str(error)
    shown = text if isinstance(error, WsisegError) and text else f"{name}: {text}".rstrip(": ")
    return Outcome(
        error=shown,
        error_type=name,
        traceback="".join(traceback.format_exception(error)),
        seconds=time.perf_counter() - began,
        is_memory=is_out_of_memory(error),
    )


def death(deaths: int, how: str, began: float, *, is_memory: bool) -> Outcome:
    """Return the outcome of an item whose process died for the `deaths`-th time."""
    times = "once" if deaths == 1 else f"{deaths} times"
    return Outcome(
        error=f"the worker process {how} {times} on this item",
        error_type="KilledWorker",
        seconds=time.perf_counter() - began,
        is_memory=is_memory,
        is_death=True,
    )
