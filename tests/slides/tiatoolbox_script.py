"""Run what needs tiatoolbox in one process (its import takes 20 s) and print results as JSON.

    python tiatoolbox_script.py FOLDER

Each result is a list of numbers or, for what raised, the text of the error.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import tifffile
import zarr

from wsiseg.geometry import Box
from wsiseg.settings.tile import TissueConfig
from wsiseg.slides.reader import open_slide
from wsiseg.slides.stain import make_normalizer
from wsiseg.slides.tissue import make_tissue_mask
from wsiseg.synthetic import SyntheticTissue, write_slide

TISSUE = SyntheticTissue(width_px=1200, height_px=900, mpp=0.5, seed=4)
PIXELS, _ = TISSUE.region(Box(0, 0, 1200, 900))
TILES: dict[str, Any] = {"tile": (256, 256), "compression": "deflate"}
HALF = np.ascontiguousarray(PIXELS[::2, ::2])


def write_ome(path: Path) -> None:
    """An OME-TIFF pyramid as Bio-Formats writes it: planes (3, H, W), levels as sub-IFDs."""
    with tifffile.TiffWriter(path, ome=True) as tiff:
        metadata = {"axes": "YXS", "PhysicalSizeX": 0.5, "PhysicalSizeY": 0.5,
                    "PhysicalSizeXUnit": "µm", "PhysicalSizeYUnit": "µm"}  # fmt: skip
        options: dict[str, Any] = {
            "photometric": "rgb",
            "tile": (256, 256),
            "compression": "deflate",
        }
        tiff.write(PIXELS, subifds=1, metadata=metadata, **options)
        tiff.write(HALF, subfiletype=1, **options)


def write_planes(path: Path) -> None:
    """The same with a plane for each colour, of which OpenSlide shows the first."""
    with tifffile.TiffWriter(path, ome=True) as tiff:
        metadata = {"axes": "CYX", "PhysicalSizeX": 0.5, "PhysicalSizeY": 0.5}
        options: dict[str, Any] = {
            "photometric": "minisblack",
            "tile": (256, 256),
            "compression": "deflate",
        }
        tiff.write(PIXELS.transpose(2, 0, 1), subifds=1, metadata=metadata, **options)
        tiff.write(HALF.transpose(2, 0, 1), subfiletype=1, **options)


def write_jp2(path: Path) -> None:
    path.write_bytes(imagecodecs.jpeg2k_encode(PIXELS, codecformat="jp2", reversible=True))


def write_ngff(path: Path) -> None:
    """An NGFF 0.4 image (zarr v2), RGB as channels."""
    group = zarr.create_group(path, zarr_format=2)
    for name, level in (("0", PIXELS), ("1", HALF)):
        data = np.ascontiguousarray(level.transpose(2, 0, 1))
        group.create_array(name, data=data, chunks=(3, 256, 256))
    axes = [{"name": "c", "type": "channel"}, *(
        {"name": name, "type": "space", "unit": "micrometer"} for name in "yx"
    )]  # fmt: skip
    datasets = [
        {"path": str(i), "coordinateTransformations": [{"type": "scale", "scale": [1, s, s]}]}
        for i, s in enumerate((0.5, 1.0))
    ]
    scale = [{"type": "scale", "scale": [1.0, 1.0, 1.0]}]
    multiscales: Any = [
        {"version": "0.4", "name": "x", "axes": axes, "datasets": datasets,
         "coordinateTransformations": scale}
    ]  # fmt: skip
    group.attrs["multiscales"] = multiscales
    window = {"start": 0, "end": 255, "min": 0, "max": 255}
    omero: Any = {
        "id": 1, "name": "x", "version": "0.4",
        "rdefs": {"defaultT": 0, "defaultZ": 0, "model": "color"},
        "channels": [
            {"label": c, "active": True, "color": color, "coefficient": 1.0, "family": "linear",
             "inverted": False, "window": window}
            for c, color in (("r", "FF0000"), ("g", "00FF00"), ("b", "0000FF"))
        ],
    }  # fmt: skip
    group.attrs["omero"] = omero
    group.attrs["_creator"] = {"name": "test", "version": "1"}


def read(path: Path, mpp: float, *, slide_mpp: float | None = None) -> list[Any]:
    """Return reader, stated mpp, and the largest and mean difference from the truth."""
    with open_slide(path, slide_mpp=slide_mpp) as slide:
        raster = slide.meta.raster(mpp)
        pixels = slide.read(raster, raster.box).astype(int)
        again = slide.read(raster, Box(301, 205, 90, 70))
        same = bool((again == pixels[205:275, 301:391]).all())
        error = np.abs(pixels - PIXELS)
        return [slide.meta.reader, slide.meta.mpp_x, int(error.max()), float(error.mean()), same]


def tissue(folder: Path, method: str) -> list[Any]:
    """Return how much is tissue and how much agrees with where the tissue was drawn."""
    with open_slide(folder / "slide.tiff") as slide:
        mask = make_tissue_mask(slide, TissueConfig(method=method, mpp=4.0)).mask
    drawn = PIXELS.max(axis=-1).astype(int) - PIXELS.min(axis=-1) > 25
    truth = drawn[: mask.shape[0] * 8, : mask.shape[1] * 8]
    truth = truth[: truth.shape[0] // 8 * 8, : truth.shape[1] // 8 * 8]
    blocks = truth.reshape(truth.shape[0] // 8, 8, truth.shape[1] // 8, 8).mean(axis=(1, 3)) > 0.5
    agreed = mask[: blocks.shape[0], : blocks.shape[1]] == blocks
    return [float(mask.mean()), float(agreed.mean())]


def stain(method: str) -> list[Any]:
    """Return how far from the target a darkened image is before and after, and glass's change."""
    target = np.ascontiguousarray(PIXELS[200:500, 300:700])
    path = Path(sys.argv[1]) / "target.png"
    path.write_bytes(imagecodecs.png_encode(target))
    normalize = make_normalizer(method, path)
    image = (255 * (target / 255.0) ** np.array([1.6, 1.3, 1.5])).astype(np.uint8)
    before = image.copy()
    after = normalize(image)
    glass = np.full((64, 64, 3), 243, np.uint8)
    distances = [float(np.abs(x.mean((0, 1)) - target.mean((0, 1))).max()) for x in (image, after)]
    untouched = bool((image == before).all())
    return [
        *distances,
        untouched,
        str(after.dtype),
        int(np.abs(normalize(glass).astype(int) - 243).max()),
    ]


