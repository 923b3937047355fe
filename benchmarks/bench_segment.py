"""Segmenting a large synthetic slide: time and peak memory of the whole command.

    python benchmarks/bench_segment.py [--side 20000] [--runs 1]

The network is small and untrained: its speed and the work around it do not depend on the weights,
and random labels make more and rougher polygons than any trained network.
"""

import argparse
import sys
import tempfile
from pathlib import Path

import torch
from measure import cost, header, report

from wsiseg.classes import ClassTable
from wsiseg.models.checkpoint import save_checkpoint
from wsiseg.models.unet import UNet
from wsiseg.runinfo import RunInfo
from wsiseg.settings.model import UNetConfig
from wsiseg.synthetic import SyntheticTissue, write_slide

NETWORK = UNetConfig(dim=8, mults=(1, 2, 4, 8), blocks=1)


def write_model(folder: Path) -> None:
    """Write a segmenter with random weights."""
    torch.manual_seed(0)
    save_checkpoint(
        folder,
        kind="segmenter",
        unet_config=NETWORK,
        out_channels=2,
        state=UNet(NETWORK, out_channels=2).state_dict(),
        mpp=0.5,
        tile_size_px=256,
        timestep=0,
        classes=ClassTable.of_names(["Gland"]),
        diffusion=None,
        metrics={},
        run=RunInfo(stage="benchmark", config={}),
    )


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--side", type=int, default=20_000, help="side of the slide in pixels")
    parser.add_argument("--runs", type=int, default=1)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        slide = folder / "slide.tiff"
        write_slide(slide, SyntheticTissue(width_px=options.side, height_px=options.side))
        write_model(folder / "model")
        header()
        command = (sys.executable, "-m", "wsiseg", "segment", str(slide))
        costs = [
            cost(*command, "--model", str(folder / "model"), "-o", str(folder / f"out-{i}"))
            for i in range(options.runs)
        ]
        seconds = report(f"wsiseg segment, {options.side} x {options.side} px", costs)
        exports = [
            cost(
                sys.executable, "-m", "wsiseg", "export", str(folder / "out-0/slide.mask.zarr"),
                "-o", str(folder / f"again-{i}.geojson"),
            )
            for i in range(options.runs)
        ]  # fmt: skip
        report("wsiseg export of its mask", exports)
        size = (folder / "out-0" / "slide.geojson").stat().st_size
    print(f"{options.side**2 / 1e6 / seconds:.2f} Mpx/s; GeoJSON of {size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
