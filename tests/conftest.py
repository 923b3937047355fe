"""Fixtures shared by all areas: real data, the command line as a real child process."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

REAL_SLIDE = Path(__file__).parent / "data" / "cmu-1-small-region.svs"
SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture(scope="session")
def real_slide() -> Path:
    """The CC0 Aperio slide: 2220 x 2967 px, 0.499 um/px, one level."""
    return REAL_SLIDE


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Annotated H&E images that are not part of the repository."""
    if not SHARED_DATA.is_dir():
        pytest.skip("the annotated images (../shared/data) are not here")
    return SHARED_DATA


Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="session")
def wsiseg() -> Run:
    """Run `wsiseg ARGS...` as a user would, in a child process; `.returncode/.stdout/.stderr`."""

    def run(
        *args: object, cwd: Path | None = None, timeout: float = 280
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "wsiseg", *map(str, args)],
            capture_output=True,
            text=True,
            timeout=timeout,
            cwd=cwd,
            check=False,
            env={**os.environ, "OMP_NUM_THREADS": "2", "COLUMNS": "200"},
        )

    return run