def main() -> None:
    """Do all and print."""
    folder = Path(sys.argv[1])
    write_ome(folder / "x.ome.tiff")
    write_planes(folder / "planes.ome.tiff")
    write_jp2(folder / "x.jp2")
    write_ngff(folder / "x.zarr")
    write_slide(folder / "slide.tiff", TISSUE)
    work: dict[str, Callable[[], list[Any]]] = {
        "ome": lambda: read(folder / "x.ome.tiff", 0.5),
        "planes": lambda: read(folder / "planes.ome.tiff", 0.5),
        "jp2": lambda: read(folder / "x.jp2", 0.5, slide_mpp=0.5),
        "ngff": lambda: read(folder / "x.zarr", 0.5),
        "otsu": lambda: tissue(folder, "otsu"),
        "morphological": lambda: tissue(folder, "morphological"),
        "macenko": lambda: stain("macenko"),
        "vahadane": lambda: stain("vahadane"),
        "reinhard": lambda: stain("reinhard"),
        "default target": lambda: [
            float(make_normalizer("macenko")(PIXELS[200:300, 300:400]).mean())
        ],
    }
    results: dict[str, list[Any] | str] = {}
    for name, function in work.items():
        try:
            results[name] = function()
        except Exception as error:  # noqa: BLE001 - whatever it is, the test shows it
            results[name] = f"{type(error).__name__}: {error}"
    sys.stdout.write(json.dumps(results, default=float) + "\n")


if __name__ == "__main__":
    main()
