"""Worker processes that are killed from outside, in the real command (R7)."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

ARGS = ("--tile-size", "256", "--mpp", "0.5", "--tissue", "none", "--slide-mpp", "0.5",
        "--workers", "2", "--json")  # fmt: skip


def workers_with(path: Path) -> list[int]:
    """Return the dask workers that have a file open."""
    found = []
    for descriptors in Path("/proc").glob("[0-9]*/fd"):
        with contextlib.suppress(OSError):
            if not any(str(fd.readlink()) == str(path) for fd in descriptors.iterdir()):
                continue
            command = (descriptors.parent / "cmdline").read_bytes()
            if b"multiprocessing" in command and b"probe" not in command:
                found.append(int(descriptors.parent.name))
    return found


class Killer(threading.Thread):
    """Kills up to `limit` workers, each as soon as it has the slide open."""

    def __init__(self, slide: Path, limit: int) -> None:
        super().__init__(daemon=True)
        self.killed: list[int] = []
        self._slide = slide
        self._limit = limit
        self._over = threading.Event()

    def run(self) -> None:
        while not self._over.is_set() and len(self.killed) < self._limit:
            for pid in workers_with(self._slide):
                if pid not in self.killed:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
                        self.killed.append(pid)
            time.sleep(0.005)

    def stop(self) -> None:
        self._over.set()
        self.join()


@pytest.mark.slow
@pytest.mark.parametrize("limit", [1, 100], ids=["one kill", "a poison slide"])
def test_a_killed_worker_costs_a_try_and_a_poison_slide_only_itself(
    tmp_path, scorecard, real_slide, limit
):
    slides = [tmp_path / f"{name}.svs" for name in ("a", "poison", "b", "c")]
    for slide in slides:
        shutil.copy(real_slide, slide)
    killer = Killer(slides[1], limit)
    killer.start()
    done = subprocess.run(
        [sys.executable, "-m", "wsiseg", "tile", *slides, "-o", tmp_path / "t", *ARGS],
        capture_output=True, text=True, check=False, timeout=280,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    killer.stop()
    assert killer.killed
    assert "KilledWorker" not in done.stderr
    assert "Traceback" not in done.stderr
    status = {r["slide_id"]: r["status"] for r in json.loads(done.stdout)["results"]}
    healthy = {"a": "ok", "b": "ok", "c": "ok"}
    if limit == 1:
        assert (status, done.returncode) == ({**healthy, "poison": "ok"}, 0)
    else:
        assert (status, done.returncode) == ({**healthy, "poison": "failed"}, 1)
        assert "slide 'poison': the worker process died" in done.stderr
        assert len(killer.killed) <= 3
    scorecard.add("kills survived", len(killer.killed))
    scorecard.add("parent deaths", 0)
