"""The one preprocessing: uint8 RGB to the network's range and back.

Pretraining, fine-tuning and segmentation all call it, so they cannot disagree about the range
(defect D7: the released code pretrains on [-1, 1] and fine-tunes on [0, 1]).
"""

import torch

HALF_RANGE = 127.5
"""0..255 maps to -1..1; both ends are exact in float32."""


def to_network(images_NHWC: torch.Tensor) -> torch.Tensor:
    """Return images as the network takes them.

    Parameters
    ----------
    images_NHWC
        uint8 (N, H, W, 3), RGB, on any device.

    Returns
    -------
    torch.Tensor
        float32 (N, 3, H, W) in [-1, 1], in channels-last memory (no copy is reordered).
    """
    if images_NHWC.dtype != torch.uint8 or images_NHWC.ndim != 4 or images_NHWC.shape[-1] != 3:
        msg = (
            f"images must be uint8 (N, H, W, 3), got {images_NHWC.dtype} {tuple(images_NHWC.shape)}"
        )
        raise ValueError(msg)
    return images_NHWC.permute(0, 3, 1, 2).to(torch.float32).div_(HALF_RANGE).sub_(1.0)


def from_network(x_NCHW: torch.Tensor) -> torch.Tensor:
    """Return uint8 (N, H, W, 3) of float (N, 3, H, W); values outside [-1, 1] are clipped."""
    clipped_NHWC = x_NCHW.detach().float().clamp(-1.0, 1.0).permute(0, 2, 3, 1)
    return clipped_NHWC.add(1.0).mul_(HALF_RANGE).round_().to(torch.uint8)
