"""Of the processes that torchrun started for a training one is killed, again and again (R9)."""

import os
import random
import signal
import subprocess
import time

import pytest

from tests.training.tiny_runs import assert_same_weights, lines
from tests.training.two_ranks import torchrun, train_alone, weights

KILLS_PER_RUN = 5
"""More would not fit into its steps, as each waits for a resume point of its own."""

TIMEOUT_S = 240


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A store and the run of one process that nobody kills."""
    return train_alone(tmp_path_factory.mktemp("alone"))


def newest_point(folder):
    """Return the step of the newest resume point, 0 if there is none."""
    names = [path.name for path in (folder / "resume").glob("step-????????")]
    return max((int(name.removeprefix("step-")) for name in names), default=0)


def ranks_of(run):
    """Return the processes that torchrun has running."""
    found = subprocess.run(
        ["pgrep", "-P", str(run.pid), "-f", "wsiseg"], capture_output=True, text=True, check=False
    )
    return [int(pid) for pid in found.stdout.split()]


def kill_ranks(run, folder, num, rng):
    """Kill a process at random times, each after the run got further; return how many it were."""
    killed, reached = 0, 0
    gone: set[int] = set()
    end = time.monotonic() + TIMEOUT_S
    while killed < num and run.poll() is None:
        assert time.monotonic() < end, f"no progress beyond step {reached} after {killed} kills"
        ranks = ranks_of(run)
        if newest_point(folder) <= reached or len(ranks) < 2 or gone & {*ranks}:
            time.sleep(0.01)
            continue
        time.sleep(rng.uniform(0.0, 0.3))
        reached = newest_point(folder)
        try:
            os.kill(rng.choice(ranks), signal.SIGKILL)
        except ProcessLookupError:
            continue  # the run has just ended
        killed, gone = killed + 1, {*ranks}
        end = time.monotonic() + TIMEOUT_S
    return killed


@pytest.mark.slow
def test_a_killed_process_is_started_again_and_the_run_ends_with_the_bits_of_an_unbroken_one(
    whole, tmp_path, figure, seed, scorecard
):
    rng = random.Random(seed)
    store, alone = whole
    left = figure(pr=5, night=50)
    while left:
        folder = tmp_path / f"{left}-left" / "run"
        folder.parent.mkdir()
        num = min(left, KILLS_PER_RUN)
        run = torchrun(store, folder, f"--max-restarts={num}")
        killed = kill_ranks(run, folder, num, rng)
        text, _ = run.communicate(timeout=TIMEOUT_S)
        assert killed, text
        assert run.returncode == 0, text
        assert_same_weights(weights(folder), weights(alone))
        assert lines(folder) == lines(alone)
        assert not (folder / "resume").exists()
        scorecard.add("kills survived", killed)
        left -= killed
