"""Where pixels come from: OpenSlide, a plain image, or a reader of tiatoolbox.

A source knows stored levels and boxes in their pixels, nothing of resolutions or slides.
"""

import threading
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import openslide
from PIL import Image

from wsiseg.errors import SlideOpenError
from wsiseg.geometry import Box
from wsiseg.slides.jpeg_tiff import JpegTiff

UInt8 = npt.NDArray[np.uint8]

MAX_IMAGE_PIXELS = 600_000_000
"""A plain image is decoded whole: 1.8 GB at this size. Larger ones need a pyramid."""

IMAGE_FORMATS = ("PNG", "JPEG", "TIFF", "BMP", "WEBP")

TIATOOLBOX_SUFFIXES = (".ome.tif", ".ome.tiff", ".zarr", ".jp2", ".dcm", ".czi", ".json")

BLOCK_PX = 1024
BLOCK_CACHE = 48
"""48 blocks of 3 MiB."""


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

    def close(self) -> None:
        """Give files and memory back."""


class OpenSlideSource:
    """What OpenSlide opens, with JPEG tiles decoded directly where that gives the same pixels."""

    def __init__(self, path: Path) -> None:
        """Open; raises openslide.OpenSlideError."""
        self._slide = openslide.OpenSlide(path)
        self.properties: Mapping[str, str] = dict(self._slide.properties)
        self.reader = f"openslide:{self.properties.get('openslide.vendor', 'unknown')}"
        self.level_sizes = tuple((int(w), int(h)) for w, h in self._slide.level_dimensions)
        self.background = _parse_color(self.properties.get("openslide.background-color", ""))
        self._downsamples = tuple(float(d) for d in self._slide.level_downsamples)
        self._blocks: OrderedDict[tuple[int, int, int], UInt8] = OrderedDict()
        self._lock = threading.Lock()
        self._jpeg = self._open_jpeg(path)

    def _open_jpeg(self, path: Path) -> JpegTiff | None:
        """Return the direct decoder, if one tile of each level is what OpenSlide shows."""
        jpeg = JpegTiff.open(path, self.level_sizes)
        if jpeg is None:
            return None
        try:
            is_same = all(
                np.array_equal(
                    jpeg.read(i, jpeg.first_tile(i)), self._region(i, jpeg.first_tile(i))
                )
                for i in range(len(self.level_sizes))
            )
        except (OSError, ValueError, RuntimeError, openslide.OpenSlideError):
            is_same = False
        if not is_same:
            jpeg.close()
            return None
        return jpeg

    def read(self, level: int, box: Box) -> UInt8:
        """See PixelSource."""
        if self._jpeg is not None:
            return self._jpeg.read(level, box)
        if self._downsamples[level].is_integer():
            return self._region(level, box)
        return self._read_blocks(level, box)

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

    def _read_blocks(self, level: int, box: Box) -> UInt8:
        """Read through blocks on a fixed grid.

        OpenSlide takes places in whole level-0 pixels. Where a level's downsample is a fraction,
        a region begins between two of its pixels and is interpolated, differently for each place
        that is asked for; a block is always asked for at the same one.
        """
        out = np.empty((box.height, box.width, 3), np.uint8)
        width, height = self.level_sizes[level]
        for row in range(box.y // BLOCK_PX, (box.bottom - 1) // BLOCK_PX + 1):
            for column in range(box.x // BLOCK_PX, (box.right - 1) // BLOCK_PX + 1):
                place = Box(column * BLOCK_PX, row * BLOCK_PX, BLOCK_PX, BLOCK_PX)
                place = place.intersection(Box(0, 0, width, height))
                block = self._block((level, row, column), place)
                part = place.intersection(box)
                target = out[part.y - box.y : part.bottom - box.y, part.x - box.x :]
                target[:, : part.width] = block[
                    part.y - place.y : part.bottom - place.y,
                    part.x - place.x : part.right - place.x,
                ]
        return out

    def _block(self, key: tuple[int, int, int], place: Box) -> UInt8:
        with self._lock:
            if key in self._blocks:
                self._blocks.move_to_end(key)
                return self._blocks[key]
        block = self._region(key[0], place)
        with self._lock:
            self._blocks[key] = block
            while len(self._blocks) > BLOCK_CACHE:
                self._blocks.popitem(last=False)
        return block

    def close(self) -> None:
        """See PixelSource."""
        if self._jpeg is not None:
            self._jpeg.close()
        self._slide.close()


class ImageSource:
    """A plain image, decoded whole, as a slide of one level."""

    reader = "image"
    background = (255, 255, 255)

    def __init__(self, path: Path, *, place: str) -> None:
        """Decode the image; `place` names the slide in errors."""
        self.properties: Mapping[str, str] = {}
        try:
            # PIL's own limit is about photographs; ours is checked before anything is decoded.
            with Image.open(path, formats=IMAGE_FORMATS) as image:
                _check_image_size(image, place)
                self._pixels = np.asarray(_on_white(image))
        except SlideOpenError:
            raise
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            msg = f"{place}: the image cannot be decoded: {error}"
            raise SlideOpenError(msg) from error
        height, width = self._pixels.shape[:2]
        self.level_sizes: tuple[tuple[int, int], ...] = ((width, height),)

    def read(self, level: int, box: Box) -> UInt8:
        """See PixelSource."""
        if level != 0:
            msg = f"an image has no level {level}"
            raise ValueError(msg)
        return self._pixels[box.y : box.bottom, box.x : box.right]

    def close(self) -> None:
        """See PixelSource."""


def _check_image_size(image: Image.Image, place: str) -> None:
    if image.width * image.height > MAX_IMAGE_PIXELS:
        msg = (
            f"{place}: a plain image of {image.width} x {image.height} px; the limit is "
            f"{MAX_IMAGE_PIXELS} px, convert it to a pyramidal TIFF"
        )
        raise SlideOpenError(msg)


def _on_white(image: Image.Image) -> Image.Image:
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
    return image.convert("RGB")


class TiatoolboxSource:
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
            raise SlideOpenError(msg) from error
        self.reader = f"tiatoolbox:{type(self._reader).__name__}"
        self.level_sizes = tuple((int(w), int(h)) for w, h in info.level_dimensions)
        mpp = info.mpp
        self.properties: Mapping[str, str] = (
            {}
            if mpp is None
            else {"openslide.mpp-x": str(float(mpp[0])), "openslide.mpp-y": str(float(mpp[1]))}
        )
        self._lock = threading.Lock()

    def read(self, level: int, box: Box) -> UInt8:
        """See PixelSource. Its readers do not promise to be thread-safe."""
        width, _ = self.level_sizes[0]
        scale = width / self.level_sizes[level][0]
        left, top = round(box.x * scale), round(box.y * scale)
        with self._lock:
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
