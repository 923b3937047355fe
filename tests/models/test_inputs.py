"""The one preprocessing: range, memory order and the way back."""

import pytest
import torch

from wsiseg.models.inputs import from_network, to_network


def every_value():
    values = torch.arange(256, dtype=torch.uint8)
    return values.reshape(1, 16, 16, 1).expand(2, 16, 16, 3).contiguous()


def test_d7_images_lie_between_minus_one_and_one_and_both_ends_are_exact():
    x = to_network(every_value())
    assert x.dtype == torch.float32
    assert x.shape == (2, 3, 16, 16)
    assert x.min() == -1.0
    assert x.max() == 1.0


def test_every_value_survives_the_way_there_and_back():
    assert torch.equal(from_network(to_network(every_value())), every_value())


def test_channels_stay_red_green_blue():
    images = torch.zeros(1, 2, 2, 3, dtype=torch.uint8)
    images[..., 0], images[..., 1] = 255, 51
    x = to_network(images)
    assert torch.allclose(x[0, :, 0, 0], torch.tensor([1.0, -0.6, -1.0]))


def test_the_result_is_in_channels_last_memory():
    assert to_network(every_value()).is_contiguous(memory_format=torch.channels_last)


def test_what_the_network_makes_outside_its_range_is_clipped():
    x = torch.tensor([-7.0, -1.0, 0.0, 1.0, 9.0, float("inf")]).reshape(1, 1, 1, 6)
    back = from_network(x.expand(1, 3, 1, 6))
    assert back[0, 0, :, 0].tolist() == [0, 0, 128, 255, 255, 255]


@pytest.mark.parametrize(
    "images",
    [
        torch.zeros(1, 4, 4, 3),
        torch.zeros(4, 4, 3, dtype=torch.uint8),
        torch.zeros(1, 4, 4, 4, dtype=torch.uint8),
        torch.zeros(1, 3, 4, 4, dtype=torch.uint8),
    ],
    ids=["float", "no batch", "alpha", "channels first"],
)
def test_other_types_and_shapes_are_refused(images):
    with pytest.raises(ValueError, match=r"must be uint8 \(N, H, W, 3\)"):
        to_network(images)
