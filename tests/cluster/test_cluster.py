"""The mapping over items, with real worker processes that really die."""

import importlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest

from wsiseg.cluster import map_items
from wsiseg.errors import ConfigError
from wsiseg.outcome import MAX_DEATHS, Outcome

LOCALHOST = "0100007F"
"""127.0.0.1 as /proc/net/tcp writes it."""


@pytest.fixture
def tasks(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The functions; child processes inherit the path they are found on."""
    monkeypatch.syspath_prepend(Path(__file__).parent)
    return importlib.import_module("slide_tasks")


def ignore(index: int, outcome: Outcome) -> None:
    """Take a result and do nothing with it."""


def resident_bytes() -> int:
    """Return the memory that this process has."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def values(outcomes: list[Outcome]) -> list[object]:
    return [outcome.value for outcome in outcomes]


def test_one_worker_needs_no_dask():
    code = (
        "import sys\n"
        "from wsiseg.cluster import map_items\n"
        "if __name__ == '__main__':\n"
        "    outcomes = map_items(abs, [-1, -2], on_result=lambda i, o: None)\n"
        "    assert [o.value for o in outcomes] == [1, 2]\n"
        "    print('dask' in sys.modules or 'distributed' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_no_items_start_no_cluster():
    assert map_items(abs, [], workers=4, on_result=ignore) == []


def test_outcomes_keep_the_order_of_the_items_whatever_finishes_first(tasks):
    arrived: list[int] = []
    outcomes = map_items(
        tasks.slow_when_early,
        range(5),
        workers=2,
        on_result=lambda index, outcome: arrived.append(index),
    )
    assert values(outcomes) == [0, 1, 2, 3, 4]
    assert sorted(arrived) == [0, 1, 2, 3, 4]
    assert arrived[0] != 0


@pytest.mark.parametrize("workers", [1, 2])
def test_an_exception_is_the_outcome_of_its_item_only(tasks, workers):
    outcomes = map_items(tasks.fail_on_two, range(5), workers=workers, on_result=ignore)
    assert values(outcomes) == [0, 1, None, None, 4]
    ours, foreign = outcomes[2], outcomes[3]
    assert (ours.error, ours.error_type) == ("slide 's2': not a slide", "SlideOpenError")
    assert (foreign.error, foreign.error_type) == ("KeyError: 'levels'", "KeyError")
    assert ours.traceback is not None
    assert "fail_on_two" in ours.traceback


@pytest.mark.parametrize("workers", [1, 2])
def test_equal_items_are_each_done_and_a_value_that_cannot_be_sent_back_is_an_error(tasks, workers):
    outcomes = map_items(
        tasks.return_what_cannot_be_sent, [0, 1, 0], workers=workers, on_result=ignore
    )
    assert values(outcomes) == [0, None, 0]
    assert [o.error is None for o in outcomes] == [True, False, True]


@pytest.mark.parametrize(
    ("workers", "how"), [(1, "was killed by SIGKILL"), (2, "died (killed or out of memory)")]
)
def test_an_item_that_kills_its_workers_is_given_up_and_the_others_finish(
    tasks, tmp_path, capfd, workers, how
):
    items = [(tmp_path, number) for number in range(8)]
    outcomes = map_items(tasks.kill_own_worker_on_two, items, workers=workers, on_result=ignore)
    assert values(outcomes) == [0, 1, None, 3, 4, 5, 6, 7]
    assert outcomes[2].error == f"the worker process {how} 3 times on this item"
    assert outcomes[2].error_type == "KilledWorker"
    starts = {number: (tmp_path / str(number)).read_text().split() for number in range(8)}
    assert len(starts[2]) == len({*starts[2]}) == MAX_DEATHS
    # A death takes along what its worker had beside the culprit: a result on its way, a next item.
    assert all(len(starts[number]) <= 1 + MAX_DEATHS for number in range(8))
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("workers", [1, 2])
def test_items_whose_worker_was_taken_away_are_done_by_another(tasks, tmp_path, capfd, workers):
    items = [(tmp_path, number) for number in range(4)]
    outcomes = map_items(tasks.kill_own_worker_once, items, workers=workers, on_result=ignore)
    assert values(outcomes) == [0, 1, 2, 3]
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("workers", [1, 2])
def test_a_failed_item_is_tried_once_more_as_the_caller_gives_it(tasks, workers):
    asked: list[tuple[int, str | None]] = []

    def second_try(index: int, outcome: Outcome) -> int | None:
        asked.append((index, outcome.error_type))
        return {1: 3, 2: 7}.get(index)  # item 1 fails again, another way; 4 is left as it is

    outcomes = map_items(
        tasks.fail_on_two, [0, 2, 2, 5, 2], workers=workers, on_result=ignore, second_try=second_try
    )
    assert values(outcomes) == [0, None, 7, 5, None]
    assert outcomes[1].error == "KeyError: 'levels'"
    assert outcomes[4].error == "slide 's2': not a slide"
    assert sorted(asked) == [(index, "SlideOpenError") for index in (1, 2, 4)]


def test_an_item_that_killed_its_worker_goes_on_as_the_caller_gives_it(tasks, tmp_path, capfd):
    asked: list[tuple[int, str | None, bool]] = []

    def second_try(index: int, outcome: Outcome) -> tuple[Path, int] | None:
        asked.append((index, outcome.error, outcome.is_memory))
        return (tmp_path, 7) if index == 0 else None

    outcomes = map_items(
        tasks.kill_own_worker_on_two,
        [(tmp_path, 2), (tmp_path, 1)],
        workers=2,
        on_result=ignore,
        second_try=second_try,
    )
    assert values(outcomes) == [7, 1]
    assert len((tmp_path / "2").read_text().split()) == 1
    death = "the worker process died (killed or out of memory) once on this item"
    assert (0, death, True) in asked
    assert len(asked) == len({index for index, _, _ in asked})
    assert capfd.readouterr() == ("", "")


def test_an_item_that_takes_too_much_memory_costs_only_itself(tasks, monkeypatch, capfd):
    monkeypatch.setattr("distributed.system.MEMORY_LIMIT", 2 * 300_000_000)
    before = resident_bytes()
    outcomes = map_items(tasks.take_memory, [50, 600, 50], workers=2, on_result=ignore)
    assert resident_bytes() - before < 150_000_000
    assert [o.error is None for o in outcomes] == [True, False, True]
    assert "out of memory" in str(outcomes[1].error)
    assert capfd.readouterr() == ("", "")


def test_workers_share_the_cores_and_leave_the_environment_as_it_was(tasks, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    before = dict(os.environ)
    outcome = map_items(tasks.environment, [0, 1], workers=2, on_result=ignore)[0]
    assert dict(os.environ) == before
    share = str(max(1, (os.cpu_count() or 1) // 2))
    assert {outcome.value[f"{n}_NUM_THREADS"] for n in ("OMP", "MKL", "OPENBLAS")} == {share}


def test_a_thread_count_that_the_user_set_is_kept(tasks, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    outcome = map_items(tasks.environment, [0], workers=2, on_result=ignore)[0]
    assert outcome.value["OMP_NUM_THREADS"] == "7"


def test_nothing_listens_beyond_this_machine(tasks):
    heard: list[str] = []
    outcomes = map_items(
        tasks.listening_addresses,
        [0, 1],
        workers=2,
        on_result=lambda index, outcome: heard.extend(tasks.listening_addresses(index)),
    )
    for outcome in outcomes:
        heard.extend(outcome.value)
    assert {*heard} == {LOCALHOST}


def test_a_scheduler_of_the_users_is_used_and_left_running(tasks):
    from distributed import Client, LocalCluster

    with LocalCluster(
        n_workers=2, threads_per_worker=1, dashboard_address=None, host="127.0.0.1"
    ) as cluster:
        address = cluster.scheduler_address
        outcomes = map_items(tasks.fail_on_two, range(4), scheduler=address, on_result=ignore)
        assert values(outcomes) == [0, 1, None, None]
        with Client(address, set_as_default=False) as client:
            assert len(client.scheduler_info()["workers"]) == 2


def test_an_address_without_scheduler_names_the_remedy(monkeypatch):
    monkeypatch.setattr("wsiseg.cluster.CONNECT_TIMEOUT_S", 1)
    with pytest.raises(ConfigError, match=r"tcp://127\.0\.0\.1:9.*dask scheduler"):
        map_items(abs, [1], scheduler="tcp://127.0.0.1:9", on_result=ignore)


def test_ctrl_c_ends_all_workers_within_ten_seconds_and_in_silence(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import sys\n"
        "from pathlib import Path\n"
        f"sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "from slide_tasks import sleep_a_minute\n"
        "from wsiseg.cluster import map_items\n"
        "from wsiseg.interrupts import Interrupts\n"
        "if __name__ == '__main__':\n"
        f"    folder = Path({str(tmp_path / 'pids')!r})\n"
        "    with Interrupts().handling():  # as the command line does\n"
        "        try:\n"
        "            map_items(sleep_a_minute, [folder] * 4, workers=2, on_result=print)\n"
        "        except KeyboardInterrupt:\n"
        "            sys.exit(130)\n"
    )
    pids = tmp_path / "pids"
    pids.mkdir()
    process = subprocess.Popen(
        [sys.executable, str(script)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    deadline = time.monotonic() + 60
    while len(list(pids.iterdir())) < 2:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.1)
    began = time.monotonic()
    os.killpg(process.pid, signal.SIGINT)  # a terminal sends it to parent and workers alike
    output, _ = process.communicate(timeout=30)
    assert time.monotonic() - began < 10
    # Where dask itself does not end, the command does so after its time of grace, and says it.
    assert output in ("", "interrupted; run the same command again to go on\n")
    assert process.returncode == 130
    while running := [pid for pid in pids.iterdir() if _is_running(int(pid.name))]:
        assert time.monotonic() - began < 20, running
        time.sleep(0.1)


def _is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False
