"""`pretrain` on a real store: what it leaves, that it goes on, what it refuses."""

import dataclasses
import json

import pytest
from PIL import Image

from tests.stores_on_disk import write_tiles
from tests.training.tiny_runs import TINY
from wsiseg.errors import ConfigError, OutputExistsError, StoreError
from wsiseg.models.checkpoint import load_checkpoint
from wsiseg.settings.model import DiffusionConfig, UNetConfig
from wsiseg.settings.training import OptimConfig, PretrainConfig
from wsiseg.stages import pretrain

CONFIG = PretrainConfig(
    model=TINY, device="cpu", sample_steps=2,
    diffusion=DiffusionConfig(timesteps=20, mask_size=4),
    optim=OptimConfig(
        steps=4, batch_size=2, warmup_steps=1, validate_every=2, save_every=2, patience=0
    ),
)  # fmt: skip


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return write_tiles(tmp_path_factory.mktemp("store") / "s.zarr", num=6, size=16)


@pytest.mark.parametrize("objective", ["noise", "velocity", "masked", "autoencoding"])
def test_it_leaves_a_checkpoint_curves_samples_and_its_settings(store, tmp_path, objective):
    config = dataclasses.replace(
        CONFIG, diffusion=dataclasses.replace(CONFIG.diffusion, objective=objective)
    )
    summary = pretrain.run(config, stores=[store], output=tmp_path / "run")
    checkpoint = load_checkpoint(tmp_path / "run", kind="pretrain")
    assert checkpoint.diffusion is not None
    assert checkpoint.diffusion["objective"] == objective
    assert checkpoint.unet_config == TINY
    assert (summary.steps, summary.skipped_steps, summary.note) == (4, 0, "")
    assert summary.train_tiles + summary.val_tiles == 6
    left = {p.name for p in (tmp_path / "run").iterdir()}
    assert left == {
        "config.yaml", "curves.png", "metrics.jsonl", "model.json", "run.json", "samples",
        "weights.safetensors",
    }  # fmt: skip
    (sample,) = (tmp_path / "run" / "samples").iterdir()
    with Image.open(sample) as image:
        assert image.size == (3 * 16 + 8, 3 * 16 + 8)
    log = (tmp_path / "run" / "metrics.jsonl").read_text(encoding="utf-8")
    steps = [json.loads(line)["step"] for line in log.splitlines()]
    assert steps == [2, 4, 4]


def test_a_finished_run_is_not_done_again_and_another_is_refused(store, tmp_path):
    pretrain.run(CONFIG, stores=[store], output=tmp_path / "run")
    before = (tmp_path / "run" / "model.json").read_bytes()
    again = pretrain.run(CONFIG, stores=[store], output=tmp_path / "run")
    assert again.note == "already done"
    assert (tmp_path / "run" / "model.json").read_bytes() == before
    other = dataclasses.replace(CONFIG, seed=1)
    with pytest.raises(OutputExistsError, match="seed"):
        pretrain.run(other, stores=[store], output=tmp_path / "run")
    pretrain.run(other, stores=[store], output=tmp_path / "run", overwrite=True)
    assert (tmp_path / "run" / "model.json").read_bytes() != before


def test_tiles_that_do_not_fit_the_network_are_refused(store, tmp_path):
    deep = dataclasses.replace(CONFIG, model=UNetConfig(dim=8, mults=(1, 1, 1, 1, 1, 1)))
    with pytest.raises(ConfigError, match=r"16 px do not fit .* multiple of 32 px"):
        pretrain.run(deep, stores=[store], output=tmp_path / "run")
    with pytest.raises(StoreError, match="no tile store given"):
        pretrain.run(CONFIG, stores=[], output=tmp_path / "run")
    assert not (tmp_path / "run").exists()
