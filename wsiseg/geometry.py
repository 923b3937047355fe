"""Frames and units: boxes, rasters laid over a slide, and conversions between them.

Two frames matter. *Level 0* (suffix `_l0`) is the slide's full-resolution pixel grid. A *raster*
is a pixel grid at some mpp laid over the whole slide, its pixel (0, 0) having its top left corner
at level-0 (0, 0): tiles, tissue masks and slide masks each live on one. Pure functions, no I/O.
"""

import math
from dataclasses import dataclass

MPP_SNAP_TOLERANCE = 0.02
"""Relative difference below which a stored level is used as it is instead of being resampled.

2 % is far below the spread of scanner calibrations, and resampling a 0.499 um/px level to
0.5 um/px only blurs it. The raster then carries the level's true mpp.
"""


@dataclass(frozen=True, slots=True)
class Box:
    """An axis-aligned rectangle of whole pixels in one frame: x, y of the top left, and size."""

    x: int
    y: int
    width: int
    height: int

    def __post_init__(self) -> None:
        if self.width < 0 or self.height < 0:
            msg = f"Box: width and height must be >= 0, got {self.width} x {self.height}"
            raise ValueError(msg)

    @property
    def right(self) -> int:
        """First column after the box."""
        return self.x + self.width

    @property
    def bottom(self) -> int:
        """First row after the box."""
        return self.y + self.height

    @property
    def is_empty(self) -> bool:
        """Whether the box holds no pixel."""
        return self.width == 0 or self.height == 0

    def intersection(self, other: "Box") -> "Box":
        """Return the overlap with `other`; of zero size if there is none."""
        x, y = max(self.x, other.x), max(self.y, other.y)
        width = max(0, min(self.right, other.right) - x)
        height = max(0, min(self.bottom, other.bottom) - y)
        return Box(x, y, width, height)

    def translated(self, dx: int, dy: int) -> "Box":
        """Return the box moved by (dx, dy)."""
        return Box(self.x + dx, self.y + dy, self.width, self.height)


@dataclass(frozen=True, slots=True)
class Raster:
    """A pixel grid over a whole slide. Pixel (i, j) covers level-0 [i*d, (i+1)*d) in each axis.

    `mpp_x`, `mpp_y` are the true micrometres per raster pixel; `downsample_x`, `downsample_y` are
    level-0 pixels per raster pixel (below 1 where the raster is finer than the slide).
    """

    width_px: int
    height_px: int
    mpp_x: float
    mpp_y: float
    downsample_x: float
    downsample_y: float

    def __post_init__(self) -> None:
        if self.width_px < 1 or self.height_px < 1:
            msg = f"Raster: size must be >= 1 px, got {self.width_px} x {self.height_px}"
            raise ValueError(msg)
        for name in ("mpp_x", "mpp_y", "downsample_x", "downsample_y"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                msg = f"Raster: {name} must be finite and > 0, got {value}"
                raise ValueError(msg)

    @property
    def mpp(self) -> float:
        """Geometric mean of the two resolutions, um per pixel."""
        return math.sqrt(self.mpp_x * self.mpp_y)

    @property
    def pixel_area_um2(self) -> float:
        """Area of one raster pixel in um2."""
        return self.mpp_x * self.mpp_y

    @property
    def box(self) -> Box:
        """The whole raster as a box in its own frame."""
        return Box(0, 0, self.width_px, self.height_px)

    def l0_from_raster(self, x: float, y: float) -> tuple[float, float]:
        """Map a raster point to level-0 pixels."""
        return x * self.downsample_x, y * self.downsample_y

    def raster_from_l0(self, x_l0: float, y_l0: float) -> tuple[float, float]:
        """Map a level-0 point to raster pixels."""
        return x_l0 / self.downsample_x, y_l0 / self.downsample_y

    def box_l0_from_raster(self, box: Box) -> Box:
        """Return the smallest level-0 box of whole pixels that covers a raster box."""
        x0 = math.floor(box.x * self.downsample_x + 1e-6)
        y0 = math.floor(box.y * self.downsample_y + 1e-6)
        x1 = math.ceil(box.right * self.downsample_x - 1e-6)
        y1 = math.ceil(box.bottom * self.downsample_y - 1e-6)
        return Box(x0, y0, max(0, x1 - x0), max(0, y1 - y0))

    def area_px_from_um2(self, area_um2: float) -> float:
        """Return an area in raster pixels. (um2) / (um2 per pixel) = pixels."""
        return area_um2 / self.pixel_area_um2


def integer_downsample(size_l0_px: int, size_level_px: int) -> float:
    """Return the downsample of a stored level along one axis, in level-0 pixels per level pixel.

    Writers halve sizes and round, so 2967 px becomes 1483 px and the quotient 2.0007 is off by
    one pixel at the far end. If a whole number explains the size, rounded up or down, it is taken.
    """
    exact = size_l0_px / size_level_px
    nearest = round(exact)
    if nearest >= 1 and abs(size_l0_px / nearest - size_level_px) < 1:
        return float(nearest)
    return exact


def is_same_mpp(first_mpp: float, second_mpp: float) -> bool:
    """Whether two resolutions differ by less than `MPP_SNAP_TOLERANCE`."""
    return abs(first_mpp / second_mpp - 1) <= MPP_SNAP_TOLERANCE
