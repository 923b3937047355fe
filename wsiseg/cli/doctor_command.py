"""`wsiseg doctor`: what works on this machine, each point really tried in a child process."""

import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import click

from wsiseg import __version__
from wsiseg.cli.report import print_json, print_summary

PROBE_TIMEOUT_S = 120

PROBES = {
    "openslide": "import openslide; print('OpenSlide', openslide.__library_version__)",
    "zarr": "import zarr; print('zarr', zarr.__version__)",
    "torch": "import torch; print('torch', torch.__version__, 'threads', torch.get_num_threads())",
    "gpu": (
        "import torch; print(torch.cuda.get_device_name(0)) if torch.cuda.is_available() else "
        "print('none: the CPU is used')"
    ),
    "polygon tracer": (
        "import numpy as np; from wsiseg.vector.trace import trace_array; "
        "print(sum(1 for _ in trace_array(np.eye(4, dtype=np.uint8))), 'polygons of a 4 px mask')"
    ),
    "dask": "import distributed; print('distributed', distributed.__version__)",
}
"""Name -> Python whose last printed line is the finding; run apart: a crash is a finding too."""

OPTIONAL = {
    "tiatoolbox": "tia",
    "tensorboard": "log",
    "snakemake": "workflow",
    "dask-jobqueue": "hpc",
}
"""Optional package -> the extra that brings it; found without the seconds of importing it."""


@click.command("doctor")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def doctor_command(*, as_json: bool) -> int:
    """Try what wsiseg needs on this machine and say what is missing."""
    checks: list[dict[str, str]] = [
        _row("wsiseg", "ok", __version__),
        _row("python", "ok", f"{platform.python_version()} on {platform.machine()}"),
        _row("cores", "ok", str(os.cpu_count())),
        *(_row(name, *_probe(code)) for name, code in PROBES.items()),
        _row("temporary folder", *_attempt(_free_space)),
        *(_optional(package, extra) for package, extra in OPTIONAL.items()),
    ]
    if as_json:
        print_json({"schema_version": 1, "checks": checks})
    else:
        print_summary(checks, columns=("check", "status", "finding"), title="doctor", as_json=False)
    return 1 if any(row["status"] == "failed" for row in checks) else 0


def _row(check: str, status: str, finding: str) -> dict[str, str]:
    return {"check": check, "status": status, "finding": finding}


def _probe(code: str) -> tuple[str, str]:
    try:
        done = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            timeout=PROBE_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return "failed", f"no answer in {PROBE_TIMEOUT_S} s"
    lines = (done.stdout if done.returncode == 0 else done.stderr).strip().splitlines()
    return ("ok" if done.returncode == 0 else "failed"), (lines or [f"exit {done.returncode}"])[-1]


def _attempt(check: Callable[[], str]) -> tuple[str, str]:
    try:
        return "ok", check()
    except OSError as error:
        return "failed", str(error)


def _free_space() -> str:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "probe").write_bytes(b"wsiseg")
        return f"writable, {shutil.disk_usage(folder).free / 1e9:.0f} GB free"


def _optional(package: str, extra: str) -> dict[str, str]:
    try:
        return _row(package, "ok", importlib.metadata.version(package))
    except importlib.metadata.PackageNotFoundError:
        return _row(package, "absent", f"optional; pip install 'wsiseg[{extra}]'")
