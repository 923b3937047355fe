"""Where pixels come from: OpenSlide, a plain image, or a reader of tiatoolbox.

A source knows stored levels and boxes in their pixels, nothing of resolutions or slides.
"""

import contextlib
import logging
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, TypeGuard

import numpy as np
import numpy.typing as npt
import openslide
import tifffile
from PIL import Image, TiffImagePlugin, UnidentifiedImageError

from wsiseg.errors import SlideOpenError
from wsiseg.geometry import Box
from wsiseg.slides.blocks import BlockReader
from wsiseg.slides.budget import check_budget, check_image
from wsiseg.slides.images import open_image
from wsiseg.slides.lasting import LastingSlide
from wsiseg.slides.tile_decoders import JpegTiles
from wsiseg.slides.tiled_tiff import TiledTiff, TileLevel

logger = logging.getLogger(__name__)

UInt8 = npt.NDArray[np.uint8]

MAX_IMAGE_PIXELS = 1 << 28
"""A plain image is decoded whole: 0.8 GB at this size, thrice that at once. Larger ones need a
pyramid."""

IMAGE_FORMATS = ("PNG", "JPEG", "TIFF", "BMP", "WEBP", "JPEG2000")

_TIFF_MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")

_TIATOOLBOX_MAGIC: Mapping[str, tuple[int, tuple[bytes, ...]]] = {
    ".ome.tif": (0, _TIFF_MAGIC),
    ".ome.tiff": (0, _TIFF_MAGIC),
    ".jp2": (0, (b"\0\0\0\x0cjP  ", b"\xff\x4f\xff\x51")),
    ".dcm": (128, (b"DICM",)),
}
"""By suffix: where a file of the kind has which bytes."""

CHECK_PX = 1024
"""Side of what is compared before tiles are decoded directly."""


class PixelSource(Protocol):
    """Stored levels of one slide. `read` is thread-safe."""

    reader: str
    level_sizes: tuple[tuple[int, int], ...]
    properties: Mapping[str, str]
    background: tuple[int, int, int]

    def read(self, level: int, box: Box) -> UInt8:
        """Return a box inside a level as uint8 (box.height, box.width, 3) RGB.

        Raises OSError, ValueError or RuntimeError if it cannot.
        """

    def factors(self, level: int) -> tuple[int, ...]:
        """Return by what a level can be shrunk while it is decoded, largest first."""

    def read_shrunk(self, level: int, factor: int, box: Box) -> UInt8:
        """Return a box of a level shrunk by one of its factors, in pixels of that.

        They are the means of blocks of the level's pixels but for rounding inside the decoder.
        """

    def jpeg_tile_px(self, level: int) -> tuple[int, int] | None:
        """Return (width, height) of the JPEG tiles that a level consists of, None if of none."""

    def jpeg_tile(self, level: int, box: Box) -> bytes | None:
        """Return the JPEG that holds exactly a box of a level; it decodes to what `read` gives."""

    def close(self) -> None:
        """Give files and memory back."""


class _WithoutTiles:
    """What a source says that has no tiles of its own to give."""

    def factors(self, level: int) -> tuple[int, ...]:
        """See PixelSource."""
        return ()

    def read_shrunk(self, level: int, factor: int, box: Box) -> UInt8:
        """See PixelSource."""
        msg = f"level {level} has no factor {factor}"
        raise ValueError(msg)

    def jpeg_tile_px(self, level: int) -> tuple[int, int] | None:
        """See PixelSource."""
        return None

    def jpeg_tile(self, level: int, box: Box) -> bytes | None:
        """See PixelSource."""
        return None


