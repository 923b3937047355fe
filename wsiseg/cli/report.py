"""What a person sees while work goes on and at its end: progress, summary table, JSON."""

import json
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import click
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

LOG_INTERVAL_S = 30.0
"""Without a terminal (a SLURM log) one plain line in this time replaces the live bar."""


class TerminalProgress:
    """Shows `wsiseg.progress.Progress` on stderr: a live bar, or plain lines without a terminal."""

    def __init__(self, *, enabled: bool = True) -> None:
        self._console = Console(stderr=True)
        self._enabled = enabled
        self._live = enabled and self._console.is_terminal
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._label, self._unit, self._total, self._done = "", "", 0, 0
        self._began = self._last = time.monotonic()
        self._first = 0

    def start(self, label: str, total: int, *, unit: str, done: int = 0) -> None:
        """Begin a new bar."""
        self.finish()
        self._label, self._unit, self._total = label, unit, total
        self._done = self._first = done
        self._began = self._last = time.monotonic()
        if self._live:
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=30),
                MofNCompleteColumn(),
                TextColumn("{task.fields[unit]}"),
                TextColumn("{task.fields[rate]}"),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}"),
                console=self._console,
                transient=True,
            )
            self._bar.start()
            self._task = self._bar.add_task(
                label, total=total, completed=done, unit=unit, rate="", note=""
            )

    def advance(self, amount: int = 1, *, note: str = "") -> None:
        """Move on."""
        self._done += amount
        now = time.monotonic()
        rate = (self._done - self._first) / max(now - self._began, 1e-9)
        if self._bar is not None and self._task is not None:
            self._bar.update(
                self._task, completed=self._done, rate=f"{rate:.3g}/s", note=note or ""
            )
        elif self._enabled and now - self._last >= LOG_INTERVAL_S:
            self._last = now
            left_s = (self._total - self._done) / max(rate, 1e-9)
            line = f"{self._label}: {self._done}/{self._total} {self._unit}, {rate:.3g}/s"
            click.echo(f"{line}, {left_s:.0f} s left {note}".rstrip(), err=True)

    def finish(self) -> None:
        """Remove the bar."""
        if self._bar is not None:
            self._bar.stop()
        self._bar = self._task = None


def print_summary(
    rows: Sequence[Mapping[str, Any]], *, columns: Iterable[str], title: str, as_json: bool
) -> None:
    """Print the closing table on stdout, or the rows as one JSON document."""
    if as_json:
        print_json({"schema_version": 1, "results": list(rows)})
        return
    table = Table(title=title, title_justify="left", show_edge=False, pad_edge=False)
    names = [c for c in columns if any(c in row for row in rows)]
    for name in names:
        table.add_column(name.replace("_", " "), overflow="fold")
    for row in rows:
        # Text, not str: a slide named "[red]" must not be read as markup.
        table.add_row(*(Text(_cell(row.get(name))) for name in names))
    width = None if sys.stdout.isatty() else 160
    Console(width=width).print(table)


def print_json(value: object) -> None:
    """Print one JSON document on stdout."""
    click.echo(json.dumps(value, indent=2, ensure_ascii=False, default=str))


def _cell(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, dict):
        return ", ".join(f"{k} {_cell(v)}" for k, v in value.items())
    return str(value)
