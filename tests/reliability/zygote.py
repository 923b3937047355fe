"""The real command many times a second: a process that has imported it and forks for each run.

The process is started clean, without the test runner's threads. What a run does to itself (an
abort, all memory, a hang) ends that run only, and is seen.
"""

import contextlib
import json
import os
import queue
import resource
import select
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from reliability.faults import Faults

COMPARABLE = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "GIT_DIR": os.devnull}
"""Environment of commands whose outputs are compared. They name the commit where one is found, and
a file that is edited while the tests run would change that."""


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
    calls: list[str] = field(default_factory=list)
    """With `fault`: the calls that change files, in order (`reliability.faults`)."""


class Zygote:
    """Runs `wsiseg ARGS...`; a context manager.

    `num_lanes` runs may go on at once, called from as many threads.
    """

    def __init__(self, *modules: str, num_lanes: int = 1) -> None:
        requests = [os.pipe() for _ in range(num_lanes - 1)]
        answers = [os.pipe() for _ in range(num_lanes - 1)]
        ends = [(r[0], a[1]) for r, a in zip(requests, answers, strict=True)]
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).resolve()), json.dumps(ends), *modules],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            pass_fds=[end for pair in ends for end in pair],
            env={**os.environ, **COMPARABLE},
        )
        for pair in ends:
            for end in pair:
                os.close(end)
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._lanes: queue.Queue[tuple[IO[bytes], IO[bytes]]] = queue.Queue()
        self._lanes.put((self._process.stdin, self._process.stdout))
        for request, answer in zip(requests, answers, strict=True):
            self._lanes.put((os.fdopen(request[1], "wb"), os.fdopen(answer[0], "rb")))

    @property
    def pid(self) -> int:
        """The process that forks."""
        return self._process.pid

    def __enter__(self) -> "Zygote":
        return self

    def __exit__(self, *error: object) -> None:
        lanes = [self._lanes.get_nowait() for _ in range(self._lanes.qsize())]
        for request, _ in lanes:
            request.close()
        self._process.wait(timeout=30)
        for _, answer in lanes:
            answer.close()

    def run(
        self,
        *args: object,
        cwd: Path,
        timeout_s: float = 120.0,
        memory_limit_bytes: int | None = None,
        file_limit_bytes: int | None = None,
        signals: Sequence[tuple[float, int]] = (),
        fault: tuple[str, int] | None = None,
    ) -> Done:
        """Run one command in `cwd`; its output comes back even if it was killed.

        Parameters
        ----------
        signals
            (seconds after the start, signal) for the process group of the command, in order.
        fault
            Kind and number of a `reliability.faults` fault under `cwd`; number 0 only counts.
        """
        request = {
            "args": [os.fsencode(str(a)).hex() for a in args],
            "cwd": str(cwd),
            "timeout_s": timeout_s,
            "memory_limit_bytes": memory_limit_bytes,
            "file_limit_bytes": file_limit_bytes,
            "signals": list(signals),
            "fault": fault,
        }
        lane = self._lanes.get()
        try:
            lane[0].write(json.dumps(request).encode() + b"\n")
            lane[0].flush()
            return Done(**json.loads(lane[1].readline()))
        finally:
            self._lanes.put(lane)


def main() -> None:
    """Import the modules that are named, then serve requests from stdin."""
    import importlib

    import wsiseg.cli.main  # noqa: F401 - imported for the forks

    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    other_lanes, modules = json.loads(sys.argv[1]), sys.argv[2:]
    for name in modules:
        importlib.import_module(name)
    if "wsiseg.slides.probe_server" in sys.modules:
        _fork_helpers()
    if "reliability.faults" in sys.modules:
        _prepare_for_many()
    lanes = [os.fork() == 0 and _serve_lane(*ends) for ends in other_lanes]
    answers = os.dup(1)
    os.dup2(2, 1)
    _serve_all(0, answers)
    for _ in lanes:
        os.wait()


def _serve_lane(requests: int, answers: int) -> NoReturn:
    os.dup2(requests, 0)
    os.close(requests)
    os.dup2(2, 1)
    try:
        _serve_all(0, answers)
    finally:
        os._exit(0)


def _serve_all(requests: int, answers: int) -> None:
    with os.fdopen(requests, "rb", closefd=False) as lines, os.fdopen(answers, "w") as out:
        while line := lines.readline():
            print(json.dumps(_serve(json.loads(line))), file=out, flush=True)


