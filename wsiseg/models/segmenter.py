"""The segmentation network: the U-Net at a fixed time step, with the classes it tells apart."""

from collections.abc import Mapping
from typing import Literal

import torch
from torch import nn

from wsiseg.classes import ClassTable
from wsiseg.errors import CheckpointError
from wsiseg.models.unet import UNet
from wsiseg.models.weights import check_tensors

InputRange = Literal["symmetric", "unit"]
"""The range a network was trained on: [-1, 1] (ours), or [0, 1] (released segmentation nets)."""

HEAD_PREFIX = "head."
"""Tensors of the U-Net that a task owns; everything else is carried over from pretraining."""


class Segmenter(nn.Module):
    """A U-Net that labels each pixel of a clean image.

    Parameters
    ----------
    unet
        With one output per class and background: `out_channels == classes.num_labels`.
    classes
        What the outputs mean.
    timestep
        Diffusion time step that stands for a clean image; the released code uses 0, which
        pretraining hardly weights (defect D8), so it is a setting.
    input_range
        Range the weights expect; callers always pass [-1, 1] (`wsiseg.models.inputs`).
    """

    def __init__(
        self,
        unet: UNet,
        classes: ClassTable,
        timestep: int,
        *,
        input_range: InputRange = "symmetric",
    ) -> None:
        super().__init__()
        if unet.out_channels != classes.num_labels:
            msg = (
                f"network has {unet.out_channels} outputs, the class table needs "
                f"{classes.num_labels} ({', '.join(classes.names)})"
            )
            raise CheckpointError(msg)
        self.unet = unet
        self.classes = classes
        self.timestep = timestep
        self.input_range = input_range

    def forward(self, x_NCHW: torch.Tensor) -> torch.Tensor:
        """Return logits (N, classes.num_labels, H, W) of float images in [-1, 1].

        Logits, never probabilities: log(softmax) of a saturated pixel is -inf (defect D1).
        """
        if self.input_range == "unit":
            x_NCHW = (x_NCHW + 1.0) / 2.0
        t_N = torch.full((x_NCHW.shape[0],), self.timestep, device=x_NCHW.device)
        logits: torch.Tensor = self.unet(x_NCHW, t_N)
        return logits

    def transfer_from_pretrained(self, state_dict: Mapping[str, torch.Tensor]) -> None:
        """Copy every tensor but the head from a pretrained U-Net; all or nothing.

        Raises
        ------
        CheckpointError
            A tensor is missing, unknown or of another shape: the networks differ.
        """
        own = self.unet.state_dict()
        given = {n: tensor for n, tensor in state_dict.items() if not n.startswith(HEAD_PREFIX)}
        wanted = {n: tuple(x.shape) for n, x in own.items() if not n.startswith(HEAD_PREFIX)}
        check_tensors(given, wanted, where="pretrained weights")
        with torch.no_grad():
            for name, tensor in given.items():
                own[name].copy_(tensor)
