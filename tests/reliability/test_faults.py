"""Every call that changes a file fails once, in turn: clear error, clean resume (R4, R5).

In the manner of SQLite: the n-th call for n = 1, 2, 3, ... until the command succeeds undisturbed.
"""

import contextlib
import os
import random
import shutil
import subprocess
from pathlib import Path

import pytest
from reliability.bench import commands, snapshot
from reliability.faults import KINDS

PR_SHARE = {"kill": 4, "torn": 6, "ENOSPC": 8, "EIO": 8}
"""An ordinary test run tries every fourth, sixth, ... n, from a random one on; a soak at full scale
tries all, one at a tenth of it every tenth."""

ERRORS = {"ENOSPC": "No space left on device", "EIO": "Input/output error"}


def assert_survives(bench, command, kind, n):
    """Let the n-th call go wrong, then run again; return whether there was an n-th call."""
    folder = bench.folder(command)
    done = bench.run(command, folder, fault=(kind, n))
    case = f"{command.args[0]}, {kind} at call {n}"
    assert not done.timed_out, case
    if kind in ERRORS and done.returncode != 0:
        assert done.returncode == 1, (case, done.stderr)
        assert "Traceback" not in done.stderr, (case, done.stderr)
        errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1, (case, done.stderr)
        assert ERRORS[kind] in errors[0], (case, errors)
        assert "run the same command again" in errors[0], (case, errors)
    elif done.signal is None and done.returncode != 0:
        pytest.fail(f"{case}: {done.stderr}")
    again = bench.run(command, folder)
    assert again.returncode == 0, (case, again.stderr)
    assert bench.differences(command, folder) == [], case
    shutil.rmtree(folder)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["tile", "segment", "export", "pretrain", "finetune"])
def test_no_failed_call_corrupts_anything(bench, scorecard, soak_scale, seed, name, kind):
    if soak_scale is None and name in ("pretrain", "finetune"):
        pytest.skip("in the soak: a second for each of hundreds of calls")
    command = commands("large" if name in ("pretrain", "finetune") else "small")[name]
    step = PR_SHARE[kind] if soak_scale is None else max(1, round(1 / soak_scale))
    numbers = range(1 + random.Random(seed).randrange(step), len(bench.calls(command)) + 1, step)
    bench.each(lambda n: assert_survives(bench, command, kind, n), numbers)
    scorecard.add("faults injected", len(numbers))
    scorecard.add("silent corruptions", 0)


@pytest.mark.parametrize("name", ["tile", "segment"])
def test_a_file_size_limit_is_an_error_that_says_what_to_do(bench, scorecard, name):
    command = commands("small")[name]
    folder = bench.folder(command)
    done = bench.run(command, folder, file_limit_bytes=4000)
    assert done.returncode == 1
    assert "File too large" in done.stderr
    assert "free some space, then run the same command again" in done.stderr
    assert "Traceback" not in done.stderr
    assert bench.run(command, folder).returncode == 0
    assert bench.differences(command, folder) == []
    scorecard.add("faults injected", 1)


@contextlib.contextmanager
def small_disk(folder: Path, num_bytes: int):
    """Mount a file system of this size."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={num_bytes}", "tmpfs", str(folder)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        pytest.skip(f"mount cannot be run here: {error}")
    if done.returncode != 0:
        pytest.skip(f"no file system may be mounted here: {done.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_leaves_old_outputs_alone_and_goes_on_once_there_is_room(
    bench, scorecard, figure, tmp_path
):
    for level in range(figure(pr=2, night=10)):
        disk = tmp_path / f"disk-{level}"
        with small_disk(disk, 4 << 20):
            (disk / "old.geojson").write_text("old")
            filler = disk / "filler"
            command = commands("large")["tile"]
            bench.furnish(disk, command)
            free = os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize
            filler.write_bytes(b"x" * (free - (level + 1) * 40_000))
            done = bench.run(command, disk)
            assert done.returncode == 1, done.stdout
            assert "large.zarr': No space left on device" in done.stderr
            assert "free some space, then run the same command again" in done.stderr
            assert "Traceback" not in done.stderr
            assert (disk / "old.geojson").read_text() == "old"
            assert not (disk / "tiles" / "large.zarr").exists()
            filler.unlink()
            assert bench.run(command, disk).returncode == 0
            assert snapshot(disk, "tiles/large.zarr") == snapshot(bench.whole, "tiles/large.zarr")
        scorecard.add("faults injected", 1)
