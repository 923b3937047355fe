"""Several processes train as one does; torchrun starts them, and starts them again."""

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest

from tests.stores_on_disk import write_tiles
from tests.training.tiny_runs import TINY, assert_same_weights, lines
from wsiseg.errors import ConfigError
from wsiseg.models.checkpoint import load_checkpoint
from wsiseg.settings.model import DiffusionConfig
from wsiseg.settings.training import OptimConfig, PretrainConfig
from wsiseg.stages import pretrain
from wsiseg.training.ranks import Ranks

CONFIG = PretrainConfig(
    model=TINY,
    device="cpu",
    sample_steps=2,
    diffusion=DiffusionConfig(timesteps=20),
    optim=OptimConfig(
        steps=30, batch_size=4, learning_rate=1e-3, warmup_steps=3, validate_every=10,
        save_every=2, ema_decay=0.9,
    ),
)  # fmt: skip


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return write_tiles(tmp_path_factory.mktemp("store") / "s.zarr", num=8, size=64, shard_tiles=8)


@pytest.fixture(scope="module")
def alone(store, tmp_path_factory):
    """The run of one process."""
    folder = tmp_path_factory.mktemp("alone") / "run"
    pretrain.run(CONFIG, stores=[store], output=folder)
    return folder


def torchrun(store, output, *options):
    """Start two processes as a user would; the settings come from a file."""
    config = output.parent / "config.yaml"
    config.write_text(json.dumps({"pretrain": plain(CONFIG)}))
    return subprocess.Popen(
        [
            sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone",
            *options, "-m", "wsiseg", "pretrain", str(store), "-o", str(output),
            "--config", str(config),
        ],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def plain(config):
    from wsiseg.config import to_dict

    return to_dict(config)


def weights(folder):
    return load_checkpoint(folder, kind="pretrain").state_dict


def test_two_processes_end_with_the_bits_of_one(store, alone, tmp_path):
    """A network call is two tiles of 64 px, so that both have the same calls to make."""
    run = torchrun(store, tmp_path / "run")
    text, _ = run.communicate(timeout=200)
    assert run.returncode == 0, text
    assert_same_weights(weights(tmp_path / "run"), weights(alone))
    assert lines(tmp_path / "run") == lines(alone)
    assert text.count("train_tiles") <= 1  # one summary


def test_a_killed_process_is_started_again_and_the_run_ends_the_same(store, alone, tmp_path):
    run = torchrun(store, tmp_path / "run", "--max-restarts=5")
    metrics = tmp_path / "run" / "metrics.jsonl"
    end = time.monotonic() + 200
    while time.monotonic() < end and run.poll() is None:
        if metrics.exists() and '"step": 10' in metrics.read_text():
            break
        time.sleep(0.05)
    children = subprocess.run(
        ["pgrep", "-P", str(run.pid)], capture_output=True, text=True, check=False
    ).stdout.split()
    assert run.poll() is None, "the run was over before a process could be killed"
    os.kill(int(children[-1]), signal.SIGKILL)
    text, _ = run.communicate(timeout=200)
    assert run.returncode == 0, text
    assert_same_weights(weights(tmp_path / "run"), weights(alone))
    assert lines(tmp_path / "run") == lines(alone)
    assert not (tmp_path / "run" / "resume").exists()
    shutil.rmtree(tmp_path / "run")


def test_a_step_that_cannot_be_shared_is_refused():
    with pytest.raises(ConfigError, match="8 tiles cannot be shared by 3 processes"):
        Ranks(rank=0, size=3).check_batch(8)


def test_shares_are_all_tiles_once():
    tiles = list(range(12))
    shares = [tiles[Ranks(rank=rank, size=4).share(12)] for rank in range(4)]
    assert list(itertools.chain(*shares)) == tiles
    assert {len(share) for share in shares} == {3}
