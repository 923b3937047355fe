"""What the zygote does once so that its forks need not: load compiled functions and late imports.

Tiles, segments and exports a picture, in this process. That leaves zarr's event loop, which knows
about forks; gradients are not computed here, for torch refuses them in a fork then.
"""

import contextlib
import importlib
import os
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image

LATE_IMPORTS = ("torch._dynamo", "matplotlib.backends.backend_agg", "matplotlib.figure")
"""Of training, which is not run here."""


def warm_up() -> None:
    """Import and run everything once, in a folder that is deleted."""
    for name in LATE_IMPORTS:
        importlib.import_module(name)
    back = Path.cwd()
    with tempfile.TemporaryDirectory() as folder, Path(os.devnull).open("w") as nothing:
        os.chdir(folder)
        noise = np.random.default_rng(0).integers(0, 256, (128, 128, 3), dtype=np.uint8)
        Image.fromarray(noise).save("w.png")
        Path("labels").mkdir()
        Image.fromarray(noise[..., 0] // 128).save("labels/w.png")
        Path("classes.yaml").write_text("classes:\n  - {name: A, color: [200, 0, 0]}\n")
        _save_model(Path("model"))
        with contextlib.redirect_stdout(nothing):
            _run("tile", "w.png", "-o", "t", "--tile-size", "64", "--slide-mpp", "0.5",
                 "--tissue", "none", "--labels", "labels", "--classes", "classes.yaml")  # fmt: skip
            _run("segment", "w.png", "--model", "model", "--slide-mpp", "0.5", "--tissue", "none",
                 "--device", "cpu")  # fmt: skip
        os.chdir(back)


def _run(*args: str) -> None:
    from wsiseg.cli.main import main

    sys.argv = ["wsiseg", *args]
    with contextlib.suppress(SystemExit):
        main()


def _save_model(folder: Path) -> None:
    from wsiseg.classes import ClassTable
    from wsiseg.models.checkpoint import save_checkpoint
    from wsiseg.models.unet import UNet
    from wsiseg.runinfo import RunInfo
    from wsiseg.settings.model import UNetConfig

    config = UNetConfig(dim=8, mults=(1, 2), groups=4)
    torch.manual_seed(0)
    save_checkpoint(
        folder,
        kind="segmenter",
        unet_config=config,
        out_channels=2,
        state=UNet(config, out_channels=2).state_dict(),
        mpp=0.5,
        tile_size_px=64,
        timestep=0,
        classes=ClassTable.of_names(["A"]),
        diffusion=None,
        metrics={},
        run=RunInfo.of("warm", {}, {}),
    )
