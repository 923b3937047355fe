"""Counts of what was survived, detected and, if ever, missed."""

SURVIVED = ("kills survived", "faults injected", "mutants survived", "corruptions detected")
MUST_BE_ZERO = ("silent corruptions", "parent deaths", "PHI leaks")


class Scorecard:
    """One number per row; a row that nothing touched says so instead of claiming zero."""

    def __init__(self) -> None:
        self._counts: dict[str, int] = {}

    def add(self, row: str, count: int = 1) -> None:
        """Add to a row; `count` 0 says that it was looked for and not found."""
        if row not in (*SURVIVED, *MUST_BE_ZERO):
            msg = f"{row!r} is no row of the scorecard: {[*SURVIVED, *MUST_BE_ZERO]}"
            raise KeyError(msg)
        self._counts[row] = self._counts.get(row, 0) + count

    @property
    def is_empty(self) -> bool:
        return not self._counts

    def lines(self) -> list[str]:
        """Return the table, one line per row."""
        table = []
        for row in (*SURVIVED, *MUST_BE_ZERO):
            count = self._counts.get(row)
            is_bad = row in MUST_BE_ZERO and count
            shown = "not run" if count is None else f"{count:,}"
            table.append(f"{row:<22}{shown:>10}{'   <-- must be 0' if is_bad else ''}")
        return table
