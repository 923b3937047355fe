"""Worker processes that are killed from outside, in the real command (R7)."""

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time

import pytest
from reliability.bench import left_over, snapshot
from reliability.processes import workers_at
from reliability.zygote import COMPARABLE

NUM_WORKERS = 3
NUM_HEALTHY = 6

ARGS = ("--tile-size", "128", "--mpp", "0.5", "--tissue", "none", "--slide-mpp", "0.5", "--json")


class Killer(threading.Thread):
    """Kills workers at random times: those that read the poison, and up to `limit` others.

    The poison's are killed as soon as they have it open. Of the others one, some or all at once,
    each while it reads a slide; but only where at least two do. A slide that has cost two workers
    waits until it has the cluster for itself, and whoever kills that worker too has made it poison.
    """

    def __init__(self, slides, *, poison, limit, rng):
        super().__init__(daemon=True)
        self.killed = []
        self.killed_by_poison = []
        self._slides = slides
        self._poison = poison
        self._limit = limit
        self._rng = rng
        self._over = threading.Event()

    def run(self):
        due_s = time.monotonic()
        while not self._over.wait(0.005):
            at_work = workers_at(self._slides)
            for pid in [pid for pid, slide in at_work.items() if slide == self._poison]:
                self._kill(pid, self.killed_by_poison)
                del at_work[pid]
            left = self._limit - len(self.killed)
            if left and len(at_work) > 1 and time.monotonic() > due_s:
                num = min(left, self._rng.randint(1, len(at_work)))
                for pid in self._rng.sample(sorted(at_work), num):
                    self._kill(pid, self.killed)
                due_s = time.monotonic() + self._rng.uniform(0.0, 1.0)

    def _kill(self, pid, killed):
        with contextlib.suppress(ProcessLookupError):
            if pid not in (*self.killed, *self.killed_by_poison):
                os.kill(pid, signal.SIGKILL)
                killed.append(pid)

    def stop(self):
        self._over.set()
        self.join()


def tile(folder, slides, *options):
    return subprocess.Popen(
        [sys.executable, "-m", "wsiseg", "tile", *slides, "-o", folder, *ARGS, *options],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, **COMPARABLE},
    )  # fmt: skip


@pytest.fixture(scope="module")
def slides(tmp_path_factory, real_slide):
    folder = tmp_path_factory.mktemp("slides")
    names = [*(f"s{number}" for number in range(NUM_HEALTHY)), "poison"]
    return [shutil.copy(real_slide, folder / f"{name}.svs") for name in names]


@pytest.fixture(scope="module")
def undisturbed(slides, tmp_path_factory):
    """The stores of all slides, made by one process."""
    folder = tmp_path_factory.mktemp("undisturbed")
    _, stderr = (run := tile(folder / "t", slides)).communicate(timeout=280)
    assert run.returncode == 0, stderr
    return snapshot(folder, "t")


@pytest.mark.slow
@pytest.mark.parametrize("has_poison", [False, True], ids=["healthy slides", "a poison slide"])
def test_killed_workers_cost_tries_and_a_poison_slide_only_itself(
    tmp_path, scorecard, figure, seed, slides, undisturbed, has_poison
):
    rng = random.Random(seed)
    poison = slides[-1] if has_poison else None
    left = figure(pr=5, night=50)
    for _ in range(2 * left):
        folder = tmp_path / f"{left} left"
        limit = min(NUM_HEALTHY, max(1, left - 3 * has_poison))
        rng.shuffle(order := [*slides])
        killer = Killer(slides, poison=poison, limit=limit, rng=rng)
        killer.start()
        command = tile(folder / "t", order, "--workers", str(NUM_WORKERS))
        stdout, stderr = command.communicate(timeout=280)
        killer.stop()
        assert "KilledWorker" not in stderr
        assert "Traceback" not in stderr
        status = {r["slide_id"]: r["status"] for r in json.loads(stdout)["results"]}
        failed = ["poison"] if has_poison else []
        assert [name for name in status if status[name] != "ok"] == failed, stderr
        assert len(status) == len(slides)
        assert command.returncode == len(failed)
        if has_poison:
            assert "error: slide 'poison': the worker process died" in stderr
            assert 1 <= len(killer.killed_by_poison) <= 3
            for unfinished in (folder / "t").glob("poison.zarr*"):
                shutil.rmtree(unfinished) if unfinished.is_dir() else unfinished.unlink()
        wanted = {n: v for n, v in undisturbed.items() if not n.startswith("t/poison.")}
        assert snapshot(folder, "t") == (wanted if has_poison else undisturbed)
        assert left_over(folder) == []
        num = len(killer.killed) + len(killer.killed_by_poison)
        shutil.rmtree(folder)
        scorecard.add("kills survived", num)
        scorecard.add("parent deaths", 0)
        left -= num
        if left <= 0:
            return
    pytest.fail(f"{left} workers were not to be caught at work")
