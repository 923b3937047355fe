"""A slide that takes too much memory is tried once more with less, and costs only itself (R8)."""

import errno
import json
import os
import resource
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch
from PIL import Image
from reliability.bench import SLIDE, snapshot
from reliability.processes import memory_bytes
from reliability.zygote import COMPARABLE
from segmenting import write_model

from wsiseg import runinfo
from wsiseg.cli.segment_job import SegmentJob, with_less_memory
from wsiseg.config import result_settings
from wsiseg.errors import SlideReadError
from wsiseg.inference.engine import Engine
from wsiseg.memory import is_out_of_memory
from wsiseg.settings.export import ExportConfig, ExtraOutputs
from wsiseg.settings.segment import SegmentConfig
from wsiseg.slides.cohort import CohortEntry
from wsiseg.slides.reader import Slide

MB = 1_000_000

LANES = 24
"""Windows of the hungry slide, which all of them at once take 2 GB and one takes 100 MB."""

ROOM = 700 * MB
"""What a process may take beyond what it has once everything is imported."""

ARGS = ("--model", "run", "-o", "out", "--device", "cpu", *SLIDE, "--window", 512,
        "--window-overlap", 0, "--json")  # fmt: skip

AGAIN = "trying it again with half of --batch-size on a GPU, one window at a time on a CPU"
CPU_ERROR = (
    "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: "
    "you tried to allocate 8388608 bytes. Error code 12 (Cannot allocate memory)"
)


@pytest.fixture(scope="module")
def slides(tmp_path_factory):
    """Slides of one window, one of `LANES` windows, and one that no setting makes small."""
    folder = tmp_path_factory.mktemp("slides")
    write_model(folder / "run")
    for name, width, height in (("a", 500, 400), ("b", 400, 500), ("hungry", 512 * LANES, 512)):
        Image.fromarray(np.full((height, width, 3), 150, np.uint8)).save(folder / f"{name}.png")
    pixels = np.full((10_000, 15_000, 3), 150, np.uint8)  # 450 MB, and as much again while decoded
    # Enough noise that the file is not refused for claiming more than it can hold.
    pixels[:200] = np.random.default_rng(0).integers(0, 256, pixels[:200].shape, np.uint8)
    Image.fromarray(pixels).save(folder / "hopeless.png", compress_level=1)
    return folder


@pytest.fixture(scope="module")
def undisturbed(bench, slides):
    """What comes out with memory for all windows."""
    done = bench.zygote.run("segment", "a.png", "b.png", "hungry.png", *ARGS, cwd=slides)
    assert done.returncode == 0, done.stderr
    return snapshot(slides, "out")


def furnish(folder, slides):
    folder.mkdir()
    for path in slides.iterdir():
        if path.name != "out":
            (folder / path.name).symlink_to(path)
    return folder


def statuses(stdout):
    return {row["slide_id"]: row["status"] for row in json.loads(stdout)["results"]}


@pytest.mark.slow
def test_within_an_address_space_that_holds_one_window_a_slide_is_done_window_by_window(
    bench, slides, undisturbed, figure, scorecard, tmp_path
):
    limit = memory_bytes(bench.zygote.pid, "VmSize") + ROOM
    for number in range(figure(pr=1, night=10)):
        folder = furnish(tmp_path / str(number), slides)
        done = bench.zygote.run(
            "segment", "a.png", "hungry.png", "b.png", *ARGS, "--set", f"lanes={LANES}",
            cwd=folder, memory_limit_bytes=limit,
        )  # fmt: skip
        assert (done.returncode, done.signal) == (0, None), done.stderr
        assert done.stderr.count(AGAIN) == 1, done.stderr
        assert "WARNING: slide 'hungry': " in done.stderr
        assert "Traceback" not in done.stderr
        assert snapshot(folder, "out") == undisturbed
        scorecard.add("kills survived", 1)


class Watch(threading.Thread):
    """Notes how much memory a process has, from the moment that a file is there."""

    def __init__(self, process, begin):
        super().__init__(daemon=True)
        self.seen = []
        self._process = process
        self._begin = begin

    def run(self):
        while self._process.returncode is None:
            if self._begin.exists():
                # Its own memory: pages of libraries that it comes to use late are nobody's fault.
                self.seen.append(memory_bytes(self._process.pid, "RssAnon"))
            time.sleep(0.05)


@pytest.mark.slow
def test_a_worker_over_its_limit_costs_a_try_and_the_command_no_memory(
    bench, slides, undisturbed, figure, scorecard, tmp_path
):
    limit = 2 * (memory_bytes(bench.zygote.pid, "VmRSS") + ROOM)  # dask shares it among workers
    for number in range(figure(pr=1, night=10)):
        folder = furnish(tmp_path / str(number), slides)
        process = subprocess.Popen(
            [sys.executable, "-m", "wsiseg", "segment", "a.png", "hungry.png", "hopeless.png",
             "b.png", *map(str, ARGS), "--set", f"lanes={LANES}", "--workers", "2"],
            cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env={**os.environ, **COMPARABLE},
        )  # fmt: skip
        resource.prlimit(process.pid, resource.RLIMIT_RSS, (limit, limit))  # dask looks later
        watch = Watch(process, folder / "out")
        watch.start()
        stdout, stderr = process.communicate(timeout=280)
        watch.join()
        assert process.returncode == 1, stderr
        healthy = {"a": "ok", "b": "ok", "hungry": "ok"}
        assert statuses(stdout) == {**healthy, "hopeless": "failed"}, stderr
        lowered = [line for line in stderr.splitlines() if line.endswith(AGAIN)]
        # Of the hungry one too, unless it is through between two of the times that dask looks, and
        # perhaps of one that the dead worker had been sent.
        told = {x.split("'")[1] for x in lowered if "the worker process died" in x}
        assert "hopeless" in told, stderr
        assert len(told) == len(lowered), stderr
        assert "error: slide 'hopeless': the worker process died" in stderr
        assert (
            "; if it was memory, use fewer --workers, a smaller --batch-size (on a GPU) or"
            in stderr
        )
        assert "Traceback" not in stderr
        assert max(watch.seen) - watch.seen[0] < 50 * MB
        assert {k: v for k, v in snapshot(folder, "out").items() if "hopeless" not in k} == (
            undisturbed
        )
        scorecard.add("kills survived", len(told))
        scorecard.add("parent deaths", 0)


