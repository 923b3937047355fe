"""How long the network waits while a slide is segmented, measured inside the engine.

    python benchmarks/bench_overlap.py [--side 6000] [--runs 3] [--readers 2] [--preset tiny]

A lane waits whenever it does not run the network, whatever the reason: a window that is not read
yet, blending or writing that hold up the next one, hand-over between threads. On a CPU there is a
lane per core, and readers, blending and writing take their time from the same cores: that shows
as a slower network, not as waiting, so what they took is printed as well.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch

from wsiseg.classes import ClassTable
from wsiseg.grid import TileGrid
from wsiseg.inference.engine import Engine
from wsiseg.inference.predict import predict_slide
from wsiseg.models.segmenter import Segmenter
from wsiseg.models.unet import UNet
from wsiseg.progress import SilentProgress
from wsiseg.runinfo import RunInfo
from wsiseg.settings.model import unet_preset
from wsiseg.settings.tile import TissueConfig
from wsiseg.slides.reader import Slide, open_slide
from wsiseg.slides.tissue import make_tissue_mask
from wsiseg.store.masks import SlideMask
from wsiseg.synthetic import SyntheticTissue, write_slide

CLASSES = ClassTable.of_names(["Gland"])


def segment(slide: Slide, engine: Engine, folder: Path) -> float:
    """Segment a slide, print what the engine counted, return the share of time it waited."""
    raster = slide.meta.raster(0.5)
    tissue = make_tissue_mask(slide, TissueConfig())
    grid = TileGrid.covering(raster, tile_size_px=256, overlap_px=64)
    windows = grid.select(tissue.fractions(grid) > 0)
    began_s = time.perf_counter()
    with SlideMask.create(
        folder, raster=raster, slide=slide.meta.to_dict(), classes=CLASSES,
        run=RunInfo(stage="segment", config={}), model_digest="", with_probability=True,
    ) as writer:  # fmt: skip
        (use,) = predict_slide(
            slide, engine, writer, windows, tissue=tissue, progress=SilentProgress()
        )
        all_s = time.perf_counter() - began_s
        writer.finish()
    print(
        f"{use.windows:6d} windows  {use.wall_s:7.2f} s on {use.lanes} lanes  "
        f"network {use.network_s / use.lanes:7.2f} s  reading {use.read_s:6.2f} s of all threads  "
        f"after the last window {all_s - use.wall_s:5.2f} s  waits {use.waiting:6.2%}",
        flush=True,
    )
    return use.waiting


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--side", type=int, default=6000, help="side of the slide, 0.25 um/px")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--readers", type=int, default=2)
    parser.add_argument("--preset", default="tiny")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch-size", type=int, default=8)
    options = parser.parse_args()
    torch.manual_seed(0)
    unet = UNet(unet_preset(options.preset), out_channels=2)
    unet.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    engine = Engine(
        Segmenter(unet, CLASSES, timestep=0),
        torch.device(options.device),
        batch_size=options.batch_size,
        num_readers=options.readers,
        amp=True,
    )
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        path = folder / "slide.tiff"
        tissue = SyntheticTissue(width_px=options.side, height_px=options.side, mpp=0.25)
        write_slide(path, tissue)
        waits = []
        for run in range(options.runs):
            with open_slide(path) as slide:  # opened anew: nothing of it is in memory
                waits.append(segment(slide, engine, folder / f"{run}.mask.zarr"))
    print(
        f"the network waits: median {statistics.median(waits):.2%} "
        f"({min(waits):.2%} to {max(waits):.2%}) of the time"
    )


if __name__ == "__main__":
    main()
