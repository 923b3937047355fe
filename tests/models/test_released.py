"""Checkpoints of the released code: read without running it, computing the same as it does.

The reference below is written from the description of the network (names and shapes of its
tensors, and what it does with them) as plain functions of a state dict.
"""

import functools
import itertools
import math
import os
import pickle
import shutil
import zipfile
from collections import OrderedDict

import numpy as np
import pytest
import torch
from torch.nn import functional

from wsiseg.classes import ClassTable
from wsiseg.errors import CheckpointError, ConfigError, OutputExistsError
from wsiseg.models import released as released_module
from wsiseg.models.checkpoint import load_checkpoint
from wsiseg.models.released import read_released, released_name
from wsiseg.models.unet import UNet, tensor_shapes
from wsiseg.settings.model import UNET_PRESETS
from wsiseg.settings.released import ImportConfig
from wsiseg.stages import import_checkpoint

WIDTHS = [42, 64, 128, 256, 512]
CONFIG = ImportConfig(mpp=0.25)


# The released network, from its description.


def conv_shapes(name, out, into, side, *, bias=True):
    yield f"{name}.weight", (out, into, side, side)
    if bias:
        yield f"{name}.bias", (out,)


def vector_shapes(name, size):
    yield f"{name}.weight", (size,)
    yield f"{name}.bias", (size,)


def linear_shapes(name, out, into):
    yield f"{name}.weight", (out, into)
    yield f"{name}.bias", (out,)


def block_shapes(name, into, out, *, has_time=True):
    if has_time:
        yield from linear_shapes(f"{name}.mlp.1", out, 256)
    for number, channels in ((1, into), (2, out)):
        yield from conv_shapes(f"{name}.block{number}.proj", out, channels, 3)
        yield from vector_shapes(f"{name}.block{number}.norm", out)
    if into != out:
        yield from conv_shapes(f"{name}.res_conv", out, into, 1)


def attention_shapes(name, channels, *, is_linear):
    yield from conv_shapes(f"{name}.fn.fn.to_qkv", 384, channels, 1, bias=False)
    out = f"{name}.fn.fn.to_out"
    yield from conv_shapes(f"{out}.0" if is_linear else out, channels, 128, 1)
    if is_linear:
        yield from vector_shapes(f"{out}.1", channels)
    yield from vector_shapes(f"{name}.fn.norm", channels)


def network_shapes(num_outputs):
    yield from conv_shapes("init_conv", 42, 3, 7)
    yield from linear_shapes("time_mlp.1", 256, 64)
    yield from linear_shapes("time_mlp.3", 256, 256)
    for i, (into, out) in enumerate(itertools.pairwise(WIDTHS)):
        yield from block_shapes(f"downs.{i}.0", into, out)
        yield from block_shapes(f"downs.{i}.1", out, out)
        yield from attention_shapes(f"downs.{i}.2", out, is_linear=True)
        if i < 3:
            yield from conv_shapes(f"downs.{i}.3", out, out, 4)
    for i, (into, out) in enumerate(((512, 256), (256, 128), (128, 64))):
        yield from block_shapes(f"ups.{i}.0", 2 * into, out)
        yield from block_shapes(f"ups.{i}.1", out, out)
        yield from attention_shapes(f"ups.{i}.2", out, is_linear=True)
        yield from conv_shapes(f"ups.{i}.3", out, out, 4)
    yield from block_shapes("mid_block1", 512, 512)
    yield from attention_shapes("mid_attn", 512, is_linear=False)
    yield from block_shapes("mid_block2", 512, 512)
    yield from block_shapes("final_conv.0", 64, 64, has_time=False)
    yield from conv_shapes("final_conv.1", num_outputs, 64, 1)


@functools.cache
def random_state(num_outputs):
    """Random weights that keep the scale of activations, so that every part matters."""
    generator = torch.Generator().manual_seed(num_outputs)
    state = OrderedDict()
    for name, shape in network_shapes(num_outputs):
        values = torch.randn(shape, generator=generator)
        fan_in = math.prod(shape[1:]) if len(shape) > 1 else 1
        is_scale = len(shape) == 1 and name.endswith("weight")
        state[f"net.{name}"] = 1 + 0.2 * values if is_scale else values / math.sqrt(fan_in)
    return state


