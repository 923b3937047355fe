"""Slide: open any slide or image, know its size and resolution, read RGB at a wanted mpp."""

import math
import re
import stat
import unicodedata
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn, Self

import numpy as np
import numpy.typing as npt
import openslide

from wsiseg.errors import MissingMppError, SlideOpenError, SlideReadError
from wsiseg.geometry import Box, Raster, integer_downsample, is_same_mpp
from wsiseg.slides.resample import apply_taps, area_taps
from wsiseg.slides.resolution import Resolution, read_resolution
from wsiseg.slides.sources import (
    ImageSource,
    OpenSlideSource,
    PixelSource,
    TiatoolboxSource,
    is_for_tiatoolbox,
)

UInt8 = npt.NDArray[np.uint8]

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".webp")

STRIP_BYTES = 48 << 20
"""Source pixels decoded at once while a large box is averaged."""


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

        A stored level within `MPP_SNAP_TOLERANCE` is taken as it is, with its true resolution.

        Raises
        ------
        MissingMppError
            The slide's resolution is unknown.
        """
        if self.mpp_x is None or self.mpp_y is None:
            raise _missing_mpp(self.slide_id, "states no resolution (mpp)")
        for size, (down_x, down_y) in zip(self.level_sizes, self.level_downsamples, strict=True):
            if is_same_mpp(self.mpp_x * down_x, mpp) and is_same_mpp(self.mpp_y * down_y, mpp):
                level_mpp = self.mpp_x * down_x, self.mpp_y * down_y
                return Raster(*size, *level_mpp, down_x, down_y)
        down_x, down_y = mpp / self.mpp_x, mpp / self.mpp_y
        width = math.ceil(self.width_px_l0 / down_x - 1e-9)
        height = math.ceil(self.height_px_l0 / down_y - 1e-9)
        return Raster(max(1, width), max(1, height), mpp, mpp, down_x, down_y)

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


class Slide:
    """An open slide; a context manager. Reads are thread-safe; it never travels to a process."""

    def __init__(self, path: Path, meta: SlideMeta, source: PixelSource) -> None:
        """Use `open_slide`."""
        self.path = path
        self.meta = meta
        self._source = source

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close it."""
        self.close()

    def __reduce__(self) -> NoReturn:
        """Refuse to be pickled: a handle means nothing elsewhere."""
        msg = f"slide '{self.meta.slide_id}' is open and cannot be sent to a process; send its path"
        raise TypeError(msg)

    def close(self) -> None:
        """Give files and memory back."""
        self._source.close()

    def read(self, raster: Raster, box: Box) -> UInt8:
        """Return a box of a raster as uint8 (box.height, box.width, 3) RGB.

        Each raster pixel is the mean of what it covers of the nearest finer stored level; it is
        the same in whatever box it is read. Outside the slide is the background colour.

        Raises
        ------
        SlideReadError
            The file is damaged there.
        """
        inner = box.intersection(raster.box)
        try:
            pixels = self._read_inside(raster, inner)
        except (OSError, ValueError, RuntimeError, openslide.OpenSlideError) as error:
            place = raster.box_l0_from_raster(box)
            msg = (
                f"slide '{self.meta.slide_id}': cannot be read at level-0 x={place.x} y={place.y} "
                f"{place.width} x {place.height} px ({error}); is the file damaged?"
            )
            raise SlideReadError(msg) from error
        if inner == box:
            return pixels
        out = np.empty((box.height, box.width, 3), np.uint8)
        out[:] = self.meta.background
        out[inner.y - box.y : inner.bottom - box.y, inner.x - box.x : inner.right - box.x] = pixels
        return out

    def _read_inside(self, raster: Raster, box: Box) -> UInt8:
        if box.is_empty:
            return np.empty((box.height, box.width, 3), np.uint8)
        level = self.meta.snapped_level(raster)
        if level is not None:
            return self._source.read(level, box)
        return self._averaged(self._finer_level(raster), raster, box)

    def _averaged(self, level: int, raster: Raster, box: Box) -> UInt8:
        down_x, down_y = self.meta.level_downsamples[level]
        scale_x, scale_y = raster.downsample_x / down_x, raster.downsample_y / down_y
        width, height = self.meta.level_sizes[level]
        line_bytes = 3 * box.width * max(1.0, scale_x) * max(1.0, scale_y)
        if line_bytes > STRIP_BYTES and box.width > 1:
            half = Box(box.x, box.y, box.width // 2, box.height)
            rest = Box(half.right, box.y, box.width - half.width, box.height)
            parts = [self._averaged(level, raster, part) for part in (half, rest)]
            return np.concatenate(parts, axis=1)
        taps_x = area_taps(box.x, box.right, scale=scale_x, size=width)
        step = max(1, int(STRIP_BYTES / line_bytes))
        out = np.empty((box.height, box.width, 3), np.uint8)
        for top in range(box.y, box.bottom, step):
            bottom = min(top + step, box.bottom)
            taps_y = area_taps(top, bottom, scale=scale_y, size=height)
            part = Box(
                taps_x.first, taps_y.first, taps_x.last - taps_x.first, taps_y.last - taps_y.first
            )
            out[top - box.y : bottom - box.y] = apply_taps(
                self._source.read(level, part), taps_y, taps_x
            )
        return out

    def _finer_level(self, raster: Raster) -> int:
        """Return the coarsest stored level that is not coarser than the raster, else 0."""
        fits = [
            i
            for i, (down_x, down_y) in enumerate(self.meta.level_downsamples)
            if down_x <= raster.downsample_x and down_y <= raster.downsample_y
        ]
        return max(fits, default=0, key=lambda i: self.meta.level_downsamples[i])

    def thumbnail(self, max_px: int) -> UInt8:
        """Return the whole slide, its longer side `max_px` or less: uint8 (h, w, 3) RGB."""
        width, height = self.meta.width_px_l0, self.meta.height_px_l0
        down = max(1.0, max(width, height) / max_px)
        size = max(1, math.floor(width / down)), max(1, math.floor(height / down))
        raster = Raster(*size, down, down, width / size[0], height / size[1])
        return self.read(raster, raster.box)


def open_slide(
    path: Path,
    *,
    slide_id: str | None = None,
    slide_mpp: float | None = None,
    require_mpp: bool = True,
) -> Slide:
    """Open a slide or a plain image.

    Parameters
    ----------
    slide_id
        Name in outputs and messages; default: from the file name.
    slide_mpp
        um/px at level 0, overriding what the file states.
    require_mpp
        Whether an unknown resolution is an error.

    Raises
    ------
    SlideOpenError
        Missing, a folder, empty, damaged, or nothing that any reader knows.
    MissingMppError
        The resolution is missing or absurd, and `slide_mpp` was not given.
    """
    slide_id = slide_id or default_slide_id(path)
    place = f"slide '{slide_id}'"
    _check_file(path, place)
    source = _open_source(path, place)
    try:
        resolution = read_resolution(source.properties, slide_mpp)
        if require_mpp:
            _require(resolution, slide_id)
        return Slide(path, _describe(slide_id, source, resolution), source)
    except BaseException:
        source.close()
        raise


def _require(resolution: Resolution, slide_id: str) -> None:
    if resolution.problem is not None:
        raise _missing_mpp(slide_id, resolution.problem)


def _missing_mpp(slide_id: str, problem: str) -> MissingMppError:
    return MissingMppError(
        f"slide '{slide_id}': {problem}; give its um/px at level 0 with --slide-mpp, or in the "
        "mpp column of the cohort"
    )


def _check_file(path: Path, place: str) -> None:
    try:
        status = path.stat()
        if stat.S_ISREG(status.st_mode):
            path.open("rb").close()
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        reason = getattr(error, "strerror", None) or str(error)
        if isinstance(error, FileNotFoundError):
            reason = "no such file"
        msg = f"{place}: {reason}: {str(path)!r}"
        raise SlideOpenError(msg) from error
    if stat.S_ISDIR(status.st_mode):
        if is_for_tiatoolbox(path):
            return
        msg = f"{place}: is a folder, not a slide; give the slides in it, as in '{path.name}/*.svs'"
        raise SlideOpenError(msg)
    if not stat.S_ISREG(status.st_mode):
        msg = f"{place}: not a regular file"
        raise SlideOpenError(msg)
    if status.st_size == 0:
        msg = f"{place}: the file is empty"
        raise SlideOpenError(msg)


def _open_source(path: Path, place: str) -> PixelSource:
    try:
        if path.is_file() and openslide.OpenSlide.detect_format(path) is not None:
            return OpenSlideSource(path)
    except openslide.OpenSlideError as error:
        if not is_for_tiatoolbox(path):
            msg = f"{place}: OpenSlide cannot open it: {error}; is the file truncated or damaged?"
            raise SlideOpenError(msg) from error
    if is_for_tiatoolbox(path):
        return TiatoolboxSource(path, place=place)
    if path.name.lower().endswith(IMAGE_SUFFIXES):
        return ImageSource(path, place=place)
    msg = f"{place}: not a slide that OpenSlide knows, nor a PNG, JPEG or TIFF image"
    raise SlideOpenError(msg)


def _describe(slide_id: str, source: PixelSource, resolution: Resolution) -> SlideMeta:
    width, height = source.level_sizes[0]
    return SlideMeta(
        slide_id=slide_id,
        width_px_l0=width,
        height_px_l0=height,
        mpp_x=resolution.mpp_x,
        mpp_y=resolution.mpp_y,
        mpp_source=resolution.source,
        level_sizes=source.level_sizes,
        level_downsamples=tuple(
            (integer_downsample(width, w), integer_downsample(height, h))
            for w, h in source.level_sizes
        ),
        bounds=_bounds(source),
        background=source.background,
        reader=source.reader,
    )


def _bounds(source: PixelSource) -> Box | None:
    try:
        x, y, width, height = (
            int(source.properties[f"openslide.bounds-{name}"])
            for name in ("x", "y", "width", "height")
        )
    except (KeyError, ValueError):
        return None
    box = Box(x, y, max(0, width), max(0, height))
    return None if box.is_empty else box


def default_slide_id(path: Path) -> str:
    """Return a file's name without suffixes, made safe as the name of outputs.

    Separators, control characters, bytes that are no UTF-8 and a leading dot become "_"; at most
    200 bytes of UTF-8.
    """
    stem = path.name
    for suffix in (".ome.tiff", ".ome.tif"):
        if stem.lower().endswith(suffix):
            stem = stem[: -len(suffix)]
            break
    else:
        stem = path.stem
    stem = unicodedata.normalize("NFC", stem)
    stem = re.sub(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff/\\:*?\"<>|]", "_", stem).strip()
    stem = re.sub(r"^\.+", "_", stem)
    return stem.encode()[:200].decode(errors="ignore").rstrip() or "_"
