"""`finetune` on a real store: transfer, time step, best weights, what it refuses."""

import dataclasses

import pytest
import torch

from tests.stages.test_pretrain import CONFIG as PRETRAIN
from tests.stores_on_disk import CLASSES, write_tiles
from tests.training.tiny_runs import TINY
from wsiseg.errors import CheckpointError, ConfigError, StoreError
from wsiseg.models.checkpoint import load_checkpoint
from wsiseg.settings.model import UNetConfig
from wsiseg.settings.training import FinetuneConfig
from wsiseg.stages import finetune, pretrain

CONFIG = FinetuneConfig(device="cpu", optim=PRETRAIN.optim)
SCRATCH = dataclasses.replace(CONFIG, model=TINY)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return write_tiles(tmp_path_factory.mktemp("store") / "s.zarr", num=6, size=16)


@pytest.fixture(scope="module")
def pretrained(store, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pretrained") / "run"
    pretrain.run(PRETRAIN, stores=[store], output=folder)
    return folder


def test_it_begins_with_the_pretrained_weights_and_ends_with_a_segmenter(
    store, pretrained, tmp_path
):
    frozen = dataclasses.replace(
        CONFIG, optim=dataclasses.replace(CONFIG.optim, learning_rate=0.0), timestep=7
    )
    summary = finetune.run(frozen, stores=[store], output=tmp_path / "run", pretrained=pretrained)
    own = load_checkpoint(tmp_path / "run", kind="segmenter")
    given = load_checkpoint(pretrained, kind="pretrain").state_dict
    for name, tensor in own.state_dict.items():
        assert name.startswith("head.") or torch.equal(tensor, given[name]), name
    assert (own.timestep, own.classes) == (7, CLASSES)
    assert summary.dice is not None
    assert (tmp_path / "run" / "samples" / "validation.png").is_file()
    logits = own.build()(torch.zeros(1, 3, 16, 16))
    assert logits.shape == (1, 3, 16, 16)


def test_random_weights_are_a_baseline_of_the_same_code_and_budget(store, pretrained, tmp_path):
    one = finetune.run(SCRATCH, stores=[store], output=tmp_path / "scratch")
    two = finetune.run(CONFIG, stores=[store], output=tmp_path / "tuned", pretrained=pretrained)
    assert (one.steps, one.parameters) == (two.steps, two.parameters)
    states = [
        load_checkpoint(tmp_path / name, kind="segmenter").state_dict
        for name in ("scratch", "tuned")
    ]
    assert states[0].keys() == states[1].keys()
    assert not torch.equal(states[0]["stem.weight"], states[1]["stem.weight"])


def test_a_network_that_does_not_fit_the_pretrained_one_is_refused(store, pretrained, tmp_path):
    other = dataclasses.replace(CONFIG, model=UNetConfig(dim=16, mults=(1, 2), blocks=1))
    with pytest.raises(ConfigError, match="pretrained network settles it"):
        finetune.run(other, stores=[store], output=tmp_path / "run", pretrained=pretrained)


def test_stores_without_labels_and_segmenters_as_pretrained_are_refused(store, tmp_path):
    plain = write_tiles(tmp_path / "p.zarr", num=6, size=16, has_labels=False)
    with pytest.raises(StoreError, match="has a label"):
        finetune.run(SCRATCH, stores=[plain], output=tmp_path / "run")
    finetune.run(SCRATCH, stores=[store], output=tmp_path / "segmenter")
    with pytest.raises(CheckpointError, match="kind is 'segmenter'"):
        finetune.run(
            CONFIG, stores=[store], output=tmp_path / "run", pretrained=tmp_path / "segmenter"
        )
