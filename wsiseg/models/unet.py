"""The U-Net that denoises in pretraining and segments after fine-tuning.

One class covers the released network (preset `parity`, the ResNet variant of Hugging Face's
"Annotated Diffusion" U-Net) and the corrected ones; `UNetConfig` names each difference. No
softmax anywhere: outputs are logits or predictions, and losses work on log_softmax (defect D1).

Shape letters: N batch, C channels, H height, W width, P = H * W positions, A attention heads,
K channels of a head, E channels of the time embedding.
"""

import itertools
import math
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from wsiseg.errors import ConfigError
from wsiseg.settings.model import UNetConfig

RELEASED_INIT_STD = 0.01
"""The released code draws convolution and norm weights from N(0, 0.01^2) (defect D6)."""

MAX_PERIOD = 10_000.0
"""Longest wavelength of the time embedding (Vaswani et al. 2017, section 3.5)."""


class TimeEmbedding(nn.Module):
    """Sinusoidal embedding of the time step and a two-layer perceptron; ends with SiLU.

    Every residual block begins its own projection with a SiLU, so it is applied once, here.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim
        self.expand = nn.Linear(dim, 4 * dim)
        self.project = nn.Linear(4 * dim, 4 * dim)

    def forward(self, t_N: torch.Tensor) -> torch.Tensor:
        """Return (N, E) with E = 4 * dim for time steps (N,), whole or fractional."""
        half = self.dim // 2
        rate = -math.log(MAX_PERIOD) / max(half - 1, 1)
        # In float32 and not stored: a last-bit change of a frequency is 6e-5 rad at t = 999.
        frequencies = torch.exp(torch.arange(half, device=t_N.device) * rate)
        angles = t_N[:, None] * frequencies[None, :]
        waves = torch.cat((angles.sin(), angles.cos()), dim=-1).to(self.expand.weight.dtype)
        embedded: torch.Tensor = self.project(functional.gelu(self.expand(waves)))
        return functional.silu(embedded)


class _ChannelsLastGroupNorm(torch.autograd.Function):
    """Group norm with a backward pass of matrix products, which keeps the channels-last layout.

    On a core of a CPU, for 64 channels of 256 x 256: 6 ms. PyTorch's kernel for contiguous
    tensors takes 65 ms with the copies to them and back, its own for channels-last far longer.
    """

    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401 - untyped in torch
        x_NCHW: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor,
        groups: int,
        eps: float,
    ) -> torch.Tensor:
        n, channels, height, width = x_NCHW.shape
        y_NCHW, mean_NG, rstd_NG = torch.native_group_norm(
            x_NCHW, weight, bias, n, channels, height * width, groups, eps
        )
        ctx.save_for_backward(x_NCHW, weight, mean_NG, rstd_NG)
        return y_NCHW

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # noqa: ANN401
        """Differentiate y = w (x - mean) rstd + b, mean and rstd being functions of x."""
        x_NCHW, weight, mean_NG, rstd_NG = ctx.saved_tensors
        x_NPC, dy_NPC = (a.permute(0, 2, 3, 1).flatten(1, 2) for a in (x_NCHW, grads[0]))
        num_groups = mean_NG.shape[1]
        width = len(weight) // num_groups
        ones_N1P = x_NPC.new_ones(()).expand(x_NPC.shape[0], 1, x_NPC.shape[1]).contiguous()
        sum_dy_NC = torch.bmm(ones_N1P, dy_NPC).squeeze(1)
        sum_dyx_NC = torch.bmm(ones_N1P, dy_NPC * x_NPC).squeeze(1)
        mean_NC = mean_NG.repeat_interleave(width, dim=1)
        rstd_NC = rstd_NG.repeat_interleave(width, dim=1)
        dweight = ((sum_dyx_NC - mean_NC * sum_dy_NC) * rstd_NC).sum(dim=0)
        sum_wdy_NG = (weight * sum_dy_NC).view(-1, num_groups, width).sum(dim=2)
        sum_wdyx_NG = (weight * sum_dyx_NC).view(-1, num_groups, width).sum(dim=2)
        # dx = rstd w dy + slope x + shift, the latter two from the derivatives of mean and rstd.
        num = x_NPC.shape[1] * width
        slope_NG = (sum_wdy_NG * mean_NG - sum_wdyx_NG) * rstd_NG**3 / num
        shift_NG = -slope_NG * mean_NG - sum_wdy_NG * rstd_NG / num
        slope_NC = slope_NG.repeat_interleave(width, dim=1)
        shift_NC = shift_NG.repeat_interleave(width, dim=1)
        dx_NPC = torch.addcmul(shift_NC[:, None], x_NPC, slope_NC[:, None])
        dx_NPC.addcmul_(dy_NPC, (rstd_NC * weight)[:, None])
        dx_NHWC = dx_NPC.view(x_NCHW.permute(0, 2, 3, 1).shape)
        return dx_NHWC.permute(0, 3, 1, 2), dweight, sum_dy_NC.sum(dim=0), None, None


class GroupNorm(nn.GroupNorm):
    """Group norm with a fast backward pass on CPUs; the same numbers within rounding."""

    def forward(self, x_NCHW: torch.Tensor) -> torch.Tensor:
        """Return (N, C, H, W)."""
        is_eager_cpu = x_NCHW.device.type == "cpu" and not torch.compiler.is_compiling()
        if is_eager_cpu and torch.is_grad_enabled() and x_NCHW.dtype == self.weight.dtype:
            result: torch.Tensor = _ChannelsLastGroupNorm.apply(  # type: ignore[no-untyped-call] # untyped in torch
                x_NCHW, self.weight, self.bias, self.num_groups, self.eps
            )
            return result
        return super().forward(x_NCHW)


class ConvBlock(nn.Module):
    """3 x 3 convolution, group norm, SiLU."""

    def __init__(self, in_channels: int, out_channels: int, groups: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm = GroupNorm(groups, out_channels)

    def forward(self, x_NCHW: torch.Tensor) -> torch.Tensor:
        """Return (N, out_channels, H, W)."""
        y_NCHW = self.norm(self.conv(x_NCHW))
        # In place saves 3 % of a prediction on a CPU; a backward pass needs what went in.
        return functional.silu(y_NCHW, inplace=not torch.is_grad_enabled())


class ResidualBlock(nn.Module):
    """Two `ConvBlock`s around a shortcut; the time step is added between them as a bias."""

    def __init__(
        self, in_channels: int, out_channels: int, *, groups: int, time_channels: int | None
    ) -> None:
        super().__init__()
        self.time = nn.Linear(time_channels, out_channels) if time_channels else None
        self.first = ConvBlock(in_channels, out_channels, groups)
        self.second = ConvBlock(out_channels, out_channels, groups)
        same = in_channels == out_channels
        self.shortcut = nn.Identity() if same else nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x_NCHW: torch.Tensor, time_NE: torch.Tensor) -> torch.Tensor:
        """Return (N, out_channels, H, W); `time_NE` is ignored by a block without time."""
        hidden_NCHW: torch.Tensor = self.first(x_NCHW)
        if self.time is not None:
            hidden_NCHW = hidden_NCHW + self.time(time_NE)[:, :, None, None]
        result: torch.Tensor = self.second(hidden_NCHW) + self.shortcut(x_NCHW)
        return result


class Attention(nn.Module):
    """Softmax attention between all positions, with norm before and residual around it."""

    def __init__(self, channels: int, *, heads: int, head_dim: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = GroupNorm(1, channels)
        self.qkv = nn.Conv2d(channels, 3 * heads * head_dim, 1, bias=False)
        self.out = nn.Conv2d(heads * head_dim, channels, 1)

    def forward(self, x_NCHW: torch.Tensor) -> torch.Tensor:
        """Return (N, C, H, W)."""
        q_NAPK, k_NAPK, v_NAPK = self._split(self.qkv(self.norm(x_NCHW)))
        mixed_NAPK = self._mix(q_NAPK, k_NAPK, v_NAPK)
        n, _, height, width = x_NCHW.shape
        mixed_NPC = mixed_NAPK.transpose(1, 2).flatten(2)
        mixed_NCHW = mixed_NPC.transpose(1, 2).reshape(n, -1, height, width)
        return x_NCHW + self._project(mixed_NCHW)

    def _split(self, qkv_NCHW: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return q, k, v, each (N, A, P, K); a view of a channels-last input."""
        qkv_NPC = qkv_NCHW.flatten(2).transpose(1, 2)
        n, p, _ = qkv_NPC.shape
        q, k, v = qkv_NPC.reshape(n, p, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        return q, k, v

    def _mix(
        self, q_NAPK: torch.Tensor, k_NAPK: torch.Tensor, v_NAPK: torch.Tensor
    ) -> torch.Tensor:
        return functional.scaled_dot_product_attention(q_NAPK, k_NAPK, v_NAPK)

    def _project(self, mixed_NCHW: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.out(mixed_NCHW)
        return result


class LinearAttention(Attention):
    """Attention at a cost linear in the positions (Shen et al. 2021, "Efficient Attention").

    Queries are normalised over the channels of a head, keys over the positions.
    """

    def __init__(self, channels: int, *, heads: int, head_dim: int) -> None:
        super().__init__(channels, heads=heads, head_dim=head_dim)
        self.out_norm = GroupNorm(1, channels)

    def _mix(
        self, q_NAPK: torch.Tensor, k_NAPK: torch.Tensor, v_NAPK: torch.Tensor
    ) -> torch.Tensor:
        scale = q_NAPK.shape[-1] ** -0.5
        context_NAKK = k_NAPK.softmax(dim=-2).transpose(-1, -2) @ v_NAPK
        mixed_NAPK: torch.Tensor = (q_NAPK.softmax(dim=-1) * scale) @ context_NAKK
        return mixed_NAPK

    def _project(self, mixed_NCHW: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.out_norm(self.out(mixed_NCHW))
        return result


class Stage(nn.Module):
    """What happens at one resolution: residual blocks, then attention if there is one."""

    def __init__(self, in_channels: int, out_channels: int, *, config: UNetConfig) -> None:
        super().__init__()
        widths = [in_channels] + [out_channels] * config.blocks
        self.blocks = nn.ModuleList(
            ResidualBlock(a, b, groups=config.groups, time_channels=4 * config.dim)
            for a, b in itertools.pairwise(widths)
        )
        self.attention: nn.Module = nn.Identity()
        if config.attention == "all":
            self.attention = LinearAttention(
                out_channels, heads=config.heads, head_dim=config.head_dim
            )

    def forward(self, x_NCHW: torch.Tensor, time_NE: torch.Tensor) -> torch.Tensor:
        """Return (N, out_channels, H, W)."""
        for block in self.blocks:
            x_NCHW = block(x_NCHW, time_NE)
        result: torch.Tensor = self.attention(x_NCHW)
        return result


class Middle(nn.Module):
    """The coarsest resolution: a residual block, full attention, a residual block."""

    def __init__(self, channels: int, *, config: UNetConfig) -> None:
        super().__init__()
        time = 4 * config.dim
        self.first = ResidualBlock(channels, channels, groups=config.groups, time_channels=time)
        self.attention: nn.Module = nn.Identity()
        if config.attention != "none":
            self.attention = Attention(channels, heads=config.heads, head_dim=config.head_dim)
        self.second = ResidualBlock(channels, channels, groups=config.groups, time_channels=time)

    def forward(self, x_NCHW: torch.Tensor, time_NE: torch.Tensor) -> torch.Tensor:
        """Return (N, C, H, W)."""
        result: torch.Tensor = self.second(self.attention(self.first(x_NCHW, time_NE)), time_NE)
        return result


class Head(nn.Module):
    """Residual block without time and a 1 x 1 convolution: the part that a task owns.

    Transfer from pretraining carries over every tensor outside the head, as released.
    """

    def __init__(self, in_channels: int, out_channels: int, *, config: UNetConfig) -> None:
        super().__init__()
        self.block = ResidualBlock(
            in_channels, config.dim, groups=config.groups, time_channels=None
        )
        self.project = nn.Conv2d(config.dim, out_channels, 1)

    def forward(self, x_NCHW: torch.Tensor, time_NE: torch.Tensor) -> torch.Tensor:
        """Return (N, out_channels, H, W)."""
        result: torch.Tensor = self.project(self.block(x_NCHW, time_NE))
        return result


class UNet(nn.Module):
    """U-Net conditioned on a diffusion time step.

    Parameters
    ----------
    config
        Architecture; see the presets in `wsiseg.settings.model`.
    out_channels
        3 to predict images or noise, `ClassTable.num_labels` to segment.
    in_channels
        3 for RGB.
    """

    def __init__(self, config: UNetConfig, *, out_channels: int, in_channels: int = 3) -> None:
        super().__init__()
        self.config = config
        self.in_channels = in_channels
        self.out_channels = out_channels
        stem = config.stem_channels or config.dim
        widths = [config.dim * mult for mult in config.mults]
        self.time = TimeEmbedding(config.dim)
        self.stem = nn.Conv2d(in_channels, stem, 7, padding=3)
        self.encoder = nn.ModuleList(
            Stage(a, b, config=config) for a, b in zip([stem, *widths[:-1]], widths, strict=True)
        )
        self.down = nn.ModuleList(nn.Conv2d(c, c, 4, stride=2, padding=1) for c in widths[:-1])
        self.middle = Middle(widths[-1], config=config)
        coarse_to_fine = list(zip(widths[:0:-1], widths[-2::-1], strict=True))
        self.decoder = nn.ModuleList(
            Stage(2 * coarse, fine, config=config) for coarse, fine in coarse_to_fine
        )
        self.up = nn.ModuleList(
            nn.ConvTranspose2d(fine, fine, 4, stride=2, padding=1) for _, fine in coarse_to_fine
        )
        head_channels = 2 * widths[0] if config.full_resolution_skip else widths[0]
        self.head = Head(head_channels, out_channels, config=config)
        if config.released_init:
            self._initialise_as_released()

    def forward(self, x_NCHW: torch.Tensor, t_N: torch.Tensor) -> torch.Tensor:
        """Return (N, out_channels, H, W): logits, or the prediction of the diffusion objective.

        Parameters
        ----------
        x_NCHW
            Float images in [-1, 1] (`wsiseg.models.inputs`), sides multiples of `config.divisor`.
        t_N
            Time steps, whole or fractional.
        """
        self._check_sides(x_NCHW)
        time_NE = self.time(t_N)
        x_NCHW = self.stem(x_NCHW)
        skips: list[torch.Tensor] = []
        for i, stage in enumerate(self.encoder):
            x_NCHW = self._run(stage, x_NCHW, time_NE)
            skips.append(x_NCHW)
            if i < len(self.down):
                x_NCHW = self.down[i](x_NCHW)
        x_NCHW = self._run(self.middle, x_NCHW, time_NE)
        for stage, up in zip(self.decoder, self.up, strict=True):
            x_NCHW = torch.cat((x_NCHW, skips.pop()), dim=1)
            x_NCHW = up(self._run(stage, x_NCHW, time_NE))
        if self.config.full_resolution_skip:
            x_NCHW = torch.cat((x_NCHW, skips.pop()), dim=1)
        return self._run(self.head, x_NCHW, time_NE)

    def _run(self, module: nn.Module, x_NCHW: torch.Tensor, time_NE: torch.Tensor) -> torch.Tensor:
        """Call a module, keeping only its input for the backward pass if so configured."""
        result: torch.Tensor
        if self.config.activation_checkpointing and self.training and torch.is_grad_enabled():
            result = checkpoint(module, x_NCHW, time_NE, use_reentrant=False)
        else:
            result = module(x_NCHW, time_NE)
        return result

    def _check_sides(self, x_NCHW: torch.Tensor) -> None:
        height, width = x_NCHW.shape[-2:]
        divisor = self.config.divisor
        if height % divisor or width % divisor:
            msg = (
                f"network input of {width} x {height} px: sides must be multiples of {divisor} "
                f"({len(self.config.mults)} stages); choose another tile size or window"
            )
            raise ConfigError(msg)

    def _initialise_as_released(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.ConvTranspose2d | nn.GroupNorm):
                nn.init.normal_(module.weight, 0.0, RELEASED_INIT_STD)


def tensor_shapes(config: UNetConfig, *, out_channels: int) -> dict[str, tuple[int, ...]]:
    """Return name and shape of every tensor of a network, without allocating it."""
    with torch.device("meta"):
        unet = UNet(config, out_channels=out_channels)
    return {name: tuple(tensor.shape) for name, tensor in unet.state_dict().items()}
