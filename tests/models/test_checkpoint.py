"""Checkpoints: whole or refused, and never unpickled."""

import json
import math
import os
import pickle
import struct
from typing import Any

import pytest
import safetensors.torch
import torch

from wsiseg.classes import ClassTable
from wsiseg.config import digest
from wsiseg.errors import CheckpointError
from wsiseg.models import checkpoint as checkpoint_module
from wsiseg.models.checkpoint import load_checkpoint, model_digest, save_checkpoint
from wsiseg.models.segmenter import Segmenter
from wsiseg.models.unet import UNet
from wsiseg.outputs import write_json
from wsiseg.runinfo import RunInfo
from wsiseg.settings.model import UNetConfig

TINY = UNetConfig(dim=8, mults=(1, 2), blocks=1, attention="all")
CLASSES = ClassTable.of_names(["Tumor", "Stroma"])
RUN = RunInfo(stage="test", config={"a": 1}, seed=3, inputs={"tiles": "00"}, git_commit="abc")
DIFFUSION = {"timesteps": 1000, "schedule": "quadratic"}


def unet(seed=0):
    torch.manual_seed(seed)
    return UNet(TINY, out_channels=3).eval()


def save(folder, *, kind="pretrain", state=None, **options):
    defaults: dict[str, Any] = {
        "unet_config": TINY,
        "out_channels": 3,
        "mpp": 0.4991,
        "tile_size_px": 256,
        "timestep": 0,
        "classes": CLASSES if kind == "segmenter" else None,
        "diffusion": DIFFUSION if kind == "pretrain" else None,
        "metrics": {"loss": 0.25},
        "run": RUN,
    }
    state = unet().state_dict() if state is None else state
    save_checkpoint(folder, kind=kind, state=state, **(defaults | options))
    return folder


def edit(folder, **changes):
    """Change values as somebody would who also knows of the digest."""
    path = folder / "model.json"
    content = json.loads(path.read_text()) | changes
    del content["digest"]
    write_json(path, content | {"digest": digest(content)})


def refused(folder, message="", *, kind="pretrain"):
    with pytest.raises(CheckpointError, match=message) as caught:
        load_checkpoint(folder, kind=kind)
    assert "\n" not in str(caught.value)


def images():
    return 2 * torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(1)) - 1


# There and back.


def test_a_pretrained_network_comes_back_bit_by_bit(tmp_path):
    found = load_checkpoint(save(tmp_path / "run"), kind="pretrain")
    state = unet().state_dict()
    assert found.state_dict.keys() == state.keys()
    assert all(torch.equal(found.state_dict[name], state[name]) for name in state)
    assert (found.unet_config, found.mpp, found.tile_size_px) == (TINY, 0.4991, 256)
    assert (found.kind, found.out_channels, found.timestep) == ("pretrain", 3, 0)
    assert (found.diffusion, found.metrics, found.run) == (DIFFUSION, {"loss": 0.25}, RUN.to_dict())
    assert found.classes is None
    network = found.build()
    assert not network.training
    with torch.no_grad():
        t = torch.tensor([3, 4])
        assert torch.allclose(network(images(), t), unet()(images(), t), atol=1e-5)


@pytest.mark.parametrize("input_range", ["symmetric", "unit"])
def test_a_segmenter_comes_back_with_its_classes_step_and_range(tmp_path, input_range):
    model = Segmenter(unet(), CLASSES, 50, input_range=input_range).eval()
    save(
        tmp_path / "run",
        kind="segmenter",
        state=model.state_dict(),
        timestep=50,
        input_range=input_range,
    )
    found = load_checkpoint(tmp_path / "run", kind="segmenter")
    assert found.classes == CLASSES
    network = found.build()
    assert (network.timestep, network.input_range, network.training) == (50, input_range, False)
    with torch.no_grad():
        assert torch.allclose(network(images()), model(images()), atol=1e-5)


def test_equal_networks_give_equal_bytes_and_others_another_digest(tmp_path):
    first, again = save(tmp_path / "a"), save(tmp_path / "b")
    for name in ("model.json", "weights.safetensors"):
        assert (first / name).read_bytes() == (again / name).read_bytes()
    assert (
        model_digest(first) == model_digest(again) == load_checkpoint(first, kind="pretrain").digest
    )
    other = save(tmp_path / "c", state=unet(seed=1).state_dict())
    assert model_digest(other) != model_digest(first)


def test_saving_again_replaces_the_checkpoint(tmp_path):
    save(tmp_path / "run")
    save(tmp_path / "run", state=unet(seed=1).state_dict())
    found = load_checkpoint(tmp_path / "run", kind="pretrain").state_dict
    assert torch.equal(found["stem.weight"], unet(seed=1).stem.weight)
    assert {p.name for p in (tmp_path / "run").iterdir()} == {"model.json", "weights.safetensors"}


