"""A pretraining that two processes share, as torchrun starts them."""

import json
import os
import subprocess
import sys

from tests.stores_on_disk import write_tiles
from tests.training.tiny_runs import TINY
from wsiseg.config import to_dict
from wsiseg.models.checkpoint import load_checkpoint
from wsiseg.settings.model import DiffusionConfig
from wsiseg.settings.training import OptimConfig, PretrainConfig
from wsiseg.stages import pretrain

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


def torchrun(store, output, *options):
    """Start two processes as a user would; the settings come from a file."""
    config = output.parent / "config.yaml"
    config.write_text(json.dumps({"pretrain": to_dict(CONFIG)}))
    return subprocess.Popen(
        [
            sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone",
            *options, "-m", "wsiseg", "pretrain", str(store), "-o", str(output),
            "--config", str(config),
        ],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def train_alone(folder):
    """Return a store of tiles and the run of one process on it, which nobody disturbs."""
    store = write_tiles(folder / "s.zarr", num=8, size=64, shard_tiles=8)
    pretrain.run(CONFIG, stores=[store], output=folder / "run")
    return store, folder / "run"


def weights(folder):
    return load_checkpoint(folder, kind="pretrain").state_dict