class Released:
    """What the released U-Net computes, before the softmax of the segmentation network."""

    def __init__(self, state):
        self.state = {name.removeprefix("net."): tensor for name, tensor in state.items()}

    def conv(self, name, x, **options):
        weight, bias = self.state[f"{name}.weight"], self.state.get(f"{name}.bias")
        return functional.conv2d(x, weight, bias, **options)

    def linear(self, name, x):
        return functional.linear(x, self.state[f"{name}.weight"], self.state[f"{name}.bias"])

    def norm(self, name, x, groups):
        weight, bias = self.state[f"{name}.weight"], self.state[f"{name}.bias"]
        return functional.group_norm(x, groups, weight, bias)

    def half_block(self, name, x):
        return functional.silu(
            self.norm(f"{name}.norm", self.conv(f"{name}.proj", x, padding=1), 8)
        )

    def block(self, name, x, time=None):
        hidden = self.half_block(f"{name}.block1", x)
        if time is not None:
            bias = self.linear(f"{name}.mlp.1", functional.silu(time))
            hidden = hidden + bias[:, :, None, None]
        hidden = self.half_block(f"{name}.block2", hidden)
        is_wider = f"{name}.res_conv.weight" in self.state
        return hidden + (self.conv(f"{name}.res_conv", x) if is_wider else x)

    def heads(self, name, x):
        """Return q, k, v as (N, heads, 32, positions)."""
        qkv = self.conv(f"{name}.fn.fn.to_qkv", self.norm(f"{name}.fn.norm", x, 1))
        return qkv.reshape(len(x), 3, 4, 32, -1).unbind(1)

    def linear_attention(self, name, x):
        q, k, v = self.heads(name, x)
        context = torch.matmul(k.softmax(dim=3), v.transpose(2, 3))
        mixed = torch.matmul(context.transpose(2, 3), q.softmax(dim=2) / math.sqrt(32))
        mixed = mixed.reshape(len(x), 128, *x.shape[2:])
        out = f"{name}.fn.fn.to_out"
        return x + self.norm(f"{out}.1", self.conv(f"{out}.0", mixed), 1)

    def full_attention(self, name, x):
        q, k, v = self.heads(name, x)
        weights = torch.matmul(q.transpose(2, 3), k).div(math.sqrt(32)).softmax(dim=3)
        mixed = torch.matmul(v, weights.transpose(2, 3))
        return x + self.conv(f"{name}.fn.fn.to_out", mixed.reshape(len(x), 128, *x.shape[2:]))

    def stage(self, name, x, time):
        x = self.block(f"{name}.1", self.block(f"{name}.0", x, time), time)
        return self.linear_attention(f"{name}.2", x)

    def time(self, t):
        angles = t[:, None] * torch.exp(torch.arange(32) * (-math.log(10000) / 31))
        waves = torch.cat((angles.sin(), angles.cos()), dim=1)
        return self.linear("time_mlp.3", functional.gelu(self.linear("time_mlp.1", waves)))

    @torch.no_grad()
    def __call__(self, x, t):
        time = self.time(t)
        x = self.conv("init_conv", x, padding=3)
        skips = []
        for i in range(4):
            x = self.stage(f"downs.{i}", x, time)
            skips.append(x)
            if i < 3:
                x = self.conv(f"downs.{i}.3", x, stride=2, padding=1)
        x = self.full_attention("mid_attn", self.block("mid_block1", x, time))
        x = self.block("mid_block2", x, time)
        for i in range(3):
            x = self.stage(f"ups.{i}", torch.cat((x, skips.pop()), dim=1), time)
            weight, bias = self.state[f"ups.{i}.3.weight"], self.state[f"ups.{i}.3.bias"]
            x = functional.conv_transpose2d(x, weight, bias, stride=2, padding=1)
        return self.conv("final_conv.1", self.block("final_conv.0", x))


def slim_state(num_outputs):
    """All names and shapes, in files of a few kilobytes: one stored number for each tensor."""
    return OrderedDict(
        (f"net.{name}", torch.zeros(1).expand(shape)) for name, shape in network_shapes(num_outputs)
    )


def save_released(path, state, **more):
    """As the released trainer does: the loss is a NumPy array of no dimension."""
    content = {"epoch": 84, "loss": np.array(0.02807, np.float32), "model_state_dict": state}
    torch.save({**content, **more}, path)
    return path


@pytest.fixture(autouse=True)
def _leave_no_large_files(tmp_path):
    yield
    shutil.rmtree(tmp_path)


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    """The released files by number of outputs: random weights, 125 MB each."""
    folder = tmp_path_factory.mktemp("released")
    yield {num: save_released(folder / f"{num}.pth", random_state(num)) for num in (2, 3)}
    shutil.rmtree(folder)


