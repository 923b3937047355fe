"""A slide mask as a pyramidal OME-TIFF, for programs that read no zarr."""

import uuid
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import tifffile

from wsiseg.config import digest
from wsiseg.geometry import Box
from wsiseg.outputs import atomic_file
from wsiseg.store.masks import SlideMask
from wsiseg.store.ngff import level_shape

TILE_PX = 512

_UM_PER_CM = 1e4


def write_ome_tiff(path: Path, mask: SlideMask) -> int:
    """Write a mask's labels, uint8, level by level; absent or complete, equal bytes every time.

    Level 0 of the file is the mask's own; the others are its SubIFDs, each half the one before.
    0 is background, 255 not predicted. Compressed without loss (deflate, which every reader has).

    Returns
    -------
    int
        Size of the file in bytes.
    """
    raster = mask.raster
    metadata = {
        "axes": "YX",
        "Name": mask.slide_id,
        "PhysicalSizeX": raster.mpp_x,
        "PhysicalSizeXUnit": "µm",
        "PhysicalSizeY": raster.mpp_y,
        "PhysicalSizeYUnit": "µm",
        # tifffile would draw a random one
        "UUID": f"urn:uuid:{uuid.uuid5(uuid.NAMESPACE_OID, digest(mask.run))}",
    }
    with atomic_file(path) as temporary:
        is_big = raster.width_px * raster.height_px > 1 << 30
        with tifffile.TiffWriter(temporary, bigtiff=is_big, ome=True) as tiff:
            for level in range(mask.num_levels):
                scale = 1 << level
                tiff.write(
                    _tiles(mask, level),
                    shape=level_shape(raster, level),
                    dtype=np.uint8,
                    tile=(TILE_PX, TILE_PX),
                    photometric="minisblack",
                    compression="zlib",
                    resolution=(
                        _UM_PER_CM / (raster.mpp_x * scale),
                        _UM_PER_CM / (raster.mpp_y * scale),
                    ),
                    resolutionunit="CENTIMETER",
                    software=False,
                    metadata=metadata if level == 0 else None,
                    subifds=mask.num_levels - 1 if level == 0 else None,
                    subfiletype=0 if level == 0 else 1,
                )
        return temporary.stat().st_size


def _tiles(mask: SlideMask, level: int) -> Iterator[npt.NDArray[np.uint8]]:
    """Yield the tiles of a level in reading order, one row of tiles in memory at a time."""
    height, width = level_shape(mask.raster, level)
    columns = -(-width // TILE_PX)
    for y in range(0, height, TILE_PX):
        row = mask.read_level(level, Box(0, y, columns * TILE_PX, TILE_PX))
        for x in range(0, width, TILE_PX):
            yield row[:, x : x + TILE_PX]
