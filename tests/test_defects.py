"""The defects D1 to D29 of the released code that have no test of their own elsewhere.

`docs/method.md` says of each what the released code does, what is done here and which test holds
it. Tests carry the number of the defect that they exclude: `grep -rn "def test_d16_" tests`.
"""

import os
import random
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from stores_on_disk import CLASSES, begin_tiles, run_info, tile_data, write_tiles
from torch import distributed

from tests.training.tiny_runs import CPU, denoiser, segmenter, setup_of, train
from wsiseg.classes import IGNORE, ClassTable
from wsiseg.cli.train_commands import ranks_of_torchrun
from wsiseg.errors import AnnotationError
from wsiseg.models.inputs import to_network
from wsiseg.models.unet import UNet
from wsiseg.settings.model import UNET_PRESETS
from wsiseg.settings.training import AugmentConfig, FinetuneConfig, LossConfig, PretrainConfig
from wsiseg.slides.label_image import LabelImage
from wsiseg.store.tiles import TileStore
from wsiseg.training.augment import augment
from wsiseg.training.data import split_groups, split_tiles
from wsiseg.training.losses import SegmentationLoss
from wsiseg.training.pieces import open_runner
from wsiseg.training.runs import open_stores

PACKAGE = Path(__file__).resolve().parents[1] / "wsiseg"
NO_LOSS: dict[str, Any] = {"focal": 0.0, "structural": 0.0}


def loss_of(num_labels, **weights):
    return SegmentationLoss(LossConfig(**{**NO_LOSS, **weights}), num_labels)


def drawn(num_labels=3, *, size=16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(2, num_labels, size, size, generator=generator)
    labels = torch.randint(0, num_labels, (2, size, size), generator=generator)
    return logits, labels.to(torch.uint8)


@pytest.fixture
def store(tmp_path):
    return write_tiles(tmp_path / "s.zarr", num=10, size=16)


# Losses.


def test_d1_a_network_that_is_sure_and_wrong_has_a_finite_loss_and_slope():
    _, labels = drawn()
    logits = torch.zeros(2, 3, 16, 16)
    logits[:, 0], logits[:, 1:] = 1e4, -1e4
    logits.requires_grad_()
    loss = loss_of(3, cross_entropy=1.0, focal=1.0, structural=1.0, dice=1.0, tversky=1.0)
    total, _ = loss(logits, labels)
    (slope,) = torch.autograd.grad(total.sum(), logits)
    assert total.isfinite().all()
    assert slope.isfinite().all()


def test_d3_ssloss_reweights_pixels_and_the_released_form_only_scales_them_all():
    """Pixels whose structure is right get no slope per pixel, but the common one as released."""
    logits, labels = drawn()
    slopes = {}
    for mode in ("per_pixel", "official"):
        values = logits.clone().requires_grad_()
        total, _ = loss_of(3, structural=1.0, structural_mode=mode)(values, labels)
        (slope,) = torch.autograd.grad(total.sum(), values)
        slopes[mode] = slope.abs().sum(dim=1)
    unmoved = (slopes["per_pixel"] < 1e-12).float().mean()
    assert unmoved > 0.01
    assert (slopes["official"] < 1e-12).float().mean() == 0.0


@pytest.mark.parametrize("mode", ["per_pixel", "official"])
def test_d4_a_class_that_is_absent_from_a_tile_has_no_part_in_ssloss(mode):
    """A further class that the network rightly never sees changes nothing."""
    logits, labels = drawn(2)
    absent = torch.full((2, 1, 16, 16), -60.0)
    two, _ = loss_of(2, structural=1.0, structural_mode=mode)(logits, labels)
    three, _ = loss_of(3, structural=1.0, structural_mode=mode)(
        torch.cat((logits, absent), dim=1), labels
    )
    assert torch.allclose(two, three, rtol=1e-4)


def test_d4_a_lonely_pixel_does_not_rule_the_loss():
    """Its standardised value is 256 in a tile of 256 px; the error that counts is at most 10."""
    labels = torch.zeros(1, 256, 256, dtype=torch.uint8)
    labels[0, 100, 100] = 1
    logits = torch.zeros(1, 2, 256, 256)
    total, _ = loss_of(2, structural=1.0)(logits, labels)
    assert float(total) <= 10 * np.log(2) + 1e-6


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0, 3.0])
def test_d5_the_focal_loss_is_right_for_odd_and_fractional_gamma(gamma):
    logits, labels = drawn()
    total, _ = loss_of(3, focal=1.0, focal_gamma=gamma)(logits, labels)
    p = logits.double().softmax(dim=1).gather(1, labels.long()[:, None])[:, 0]
    exact = ((1 - p) ** gamma * -p.log()).mean(dim=(1, 2))
    assert torch.allclose(total.double(), exact, rtol=1e-5)