TIMES = (0.0, 1.0, 2.0, 10.0, 499.0, 500.0, 741.0, 998.0, 999.0)


@pytest.mark.parametrize("side", [(8, 8), (16, 40), (64, 64)])
@pytest.mark.parametrize("num_outputs", [2, 3])
def test_the_network_of_the_preset_computes_the_released_one_at_every_size_and_time(
    released, num_outputs, side
):
    """Within 1e-5 of the size of the output, in float32, for images in and out of range."""
    unet = UNet(UNET_PRESETS["parity"], out_channels=num_outputs).eval()
    unet.load_state_dict(read_released(released[num_outputs]).state_dict)
    reference = Released(random_state(num_outputs))
    generator = torch.Generator().manual_seed(sum(side))
    for t in TIMES:
        x = torch.randn(1, 3, *side, generator=generator) * (1 + t / 500)
        theirs = reference(x, torch.tensor([t]))
        with torch.no_grad():
            ours = unet(x, torch.tensor([int(t)]))
        assert (ours - theirs).abs().max() < 1e-5 * max(1.0, float(theirs.abs().max()))


def images():
    return torch.rand(2, 3, 48, 48, generator=torch.Generator().manual_seed(7))


# What it computes.


def test_the_imported_pretrained_network_predicts_the_same_noise(released, tmp_path):
    summary = import_checkpoint.run(CONFIG, checkpoint=released[3], output=tmp_path / "run")
    assert (summary.kind, summary.parameters, summary.epoch) == ("pretrain", 31_267_083, 84)
    checkpoint = load_checkpoint(tmp_path / "run", kind="pretrain")
    assert checkpoint.diffusion is not None
    assert checkpoint.diffusion["schedule"] == "quadratic"
    x, t = 2 * images() - 1, torch.tensor([0, 741])
    theirs = Released(random_state(3))(x, t)
    with torch.no_grad():
        ours = checkpoint.build()(x, t)
    assert theirs.std() > 0.1
    assert (ours - theirs).abs().max() < 1e-5 * theirs.abs().max()


def test_the_imported_segmentation_network_gives_the_same_probabilities(released, tmp_path):
    """Ours are called with [-1, 1], theirs with [0, 1] (defect D7) and t = 0 (defect D8)."""
    summary = import_checkpoint.run(CONFIG, checkpoint=released[2], output=tmp_path / "run")
    assert (summary.kind, summary.parameters) == ("segmenter", 31_267_018)
    assert summary.classes == "Foreground"
    segmenter = load_checkpoint(tmp_path / "run", kind="segmenter").build()
    x = images()
    theirs = Released(random_state(2))(x, torch.zeros(2)).softmax(dim=1)
    with torch.no_grad():
        ours = segmenter(2 * x - 1).softmax(dim=1)
    assert theirs.std() > 0.1
    assert (ours - theirs).abs().max() < 1e-5


def test_three_outputs_are_classes_if_they_are_named(released, tmp_path):
    classes = ClassTable.of_names(["Inside", "Border"])
    import_checkpoint.run(CONFIG, checkpoint=released[3], output=tmp_path / "run", classes=classes)
    assert load_checkpoint(tmp_path / "run", kind="segmenter").classes == classes


def test_classes_that_do_not_fit_the_outputs_are_refused(released, tmp_path):
    classes = ClassTable.of_names(["a", "b", "c"])
    with pytest.raises(CheckpointError, match=r"has 2 outputs.* 3 classes need 4"):
        import_checkpoint.run(
            CONFIG, checkpoint=released[2], output=tmp_path / "run", classes=classes
        )
    assert not (tmp_path / "run").exists()


def test_four_outputs_are_numbered_classes(tmp_path):
    path = save_released(tmp_path / "hn.pth", slim_state(4))
    summary = import_checkpoint.run(CONFIG, checkpoint=path, output=tmp_path / "run")
    assert summary.classes == "Label 1, Label 2, Label 3"
    assert summary.parameters == 31_267_148


def test_every_tensor_has_one_name_there():
    for num_outputs in (2, 3, 4):
        ours = tensor_shapes(UNET_PRESETS["parity"], out_channels=num_outputs)
        theirs = {f"net.{name}": shape for name, shape in network_shapes(num_outputs)}
        assert {released_name(name): shape for name, shape in ours.items()} == theirs
    with pytest.raises(ValueError, match=r"no tensor 'unknown\.weight'"):
        released_name("unknown.weight")


# Formats.