# Each way of saying it, raised by hand.


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError(CPU_ERROR),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("MPS backend out of memory (MPS allocated: 8.00 GB)"),
        RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes."),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
    ],
    ids=lambda e: f"{type(e).__name__} {e}"[:40],
)
def test_a_want_of_memory_is_known_by_whoever_reports_it(error):
    assert is_out_of_memory(error)
    outer = SlideReadError("slide 's1': cannot be read")
    assert not is_out_of_memory(outer)
    outer.__cause__ = error
    assert is_out_of_memory(outer)


def test_other_errors_are_no_want_of_memory():
    for error in (ValueError("out of memory"), RuntimeError("size mismatch"), OSError("x")):
        assert not is_out_of_memory(error)


def test_the_second_try_has_less_and_is_the_same_run(tmp_path):
    job = SegmentJob(
        entry=CohortEntry(slide_id="s", patient_id="s", path=tmp_path / "s.png"),
        config=SegmentConfig(batch_size=8, window=512),
        export=ExportConfig(),
        extra=ExtraOutputs(),
        model=tmp_path,
        geojson=tmp_path / "s.geojson",
    )
    less = with_less_memory(job)
    assert (less.config.batch_size, less.config.lanes) == (4, 1)
    assert with_less_memory(with_less_memory(with_less_memory(less))).config.batch_size == 1
    assert result_settings(less.config) == result_settings(job.config)


@pytest.fixture
def failing(monkeypatch):
    """Let the network fail for want of memory wherever `fails(number of the call)` says so."""
    real, calls = Engine._predict, []

    def install(fails, error):
        def predict(engine, images):
            calls.append(engine)
            if fails(engine, len(calls)):
                raise error
            return real(engine, images)

        monkeypatch.setattr(Engine, "_predict", predict)

    return install


@pytest.mark.parametrize("call", [1, LANES])
def test_a_slide_that_ran_out_of_memory_goes_on_with_less_and_ends_with_the_same_bytes(
    slides, undisturbed, tmp_path, wsiseg_here, monkeypatch, failing, call
):
    monkeypatch.setattr(runinfo, "git_commit", lambda: None)
    failing(lambda engine, number: number == call, RuntimeError(CPU_ERROR))
    furnish(tmp_path / "here", slides)
    done = wsiseg_here("segment", "hungry.png", *ARGS, "--set", "chunk=512", cwd=tmp_path / "here")
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stderr.splitlines() if line]
    assert lines == [f"WARNING: slide 'hungry': RuntimeError: {CPU_ERROR}; {AGAIN}"]
    for name in ("hungry.geojson", "hungry.png"):
        assert snapshot(tmp_path / "here", f"out/{name}") == {
            f"out/{name}": undisturbed[f"out/{name}"]
        }


def test_a_slide_that_runs_out_of_memory_twice_fails_and_the_error_says_what_to_do(
    slides, tmp_path, wsiseg_here, failing
):
    tried = []

    def fails(engine, number):
        tried.append(engine._lanes)
        return len(tried) <= 2

    failing(fails, MemoryError("Unable to allocate 8.00 MiB"))
    furnish(tmp_path / "here", slides)
    done = wsiseg_here("segment", "a.png", *ARGS, "--set", "lanes=3", cwd=tmp_path / "here")
    assert done.returncode == 1
    assert statuses(done.stdout) == {"a": "failed"}
    assert tried == [3, 1]
    assert done.stderr.splitlines()[-1] == (
        "error: slide 'a': MemoryError: Unable to allocate 8.00 MiB; use a smaller --batch-size "
        "(on a GPU) or a machine with more memory"
    )
    assert "Traceback" not in done.stderr


def test_tile_has_nothing_to_lower_and_says_what_to_do(slides, tmp_path, wsiseg_here, monkeypatch):
    def read(slide, raster, box):
        raise MemoryError("Unable to allocate 8.00 MiB")

    monkeypatch.setattr(Slide, "read", read)
    furnish(tmp_path / "here", slides)
    done = wsiseg_here(
        "tile", "a.png", "-o", "out", *SLIDE, "--mpp", 0.5, "--tile-size", 64, "--json",
        cwd=tmp_path / "here",
    )  # fmt: skip
    assert done.returncode == 1
    assert statuses(done.stdout) == {"a": "failed"}
    assert done.stderr == (
        "error: slide 'a': MemoryError: Unable to allocate 8.00 MiB; use a machine with more "
        "memory\n"
    )