class OpenSlideSource:
    """What OpenSlide opens, with TIFF tiles decoded directly where that gives the same pixels.

    Where it does not and a level's downsample is a fraction (Leica, DICOM), the level is as
    OpenSlide interpolates it, moved by less than half a level-0 pixel.
    """

    def __init__(self, path: Path, *, place: str) -> None:
        """Open; raises openslide.OpenSlideError, or ValueError for claims beyond reason.

        `place` names the slide in warnings.
        """
        self._slide = LastingSlide(path)
        self.properties: Mapping[str, str] = dict(self._slide.properties)
        self.reader = f"openslide:{self.properties.get('openslide.vendor', 'unknown')}"
        self.level_sizes = tuple((int(w), int(h)) for w, h in self._slide.level_dimensions)
        try:
            check_budget(self.level_sizes, self.properties)
        except ValueError:
            self._slide.close()
            raise
        self.background = _parse_color(self.properties.get("openslide.background-color", ""))
        self._downsamples = tuple(float(d) for d in self._slide.level_downsamples)
        self._blocks = BlockReader(self.level_sizes, self._region)
        self._tiff = self._open_tiff(path, place)
        pages = () if self._tiff is None else self._tiff.levels
        self._direct = {i: page for i, page in enumerate(pages) if self._is_direct(page, i)}

    def _is_direct(self, page: TileLevel | None, level: int) -> TypeGuard[TileLevel]:
        """Whether a level's tiles are decoded here.

        Where OpenSlide would interpolate, it cannot fill in for tiles that are missing.
        """
        return page is not None and (self._is_whole(level) or not page.has_missing)

    def _is_whole(self, level: int) -> bool:
        return self._downsamples[level].is_integer()

    def _open_tiff(self, path: Path, place: str) -> TiledTiff | None:
        """Return the direct decoder, if parts of each level are what OpenSlide shows."""
        vendor = self.properties.get("openslide.vendor", "")
        tiff = TiledTiff.open(path, self.level_sizes, vendor=vendor)
        if tiff is None:
            return None
        try:
            levels = [i for i, page in enumerate(tiff.levels) if self._is_direct(page, i)]
            differing = [i for i in levels if not self._is_same(tiff, i)]
        except (OSError, ValueError, RuntimeError, openslide.OpenSlideError) as error:
            logger.debug("%s: its tiles are not decoded directly: %s", place, error)
            tiff.close()
            return None
        if differing:
            logger.warning(
                "%s: the tiles of level %d decode to other pixels than OpenSlide shows; it is read "
                "through OpenSlide, which is slower",
                place, differing[0],
            )  # fmt: skip
            tiff.close()
            return None
        return tiff

    def _is_same(self, tiff: TiledTiff, level: int) -> bool:
        """Whether some tiles of a level are what OpenSlide shows.

        Where it would interpolate, only what begins at the corner is exact.
        """
        boxes = tiff.check_boxes(level)
        if not self._is_whole(level):
            whole = Box(0, 0, *self.level_sizes[level])
            boxes = [Box(0, 0, CHECK_PX, CHECK_PX).intersection(whole)]
        return all(np.array_equal(tiff.read(level, box), self._region(level, box)) for box in boxes)

    def read(self, level: int, box: Box) -> UInt8:
        """See PixelSource."""
        if self._tiff is not None and level in self._direct and self._tiff.covers(level, box):
            return self._tiff.read(level, box)
        if self._is_whole(level):
            return self._region(level, box)
        return self._blocks.read(level, box)

    def factors(self, level: int) -> tuple[int, ...]:
        """See PixelSource."""
        page = self._direct.get(level)
        return () if page is None else page.factors

    def read_shrunk(self, level: int, factor: int, box: Box) -> UInt8:
        """See PixelSource."""
        assert self._tiff is not None
        return self._tiff.read(level, box, factor)

    def jpeg_tile_px(self, level: int) -> tuple[int, int] | None:
        """See PixelSource."""
        page = self._direct.get(level)
        if page is None or not isinstance(page.decoder, JpegTiles):
            return None
        return page.tile_width_px, page.tile_height_px

    def jpeg_tile(self, level: int, box: Box) -> bytes | None:
        """See PixelSource."""
        if self._tiff is None or level not in self._direct:
            return None
        return self._tiff.jpeg_tile(level, box)

    def _region(self, level: int, box: Box) -> UInt8:
        scale = self._downsamples[level]
        place = (round(box.x * scale), round(box.y * scale))
        image = self._slide.read_region(place, level, (box.width, box.height))
        pixels = np.asarray(image)
        alpha = pixels[..., 3:]
        if (alpha == 255).all():
            return np.ascontiguousarray(pixels[..., :3])
        share = alpha.astype(np.uint16)
        back = np.array(self.background, np.uint16)
        blended = (pixels[..., :3] * share + back * (255 - share) + 127) // 255
        return blended.astype(np.uint8)

    def close(self) -> None:
        """See PixelSource."""
        if self._tiff is not None:
            self._tiff.close()
        self._slide.close()


