"""Slide: open any slide or image, know its size and resolution, read RGB at a wanted mpp."""

import math
import re
import stat
import unicodedata
from pathlib import Path
from types import TracebackType
from typing import NoReturn, Self

import numpy as np
import numpy.typing as npt
import openslide

from wsiseg.errors import SlideOpenError, SlideReadError
from wsiseg.geometry import Box, Raster, integer_downsample
from wsiseg.jpeg import check_jpeg
from wsiseg.slides.budget import check_tiff
from wsiseg.slides.dicom_frames import check_dicom
from wsiseg.slides.meta import SlideMeta, missing_mpp
from wsiseg.slides.resample import apply_taps, area_taps
from wsiseg.slides.resolution import Resolution, read_resolution
from wsiseg.slides.sources import (
    ImageSource,
    OpenSlideSource,
    PixelSource,
    TiatoolboxSource,
    is_for_tiatoolbox,
    is_ome_of_planes,
    is_small_jpeg2000,
    is_tiff,
)

UInt8 = npt.NDArray[np.uint8]

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".webp")

STRIP_BYTES = 48 << 20
"""Source pixels decoded at once while a large box is averaged."""


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
        the same in whatever box it is read. Outside the slide is the background colour. Where that
        level is JPEG and 2, 4 or 8 divides the downsample, the decoder takes the means, which
        moves a pixel by less than one grey level on average.

        Raises
        ------
        SlideReadError
            The file is damaged there.
        """
        inner = box.intersection(raster.box)
        try:
            pixels = self._read_inside(raster, inner)
        except (OSError, ValueError, RuntimeError, openslide.OpenSlideError) as error:
            raise self._read_error(raster, box, error) from error
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
        factor = self._decoded_factor(level, scale_x, scale_y)
        width, height = (-(-size // factor) for size in self.meta.level_sizes[level])
        scale_x, scale_y = scale_x / factor, scale_y / factor
        if scale_x == scale_y == 1 and box.right <= width and box.bottom <= height:
            return self._read_level(level, factor, box)
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
                self._read_level(level, factor, part), taps_y, taps_x
            )
        return out

    def _decoded_factor(self, level: int, scale_x: float, scale_y: float) -> int:
        """Return by how much a level is shrunk in the decoder: what divides both scales, or 1."""
        fits = (f for f in self._source.factors(level) if scale_x % f == scale_y % f == 0)
        return next(fits, 1)

    def _read_level(self, level: int, factor: int, box: Box) -> UInt8:
        if factor == 1:
            return self._source.read(level, box)
        return self._source.read_shrunk(level, factor, box)

    def _finer_level(self, raster: Raster) -> int:
        """Return the coarsest stored level that is not coarser than the raster, else 0."""
        fits = [
            i
            for i, (down_x, down_y) in enumerate(self.meta.level_downsamples)
            if down_x <= raster.downsample_x and down_y <= raster.downsample_y
        ]
        return max(fits, default=0, key=lambda i: self.meta.level_downsamples[i])

    def jpeg_tile_px(self, raster: Raster) -> tuple[int, int] | None:
        """Return (width, height) of the JPEG tiles that a raster consists of, None if of none."""
        level = self.meta.snapped_level(raster)
        return None if level is None else self._source.jpeg_tile_px(level)

    def jpeg_tile(self, raster: Raster, box: Box, *, check: bool = False) -> bytes | None:
        """Return the slide's own JPEG of a box; it decodes to what `read` gives.

        None unless the box is exactly one of the slide's tiles, inside the raster.

        Parameters
        ----------
        check
            Whether to make sure that it decodes.

        Raises
        ------
        SlideReadError
            The tile is not a JPEG; with `check` also if `read` would fail.
        """
        level = self.meta.snapped_level(raster)
        if level is None:
            return None
        try:
            jpeg = self._source.jpeg_tile(level, box)
            if check and jpeg is not None:
                check_jpeg(jpeg, width_px=box.width, height_px=box.height)
        except (OSError, ValueError) as error:
            raise self._read_error(raster, box, error) from error
        return jpeg

    def _read_error(self, raster: Raster, box: Box, error: Exception) -> SlideReadError:
        place = raster.box_l0_from_raster(box)
        return SlideReadError(
            f"slide '{self.meta.slide_id}': cannot be read at level-0 x={place.x} y={place.y} "
            f"{place.width} x {place.height} px ({_reason(error, self.path)}); is the file damaged?"
        )

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
        raise missing_mpp(slide_id, resolution.problem)


def _check_file(path: Path, place: str) -> None:
    try:
        status = path.stat()
        if stat.S_ISREG(status.st_mode):
            path.open("rb").close()
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        reason = getattr(error, "strerror", None) or str(error)
        if isinstance(error, FileNotFoundError):
            reason = "no such file"
        # A cohort's slide_id is a pseudonym: the file's own name may be the patient's.
        is_own_name = place == f"slide '{default_slide_id(path)}'"
        msg = f"{place}: {reason}: {str(path)!r}" if is_own_name else f"{place}: {reason}"
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


def _reason(error: Exception, path: Path) -> str:
    """Return the text of an error in one line, which libtiff's are not, and without the file.

    A cohort's slide_id is a pseudonym: the file's own name may be the patient's.
    """
    return " ".join(str(error).replace(str(path), "the file").split())


def _open_source(path: Path, place: str) -> PixelSource:
    try:
        if path.is_file():
            check_tiff(path)
            check_dicom(path)
            is_known = openslide.OpenSlide.detect_format(path) is not None
            if is_known and not is_ome_of_planes(path):
                return OpenSlideSource(path, place=place)
    except openslide.OpenSlideError as error:
        if not is_for_tiatoolbox(path):
            reason = _reason(error, path)
            msg = f"{place}: OpenSlide cannot open it: {reason}; is the file truncated or damaged?"
            raise SlideOpenError(msg) from error
    except ValueError as error:
        msg = f"{place}: {error}; is the file damaged?"
        raise SlideOpenError(msg) from error
    if is_small_jpeg2000(path):
        return ImageSource(path, place=place)
    if is_for_tiatoolbox(path):
        return TiatoolboxSource(path, place=place)
    if path.name.lower().endswith(IMAGE_SUFFIXES):
        return ImageSource(path, place=place)
    msg = f"{place}: not a slide that OpenSlide knows, nor a PNG, JPEG or TIFF image"
    if is_tiff(path):
        msg = f"{place}: a TIFF file that OpenSlide cannot open; is it truncated or damaged?"
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
