"""Settings of the network and of the diffusion process it is pretrained with."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from wsiseg.config import setting
from wsiseg.errors import ConfigError

MAX_STAGES = 8
"""Seven halvings take a 256 px tile to 2 px; deeper networks cannot be fed."""

MAX_MULT = 64
"""Bounds the size of a network that a damaged or hostile `model.json` can ask for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class UNetConfig:
    """Architecture of the U-Net; the defaults are the corrected `small` network."""

    dim: int = setting(32, "Channels at full resolution.", minimum=8, maximum=512)
    mults: tuple[int, ...] = setting(
        (1, 2, 4, 8),
        "Channel multiplier of each stage; their number sets the depth.",
        minimum=1,
        maximum=MAX_MULT,
    )
    blocks: int = setting(
        2, "Residual blocks of each stage; 2 as released.", minimum=1, maximum=MAX_STAGES
    )
    stem_channels: int | None = setting(
        None,
        "Channels of the 7 x 7 stem; default: dim. The released network has 2 * (dim // 3) = 42, "
        "which no vector unit likes.",
        minimum=1,
        maximum=512,
    )
    groups: int = setting(8, "Groups of the group normalisation.", minimum=1, maximum=512)
    attention: str = setting(
        "middle",
        "Where attention is placed: linear attention at every stage and full attention "
        "in the middle ('all', as released), only in the middle, or nowhere.",
        choices=("all", "middle", "none"),
    )
    heads: int = setting(4, "Attention heads.", minimum=1, maximum=64)
    head_dim: int = setting(32, "Channels of an attention head.", minimum=1, maximum=512)
    full_resolution_skip: bool = setting(
        True,
        "Use the skip from full resolution, which the released network computes but never "
        "reads (defect D9).",
    )
    released_init: bool = setting(
        False,
        "Initialise convolutions and norm weights with N(0, 0.01) as released (defect D6).",
    )
    activation_checkpointing: bool = setting(
        False,
        "Recompute activations in the backward pass: about half the memory, a third more time.",
        affects_result=False,
    )

    def __post_init__(self) -> None:
        if not 1 <= len(self.mults) <= MAX_STAGES:
            msg = f"mults: needs 1 to {MAX_STAGES} stages, got {len(self.mults)}"
            raise ConfigError(msg)
        if self.dim % self.groups or self.dim % 2:
            msg = f"dim ({self.dim}) must be even and a multiple of groups ({self.groups})"
            raise ConfigError(msg)

    @property
    def divisor(self) -> int:
        """Sides of an input must be multiples of this: one halving per stage but the last."""
        return 1 << (len(self.mults) - 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class DiffusionConfig:
    """The noising process and the weighting of its loss."""

    timesteps: int = setting(1000, "Number of noise steps T.", minimum=2, maximum=100_000)
    schedule: str = setting(
        "quadratic",
        "Noise schedule (betas); quadratic as released.",
        choices=("quadratic", "linear", "cosine", "sigmoid"),
    )
    objective: str = setting(
        "noise",
        "What the network predicts: the noise (as released), the velocity, the clean image of "
        "masked and noised patches, or the clean image of patches that are masked and nothing "
        "else (the masked-autoencoder baseline).",
        choices=("noise", "velocity", "masked", "autoencoding"),
    )
    p2_k: float = setting(1.0, "P2 weighting 1/(k + SNR)^gamma, k.", minimum=0.0)
    p2_gamma: float = setting(1.0, "P2 weighting, gamma; 0 is the plain loss.", minimum=0.0)
    mask_ratio: float = setting(
        0.5,
        "Fraction of patches hidden from the network by the 'masked' and 'autoencoding' "
        "objectives.",
        minimum=0.01,
        maximum=0.95,
    )
    mask_size: int = setting(
        16, "Side of a hidden patch in pixels; about a nucleus at 0.5 um/px.", minimum=1
    )


UNET_PRESETS: Mapping[str, UNetConfig] = MappingProxyType(
    {
        "tiny": UNetConfig(dim=16, mults=(1, 2, 4), blocks=1),
        "small": UNetConfig(),
        "base": UNetConfig(dim=64),
        "large": UNetConfig(dim=128, activation_checkpointing=True),
        "parity": UNetConfig(
            dim=64,
            stem_channels=42,
            attention="all",
            full_resolution_skip=False,
            released_init=True,
        ),
    }
)
"""Networks by name. `tiny` trains in a minute on a CPU (demo, tests); `small` is the default;
`base` has the released width with the corrections; `large` wants a GPU; `parity` is the released
network: 31,267,083 parameters with 3 outputs."""


def unet_preset(name: str) -> UNetConfig:
    """Return the network of a preset; ConfigError names the presets if there is none."""
    if name not in UNET_PRESETS:
        msg = f"model preset {name!r} does not exist; presets: {', '.join(UNET_PRESETS)}"
        raise ConfigError(msg)
    return UNET_PRESETS[name]
