"""Lossless slides whose colours say where they are, so that a wrong pixel names itself."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import tifffile

UInt8 = npt.NDArray[np.uint8]


def coordinate_colours(width: int, height: int) -> UInt8:
    """Return uint8 (height, width, 3): x and y modulo 256, and the high bits of both."""
    y, x = np.mgrid[:height, :width]
    return np.stack([x % 256, y % 256, x // 256 * 16 + y // 256], axis=-1).astype(np.uint8)


@pytest.fixture(scope="session")
def write_pyramid() -> Callable[..., list[UInt8]]:
    """Write a tiled TIFF of two levels and return their pixels.

    With "deflate" its tiles are decoded directly, with "zstd" OpenSlide reads it.
    """

    def write(
        path: Path, width: int, height: int, *, codec: str = "deflate", mpp: float | None = 0.5
    ) -> list[UInt8]:
        full = coordinate_colours(width, height)
        levels = [full, np.ascontiguousarray(full[: height // 2 * 2 : 2, : width // 2 * 2 : 2])]
        tags: dict[str, Any] = {}
        if mpp is not None:
            tags = {"resolution": (1e4 / mpp,) * 2, "resolutionunit": 3}
        with tifffile.TiffWriter(path) as tiff:
            for i, level in enumerate(levels):
                tiff.write(
                    level, photometric="rgb", tile=(128, 128), compression=codec,
                    subfiletype=int(i > 0), **(tags if i == 0 else {}),
                )  # fmt: skip
        return levels

    return write
