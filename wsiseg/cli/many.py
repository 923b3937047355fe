"""Run one stage over many slides: a bad slide costs that slide, and the exit code says so."""

import dataclasses
import logging
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

import click

from wsiseg.cli.report import TerminalProgress, print_summary
from wsiseg.cluster import map_items
from wsiseg.outcome import Outcome

logger = logging.getLogger(__name__)

JobT = TypeVar("JobT")
Command = Callable[..., Any]


def many_slides_options(command: Command) -> Command:
    """Add --workers, --scheduler and --json."""
    for option in (
        click.option("--json", "as_json", is_flag=True, help="Print the summary as JSON."),
        click.option("--scheduler", metavar="ADDR", help="Address of a dask scheduler to use."),
        click.option(
            "--workers",
            type=click.IntRange(1, 1024),
            default=1,
            show_default=True,
            help="Processes on this machine; each takes one slide at a time.",
        ),
    ):
        command = option(command)
    return command


def overwrite_option(command: Command) -> Command:
    """Add --overwrite/--resume."""
    return click.option(
        "--overwrite/--resume",
        default=False,
        show_default="resume",
        help="Start again, or go on where an earlier run of the same command stopped.",
    )(command)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class LessMemory(Generic[JobT]):
    """How a command tries a slide once more that ran out of memory.

    `lowered` : what the job of the second try has less of. `remedy` : what the user can do where
    that is not enough either.
    """

    job: Callable[[JobT], JobT]
    lowered: str
    remedy: str


def run_over_slides(  # noqa: PLR0913 - all but two by their names
    function: Callable[..., Any],
    jobs: Sequence[JobT],
    *,
    slide_ids: Sequence[str],
    label: str,
    columns: Sequence[str],
    workers: int,
    scheduler: str | None,
    as_json: bool,
    less_memory: LessMemory[JobT] | None = None,
) -> int:
    """Map `function(job)` over slides, print failures as they come and the table at the end.

    With one worker `function` also gets `progress=`. Returns the exit code: 1 if any failed.
    """
    failures: dict[int, str] = {}
    progress = TerminalProgress()
    in_process = workers <= 1 and scheduler is None
    if not in_process:
        progress.start(label, len(jobs), unit="slides")

    def on_result(index: int, outcome: Outcome) -> None:
        if outcome.error is not None:
            failures[index] = outcome.error
            if outcome.is_memory:
                remedy = _memory_remedy(less_memory, in_process=in_process)
                failures[index] += f"; {'if it was memory, ' if outcome.is_death else ''}{remedy}"
            click.echo(f"error: {_named(slide_ids[index], failures[index])}", err=True)
            logger.debug("%s", outcome.traceback)
        if not in_process:
            progress.advance()

    def second_try(index: int, outcome: Outcome) -> JobT | None:
        if less_memory is None or not outcome.is_memory:
            return None
        text = _named(slide_ids[index], outcome.error or "")
        logger.warning("%s; trying it again with %s", text, less_memory.lowered)
        return less_memory.job(jobs[index])

    outcomes = map_items(
        function,
        jobs,
        workers=workers,
        scheduler=scheduler,
        on_result=on_result,
        second_try=second_try,
        progress=progress,
    )
    progress.finish()
    rows = [
        {"slide_id": slide_ids[i], "status": "failed", "error": failures[i]}
        if i in failures
        else {"status": "ok", **dataclasses.asdict(outcome.value)}
        for i, outcome in enumerate(outcomes)
    ]
    print_summary(
        rows,
        columns=("slide_id", "status", *columns, "error"),
        as_json=as_json,
        title=f"{label}: {len(jobs) - len(failures)} of {len(jobs)} slides done",
    )
    return 1 if failures else 0


def _named(slide_id: str, error: str) -> str:
    return error if f"slide '{slide_id}'" in error else f"slide '{slide_id}': {error}"


def _memory_remedy(less_memory: LessMemory[Any] | None, *, in_process: bool) -> str:
    """Return what to do about a want of memory."""
    remedies = [
        *([] if in_process else ["fewer --workers"]),
        *([] if less_memory is None else [less_memory.remedy]),
        "a machine with more memory",
    ]
    return f"use {', '.join(remedies[:-1])}{' or ' if remedies[1:] else ''}{remedies[-1]}"
