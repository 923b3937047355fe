"""Settings of the network and of the diffusion process it is pretrained with."""

from dataclasses import dataclass

from wsiseg.config import setting
from wsiseg.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class UNetConfig:
    """Architecture of the U-Net; the defaults are the corrected `small` network."""

    dim: int = setting(32, "Channels at full resolution.", minimum=8, maximum=512)
    mults: tuple[int, ...] = setting(
        (1, 2, 4, 8), "Channel multiplier of each stage; their number sets the depth.", minimum=1
    )
    groups: int = setting(8, "Groups of the group normalisation.", minimum=1)
    attention: str = setting(
        "middle",
        "Where attention is placed: linear attention at every stage and full attention "
        "in the middle ('all', as released), only in the middle, or nowhere.",
        choices=("all", "middle", "none"),
    )
    heads: int = setting(4, "Attention heads.", minimum=1)
    head_dim: int = setting(32, "Channels of an attention head.", minimum=1)
    full_resolution_skip: bool = setting(
        True,
        "Use the skip from full resolution, which the released network computes but never "
        "reads (defect D9).",
    )
    released_init: bool = setting(
        False, "Initialise convolutions and norm weights with N(0, 0.01) as released (defect D6)."
    )

    def __post_init__(self) -> None:
        if not self.mults:
            msg = "mults: needs at least one stage"
            raise ConfigError(msg)
        if self.dim % self.groups:
            msg = f"dim ({self.dim}) must be a multiple of groups ({self.groups})"
            raise ConfigError(msg)

    @property
    def divisor(self) -> int:
        """Sides of an input must be multiples of this: one halving per stage but the last."""
        return 2 ** (len(self.mults) - 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class DiffusionConfig:
    """The noising process and the weighting of its loss."""

    timesteps: int = setting(1000, "Number of noise steps T.", minimum=2)
    schedule: str = setting(
        "quadratic", "Noise schedule (betas).", choices=("quadratic", "linear", "cosine", "sigmoid")
    )
    objective: str = setting(
        "noise", "What the network predicts.", choices=("noise", "velocity", "masked")
    )
    p2_k: float = setting(1.0, "P2 weighting 1/(k + SNR)^gamma, k.", minimum=0.0)
    p2_gamma: float = setting(1.0, "P2 weighting, gamma; 0 is the plain loss.", minimum=0.0)
    mask_ratio: float = setting(
        0.5,
        "Fraction of 16 px patches hidden from the network by the 'masked' objective.",
        minimum=0.0,
        maximum=0.95,
    )


def parity_unet() -> UNetConfig:
    """Return the released network: 31,267,083 parameters with 3 outputs."""
    return UNetConfig(dim=64, attention="all", full_resolution_skip=False, released_init=True)
