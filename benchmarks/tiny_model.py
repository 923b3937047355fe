"""A tiny segmenter of glands, trained for seconds: its masks have real shapes, and little cost.

    python benchmarks/tiny_model.py FOLDER MPP

Benchmarks run it as a process of its own: the peak memory of a child counts what its parent held
when it was started.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional

from wsiseg.classes import ClassTable
from wsiseg.geometry import Box
from wsiseg.models.checkpoint import save_checkpoint
from wsiseg.models.inputs import to_network
from wsiseg.models.unet import UNet
from wsiseg.runinfo import RunInfo
from wsiseg.settings.model import UNetConfig
from wsiseg.synthetic import SyntheticTissue

NETWORK = UNetConfig(dim=8, mults=(1, 2, 2), blocks=1, groups=4, attention="none")
FAR_PX = 1 << 18


def train_model(folder: Path, *, mpp: float, tile_size_px: int = 256, steps: int = 80) -> None:
    """Write a segmenter trained on synthetic tissue at `mpp` um/px."""
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    network = UNet(NETWORK, out_channels=2)
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimiser = torch.optim.AdamW(network.parameters(), lr=3e-3)
    tissue = SyntheticTissue(width_px=FAR_PX, height_px=FAR_PX, mpp=mpp, seed=7)
    for _ in range(steps):
        parts = [
            tissue.region(Box(*(FAR_PX // 2 + rng.integers(0, 4000, 2)).tolist(), 128, 128))
            for _ in range(6)
        ]
        images, labels = (np.stack(arrays) for arrays in zip(*parts, strict=True))
        logits = network(to_network(torch.from_numpy(images)), torch.zeros(len(images)))
        loss = functional.cross_entropy(logits, torch.from_numpy(labels).long())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    save_checkpoint(
        folder,
        kind="segmenter",
        unet_config=NETWORK,
        out_channels=2,
        state=network.state_dict(),
        mpp=mpp,
        tile_size_px=tile_size_px,
        timestep=0,
        classes=ClassTable.of_names(["Gland"]),
        diffusion=None,
        metrics={"loss": float(loss.detach())},
        run=RunInfo(stage="benchmark", config={}),
    )


if __name__ == "__main__":
    train_model(Path(sys.argv[1]), mpp=float(sys.argv[2]))
