"""LabelImage: a mask image of the same name and size as a slide, as labels on any raster."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from wsiseg.classes import IGNORE, ClassTable
from wsiseg.errors import AnnotationError
from wsiseg.geometry import Box, Raster
from wsiseg.slides.images import open_image
from wsiseg.slides.resample import Taps, area_taps

MAX_LABEL_PIXELS = 1 << 30
"""Largest mask image that is decoded (1 GiB as uint8); larger truth belongs in GeoJSON."""

SUFFIXES = (".png", ".tif", ".tiff", ".bmp", ".gif", ".jpg", ".jpeg")
"""What `find_label_image` looks for; lossy JPEG is found, so that it can be refused by name."""


def find_label_image(folder: Path, slide_id: str) -> Path | None:
    """Return the mask image of a slide in a folder, by name; None if there is none.

    Raises
    ------
    AnnotationError
        Two images have that name.
    """
    found = [p for s in SUFFIXES for p in (folder / f"{slide_id}{s}",) if p.is_file()]
    if len(found) > 1:
        names = ", ".join(p.name for p in found)
        msg = f"slide '{slide_id}': several mask images ({names}); keep one"
        raise AnnotationError(msg)
    return found[0] if found else None


@dataclass(frozen=True, slots=True)
class LabelImage:
    """`labels_l0` : uint8 (H, W) at level 0; 0 background, 1..N classes, 255 ignore."""

    labels_l0: npt.NDArray[np.uint8]

    @classmethod
    def open(
        cls,
        path: Path,
        *,
        slide_id: str,
        width_px_l0: int,
        height_px_l0: int,
        classes: ClassTable,
        may_name: bool = True,
    ) -> "LabelImage":
        """Read a mask image. `may_name` : whether errors may name it; see `CohortEntry.may_name`.

        Binary masks (1 bit, or 0 and 255 only, with one class) become 0 and 1; any other image
        holds the label itself in each pixel.

        Raises
        ------
        AnnotationError
            Not an image, lossy, of another size than the slide, or with a value that is no label.
        """
        place = f"slide '{slide_id}': mask image" + (f" '{path.name}'" if may_name else "")
        values = read_values(path, place)
        height, width = values.shape
        if (width, height) != (width_px_l0, height_px_l0):
            msg = (
                f"{place} is {width} x {height} px but the slide is {width_px_l0} x "
                f"{height_px_l0} px; a mask must have the slide's full size"
            )
            raise AnnotationError(msg)
        return cls(_labels_from_values(values, classes, place))

    def read(self, raster: Raster, box: Box) -> npt.NDArray[np.uint8]:
        """Return the label that covers most of each raster pixel: uint8 (box.height, box.width).

        Pixels outside the slide are 255 (ignore).
        """
        out = np.full((box.height, box.width), IGNORE, np.uint8)
        inner = box.intersection(raster.box)
        if inner.is_empty:
            return out
        height_l0, width_l0 = self.labels_l0.shape
        across = area_taps(inner.x, inner.right, scale=raster.downsample_x, size=width_l0)
        down = area_taps(inner.y, inner.bottom, scale=raster.downsample_y, size=height_l0)
        source = self.labels_l0[down.first : down.last, across.first : across.last]
        out[inner.y - box.y : inner.bottom - box.y, inner.x - box.x : inner.right - box.x] = (
            _majority(source, down, across)
        )
        return out


def read_values(path: Path, place: str) -> npt.NDArray[np.uint8]:
    """Return the values of a mask image as they are in the file, uint8 (H, W).

    Raises
    ------
    AnnotationError
        Not an image, lossy, not one channel of at most 8 bits, or too large; begins with `place`.
    """
    if path.suffix.lower() in (".jpg", ".jpeg"):
        # JPEG moves the values at every edge (defect D10: 5.7 % of the gland pixels lost).
        msg = f"{place} is JPEG, which changes labels at edges; save it as PNG"
        raise AnnotationError(msg)
    try:
        with open_image(path) as image:
            if image.width * image.height > MAX_LABEL_PIXELS:
                size = f"{image.width} x {image.height}"
                msg = f"{place} claims {size} px, more than {MAX_LABEL_PIXELS}"
                raise AnnotationError(msg)
            if image.mode not in ("1", "L", "P"):
                msg = (
                    f"{place} has mode {image.mode}; expected one channel of 8 bits or 1 bit with "
                    "the label in each pixel"
                )
                raise AnnotationError(msg)
            values = np.array(image)
    except (OSError, SyntaxError, ValueError) as error:
        if isinstance(error, AnnotationError):
            raise
        reason = str(error).replace(str(path), "the file")  # its name stands in `place`, if it may
        msg = f"{place} cannot be read as an image: {reason}"
        raise AnnotationError(msg) from error
    return values.astype(np.uint8)


def _labels_from_values(
    values: npt.NDArray[np.uint8], classes: ClassTable, place: str
) -> npt.NDArray[np.uint8]:
    present = np.flatnonzero(np.bincount(values.ravel(), minlength=256))
    num_classes = len(classes.classes)
    if num_classes == 1 and set(present.tolist()) <= {0, 255}:
        return (values > 127).astype(np.uint8)
    unknown = [int(v) for v in present if num_classes < v < IGNORE]
    if unknown:
        msg = (
            f"{place} holds the value {unknown[0]}, which is no label of the class table (labels "
            f"0..{num_classes}, 255 = ignore); pass --classes FILE with all classes"
        )
        raise AnnotationError(msg)
    return values


def _majority(labels: npt.NDArray[np.uint8], down: Taps, across: Taps) -> npt.NDArray[np.uint8]:
    """Return the label with the largest share of each target pixel; the lowest wins a tie."""
    from wsiseg.slides.kernels import fill_majority

    winners = np.empty((down.num_targets, across.num_targets), np.uint8)
    fill_majority(
        labels, winners,
        down.starts, down.columns, down.weights,
        across.starts, across.columns, across.weights,
    )  # fmt: skip
    return winners