@pytest.mark.parametrize("loss", [0.1, np.float64(0.1), np.array(0.1), torch.tensor(0.1)])
def test_the_loss_may_be_of_any_type(tmp_path, loss):
    path = save_released(tmp_path / "a.pth", slim_state(3), loss=loss)
    assert read_released(path).epoch == 84


def test_the_loss_may_be_as_numpy_1_wrote_it(tmp_path, released):
    """NumPy 2 calls its module `numpy._core`, which the checkpoints of 2023 cannot know."""
    path = tmp_path / "old.pth"
    with zipfile.ZipFile(released[3]) as source, zipfile.ZipFile(path, "w") as target:
        for entry in source.infolist():
            data = source.read(entry)
            if entry.filename.endswith("data.pkl"):
                assert b"numpy._core" in data
                data = data.replace(b"numpy._core", b"numpy.core")
            target.writestr(entry.filename, data)
    assert read_released(path).out_channels == 3


def test_files_of_torch_before_1_6_are_read(tmp_path):
    content = {"epoch": 3, "loss": 0.1, "model_state_dict": slim_state(3)}
    torch.save(content, tmp_path / "a.pth", _use_new_zipfile_serialization=False)
    assert read_released(tmp_path / "a.pth").epoch == 3


def wrapped(state):
    return OrderedDict((f"module.{name}", tensor) for name, tensor in state.items())


def bare(state):
    return OrderedDict((name.removeprefix("net."), tensor) for name, tensor in state.items())


@pytest.mark.parametrize("rename", [wrapped, bare, lambda state: wrapped(bare(state))])
@pytest.mark.parametrize("is_alone", [False, True], ids=["in a checkpoint", "alone"])
def test_prefixes_of_wrappers_and_tensors_alone_are_the_same_network(tmp_path, rename, is_alone):
    path = tmp_path / "a.pth"
    state = slim_state(3)
    state["net.init_conv.bias"] = torch.arange(42.0)
    if is_alone:
        torch.save(rename(state), path)
    else:
        save_released(path, rename(state))
    found = read_released(path)
    assert found.epoch == (None if is_alone else 84)
    assert found.state_dict["stem.bias"].tolist() == list(range(42))


def test_our_own_names_in_a_pickle_are_refused(tmp_path):
    shapes = tensor_shapes(UNET_PRESETS["parity"], out_channels=3)
    state = {name: torch.zeros(1).expand(shape) for name, shape in shapes.items()}
    torch.save(state, tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match=r"not the released network: 'net\.final_conv"):
        read_released(tmp_path / "a.pth")


# What is refused.


class Bomb:
    """Makes a folder when it is unpickled."""

    def __init__(self, canary):
        self.canary = canary

    def __reduce__(self):
        return os.mkdir, (str(self.canary),)


def bomb_in_loss(path, canary):
    save_released(path, slim_state(3), loss=Bomb(canary))


def bomb_in_state(path, canary):
    save_released(path, OrderedDict(a=Bomb(canary)))


def plain_pickle(path, canary):
    path.write_bytes(pickle.dumps(Bomb(canary)))


def legacy_bomb(path, canary):
    torch.save(Bomb(canary), path, _use_new_zipfile_serialization=False)


def bomb_behind_numpy(path, canary):
    """An object array, whose items NumPy would unpickle."""
    save_released(path, slim_state(3), loss=np.array([Bomb(canary)], object))


@pytest.mark.parametrize(
    "write", [bomb_in_loss, bomb_in_state, plain_pickle, legacy_bomb, bomb_behind_numpy]
)
def test_a_pickle_that_would_run_code_is_refused_and_runs_none(tmp_path, write):
    path, canary = tmp_path / "a.pth", tmp_path / "canary"
    write(path, canary)
    with pytest.raises(CheckpointError, match="without running code"):
        read_released(path)
    assert not canary.exists()


def test_the_bomb_of_these_tests_goes_off_in_a_plain_load(tmp_path):
    bomb_in_loss(tmp_path / "a.pth", tmp_path / "canary")
    torch.load(tmp_path / "a.pth", weights_only=False)
    assert (tmp_path / "canary").exists()


@pytest.mark.parametrize(
    "content",
    [[1, 2], {"state_dict": {}}, {"model_state_dict": {}}, {"model_state_dict": {"a": 1}}, "text"],
)
def test_another_content_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match="model_state_dict"):
        read_released(tmp_path / "a.pth")


def without_one(state):
    del state["net.mid_block1.block1.proj.weight"]


def with_another(state):
    state["net.extra.weight"] = torch.zeros(3)


