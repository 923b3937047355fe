"""How a stage says how far it is, without knowing whether anyone watches."""

from typing import Protocol


class Progress(Protocol):
    """Receives the progress of one piece of work at a time."""

    def start(self, label: str, total: int, *, unit: str, done: int = 0) -> None:
        """Begin `total` units ("tiles", "steps") of work, of which `done` are done already."""

    def advance(self, amount: int = 1, *, note: str = "") -> None:
        """Report `amount` more units; `note` is a short live value such as the loss."""

    def finish(self) -> None:
        """End the present piece of work."""


class SilentProgress:
    """Shows nothing; the default of every stage."""

    def start(self, label: str, total: int, *, unit: str, done: int = 0) -> None:
        """Ignore."""

    def advance(self, amount: int = 1, *, note: str = "") -> None:
        """Ignore."""

    def finish(self) -> None:
        """Ignore."""