def test_d23_every_sample_of_a_batch_has_its_own_weight_in_the_loss():
    """The released weights of images were those of the first one only, by a misplaced return."""
    logits, labels = drawn()
    both, _ = loss_of(3, cross_entropy=1.0)(logits, labels)
    alone = [loss_of(3, cross_entropy=1.0)(logits[i : i + 1], labels[i : i + 1])[0] for i in (0, 1)]
    assert torch.allclose(both, torch.cat(alone))
    assert both[0] != both[1]


# Data.


def open_label_image(path, classes):
    return LabelImage.open(path, slide_id="a", width_px_l0=30, height_px_l0=20, classes=classes)


def test_d10_a_jpeg_of_labels_is_refused(tmp_path):
    Image.fromarray(np.full((20, 30), 255, np.uint8)).save(tmp_path / "a.jpg")
    with pytest.raises(AnnotationError, match=r"a\.jpg.*(lossy|JPEG)"):
        open_label_image(tmp_path / "a.jpg", ClassTable.of_names(["Gland"]))


def test_d11_a_bitmap_with_one_channel_is_read_with_each_of_its_labels(tmp_path):
    labels = (np.arange(600).reshape(20, 30) % 3).astype(np.uint8)
    Image.fromarray(labels).save(tmp_path / "a.bmp")
    image = open_label_image(tmp_path / "a.bmp", CLASSES)
    assert np.array_equal(image.labels_l0, labels)


@settings(max_examples=200, deadline=None)
@given(num=st.integers(1, 30), fraction=st.floats(0, 0.9), seed=st.integers(0, 99))
def test_d13_the_split_does_not_depend_on_the_order_of_the_files(num, fraction, seed):
    groups: dict[str, str | None] = {f"p{i}": None for i in range(num)}
    names = list(groups)
    random.Random(seed).shuffle(names)
    shuffled = {name: groups[name] for name in names}
    first = split_groups(groups, val_fraction=fraction, seed=seed)
    assert split_groups(shuffled, val_fraction=fraction, seed=seed) == first


def test_d13_stores_are_taken_in_the_order_of_their_names(tmp_path):
    paths = [write_tiles(tmp_path / f"{name}.zarr") for name in "cab"]
    assert [store.path.stem for store in open_stores(paths)] == ["a", "b", "c"]


def test_d14_images_and_labels_are_as_many_and_of_one_shape(tmp_path):
    images, labels = tile_data(4, 16)
    with begin_tiles(tmp_path / "s.zarr", num=4) as writer, pytest.raises(ValueError, match=r"\("):
        writer.write_shard(0, images, np.repeat(labels[..., None], 3, axis=3))
    store = TileStore.open(write_tiles(tmp_path / "t.zarr", num=10, size=16))
    assert store.read_images(range(10)).shape[:3] == store.read_labels(range(10)).shape


@settings(max_examples=1000, deadline=None)
@given(
    named=st.lists(st.sampled_from([None, None, "train", "val", "test"]), min_size=1, max_size=20),
    fraction=st.floats(0, 0.9), seed=st.integers(0, 99),
)  # fmt: skip
def test_d15_no_patient_is_in_two_splits_and_some_are_left_to_learn_from(named, fraction, seed):
    groups = {f"p{i}": split for i, split in enumerate(named)}
    splits = split_groups(groups, val_fraction=fraction, seed=seed)
    assert splits.keys() == groups.keys()
    assert all(splits[name] == split for name, split in groups.items() if split)
    if None in named:
        assert "train" in splits.values()


def test_d15_tiles_of_a_patient_are_on_one_side(tmp_path):
    stores = []
    for name in "abcd":
        with TileStore.create(
            tmp_path / f"{name}.zarr",
            raster=TileStore.open(write_tiles(tmp_path / f"{name}0.zarr")).raster,
            tile_size_px=16, origins=np.array([[0, 0], [3, 1]]),
            slide={"slide_id": name, "width_px_l0": 400, "height_px_l0": 260, "bounds": None},
            run=run_info(), has_labels=False, classes=None,
            group_id="ab" if name in "ab" else name, split=None, shard_tiles=4,
            overwrite=False, codec="zstd",
        ) as writer:  # fmt: skip
            writer.write_shard(0, tile_data(2, 16)[0], None)
            writer.finish()
        stores.append(TileStore.open(tmp_path / f"{name}.zarr"))
    for seed in range(5):
        train_set, val_set = split_tiles(stores, val_fraction=0.4, seed=seed, labelled_only=False)
        sides = [{s.name(i)[0] for i in range(len(s))} for s in (train_set, val_set)]
        assert not sides[0] & sides[1]
        assert ({"a", "b"} <= sides[0]) != ({"a", "b"} <= sides[1])