def test_weights_in_channels_last_memory_are_saved_as_they_are(tmp_path):
    network = unet().to(memory_format=torch.channels_last)
    save(tmp_path / "run", state=network.state_dict())
    found = load_checkpoint(tmp_path / "run", kind="pretrain").state_dict
    assert torch.equal(found["stem.weight"], unet().stem.weight)


def test_the_weights_are_plain_safetensors_that_anyone_can_read(tmp_path):
    tensors = safetensors.torch.load_file(save(tmp_path / "run") / "weights.safetensors")
    assert tensors.keys() == unet().state_dict().keys()


def test_figures_that_are_no_numbers_are_stored_as_null(tmp_path):
    save(tmp_path / "run", metrics={"loss": math.nan, "more": [math.inf, {"x": -math.inf}, 1]})
    assert load_checkpoint(tmp_path / "run", kind="pretrain").metrics == {
        "loss": None,
        "more": [None, {"x": None}, 1],
    }


def test_a_state_that_does_not_fit_is_not_saved(tmp_path):
    state = unet().state_dict()
    with pytest.raises(CheckpointError, match="missing"):
        save(tmp_path / "run", state={"stem.weight": state["stem.weight"]})
    with pytest.raises(CheckpointError, match=r"head\.project"):
        save(tmp_path / "run", out_channels=4)
    with pytest.raises(CheckpointError, match="needs a class table"):
        save(tmp_path / "run", kind="segmenter", classes=None)
    with pytest.raises(CheckpointError, match="has no class table"):
        save(tmp_path / "run", classes=CLASSES)
    assert not (tmp_path / "run").exists()


def test_a_kill_between_the_two_files_leaves_no_checkpoint(tmp_path, monkeypatch):
    """Not even where an older one was: its description does not fit the new weights."""
    save(tmp_path / "run")

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_module, "write_json", killed)
        with pytest.raises(KeyboardInterrupt):
            save(tmp_path / "run", state=unet(seed=1).state_dict())
    refused(tmp_path / "run", r"holds no model\.json")


# Damage.


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = save(tmp_path_factory.mktemp("whole") / "run")
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def put(folder, files):
    folder.mkdir(exist_ok=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return folder


def test_a_flipped_bit_anywhere_in_the_weights_is_found(tmp_path, whole):
    data = whole["weights.safetensors"]
    places = [0, 7, 8, 9, 40, len(data) // 2, len(data) - 1, *range(100, len(data), 5003)]
    for place in places:
        damaged = bytearray(data)
        damaged[place] ^= 1 << place % 8
        refused(put(tmp_path / "run", whole | {"weights.safetensors": bytes(damaged)}), "run")


def test_a_flipped_bit_in_the_description_is_found(tmp_path, whole):
    data = whole["model.json"]
    put(tmp_path / "run", whole)
    for place in range(0, len(data), 7):
        damaged = bytearray(data)
        damaged[place] ^= 1 << place % 8
        refused(put(tmp_path / "run", {"model.json": bytes(damaged)}), "run")


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text.replace("0.4991", "0.4981"),
        lambda text: text.replace('"symmetric"', '"unit"'),
        lambda text: text.replace("0.4991", "1e400"),
        lambda text: text.replace('"test"', '"\\ud800"'),
        lambda text: text.replace("0.4991", "[" * 900 + "]" * 900),
        lambda text: text.replace("0.4991,", "0.4991, "),
        lambda text: text.replace("{", '{"mpp": 1,', 1),
    ],
    ids=["mpp", "range", "infinite", "surrogate", "deep", "blank", "twice"],
)
def test_an_edited_description_is_refused_with_the_remedy(tmp_path, whole, change):
    text = change(whole["model.json"].decode())
    put(tmp_path / "run", whole | {"model.json": text.encode()})
    refused(tmp_path / "run", r"model\.json is damaged \(its own checksum differs\); restore it")


def test_a_description_without_a_digest_says_to_make_the_model_again(tmp_path):
    path = save(tmp_path / "run") / "model.json"
    content = json.loads(path.read_text())
    del content["digest"]
    write_json(path, content)
    refused(tmp_path / "run", "has no digest of itself.*; make the model again with the command")


@pytest.mark.parametrize("keep", [0, 4, 8, 500, -1])
def test_weights_cut_off_are_refused(tmp_path, whole, keep):
    data = whole["weights.safetensors"][:keep]
    refused(put(tmp_path / "run", whole | {"weights.safetensors": data}), "cut off")


def test_weights_with_bytes_behind_them_are_refused(tmp_path, whole):
    data = whole["weights.safetensors"] + b"\0"
    refused(put(tmp_path / "run", whole | {"weights.safetensors": data}), "bytes of data")


@pytest.mark.parametrize("name", ["model.json", "weights.safetensors"])
def test_a_missing_file_is_named(tmp_path, whole, name):
    put(tmp_path / "run", whole)
    (tmp_path / "run" / name).unlink()
    refused(tmp_path / "run", name)


