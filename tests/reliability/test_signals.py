"""SIGTERM (a cluster takes the node) and SIGINT (Ctrl-C): stop soon, lose nothing, say so (R6)."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from reliability.bench import commands

CODES = {signal.SIGINT: 130, signal.SIGTERM: 143}

STOPS_WITHIN_S = 10.0


@pytest.mark.slow
@pytest.mark.parametrize("number", CODES, ids=lambda n: n.name)
@pytest.mark.parametrize("name", ["tile", "pretrain", "finetune", "segment"])
def test_a_signal_stops_the_command_which_then_goes_on(
    bench, scorecard, figure, seed, name, number
):
    command = commands("large")[name]
    rng = random.Random(seed)
    for _ in range(figure(pr=1, night=7)):
        folder = bench.folder(command)
        after_s = rng.uniform(0.02, 0.9) * bench.seconds["large", name]
        done = bench.run(command, folder, signals=[(after_s, number)])
        assert done.seconds - after_s < STOPS_WITHIN_S
        if done.signal is not None:  # it came before the command was at work, or after
            assert done.signal == number.name
        else:
            assert done.returncode in (0, CODES[number]), done.stderr
        if done.returncode:
            assert done.stderr.endswith("; run the same command again to go on\n")
            assert "Traceback" not in done.stderr
            assert not list(folder.rglob("*.lock"))
        again = bench.run(command, folder)
        assert again.returncode == 0, again.stderr
        assert bench.differences(command, folder) == []
        scorecard.add("kills survived", 1)


def test_a_training_that_is_told_to_stop_keeps_the_step_it_is_at(bench):
    command = commands("large")["pretrain"]
    # A resume point is due after each third step, so one of another number is the signal's.
    # The machine may be faster or slower than when the bench was timed, so it is tried all along.
    for after_s in (bench.seconds["large", "pretrain"] * x / 40 for x in range(2, 60)):
        folder = bench.folder(command)
        done = bench.run(command, folder, signals=[(after_s, signal.SIGTERM)])
        points = sorted(p.name for p in (folder / "pre" / "resume").glob("step-*"))
        if done.returncode == 143 and points and int(points[-1][5:]) % 3:
            break
    else:
        pytest.fail("no run was stopped between two resume points")
    state = json.loads((folder / "pre" / "resume" / points[-1] / "state.json").read_text())
    assert state["state"]["step"] == int(points[-1][5:])
    assert bench.run(command, folder).returncode == 0
    assert bench.differences(command, folder) == []


@pytest.mark.parametrize("number", CODES, ids=lambda n: n.name)
def test_the_second_signal_ends_it_at_once_but_an_echo_of_the_first_does_not(tmp_path, number):
    script = (
        "import sys, time\n"
        "from wsiseg.interrupts import Interrupts\n"
        "with Interrupts().handling():\n"
        "    try:\n"
        "        print('ready', flush=True)\n"
        "        time.sleep(60)\n"
        "    finally:\n"
        "        time.sleep(60)  # such as the threads of a stage, which are waited for\n"
    )
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(number)
    process.send_signal(number)
    time.sleep(0.7)
    assert process.poll() is None
    began = time.monotonic()
    process.send_signal(number)
    assert process.wait(timeout=10) == CODES[number]
    assert time.monotonic() - began < 2
    process.stdout.close()


def test_a_signal_whose_exception_python_drops_is_not_lost():
    script = (
        "import signal, sys, time\n"
        "from wsiseg.interrupts import Interrupts\n"
        "class Closing:\n"
        "    def __del__(self):\n"
        "        signal.raise_signal(signal.SIGTERM)\n"
        "with Interrupts().handling():\n"
        "    try:\n"
        "        closing = Closing()\n"
        "        del closing\n"
        "        for _ in range(200): time.sleep(0.01)\n"
        "    except KeyboardInterrupt as error:\n"
        "        print(type(error).__name__)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], check=False, timeout=30, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "Terminated\n", "")


def test_work_that_does_not_stop_is_ended_after_the_grace():
    script = (
        "import signal, time\n"
        "from wsiseg import interrupts\n"
        "interrupts.GRACE_S = 0.3\n"
        "with interrupts.Interrupts().handling():\n"
        "    try:\n"
        "        signal.raise_signal(signal.SIGTERM)\n"
        "    finally:\n"
        "        time.sleep(60)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], check=False, timeout=30)
    assert done.returncode == 143


@pytest.mark.slow
@pytest.mark.parametrize("workers", ["1", "2"])
@pytest.mark.parametrize("number", CODES, ids=lambda n: n.name)
def test_workers_end_with_the_command(bench, scorecard, number, workers):
    command = commands("large")["tile"]
    folder = bench.folder(command)
    for i in range(40):  # enough to be at work when the signal comes
        (folder / f"more-{i}.png").symlink_to(bench.whole / "large.png")
    args = [str(a) for a in command.args if a not in ("--labels", "labels")]
    args = [a for a in args if a not in ("--classes", "classes.yaml", "large.png")]
    process = subprocess.Popen(
        [sys.executable, "-m", "wsiseg", *args, *sorted(str(p) for p in folder.glob("*.png")),
         "--workers", workers],
        cwd=folder, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while not list(folder.glob("tiles/*.zarr*")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    began = time.monotonic()
    os.killpg(process.pid, number)
    _, stderr = process.communicate(timeout=60)
    assert time.monotonic() - began < STOPS_WITHIN_S
    assert process.returncode == CODES[number], stderr
    assert stderr.endswith("; run the same command again to go on\n")
    assert "Traceback" not in stderr
    while group_members(process.pid):
        assert time.monotonic() - began < STOPS_WITHIN_S
        time.sleep(0.05)
    scorecard.add("kills survived", 1)


def group_members(group: int) -> list[int]:
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rsplit(")", 1)[1].split()
        except OSError:
            continue
        if int(fields[2]) == group and fields[0] != "Z":
            found.append(int(stat.parent.name))
    return found
