"""The segmentation network: its time step, its input range, and what it takes over."""

import pytest
import torch

from wsiseg.classes import ClassTable
from wsiseg.errors import CheckpointError
from wsiseg.models.inputs import to_network
from wsiseg.models.segmenter import Segmenter
from wsiseg.models.unet import UNet
from wsiseg.settings.model import UNetConfig

TINY = UNetConfig(dim=8, mults=(1, 2), blocks=1)
CLASSES = ClassTable.of_names(["Tumor", "Stroma", "Necrosis"])


def segmenter(config=TINY, *, seed=0, timestep=0, **options):
    torch.manual_seed(seed)
    unet = UNet(config, out_channels=CLASSES.num_labels)
    return Segmenter(unet, CLASSES, timestep, **options).eval()


def pretrained(config=TINY, *, seed=9):
    torch.manual_seed(seed)
    return UNet(config, out_channels=3).state_dict()


def images():
    values = torch.arange(2 * 16 * 16 * 3).reshape(2, 16, 16, 3) * 7 % 256
    return to_network(values.to(torch.uint8))


def test_outputs_must_be_as_many_as_labels():
    unet = UNet(TINY, out_channels=3)
    with pytest.raises(CheckpointError, match=r"3 outputs, the class table needs 4 .*Necrosis"):
        Segmenter(unet, CLASSES, 0)


def test_d1_outputs_are_logits_not_probabilities():
    model = segmenter()
    with torch.no_grad():
        model.unet.head.project.bias.copy_(torch.tensor([1e4, 0.0, 0.0, -1e4]))
        logits = model(images())
    assert logits[:, 0].min() > 9e3
    assert logits[:, 3].max() < -9e3
    assert logits.log_softmax(dim=1).isfinite().all()


def test_d7_a_network_trained_on_0_to_1_is_given_that_range():
    """Callers always pass [-1, 1]; released networks are fed as they were trained."""
    seen = []
    for input_range in ("symmetric", "unit"):
        model = segmenter(input_range=input_range)
        model.unet.stem.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0]))
        with torch.no_grad():
            model(images())
    assert torch.equal(seen[0], images())
    assert torch.allclose(seen[1], (images() + 1) / 2)
    assert seen[1].min() == 0.0
    assert seen[1].max() == 1.0


def test_d8_the_time_step_of_clean_images_is_a_setting():
    results = []
    for timestep in (0, 50):
        model = segmenter(timestep=timestep)
        with torch.no_grad():
            results.append(model(images()))
            exact = model.unet(images(), torch.tensor([timestep, timestep]))
        assert torch.equal(results[-1], exact)
    assert not torch.allclose(results[0], results[1])


def test_everything_but_the_head_is_taken_over():
    model, state = segmenter(), pretrained()
    before = {name: tensor.clone() for name, tensor in model.unet.state_dict().items()}
    model.transfer_from_pretrained(state)
    for name, tensor in model.unet.state_dict().items():
        assert torch.equal(tensor, before[name] if name.startswith("head.") else state[name])


def test_the_transfer_shares_no_memory_with_its_source():
    model, state = segmenter(), pretrained()
    model.transfer_from_pretrained(state)
    for tensor in state.values():
        tensor.zero_()
    assert model.unet.stem.weight.abs().sum() > 0


def missing(state):
    del state["encoder.1.blocks.0.first.conv.weight"]


def renamed(state):
    state["encoder.1.blocks.0.first.conv.kernel"] = state.pop(
        "encoder.1.blocks.0.first.conv.weight"
    )


def extra(state):
    state["encoder.7.weight"] = torch.zeros(2)


def reshaped(state):
    state["stem.weight"] = torch.zeros(8, 3, 5, 5)


def halved(state):
    state["stem.weight"] = state["stem.weight"].half()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (missing, r"1 missing \(encoder\.1\.blocks\.0\.first\.conv\.weight\)"),
        (renamed, r"1 missing .*; 1 unknown \(encoder\.1\.blocks\.0\.first\.conv\.kernel\)"),
        (extra, r"1 unknown \(encoder\.7\.weight\)"),
        (reshaped, r"'stem\.weight' is float32 \(8, 3, 5, 5\), .* \(8, 3, 7, 7\)"),
        (halved, r"'stem\.weight' is float16"),
        (dict.clear, "missing"),
    ],
)
def test_a_transfer_that_does_not_fit_is_refused_and_changes_nothing(change, message):
    model, state = segmenter(), dict(pretrained())
    change(state)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=message):
        model.transfer_from_pretrained(state)
    assert all(torch.equal(tensor, before[n]) for n, tensor in model.state_dict().items())


def test_a_pretrained_network_of_another_depth_is_refused():
    with pytest.raises(CheckpointError, match="missing"):
        segmenter(UNetConfig(dim=8, mults=(1, 2, 4))).transfer_from_pretrained(pretrained())