def test_what_is_no_folder_or_not_there_is_refused(tmp_path):
    refused(tmp_path / "run", "does not exist")
    (tmp_path / "model.json").write_text("{}")
    refused(tmp_path / "model.json", r"a file; give the run folder that holds model\.json")


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "null", '{"format": "other"}', "[" * 100_000, '{"a": NaN}', "\x00", "9" * 5000],
    ids=["empty", "half", "list", "null", "other", "deep", "nan", "zero", "number"],
)
def test_a_description_that_is_none_is_refused(tmp_path, whole, text):
    refused(put(tmp_path / "run", whole | {"model.json": text.encode()}), r"model\.json")


def test_a_description_too_large_to_be_one_is_refused_unparsed(tmp_path, whole):
    padded = whole["model.json"] + b" " * 4_000_000
    refused(put(tmp_path / "run", whole | {"model.json": padded}), "larger than 4000000 bytes")


def test_a_newer_version_says_to_upgrade(tmp_path):
    edit(save(tmp_path / "run"), format_version=2)
    refused(tmp_path / "run", r"format_version 2 is newer than this wsiseg reads \(1\); upgrade")


@pytest.mark.parametrize("version", [0, -1, "1", None, True, 1.0])
def test_what_is_no_version_is_refused(tmp_path, version):
    edit(save(tmp_path / "run"), format_version=version)
    refused(tmp_path / "run", "is not a version")


def test_a_checkpoint_of_the_other_kind_says_what_to_do(tmp_path):
    refused(save(tmp_path / "a"), "needed is 'segmenter'; run `wsiseg finetune`", kind="segmenter")
    refused(save(tmp_path / "b", kind="segmenter"), "needed is 'pretrain'; .* folder of `pretrain`")


@pytest.mark.parametrize(
    "changes",
    [
        {"mpp": 0},
        {"mpp": "0.5"},
        {"mpp": None},
        {"tile_size_px": 0},
        {"timestep": -1},
        {"out_channels": 4},
        {"input_range": "both"},
        {"architecture": {"dim": 10**9}},
        {"architecture": {"dim": 8, "unknown": 1}},
        {"architecture": []},
        {"diffusion": 3},
        {"metrics": None},
        {"run": "x"},
        {"weights": None},
        {"weights": {"sha256": "00"}},
    ],
    ids=str,
)
def test_a_description_with_a_wrong_value_is_refused(tmp_path, changes):
    edit(save(tmp_path / "run"), **changes)
    refused(tmp_path / "run", "run")


def test_a_description_of_a_huge_network_is_refused_before_memory_is_taken(tmp_path):
    """It would have 5e13 parameters."""
    huge = {"dim": 512, "mults": [64] * 8, "blocks": 8}
    edit(save(tmp_path / "run"), architecture=huge)
    refused(tmp_path / "run", "missing|the network needs")


def test_other_tensors_than_the_network_has_are_refused(tmp_path):
    folder = save(tmp_path / "run")
    state = unet().state_dict()
    for change, message in (
        ({"extra": torch.zeros(1)}, r"1 unknown \(extra\)"),
        ({"stem.weight": torch.zeros(8, 3, 7, 6)}, r"'stem\.weight'"),
        ({"stem.bias": torch.zeros(8).half()}, r"'stem\.bias'"),
        ({"stem.bias": torch.zeros(8, dtype=torch.int32)}, r"'stem\.bias'"),
    ):
        data = safetensors.torch.save({**state, **change})
        (folder / "weights.safetensors").write_bytes(data)
        refused(folder, message)


def test_a_header_of_absurd_length_is_refused(tmp_path, whole):
    for length in (2**63, 2**40, len(whole["weights.safetensors"])):
        data = struct.pack("<Q", length) + whole["weights.safetensors"][8:]
        refused(put(tmp_path / "run", whole | {"weights.safetensors": data}), "header")


# Pickles.


class Bomb:
    """Makes a folder when it is unpickled."""

    def __init__(self, canary):
        self.canary = canary

    def __reduce__(self):
        return os.mkdir, (str(self.canary),)


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".pkl", ".ckpt", ".bin"])
def test_d27_a_pickle_is_refused_by_name_and_not_opened(tmp_path, suffix):
    path = tmp_path / f"model{suffix}"
    torch.save(Bomb(tmp_path / "canary"), path)
    refused(path, "can run code when opened.*wsiseg import-checkpoint")
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize("name", ["model.json", "weights.safetensors"])
def test_a_pickle_under_the_name_of_one_of_the_files_is_refused_and_runs_nothing(
    tmp_path, whole, name
):
    data = pickle.dumps(Bomb(tmp_path / "canary"))
    refused(put(tmp_path / "run", whole | {name: data}), name)
    assert not (tmp_path / "canary").exists()