class ImageSource(_WithoutTiles):
    """A plain image, decoded whole, as a slide of one level."""

    reader = "image"
    background = (255, 255, 255)

    def __init__(self, path: Path, *, place: str) -> None:
        """Decode the image; `place` names the slide in errors."""
        try:
            with open_image(path, IMAGE_FORMATS) as image:
                _check_image(image, path.stat().st_size, place)
                self.properties = _resolution_tags(image)
                self._pixels = np.asarray(_on_white(image))
        except SlideOpenError:
            raise
        except UnidentifiedImageError as error:
            msg = f"{place}: not a slide that OpenSlide knows, nor a PNG, JPEG or TIFF image"
            raise SlideOpenError(msg) from error
        except (OSError, SyntaxError, ValueError) as error:
            msg = f"{place}: the image cannot be decoded ({error}); is it truncated or damaged?"
            raise SlideOpenError(msg) from error
        height, width = self._pixels.shape[:2]
        self.level_sizes: tuple[tuple[int, int], ...] = ((width, height),)

    def read(self, level: int, box: Box) -> UInt8:
        """See PixelSource."""
        if level != 0:
            msg = f"an image has no level {level}"
            raise ValueError(msg)
        return self._pixels[box.y : box.bottom, box.x : box.right].copy()

    def close(self) -> None:
        """See PixelSource."""


def _check_image(image: Image.Image, num_bytes: int, place: str) -> None:
    if image.width * image.height > MAX_IMAGE_PIXELS:
        msg = (
            f"{place}: a plain image of {image.width} x {image.height} px; the limit is "
            f"{MAX_IMAGE_PIXELS} px, convert it to a pyramidal TIFF"
        )
        raise SlideOpenError(msg)
    check_image(image.width, image.height, num_bytes, place)
    if image.mode.startswith(("I", "F")):  # PIL would clip what is above 255
        msg = f"{place}: an image with more than 8 bits per pixel ({image.mode}); convert it to RGB"
        raise SlideOpenError(msg)


def _resolution_tags(image: Image.Image) -> Mapping[str, str]:
    """Return the resolution tags of a TIFF under the names that OpenSlide gives them."""
    if not isinstance(image, TiffImagePlugin.TiffImageFile):
        return {}
    tags = image.tag_v2
    unit = {2: "inch", 3: "centimeter"}.get(tags.get(TiffImagePlugin.RESOLUTION_UNIT, 2), "")
    properties = {"tiff.ResolutionUnit": unit}
    for name, tag in (("X", TiffImagePlugin.X_RESOLUTION), ("Y", TiffImagePlugin.Y_RESOLUTION)):
        with contextlib.suppress(KeyError, TypeError, ValueError, ZeroDivisionError):
            properties[f"tiff.{name}Resolution"] = str(float(tags[tag]))
    return properties


def _on_white(image: Image.Image) -> Image.Image:
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def is_for_tiatoolbox(path: Path) -> bool:
    """Whether a path looks like what tiatoolbox reads, by its name and its first bytes.

    Importing tiatoolbox costs 20 s, which no text file with a slide's name should cost.
    """
    name = path.name.lower()
    if name.endswith(".zarr"):
        return (path / ".zattrs").is_file()  # NGFF 0.4; it reads no zarr v3
    for suffix, (offset, magic) in _TIATOOLBOX_MAGIC.items():
        if name.endswith(suffix):
            with path.open("rb") as file:
                return file.read(offset + 16)[offset:].startswith(magic)
    return False


