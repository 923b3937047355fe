"""Run a command and tell its wall time and peak memory."""

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Cost:
    """Wall time, the peak resident memory of the process, and what it printed.

    The kernel counts what this process held when it started the child: keep it small.
    """

    seconds: float
    peak_mib: float
    output: str = ""
    cpu_s: float = 0.0
    """Of all its threads; unlike the wall time it hardly depends on what else a machine does."""


def cost(*command: str) -> Cost:
    """Run a child process that must succeed."""
    began = time.perf_counter()
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.PIPE)
        assert process.stderr is not None
        errors = process.stderr.read().decode()
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - began
        output.seek(0)
        printed = output.read().decode()
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != 0:
        sys.exit(f"{' '.join(command)} exited with {process.returncode}:\n{errors}")
    cpu_s = usage.ru_utime + usage.ru_stime
    return Cost(seconds, usage.ru_maxrss / 1024, printed, cpu_s)


def report(name: str, costs: Sequence[Cost]) -> float:
    """Print minimum, median and maximum time and the highest peak; return the median time."""
    times = [c.seconds for c in costs]
    peak = max(c.peak_mib for c in costs)
    median = statistics.median(times)
    print(
        f"{name:50s} {min(times):8.2f} {median:8.2f} {max(times):8.2f} s  {peak:7.0f} MiB",
        flush=True,
    )
    return median


def header() -> None:
    """Print the head of the table."""
    print(f"{'':50s} {'min':>8s} {'median':>8s} {'max':>8s}       peak")
