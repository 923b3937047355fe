"""Test-time augmentation: the mean over the turns and flips of a window.

Tissue has no up and no left. The mean is taken over a group of symmetries and in whole numbers, so
it is exactly what it claims: the prediction of a flipped window is the flipped prediction, bit
for bit, whatever the network.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

NAMES = ("none", "flips", "dihedral")
"""Nothing; the two flips and both together (4 calls); these with their transposes (8 calls)."""


@dataclass(frozen=True, slots=True)
class Symmetry:
    """A symmetry of the square: transpose first, then flip vertically, then horizontally."""

    is_transposed: bool
    is_flipped_y: bool
    is_flipped_x: bool

    def apply(self, x_NCHW: torch.Tensor) -> torch.Tensor:
        """Return the image turned, in channels-last memory like the original."""
        if self.is_transposed:
            x_NCHW = x_NCHW.transpose(2, 3)
        turned_NCHW = self._flip(x_NCHW)
        return turned_NCHW.contiguous(memory_format=torch.channels_last)

    def undo(self, x_NCHW: torch.Tensor) -> torch.Tensor:
        """Return the image that `apply` turned into this one."""
        x_NCHW = self._flip(x_NCHW)
        return x_NCHW.transpose(2, 3) if self.is_transposed else x_NCHW

    def _flip(self, x_NCHW: torch.Tensor) -> torch.Tensor:
        axes = [axis for axis, is_flipped in ((2, self.is_flipped_y), (3, self.is_flipped_x))
                if is_flipped]  # fmt: skip
        return x_NCHW.flip(axes) if axes else x_NCHW


def symmetries(name: str) -> tuple[Symmetry, ...]:
    """Return the group of a name in `NAMES`; the identity comes first."""
    if name not in NAMES:
        msg = f"test-time augmentation {name!r} is not one of {', '.join(NAMES)}"
        raise ValueError(msg)
    flips = (False,) if name == "none" else (False, True)
    transposes = (False, True) if name == "dihedral" else (False,)
    return tuple(Symmetry(t, y, x) for t in transposes for y in flips for x in flips)


def mean_over(
    group: tuple[Symmetry, ...],
    predict: Callable[[torch.Tensor], torch.Tensor],
    x_NCHW: torch.Tensor,
) -> torch.Tensor:
    """Return the mean of what `predict` gives for each turned image, turned back and rounded.

    Parameters
    ----------
    predict
        Integers (N, C, H, W) of images (N, 3, H, W).
    """
    total_NCHW = group[0].undo(predict(group[0].apply(x_NCHW)))
    if len(group) == 1:
        return total_NCHW
    for symmetry in group[1:]:
        total_NCHW = total_NCHW + symmetry.undo(predict(symmetry.apply(x_NCHW)))
    return (total_NCHW + len(group) // 2).div(len(group), rounding_mode="floor")
