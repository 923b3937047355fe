"""Several slides with one worker: a child takes them in turn, and its death costs only one."""

import functools
import importlib
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest

from wsiseg.cluster import map_items


@pytest.fixture
def tasks(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The functions; child processes inherit the path they are found on."""
    monkeypatch.syspath_prepend(Path(__file__).parent)
    return importlib.import_module("slide_tasks")


class Diary:
    """A progress that notes what it is told."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def start(self, label: str, total: int, *, unit: str, done: int = 0) -> None:
        self.lines.append(f"{label}: {done} of {total} {unit}")

    def advance(self, amount: int = 1, *, note: str = "") -> None:
        self.lines.append(f"+{amount} {note}".rstrip())

    def finish(self) -> None:
        self.lines.append("finished")


@pytest.mark.parametrize("num_items", [1, 3])
def test_progress_and_log_look_as_if_the_work_was_done_here(tasks, caplog, request, num_items):
    library = logging.getLogger("tifffile")
    request.addfinalizer(functools.partial(library.setLevel, library.level))
    library.setLevel(logging.CRITICAL)  # as the command line does
    diary = Diary()
    outcomes = map_items(
        tasks.tell, range(num_items), progress=diary,
        on_result=lambda index, outcome: diary.lines.append(f"result {index}"),
    )  # fmt: skip
    assert diary.lines == [
        line
        for i in range(num_items)
        for line in (f"item {i}: 0 of 2 tiles", "+1 half", "+1", "finished", f"result {i}")
    ]
    assert [r.getMessage().split(":")[0] for r in caplog.records] == [
        f"slide {i} is odd" for i in range(num_items)
    ]
    assert {r.levelno for r in caplog.records} == {logging.WARNING}
    (pid,) = {outcome.value for outcome in outcomes}
    assert (pid == os.getpid()) == (num_items == 1)


def test_the_child_ends_with_its_parent_however_that_ends(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import sys\n"
        "from pathlib import Path\n"
        f"sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "from slide_tasks import hold_a_lock\n"
        "from wsiseg.cluster import map_items\n"
        "if __name__ == '__main__':\n"
        f"    map_items(hold_a_lock, [Path({str(tmp_path)!r})] * 2, on_result=print)\n"
    )
    parent = subprocess.Popen([sys.executable, str(script)])
    wait_for(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text())
    child = int((tmp_path / "pid").read_text())
    assert child != parent.pid
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    wait_for(lambda: not is_running(child))


def wait_for(condition, seconds=60.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def is_running(pid):
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except OSError:
        return False
    return state != "Z"


def test_a_slide_that_ends_its_process_does_not_keep_the_others_from_their_turn(
    tmp_path, real_slide
):
    """The real command; the decoder's crash is a breakpoint that stands on the poison's name."""
    for name in ("a", "poison", "b"):
        shutil.copy(real_slide, tmp_path / f"{name}.svs")
    (tmp_path / "sitecustomize.py").write_text(
        "import os, signal, sys\n"
        "def hook(event, args):\n"
        "    if event == 'os.mkdir' and 'poison.zarr' in str(args[0]):\n"
        "        os.kill(os.getpid(), signal.SIGSEGV)\n"
        "sys.addaudithook(hook)\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "wsiseg", "tile", "a.svs", "poison.svs", "b.svs", "-o", "out",
         "--tile-size", "256", "--slide-mpp", "0.5", "--tissue", "none", "--json"],
        cwd=tmp_path, capture_output=True, text=True, check=False, timeout=200,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path[:1]])},
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    status = {r["slide_id"]: r["status"] for r in json.loads(done.stdout)["results"]}
    assert status == {"a": "ok", "poison": "failed", "b": "ok"}
    assert "slide 'poison': the worker process was killed by SIGSEGV 3 times" in done.stderr
    assert "Traceback" not in done.stderr


class Broken(Diary):
    """A progress whose terminal is gone."""

    def advance(self, amount: int = 1, *, note: str = "") -> None:
        raise BrokenPipeError("the terminal is gone")


def test_an_error_of_ours_is_not_taken_for_a_death_of_the_child(tasks):
    with pytest.raises(BrokenPipeError, match="the terminal is gone"):
        map_items(tasks.tell, range(2), progress=Broken(), on_result=lambda index, outcome: None)
