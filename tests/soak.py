"""How much a test does: its PR figure in `make test`, its NIGHT figure times a scale in a soak."""

import functools
import os
import secrets
from collections.abc import Callable
from typing import Any

import hypothesis


def soak_scale() -> float | None:
    """Return the scale of a soak, None in an ordinary test run."""
    text = os.environ.get("WSISEG_SOAK_SCALE")
    return float(text) if text else None


@functools.cache
def base_seed() -> int:
    """Return the seed of the whole run: 0, or in a soak a drawn one that can be given again."""
    text = os.environ.get("WSISEG_SOAK_SEED")
    drawn = 0 if soak_scale() is None else secrets.randbelow(2**31)
    return int(text) if text else drawn


def chosen(*, pr: int, night: int) -> int:
    """Return how often to do something."""
    scale = soak_scale()
    return pr if scale is None else max(1, round(night * scale))


def examples(*, pr: int, night: int) -> Callable[[Any], Any]:
    """Let a property be tried on that many examples; a soak's follow from its seed."""

    def decorate(test: Any) -> Any:
        limited = hypothesis.settings(max_examples=chosen(pr=pr, night=night), deadline=None)(test)
        return limited if soak_scale() is None else hypothesis.seed(base_seed())(limited)

    return decorate
