"""SlideMeta: what is known of a slide without its pixels."""

import math
from dataclasses import dataclass
from typing import Any

from wsiseg.errors import MissingMppError
from wsiseg.geometry import Box, Raster, is_same_mpp


@dataclass(frozen=True, slots=True, kw_only=True)
class SlideMeta:
    """What is known of a slide without its pixels. Holds no path and no text of the file.

    `mpp_x`, `mpp_y` : um per level-0 pixel; None only if `open_slide` was told not to require
    them. `level_sizes` : (width, height) of each stored level. `level_downsamples` : level-0
    pixels per pixel of each level as (x, y). `bounds` : the scanned part of level 0 (MRXS), which
    is all that QuPath shows. `background` : RGB of where nothing was scanned.
    """

    slide_id: str
    width_px_l0: int
    height_px_l0: int
    mpp_x: float | None
    mpp_y: float | None
    mpp_source: str | None
    level_sizes: tuple[tuple[int, int], ...]
    level_downsamples: tuple[tuple[float, float], ...]
    bounds: Box | None
    background: tuple[int, int, int]
    reader: str

    def raster(self, mpp: float) -> Raster:
        """Return the pixel grid at `mpp` um/px over the whole slide.

        A stored level within `MPP_SNAP_TOLERANCE` is taken as it is, with its true resolution. So
        is a whole number of level-0 pixels: the mean of 2 x 2 pixels is sharper, and is read
        faster, than that of 2.004 x 2.004.

        Raises
        ------
        MissingMppError
            The slide's resolution is unknown.
        """
        if self.mpp_x is None or self.mpp_y is None:
            raise missing_mpp(self.slide_id, "states no resolution (mpp)")
        for level in range(len(self.level_sizes)):
            raster = self.level_raster(level)
            if is_same_mpp(raster.mpp_x, mpp) and is_same_mpp(raster.mpp_y, mpp):
                return raster
        down_x, down_y = mpp / self.mpp_x, mpp / self.mpp_y
        whole_x, whole_y = max(2.0, round(down_x)), max(2.0, round(down_y))
        if is_same_mpp(self.mpp_x * whole_x, mpp) and is_same_mpp(self.mpp_y * whole_y, mpp):
            return self._raster(whole_x, whole_y, self.mpp_x * whole_x, self.mpp_y * whole_y)
        return self._raster(down_x, down_y, mpp, mpp)

    def _raster(self, down_x: float, down_y: float, mpp_x: float, mpp_y: float) -> Raster:
        width = math.ceil(self.width_px_l0 / down_x - 1e-9)
        height = math.ceil(self.height_px_l0 / down_y - 1e-9)
        return Raster(max(1, width), max(1, height), mpp_x, mpp_y, down_x, down_y)

    def level_raster(self, level: int) -> Raster:
        """Return the pixel grid of a stored level; MissingMppError without a resolution."""
        if self.mpp_x is None or self.mpp_y is None:
            raise missing_mpp(self.slide_id, "states no resolution (mpp)")
        down_x, down_y = self.level_downsamples[level]
        mpp_x, mpp_y = self.mpp_x * down_x, self.mpp_y * down_y
        return Raster(*self.level_sizes[level], mpp_x, mpp_y, down_x, down_y)

    def snapped_level(self, raster: Raster) -> int | None:
        """Return the stored level whose pixels are the raster's, or None."""
        wanted = (raster.width_px, raster.height_px), (raster.downsample_x, raster.downsample_y)
        for level, found in enumerate(zip(self.level_sizes, self.level_downsamples, strict=True)):
            if found == wanted:
                return level
        return None

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        b = self.bounds
        return {
            "slide_id": self.slide_id,
            "width_px_l0": self.width_px_l0,
            "height_px_l0": self.height_px_l0,
            "mpp_x": self.mpp_x,
            "mpp_y": self.mpp_y,
            "mpp_source": self.mpp_source,
            "level_sizes": [list(size) for size in self.level_sizes],
            "level_downsamples": [list(d) for d in self.level_downsamples],
            "bounds": None if b is None else [b.x, b.y, b.width, b.height],
            "background": list(self.background),
            "reader": self.reader,
        }


def missing_mpp(slide_id: str, problem: str) -> MissingMppError:
    """Return the error for a slide whose resolution cannot be used, with the remedy."""
    return MissingMppError(
        f"slide '{slide_id}': {problem}; give its um/px at level 0 with --slide-mpp, or in the "
        "mpp column of the cohort"
    )
