"""Two commands on one output: one works, the other says who holds it; the dead hold nothing (R10).

And two writers of one shard, which would lose data without an error, cannot be (R11).
"""

import fcntl
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time

import hypothesis
import numpy as np
import pytest
import stores_on_disk as data
from hypothesis import given, settings
from hypothesis import strategies as st
from reliability.bench import commands

from wsiseg import outputs
from wsiseg.errors import OutputLockedError
from wsiseg.store.tiles import TileStore


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tile", "pretrain", "segment", "export"])
def test_of_two_commands_on_one_output_one_wins_and_the_other_names_it(bench, figure, name):
    command = commands("large")[name]
    for _ in range(figure(pr=3, night=25)):
        folder = bench.folder(command)
        runs = bench.each(lambda _, f=folder: bench.run(command, f), range(2))
        codes = sorted(done.returncode for done in runs)
        assert codes in ([0, 1], [0, 0]), [done.stderr for done in runs]  # or one after the other
        for done in runs:
            if done.returncode == 1:
                assert re.search(rf"locked by pid \d+ on {socket.gethostname()}", done.stderr)
                assert "Traceback" not in done.stderr
        assert bench.differences(command, folder) == []


def test_the_lock_of_a_killed_process_is_taken_over(tmp_path):
    output = tmp_path / "out.zarr"
    code = (
        "import sys, time; from pathlib import Path; from wsiseg.outputs import output_lock\n"
        "with output_lock(Path(sys.argv[1])):\n"
        "    print('held', flush=True); time.sleep(60)\n"
    )
    holder = subprocess.Popen([sys.executable, "-c", code, output], stdout=subprocess.PIPE)
    assert holder.stdout is not None
    assert holder.stdout.readline() == b"held\n"
    with (
        pytest.raises(OutputLockedError, match=rf"locked by pid {holder.pid} on"),
        outputs.output_lock(output),
    ):
        pass
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    holder.stdout.close()
    assert (tmp_path / "out.zarr.lock").exists()
    with outputs.output_lock(output):
        assert f"pid {os.getpid()} " in (tmp_path / "out.zarr.lock").read_text()
    assert list(tmp_path.iterdir()) == []


def test_the_lock_is_never_held_twice_however_fast_it_changes_hands(tmp_path):
    """Each of three processes adds to a counter under the lock; a lost update would show."""
    code = (
        "import sys; from pathlib import Path; from wsiseg.outputs import output_lock\n"
        "from wsiseg.errors import OutputLockedError\n"
        "counter, done = Path(sys.argv[1]), 0\n"
        "while done < 100:\n"
        "    try:\n"
        "        with output_lock(counter):\n"
        "            counter.write_text(str(int(counter.read_text()) + 1)); done += 1\n"
        "    except OutputLockedError: pass\n"
    )
    counter = tmp_path / "counter"
    counter.write_text("0")
    children = [subprocess.Popen([sys.executable, "-c", code, counter]) for _ in range(3)]
    deadline = time.monotonic() + 120
    for child in children:
        assert child.wait(timeout=max(1, deadline - time.monotonic())) == 0
    assert counter.read_text() == "300"


def test_blocks_that_do_not_fill_a_shard_are_refused_and_never_lose_tiles(
    tmp_path_factory, figure, seed
):
    """A writer that cuts the tiles into blocks of `part`, aligned with the shards or not."""

    @hypothesis.seed(seed)
    @settings(max_examples=figure(pr=100, night=1_000), deadline=None)
    @given(
        num=st.integers(1, 40),
        shard_tiles=st.integers(1, 9),
        part=st.integers(1, 11),
        has_labels=st.booleans(),
    )
    def every_tile_is_there(num, shard_tiles, part, has_labels):
        path = tmp_path_factory.mktemp("race") / "s.zarr"
        images, labels = data.tile_data(num, 8)
        options = {"num": num, "size": 8, "shard_tiles": shard_tiles, "has_labels": has_labels}
        with data.begin_tiles(path, **options) as writer:
            for shard in writer.pending_shards():
                tiles = writer.shard_tiles(shard)
                block = slice(tiles.start, min(tiles.start + part, num))
                given_labels = labels[block] if has_labels else None
                if block.stop != tiles.stop:
                    with pytest.raises(ValueError, match=f"shard {shard}"):
                        writer.write_shard(shard, images[block], given_labels)
                    block = slice(tiles.start, tiles.stop)
                    given_labels = labels[block] if has_labels else None
                writer.write_shard(shard, images[block], given_labels)
            writer.finish()
        np.testing.assert_array_equal(TileStore.open(path).read_images(range(num)), images)
        shutil.rmtree(path.parent)

    every_tile_is_there()


def test_a_lock_without_a_name_yet_is_asked_again(tmp_path):
    """Between taking the lock and writing its name, its holder may be anywhere."""
    output = tmp_path / "out.zarr"
    lock = tmp_path / "out.zarr.lock"
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        naming = threading.Timer(0.2, lambda: lock.write_text("pid 7 on elsewhere\n"))
        naming.start()
        with (
            pytest.raises(OutputLockedError, match="locked by pid 7 on elsewhere; wait"),
            outputs.output_lock(output),
        ):
            pass
        naming.join()