def of_another_shape(state):
    state["net.init_conv.weight"] = torch.zeros(64, 3, 7, 7)


def in_half_precision(state):
    state["net.init_conv.bias"] = state["net.init_conv.bias"].half()


def without_outputs(state):
    del state["net.final_conv.1.bias"]


def with_nan(state):
    state["net.downs.2.0.mlp.1.weight"] = torch.zeros(256, 256)
    state["net.downs.2.0.mlp.1.weight"][5, 7] = math.nan


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without_one, r"1 missing \(net\.mid_block1\.block1\.proj\.weight\)"),
        (with_another, r"1 unknown \(net\.extra\.weight\)"),
        (of_another_shape, r"'net\.init_conv\.weight' is float32 \(64, 3, 7, 7\)"),
        (in_half_precision, r"'net\.init_conv\.bias' is float16"),
        (without_outputs, r"'net\.final_conv\.1\.bias' is absent"),
        (with_nan, r"'net\.downs\.2\.0\.mlp\.1\.weight' holds NaN"),
    ],
)
def test_another_network_is_refused_by_tensor(tmp_path, change, message):
    state = slim_state(3)
    change(state)
    with pytest.raises(CheckpointError, match=message):
        read_released(save_released(tmp_path / "a.pth", state))


@pytest.mark.parametrize("keep", [0, 1, 100, 1_000_000, -200])
def test_a_file_cut_off_is_refused(tmp_path, released, keep):
    (tmp_path / "a.pth").write_bytes(released[3].read_bytes()[:keep])
    with pytest.raises(CheckpointError):
        read_released(tmp_path / "a.pth")


@pytest.mark.parametrize(
    "data", [b"text\n" * 50, b"\x80", b"\x00" * 5000, b"PK\x03\x04" + b"x" * 99]
)
def test_a_file_of_another_kind_is_refused(tmp_path, data):
    (tmp_path / "a.pth").write_bytes(data)
    with pytest.raises(CheckpointError, match=r"a\.pth"):
        read_released(tmp_path / "a.pth")


def test_a_zip_that_unpacks_to_too_much_is_refused_unread(tmp_path, monkeypatch):
    monkeypatch.setattr(released_module, "MAX_BYTES", 9_000_000)
    path = tmp_path / "a.pth"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data/0", bytes(10_000_000))
    assert path.stat().st_size < 20_000
    with pytest.raises(CheckpointError, match="10000000 bytes"):
        read_released(path)


def test_missing_files_and_folders_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match="does not exist"):
        read_released(tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match="a folder"):
        read_released(tmp_path)


@pytest.mark.parametrize(("mpp", "side"), [(0, 256), (math.nan, 256), (0.5, 250), (0.5, 0)])
def test_a_resolution_or_tile_that_cannot_be_is_refused(mpp, side):
    with pytest.raises(ConfigError):
        ImportConfig(mpp=mpp, tile_size_px=side)


# The command.


def test_the_command_imports_and_guards_its_output(released, tmp_path, wsiseg):
    table = tmp_path / "classes.yaml"
    table.write_text("classes: [Gland]\n")
    output = tmp_path / "run"
    arguments = ["import-checkpoint", released[2], "-o", output, "--classes", table]
    done = wsiseg(*arguments, "--mpp", 0.62)
    assert done.returncode == 0, done.stderr
    assert "Gland" in done.stdout
    assert load_checkpoint(output, kind="segmenter").mpp == 0.62
    with pytest.raises(OutputExistsError, match=r"mpp: 0\.62 -> 0\.25"):
        import_checkpoint.run(CONFIG, checkpoint=released[2], output=output)


def test_the_command_refuses_a_bomb_in_one_line(tmp_path, wsiseg):
    plain_pickle(tmp_path / "a.pth", tmp_path / "canary")
    done = wsiseg("import-checkpoint", tmp_path / "a.pth", "-o", tmp_path / "run", "--mpp", 0.25)
    assert done.returncode == 1
    assert done.stderr.startswith("error: released checkpoint")
    assert "Re-running" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "canary").exists()
    assert not (tmp_path / "run").exists()


def test_importing_twice_gives_the_same_bytes(released, tmp_path):
    for name in ("a", "b"):
        import_checkpoint.run(CONFIG, checkpoint=released[2], output=tmp_path / name)
    again = import_checkpoint.run(CONFIG, checkpoint=released[2], output=tmp_path / "a")
    assert again.digest == load_checkpoint(tmp_path / "b", kind="segmenter").digest
    for file in (tmp_path / "a").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes()