def is_ome_of_planes(path: Path) -> bool:
    """Whether a TIFF is an OME-TIFF with a page for each colour, of which OpenSlide shows one."""
    if not path.name.lower().endswith((".ome.tif", ".ome.tiff")):
        return False
    try:
        with tifffile.TiffFile(path) as tiff:
            return bool(tiff.is_ome and tiff.pages.first.samplesperpixel == 1)
    except (OSError, ValueError, KeyError, IndexError, tifffile.TiffFileError):
        return False


def is_small_jpeg2000(path: Path) -> bool:
    """Whether a JPEG 2000 file can be decoded whole; a larger one needs a reader of parts."""
    if path.suffix.lower() != ".jp2":
        return False
    try:
        with open_image(path, ("JPEG2000",)) as image:
            return image.width * image.height <= MAX_IMAGE_PIXELS
    except (OSError, SyntaxError, ValueError):
        return False


def is_tiff(path: Path) -> bool:
    """Whether a file begins as a TIFF or BigTIFF does."""
    with path.open("rb") as file:
        return file.read(4) in _TIFF_MAGIC


class TiatoolboxSource(_WithoutTiles):
    """What tiatoolbox reads and OpenSlide does not: OME-TIFF, NGFF, JP2, some DICOM.

    Importing tiatoolbox costs some 20 s and 1.3 GB, hence only here and only when needed.
    """

    background = (255, 255, 255)

    def __init__(self, path: Path, *, place: str) -> None:
        """Open; SlideOpenError if tiatoolbox is absent or refuses the file."""
        try:
            from tiatoolbox.wsicore.wsireader import WSIReader
        except ImportError as error:
            msg = f"{place}: OpenSlide cannot open it; tiatoolbox might: pip install 'wsiseg[tia]'"
            raise SlideOpenError(msg) from error
        try:
            self._reader = WSIReader.open(path)
            info = self._reader.info
        except Exception as error:
            msg = f"{place}: neither OpenSlide nor tiatoolbox can open it: {error}"
            raise SlideOpenError(msg.replace(str(path), "the file")) from error
        self.reader = f"tiatoolbox:{type(self._reader).__name__}"
        self.level_sizes = tuple((int(w), int(h)) for w, h in info.level_dimensions)
        mpp = info.mpp
        self.properties: Mapping[str, str] = (
            {}
            if mpp is None
            else {"openslide.mpp-x": str(float(mpp[0])), "openslide.mpp-y": str(float(mpp[1]))}
        )
        self._lock = threading.Lock()
        self._blocks = BlockReader(self.level_sizes, self._region)

    def read(self, level: int, box: Box) -> UInt8:
        """See PixelSource."""
        return self._blocks.read(level, box)

    def _region(self, level: int, box: Box) -> UInt8:
        width, _ = self.level_sizes[0]
        scale = width / self.level_sizes[level][0]
        left, top = round(box.x * scale), round(box.y * scale)
        with self._lock:  # its readers do not promise to be thread-safe
            region: Any = self._reader.read_rect(
                (left, top),
                (box.width, box.height),
                resolution=level,
                units="level",
                coord_space="baseline",
            )
        return np.ascontiguousarray(region[..., :3])

    def close(self) -> None:
        """See PixelSource."""


def _parse_color(text: str) -> tuple[int, int, int]:
    """Return the colour of `openslide.background-color` ("EFEFEF"), white if absent or odd."""
    try:
        value = int(text, 16) if len(text) == 6 else 0xFFFFFF
    except ValueError:
        value = 0xFFFFFF
    return value >> 16 & 255, value >> 8 & 255, value & 255
