"""Fixtures shared by all areas: real data, the command line as a child process or right here."""

import contextlib
import io
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
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


@contextlib.contextmanager
def _logging_and_signals_restored() -> Iterator[None]:
    """Undo what the command line sets up for a process that it believes to own."""
    handlers, level = [*logging.root.handlers], logging.root.level
    package = logging.getLogger("wsiseg")
    package_level, on_sigterm = package.level, signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        logging.root.handlers[:] = handlers
        logging.root.setLevel(level)
        package.setLevel(package_level)
        signal.signal(signal.SIGTERM, on_sigterm)


@pytest.fixture
def wsiseg_here(monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run `wsiseg ARGS...` in this process: the same entry point, without a second of imports."""
    from wsiseg.cli.main import main

    def run(*args: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
        command = ["wsiseg", *map(str, args)]
        out, err = io.StringIO(), io.StringIO()
        with (
            monkeypatch.context() as patch,
            _logging_and_signals_restored(),
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
        ):
            patch.setattr(sys, "argv", command)
            patch.setenv("COLUMNS", "200")
            if cwd is not None:
                patch.chdir(cwd)
            with pytest.raises(SystemExit) as end:
                main()
        code = end.value.code if isinstance(end.value.code, int) else 0
        return subprocess.CompletedProcess(command, code, out.getvalue(), err.getvalue())

    return run
