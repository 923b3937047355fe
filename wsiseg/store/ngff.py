"""The pyramids of a slide mask in the words of NGFF 0.5 (OME-Zarr), and how a level is made."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from wsiseg.classes import BACKGROUND, IGNORE, ClassTable
from wsiseg.geometry import Raster

UInt8 = npt.NDArray[np.uint8]

OVERVIEW_PX = 1024
"""The pyramid ends with the first level that fits in this."""

NGFF_VERSION = "0.5"


def num_pyramid_levels(width_px: int, height_px: int) -> int:
    """Return how many levels a mask has, level 0 included."""
    return 1 + max(0, math.ceil(math.log2(max(width_px, height_px) / OVERVIEW_PX)))


def level_shape(raster: Raster, level: int) -> tuple[int, int]:
    """Return (height, width) of a level in pixels."""
    scale = 1 << level
    return -(-raster.height_px // scale), -(-raster.width_px // scale)


def halve(labels: UInt8) -> UInt8:
    """Return labels at half size, uint8 (ceil(H/2), ceil(W/2)): the most frequent of each 2 x 2.

    Ties go to the first in reading order; odd edges count their last row or column twice.
    """
    a, b, c, d = _quarters(labels)
    is_a = (a == b) | (a == c) | (a == d) | ((b != c) & (b != d) & (c != d))
    is_b = (b == c) | (b == d)
    return np.where(is_a, a, np.where(is_b, b, c))


def halve_mean(values: UInt8) -> UInt8:
    """Return values at half size: the mean of each 2 x 2, rounded; odd edges as in `halve`."""
    a, b, c, d = (quarter.astype(np.uint16) for quarter in _quarters(values))
    half: UInt8 = ((a + b + c + d + 2) >> 2).astype(np.uint8)
    return half


def _quarters(values: UInt8) -> tuple[UInt8, UInt8, UInt8, UInt8]:
    """Return the four pixels of each 2 x 2, in reading order, as four arrays."""
    height, width = values.shape
    if height % 2 or width % 2:
        values = np.pad(values, ((0, height % 2), (0, width % 2)), mode="edge")
    return values[0::2, 0::2], values[0::2, 1::2], values[1::2, 0::2], values[1::2, 1::2]


def label_attributes(raster: Raster, classes: ClassTable) -> dict[str, Any]:
    """Return the `ome` attributes of the labels: multiscales and image-label."""
    return {**image_attributes(raster, "labels"), "image-label": _image_label(classes)}


def image_attributes(raster: Raster, name: str) -> dict[str, Any]:
    """Return the `ome` attributes of a pyramid on the mask's raster."""
    num_levels = num_pyramid_levels(raster.width_px, raster.height_px)
    datasets = [
        {
            "path": str(level),
            "coordinateTransformations": [
                {
                    "type": "scale",
                    "scale": [raster.mpp_y * (1 << level), raster.mpp_x * (1 << level)],
                },
                {
                    # Pixel centres: the first pixel of a level covers several of level 0.
                    "type": "translation",
                    "translation": [
                        raster.mpp_y * ((1 << level) - 1) / 2,
                        raster.mpp_x * ((1 << level) - 1) / 2,
                    ],
                },
            ],
        }
        for level in range(num_levels)
    ]
    axes = [{"name": axis, "type": "space", "unit": "micrometer"} for axis in ("y", "x")]
    return {
        "version": NGFF_VERSION,
        "multiscales": [{"name": name, "axes": axes, "datasets": datasets}],
    }


def _image_label(classes: ClassTable) -> Mapping[str, Any]:
    colors = [{"label-value": BACKGROUND, "rgba": [0, 0, 0, 0]}]
    properties: list[dict[str, Any]] = [{"label-value": BACKGROUND, "class": classes.names[0]}]
    for item in classes.classes:
        colors.append({"label-value": item.label, "rgba": [*item.color, 255]})
        properties.append({"label-value": item.label, "class": item.name})
    colors.append({"label-value": IGNORE, "rgba": [0, 0, 0, 0]})
    properties.append({"label-value": IGNORE, "class": "Not predicted"})
    return {"colors": colors, "properties": properties}
