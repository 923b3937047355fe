"""The U-Net: its size, its parts against plain formulas, and what it does at the limits."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from wsiseg.errors import ConfigError
from wsiseg.models.unet import Attention, LinearAttention, TimeEmbedding, UNet, tensor_shapes
from wsiseg.settings.model import UNET_PRESETS, UNetConfig, unet_preset

TINY = UNetConfig(dim=8, mults=(1, 2), blocks=1)


def network(config=TINY, *, out_channels=3, seed=0):
    torch.manual_seed(seed)
    return UNet(config, out_channels=out_channels).eval()


def images(num=2, side=16, seed=1):
    return 2 * torch.rand(num, 3, side, side, generator=torch.Generator().manual_seed(seed)) - 1


def times(*values):
    return torch.tensor(values)


# Size.


@pytest.mark.parametrize(
    ("out_channels", "parameters"), [(3, 31_267_083), (2, 31_267_018), (4, 31_267_148)]
)
def test_the_parity_network_has_exactly_the_released_number_of_parameters(out_channels, parameters):
    shapes = tensor_shapes(UNET_PRESETS["parity"], out_channels=out_channels)
    assert sum(map(math.prod, shapes.values())) == parameters
    with torch.device("meta"):
        unet = UNet(UNET_PRESETS["parity"], out_channels=out_channels)
    assert sum(p.numel() for p in unet.parameters()) == parameters


def test_shapes_are_those_of_the_real_state_dict():
    real = {name: tuple(tensor.shape) for name, tensor in network().state_dict().items()}
    assert tensor_shapes(TINY, out_channels=3) == real


@pytest.mark.parametrize("name", UNET_PRESETS)
def test_each_preset_takes_a_tile_of_256_px(name):
    config = unet_preset(name)
    with torch.device("meta"):
        result = UNet(config, out_channels=5)(torch.zeros(1, 3, 256, 256), torch.zeros(1))
    assert result.shape == (1, 5, 256, 256)


def test_a_preset_that_does_not_exist_is_refused_with_the_others():
    with pytest.raises(ConfigError, match="'huge' does not exist; presets: tiny, small"):
        unet_preset("huge")


@pytest.mark.parametrize(
    "values", [{"dim": 20}, {"dim": 9, "groups": 3}, {"mults": ()}, {"mults": (1,) * 9}]
)
def test_an_architecture_that_cannot_be_built_is_refused(values):
    with pytest.raises(ConfigError):
        UNetConfig(**values)


# Defects of the released network.


def test_d1_outputs_are_logits_that_no_softmax_bounds():
    unet = network()
    with torch.no_grad():
        unet.head.project.bias.fill_(500.0)
        logits = unet(images(), times(0, 0))
    assert logits.min() > 400
    assert logits.log_softmax(dim=1).isfinite().all()


def test_d6_norms_begin_as_the_identity_but_for_parity():
    for module in network().modules():
        if isinstance(module, nn.GroupNorm):
            assert (module.weight == 1).all()
            assert (module.bias == 0).all()
    released = UNetConfig(dim=8, mults=(1, 2), released_init=True)
    norms = [m for m in network(released).modules() if isinstance(m, nn.GroupNorm)]
    drawn = torch.cat([norm.weight.detach() for norm in norms])
    assert abs(drawn.mean()) < 0.003
    assert 0.008 < drawn.std() < 0.012
    assert UNET_PRESETS["parity"].released_init


@pytest.mark.parametrize("is_used", [True, False])
def test_d9_full_resolution_reaches_the_head_but_for_parity(is_used):
    """With everything below full resolution cut off, only that skip can carry the image."""
    unet = network(UNetConfig(dim=8, mults=(1, 2), full_resolution_skip=is_used))
    with torch.no_grad():
        for parameter in unet.down.parameters():
            parameter.zero_()
        one, other = unet(images(seed=1), times(0, 0)), unet(images(seed=2), times(0, 0))
    assert torch.equal(one, other) is not is_used
    assert not UNET_PRESETS["parity"].full_resolution_skip


@settings(max_examples=12, deadline=None)
@given(st.integers(1, 6), st.integers(2, 6), st.sampled_from(["all", "middle", "none"]))
def test_d29_any_image_whose_sides_are_multiples_of_the_divisor_fits(rows, columns, attention):
    unet = network(UNetConfig(dim=8, mults=(1, 2), blocks=1, attention=attention))
    height, width = 2 * rows, 2 * columns
    with torch.no_grad():
        result = unet(torch.zeros(1, 3, height, width), times(0))
    assert result.shape == (1, 3, height, width)


@pytest.mark.parametrize(("height", "width"), [(255, 256), (256, 250)])
def test_other_sides_are_refused_with_the_divisor(height, width):
    unet = UNet(UNetConfig(dim=8, mults=(1, 2, 4, 8)), out_channels=2)
    with pytest.raises(ConfigError, match=f"{width} x {height} px: .* multiples of 8"):
        unet(torch.zeros(1, 3, height, width), times(0))


# Parts against plain formulas.


@pytest.mark.parametrize("dim", [8, 64])
def test_the_time_embedding_is_the_sinusoidal_one_in_float64(dim):
    embedding = TimeEmbedding(dim)
    t = times(0.0, 1.0, 500.0, 999.0)
    seen = []
    embedding.expand.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0]))
    embedding(t)
    rates = 10_000.0 ** (-torch.arange(dim // 2, dtype=torch.float64) / (dim // 2 - 1))
    angles = t.double()[:, None] * rates
    exact = torch.cat((angles.sin(), angles.cos()), dim=1)
    assert torch.allclose(seen[0].double(), exact, atol=1e-4)


def test_whole_and_fractional_time_steps_agree():
    unet = network()
    with torch.no_grad():
        whole, same = unet(images(), times(3, 700)), unet(images(), times(3.0, 700.0))
        between = unet(images(), times(3.5, 700.0))
    assert torch.equal(whole, same)
    assert not torch.equal(whole[0], between[0])
    assert torch.allclose(whole[1], between[1], atol=1e-6)


@torch.no_grad()
def attended(attention, x):
    """Attend position by position, in float64."""
    attention, x = attention.double(), x.double()
    n, _, height, width = x.shape
    qkv = attention.qkv(attention.norm(x)).reshape(n, 3, 4, 8, height * width)
    result = torch.zeros(n, 4, 8, height * width, dtype=torch.float64)
    for sample, head in torch.cartesian_prod(torch.arange(n), torch.arange(4)).tolist():
        q, k, v = qkv[sample, :, head]
        if isinstance(attention, LinearAttention):
            q, k = q.softmax(dim=0) / math.sqrt(8), k.softmax(dim=1)
            weights = q.T @ k
        else:
            weights = (q.T @ k / math.sqrt(8)).softmax(dim=1)
        for position in range(height * width):
            result[sample, head, :, position] = (weights[position] * v).sum(dim=1)
    out = attention.out(result.reshape(n, 32, height, width))
    return x + (attention.out_norm(out) if isinstance(attention, LinearAttention) else out)


@pytest.mark.parametrize("cls", [Attention, LinearAttention])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_attention_is_what_its_formula_says(cls, memory_format):
    torch.manual_seed(2)
    attention = cls(16, heads=4, head_dim=8)
    x = torch.randn(2, 16, 3, 5).to(memory_format=memory_format)
    with torch.no_grad():
        fast = attention(x).double()
    assert torch.allclose(fast, attended(attention, x), atol=1e-5)


# Independence and numbers.


def test_a_sample_does_not_depend_on_the_others_of_its_batch():
    unet, x = network(), images(num=4)
    with torch.no_grad():
        together = unet(x, times(0, 10, 100, 999))
        alone = unet(x[2:3], times(100))
    assert torch.allclose(together[2:3], alone, atol=1e-5)


def test_the_order_of_memory_does_not_matter():
    unet = network(UNetConfig(dim=8, mults=(1, 2), attention="all"))
    with torch.no_grad():
        plain = unet(images(), times(0, 9))
        unet.to(memory_format=torch.channels_last)
        last = unet(images().to(memory_format=torch.channels_last), times(0, 9))
    assert torch.allclose(plain, last, atol=1e-5)


def test_activation_checkpointing_gives_the_same_gradients():
    gradients = []
    for is_on in (False, True):
        unet = network(UNetConfig(dim=8, mults=(1, 2), activation_checkpointing=is_on)).train()
        unet(images(), times(5, 50)).square().mean().backward()
        gradients.append([p.grad for p in unet.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_every_parameter_has_a_gradient_after_one_step():
    for skip in (True, False):
        unet = network(UNetConfig(dim=8, mults=(1, 2), attention="all", full_resolution_skip=skip))
        unet(images(), times(5, 50)).square().mean().backward()
        without = [name for name, p in unet.named_parameters() if p.grad is None]
        assert without == []


EXTREMES = {
    "black": torch.full((2, 3, 16, 16), -1.0),
    "white": torch.full((2, 3, 16, 16), 1.0),
    "zero": torch.zeros(2, 3, 16, 16),
    "huge": 1e6 * images(),
    "tiny": 1e-30 * images(),
    "one pixel": nn.functional.one_hot(torch.tensor([37, 200]), 256).reshape(2, 1, 16, 16).float()
    .expand(2, 3, 16, 16),
}  # fmt: skip


@pytest.mark.parametrize("name", EXTREMES)
@pytest.mark.parametrize("attention", ["all", "middle", "none"])
@pytest.mark.parametrize("released_init", [False, True])
def test_extreme_images_give_finite_outputs_and_gradients(name, attention, released_init):
    config = UNetConfig(dim=8, mults=(1, 2), attention=attention, released_init=released_init)
    unet = network(config).train()
    result = unet(EXTREMES[name], times(0, 99_999))
    result.square().mean().backward()
    assert result.isfinite().all()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in unet.parameters())


def test_half_precision_gives_finite_outputs_near_the_exact_ones():
    unet = network(UNetConfig(dim=8, mults=(1, 2), attention="all"))
    with torch.no_grad():
        exact = unet(images(), times(0, 999))
        with torch.autocast("cpu", torch.bfloat16):
            rough = unet(images(), times(0, 999)).float()
    assert rough.isfinite().all()
    assert (rough - exact).abs().max() < 0.05 * exact.abs().max() + 0.05