def _prepare_for_many() -> None:
    """Make runs cheap and alike: everything loaded, small shards."""
    import gc

    from reliability.warm import warm_up

    from wsiseg.store import tiles

    tiles.MAX_TILES_PER_SHARD = 4
    warm_up()
    gc.collect()
    gc.freeze()


def _serve(request: dict[str, Any]) -> dict[str, Any]:
    began = time.monotonic()
    files = [os.memfd_create(name) for name in ("stdout", "stderr", "calls")]
    pid = os.fork()
    if pid == 0:
        _be_the_command(request, files)
    deadline, killed = began + request["timeout_s"], False
    descriptor = os.pidfd_open(pid)
    for after_s, number in request["signals"]:
        left_s = max(0.0, began + after_s - time.monotonic())
        if not select.select([descriptor], [], [], left_s)[0]:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(pid, number)
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
        "calls": _content(files[2]).splitlines(),
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
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # until the command takes it
        os.dup2(files[0], 1)
        os.dup2(files[1], 2)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.chdir(request["cwd"])
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        for name, what in (("memory", resource.RLIMIT_AS), ("file", resource.RLIMIT_FSIZE)):
            limit = request[f"{name}_limit_bytes"]
            if limit is not None:
                resource.setrlimit(what, (limit, limit))
        sys.argv = ["wsiseg", *(os.fsdecode(bytes.fromhex(a)) for a in request["args"])]
        from wsiseg.cli.main import main as command

        faults = _install_faults(request)
        try:
            command()
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 70
        sys.stdout.flush()
        sys.stderr.flush()
        os.write(files[2], "\n".join(faults.log).encode())
    except BaseException:  # noqa: BLE001 - shown as a traceback, which the tests look for
        import traceback

        traceback.print_exc()
        sys.stderr.flush()
    finally:
        os._exit(code)


def _install_faults(request: dict[str, Any]) -> "Faults":
    from reliability.faults import Faults, install

    kind, number = request["fault"] or (None, 0)
    faults = Faults(root=request["cwd"], kind=kind, n=number)
    if request["fault"] is not None:
        install(faults)
    return faults


class _ForkedHelper:
    """The helper process of `wsiseg.slides.probe`, forked from here instead of started anew.

    It runs the same code; only its second of imports is saved. Has what Popen would have.
    """

    def __init__(self) -> None:
        request_r, request_w = os.pipe()
        answer_r, answer_w = os.pipe()
        # What logging registers for a fork would swallow the exception of a signal, and its lock.
        signals = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))
        self.pid = os.fork()
        signal.pthread_sigmask(signal.SIG_SETMASK, signals)
        if self.pid == 0:
            try:
                nothing = os.open(os.devnull, os.O_WRONLY)
                for descriptor, target in ((request_r, 0), (answer_w, 1), (nothing, 2)):
                    os.dup2(descriptor, target)
                for descriptor in (request_r, request_w, answer_r, answer_w):
                    os.close(descriptor)
                from wsiseg.slides import probe_server

                sys.stdin = os.fdopen(0, closefd=False)  # a child of `multiprocessing` has another
                probe_server.main()
            finally:
                os._exit(0)
        os.close(request_r)
        os.close(answer_w)
        self.stdin, self.stdout = os.fdopen(request_w, "wb"), os.fdopen(answer_r, "rb")
        self._is_over = False

    def poll(self) -> int | None:
        if not self._is_over:
            self._is_over = os.waitpid(self.pid, os.WNOHANG)[0] != 0
        return 0 if self._is_over else None

    def kill(self) -> None:
        if self.poll() is None:
            os.kill(self.pid, signal.SIGKILL)

    def wait(self) -> int:
        if not self._is_over:
            os.waitpid(self.pid, 0)
            self._is_over = True
        return 0


def _fork_helpers() -> None:
    from wsiseg import child
    from wsiseg.slides import probe

    child.START_METHOD = "fork"  # the same for the child of a command over several slides

    def start(server: Any) -> Any:
        if server._process is None or server._process.poll() is not None:
            server._stop()
            server._unread = b""
            server._process = _ForkedHelper()
        return server._process

    probe._Server.start = start  # type: ignore[method-assign, assignment] # a helper of ours


if __name__ == "__main__":
    main()
