"""The real command many times a second: a process that has imported it and forks for each run.

The process is started clean, without the test runner's threads. What a run does to itself (an
abort, all memory, a hang) ends that run only, and is seen.
"""

import contextlib
import json
import os
import resource
import select
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn


@dataclass(frozen=True)
class Done:
    """How a run of the command ended. `signal` : the name of what killed it, or None."""

    returncode: int | None
    signal: str | None
    timed_out: bool
    stdout: str
    stderr: str
    max_rss_bytes: int
    seconds: float


class Zygote:
    """Runs `wsiseg ARGS...`; a context manager."""

    def __init__(self, *modules: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).resolve()), *modules],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
        )

    def __enter__(self) -> "Zygote":
        return self

    def __exit__(self, *error: object) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(timeout=30)
        self._process.stdout.close()

    def run(
        self,
        *args: object,
        cwd: Path,
        timeout_s: float = 120.0,
        memory_limit_bytes: int | None = None,
    ) -> Done:
        """Run one command in `cwd`; its output comes back even if it was killed."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        request = {
            "args": [os.fsencode(str(a)).hex() for a in args],
            "cwd": str(cwd),
            "timeout_s": timeout_s,
            "memory_limit_bytes": memory_limit_bytes,
        }
        self._process.stdin.write(json.dumps(request).encode() + b"\n")
        self._process.stdin.flush()
        return Done(**json.loads(self._process.stdout.readline()))


def main() -> None:
    """Import the modules that are named, then serve requests from stdin."""
    import importlib

    import wsiseg.cli.main  # noqa: F401 - imported for the forks

    for name in sys.argv[1:]:
        importlib.import_module(name)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    while line := sys.stdin.buffer.readline():
        print(json.dumps(_serve(json.loads(line))), file=answers, flush=True)


def _serve(request: dict[str, Any]) -> dict[str, Any]:
    began = time.monotonic()
    files = [os.memfd_create(name) for name in ("stdout", "stderr")]
    pid = os.fork()
    if pid == 0:
        _be_the_command(request, files)
    deadline, killed = began + request["timeout_s"], False
    descriptor = os.pidfd_open(pid)
    if not select.select([descriptor], [], [], max(0.0, deadline - time.monotonic()))[0]:
        killed = True
        os.killpg(pid, signal.SIGKILL)
    os.close(descriptor)
    _, status, usage = os.wait4(pid, 0)
    with contextlib.suppress(ProcessLookupError):  # what it left behind, such as its helper
        os.killpg(pid, signal.SIGKILL)
    code = os.waitstatus_to_exitcode(status)
    return {
        "returncode": code if code >= 0 else None,
        "signal": signal.Signals(-code).name if code < 0 else None,
        "timed_out": killed,
        "stdout": _content(files[0]),
        "stderr": _content(files[1]),
        "max_rss_bytes": usage.ru_maxrss * 1024,
        "seconds": time.monotonic() - began,
    }


def _content(descriptor: int) -> str:
    size = os.fstat(descriptor).st_size
    data = os.pread(descriptor, size, 0)
    os.close(descriptor)
    return data.decode("utf-8", "replace")


def _be_the_command(request: dict[str, Any], files: list[int]) -> NoReturn:
    code = 70
    try:
        os.setpgid(0, 0)
        os.dup2(files[0], 1)
        os.dup2(files[1], 2)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.chdir(request["cwd"])
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        limit = request["memory_limit_bytes"]
        if limit is not None:
            resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        sys.argv = ["wsiseg", *(os.fsdecode(bytes.fromhex(a)) for a in request["args"])]
        from wsiseg.cli.main import main as command

        try:
            command()
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 70
        sys.stdout.flush()
        sys.stderr.flush()
    except BaseException:  # noqa: BLE001 - shown as a traceback, which the tests look for
        import traceback

        traceback.print_exc()
        sys.stderr.flush()
    finally:
        os._exit(code)


if __name__ == "__main__":
    main()
