"""TissueMask: where on the glass there is tissue."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from wsiseg.errors import ConfigError, NoTissueError
from wsiseg.geometry import Box, Raster
from wsiseg.grid import TileGrid
from wsiseg.settings.tile import TissueConfig
from wsiseg.slides.reader import Slide

Mask = npt.NDArray[np.bool_]
Polygon = Sequence[npt.NDArray[np.float64]]
"""Rings float64 (n, 2) of (x, y) in level-0 pixels: the outer one, then holes."""

MAX_MASK_PX = 16_000_000
"""A larger mask is made at a coarser resolution; tissue borders need no more."""

MIN_SATURATION = 0.05
"""Glass, whatever its tint, has less colour than this; the palest eosin has more."""

MIN_CONTRAST = 0.04
"""Otsu always finds two groups. Closer together than this they are one, and noise is no tissue."""

DARK = 60
"""Grey level below which a colourless pixel is ink or a coverslip edge, not tissue."""


@dataclass(frozen=True)
class TissueMask:
    """Where there is tissue: bool (h, w) on `raster`."""

    mask: Mask
    raster: Raster

    def __post_init__(self) -> None:
        if self.mask.shape != (self.raster.height_px, self.raster.width_px):
            msg = f"tissue mask is {self.mask.shape}, its raster {self.raster}"
            raise ValueError(msg)

    @cached_property
    def _integral(self) -> npt.NDArray[np.int64]:
        """Number of tissue pixels above and left of each corner: int64 (h + 1, w + 1)."""
        sums = self.mask.astype(np.int64).cumsum(axis=0).cumsum(axis=1)
        return np.pad(sums, ((1, 0), (1, 0)))

    def fraction(self, box: Box, raster: Raster) -> float:
        """Return the share of a box of another raster that is tissue."""
        grid = TileGrid(raster, 1, 1, np.array([[box.x, box.y]]))
        return float(self._fractions(grid, box.width, box.height)[0])

    def covers(self, raster: Raster, box: Box) -> bool:
        """Whether all of a box of another raster is tissue; then `at` is true throughout."""
        # `at` looks as far as the next pixel of the mask.
        margin_x = math.ceil(self.raster.downsample_x / raster.downsample_x)
        margin_y = math.ceil(self.raster.downsample_y / raster.downsample_y)
        grown = Box(
            box.x - margin_x, box.y - margin_y,
            box.width + 2 * margin_x, box.height + 2 * margin_y,
        )  # fmt: skip
        return self.fraction(grown.intersection(raster.box), raster) >= 1 - 1e-9

    def at(self, raster: Raster, box: Box) -> Mask:
        """Return whether each pixel of a box of another raster is tissue: bool (h, w).

        Between the centres of mask pixels the mask is interpolated, so that its border is no
        staircase on a finer raster; outside the slide it goes on as at the edge.
        """
        weights = []
        for start, length, scale, size in (
            (box.y, box.height, raster.downsample_y / self.raster.downsample_y, self.mask.shape[0]),
            (box.x, box.width, raster.downsample_x / self.raster.downsample_x, self.mask.shape[1]),
        ):
            place = np.clip((np.arange(start, start + length) + 0.5) * scale - 0.5, 0, size - 1)
            low = np.minimum(place.astype(int), max(0, size - 2))
            weights.append((low, np.minimum(low + 1, size - 1), (place - low).astype(np.float32)))
        (y0, y1, fy), (x0, x1, fx) = weights
        top = self.mask[np.ix_(y0, x0)] * (1 - fx) + self.mask[np.ix_(y0, x1)] * fx
        bottom = self.mask[np.ix_(y1, x0)] * (1 - fx) + self.mask[np.ix_(y1, x1)] * fx
        inside: Mask = top * (1 - fy[:, None]) + bottom * fy[:, None] >= 0.5
        return inside

    def grown(self, margin_um: float) -> "TissueMask":
        """Return the mask with a margin of at least `margin_um` around all tissue."""
        from scipy import ndimage

        steps = math.ceil(margin_um / max(self.raster.mpp_x, self.raster.mpp_y))
        grown = ndimage.binary_dilation(self.mask, iterations=steps) if steps else self.mask
        return TissueMask(np.asarray(grown, bool), self.raster)

    def fractions(self, grid: TileGrid) -> npt.NDArray[np.float64]:
        """Return the share of tissue of every tile: float64 (N,); outside the slide is none."""
        return self._fractions(grid, grid.tile_size_px, grid.tile_size_px)

    def _fractions(self, grid: TileGrid, width: int, height: int) -> npt.NDArray[np.float64]:
        scale_x = grid.raster.downsample_x / self.raster.downsample_x
        scale_y = grid.raster.downsample_y / self.raster.downsample_y
        origins = grid.origins.astype(np.float64)
        left, top = origins[:, 0] * scale_x, origins[:, 1] * scale_y
        right, bottom = left + width * scale_x, top + height * scale_y
        area = self._area(right, bottom) - self._area(left, bottom)
        area -= self._area(right, top) - self._area(left, top)
        fractions: npt.NDArray[np.float64] = area / (width * scale_x * height * scale_y)
        return np.clip(fractions, 0.0, 1.0)

    def _area(
        self, x: npt.NDArray[np.float64], y: npt.NDArray[np.float64]
    ) -> npt.NDArray[np.float64]:
        """Return the tissue area between the origin and points, in mask pixels, bilinearly."""
        height, width = self.mask.shape
        x, y = np.clip(x, 0, width), np.clip(y, 0, height)
        ix, iy = np.minimum(x.astype(int), width - 1), np.minimum(y.astype(int), height - 1)
        fx, fy = x - ix, y - iy
        sums = self._integral
        top = sums[iy, ix] * (1 - fx) + sums[iy, ix + 1] * fx
        bottom = sums[iy + 1, ix] * (1 - fx) + sums[iy + 1, ix + 1] * fx
        area: npt.NDArray[np.float64] = top * (1 - fy) + bottom * fy
        return area


def make_tissue_mask(
    slide: Slide, config: TissueConfig, *, outline: Sequence[Polygon] | None = None
) -> TissueMask:
    """Find the tissue of a slide.

    Parameters
    ----------
    outline
        Polygons that hold the tissue, for the method "annotation".

    Raises
    ------
    NoTissueError
        Nothing on the slide is tissue.
    """
    raster = _mask_raster(slide, config)
    mask = _METHODS[config.method](slide, raster, config, outline)
    if not mask.any():
        msg = (
            f"slide '{slide.meta.slide_id}': no tissue found by method '{config.method}'; if there "
            "is some, outline it (--tissue annotation --tissue-annotation FILE) or take the whole "
            "slide (--tissue none)"
        )
        raise NoTissueError(msg)
    return TissueMask(mask, raster)


def _mask_raster(slide: Slide, config: TissueConfig) -> Raster:
    meta = slide.meta
    mpp = max(config.mpp, min(meta.mpp_x or config.mpp, meta.mpp_y or config.mpp))
    raster = meta.raster(mpp)
    pixels = raster.width_px * raster.height_px
    return raster if pixels <= MAX_MASK_PX else meta.raster(mpp * (pixels / MAX_MASK_PX) ** 0.5)


def _by_saturation(
    slide: Slide, raster: Raster, config: TissueConfig, outline: Sequence[Polygon] | None
) -> Mask:
    """Our own: stained tissue has colour, glass has none (saturation, Otsu's threshold)."""
    image = slide.read(raster, raster.box)
    mask = is_stained(image)
    return _without_small(mask, raster, config)


def is_stained(image: npt.NDArray[np.uint8]) -> Mask:
    """Return where an image uint8 (h, w, 3) has the colour of stained tissue: bool (h, w)."""
    from skimage.filters import gaussian, threshold_otsu

    smooth = gaussian(image, sigma=1, channel_axis=-1, preserve_range=True)
    high, low = smooth.max(axis=-1), smooth.min(axis=-1)
    saturation = (high - low) / np.maximum(high, 1)
    threshold = threshold_otsu(saturation)
    is_high = saturation > threshold
    if not is_high.any() or is_high.all():
        contrast = 0.0
    else:
        contrast = float(saturation[is_high].mean() - saturation[~is_high].mean())
    if contrast < MIN_CONTRAST:  # one kind of thing only: all glass or all tissue
        threshold = MIN_SATURATION
    # Where tissue fills the view, Otsu parts pale tissue from dark: glass is never that coloured.
    threshold = min(threshold, 2 * MIN_SATURATION)
    mask: Mask = (saturation > max(threshold, MIN_SATURATION)) & ~_is_ink(smooth)
    return mask


def _is_ink(smooth: npt.NDArray[np.float64]) -> Mask:
    """Whether pixels are green or black: marker pens; no H&E or IHC stain is either."""
    red, green, blue = smooth[..., 0], smooth[..., 1], smooth[..., 2]
    is_green = (green > red + 25) & (green > blue + 5)
    is_black = smooth.max(axis=-1) < DARK
    ink: Mask = is_green | is_black
    return ink


def _without_small(mask: Mask, raster: Raster, config: TissueConfig) -> Mask:
    """Drop small pieces and fill small holes; sizes in um2 become pixels of this raster."""
    from skimage.morphology import label, remove_small_holes

    hole_px = int(raster.area_px_from_um2(config.min_hole_um2))
    if hole_px > 1 and not mask.all():
        mask = remove_small_holes(mask, max_size=hole_px)
    object_px = raster.area_px_from_um2(config.min_object_um2)
    # A view smaller than the smallest piece is a crop of tissue, not a crumb on glass.
    object_px = min(object_px, 0.02 * mask.size)
    pieces = label(mask, connectivity=1)
    sizes = np.bincount(pieces.ravel())
    sizes[0] = 0
    kept: Mask = (sizes >= object_px)[pieces] & mask
    return kept


def _by_tiatoolbox(
    slide: Slide, raster: Raster, config: TissueConfig, outline: Sequence[Polygon] | None
) -> Mask:
    """Otsu's or the morphological masker of tiatoolbox, imported only now (20 s, 1.3 GB)."""
    try:
        from tiatoolbox.tools.tissuemask import MorphologicalMasker, OtsuTissueMasker
    except ImportError as error:
        msg = f"--tissue {config.method} needs tiatoolbox: pip install 'wsiseg[tia]'"
        raise ConfigError(msg) from error
    image = slide.read(raster, raster.box)
    if config.method == "otsu":
        masker = OtsuTissueMasker()
    else:
        masker = MorphologicalMasker(mpp=(raster.mpp_x, raster.mpp_y))
    masks = masker.fit_transform([image])
    return np.asarray(masks[0], bool)


def _by_outline(
    slide: Slide, raster: Raster, config: TissueConfig, outline: Sequence[Polygon] | None
) -> Mask:
    """Inside the polygons (even-odd, so that holes are out)."""
    from skimage.draw import polygon2mask

    mask: Mask = np.zeros((raster.height_px, raster.width_px), bool)
    scale = np.array([raster.downsample_y, raster.downsample_x])
    for rings in outline or ():
        inside = np.zeros_like(mask)
        for ring in rings:
            # Pixel centres lie at +0.5; polygon2mask puts them on whole numbers.
            inside ^= polygon2mask(mask.shape, ring[:, ::-1] / scale - 0.5)
        mask |= inside
    return mask


def _whole_slide(
    slide: Slide, raster: Raster, config: TissueConfig, outline: Sequence[Polygon] | None
) -> Mask:
    return np.ones((raster.height_px, raster.width_px), bool)


_Method = Callable[[Slide, Raster, TissueConfig, Sequence[Polygon] | None], Mask]

_METHODS: dict[str, _Method] = {
    "default": _by_saturation,
    "otsu": _by_tiatoolbox,
    "morphological": _by_tiatoolbox,
    "annotation": _by_outline,
    "none": _whole_slide,
}