def test_d16_labels_move_with_their_image_and_differently_each_time():
    """Labels that are one of the image's channels still are, after any of the symmetries."""
    images = torch.randint(0, 256, (64, 8, 8, 3), generator=torch.Generator().manual_seed(1))
    images = images.to(torch.uint8)
    off = AugmentConfig(stain_sigma=0.0, blur_probability=0.0, brightness=0.0, contrast=0.0)
    generators = [np.random.default_rng(i) for i in range(64)]
    moved, labels = augment(images, images[..., 1].clone(), off, generators)
    assert torch.equal(moved[..., 1], labels)
    symmetries = {
        k for image, before in zip(moved, images, strict=True) for k in range(8)
        if torch.equal(image, turned(before, k))
    }  # fmt: skip
    assert symmetries == set(range(8))


def turned(image, k):
    image = torch.rot90(image, k % 4, (0, 1))
    return image.flip(1) if k >= 4 else image


def test_d16_colours_and_blur_leave_labels_alone():
    images = torch.randint(0, 256, (8, 16, 16, 3)).to(torch.uint8)
    labels = torch.randint(0, 3, (8, 16, 16)).to(torch.uint8)
    labels[:, :4] = IGNORE
    config = AugmentConfig(flip=False, stain_sigma=0.2, blur_probability=1.0)
    generators = [np.random.default_rng(i) for i in range(8)]
    changed, same = augment(images, labels, config, generators)
    assert torch.equal(same, labels)
    assert not torch.equal(changed, images)
    assert changed.dtype == torch.uint8


@pytest.mark.parametrize("make", [denoiser, segmenter])
def test_d17_validation_sees_the_same_tiles_noise_and_steps_every_time(store, make):
    model, task = make(store)
    with open_runner(CPU, amp=True, num_pieces=2, is_compiled=False) as runner:
        first = task.validate(model.eval(), runner)
        torch.rand(7)  # whatever else draws random numbers
        task.pieces(task.batch(3), 3)
        assert task.validate(model.eval(), runner) == first


def test_d17_validation_tiles_are_as_stored(store):
    model, task = segmenter(store)
    seen = []
    model.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with open_runner(CPU, amp=True, num_pieces=1, is_compiled=False) as runner:
        task.validate(model.eval(), runner)
    stored = TileStore.open(store).read_images(range(7, 10))
    assert torch.equal(torch.cat(seen), to_network(torch.from_numpy(stored)))


@pytest.mark.parametrize("codec", ["zstd", "jpeg"])
def test_d18_labels_are_stored_without_loss_whatever_the_codec_of_the_images(tmp_path, codec):
    path = write_tiles(tmp_path / "s.zarr", num=10, size=16, codec=codec)
    images, labels = tile_data(10, 16)
    store = TileStore.open(path)
    assert np.array_equal(store.read_labels(range(10)), labels)
    if codec == "zstd":
        assert np.array_equal(store.read_images(range(10)), images)


# The programme.


def test_d24_the_number_of_classes_follows_from_the_class_table():
    for names in (["A"], ["A", "B", "C", "D"]):
        classes = ClassTable.of_names(names)
        unet = UNet(UNET_PRESETS["tiny"], out_channels=classes.num_labels)
        assert unet.head.project.out_channels == len(names) + 1


def test_d24_no_path_port_or_device_number_is_written_into_the_code():
    pattern = re.compile(r"[\"'](/(home|root|mnt)/|cuda:\d)|\b12345\b")
    found = [
        f"{path.name}: {line.strip()}"
        for path in PACKAGE.rglob("*.py")
        for line in path.read_text(encoding="utf-8").splitlines()
        if pattern.search(line)
    ]
    assert not found


def test_d24_every_choice_of_training_is_a_setting():
    for config in (PretrainConfig(), FinetuneConfig()):
        assert config.optim.batch_size
        assert config.seed == 0
        assert config.device == "auto"


def test_d26_one_process_on_a_cpu_needs_no_process_group(store, tmp_path, monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    assert ranks_of_torchrun().size == 1
    train("pretrain", store, tmp_path / "run")
    assert not distributed.is_initialized()
    assert os.environ.get("CUDA_LAUNCH_BLOCKING") is None


def test_d28_what_a_step_sees_follows_from_the_seed_alone(store):
    setups = [setup_of(store, seed=seed) for seed in (3, 3, 4)]
    batches = []
    for setup in setups:
        task = denoiser(store, seed=setup.seed)[1]
        batches.append(task._augmented(task.batch(5), 5)[0])
    assert torch.equal(batches[0], batches[1])
    assert not torch.equal(batches[0], batches[2])
