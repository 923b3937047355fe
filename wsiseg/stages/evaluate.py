"""A prediction held against the truth, whatever files they are in."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from wsiseg.classes import IGNORE, ClassTable
from wsiseg.errors import AnnotationError, ConfigError
from wsiseg.geometry import Box, Raster, is_same_mpp
from wsiseg.outputs import write_json
from wsiseg.settings.evaluate import EvaluateConfig
from wsiseg.slides.label_image import LabelImage, read_values
from wsiseg.store.masks import SlideMask
from wsiseg.training.comparison import ImageScores, compare, describe, describe_all, intervals
from wsiseg.vector.labels import AnnotationLabels, check_annotations
from wsiseg.vector.qupath_read import Annotation, read_annotations

GEOJSON_SUFFIXES = (".geojson", ".geojson.gz", ".json", ".json.gz")
IMAGE_SUFFIXES = (".png", ".tif", ".tiff", ".bmp", ".gif", ".jpg", ".jpeg")
MASK_SUFFIX = ".mask.zarr"

REGION = "Region*"
"""QuPath's class for a region of interest; where a file has one, nothing outside it counts."""

MAX_EXTENT_PIXELS = 10**11
"""Larger than any slide; what polygons with a mistaken coordinate may claim is a million times
this."""

SUMMARY_METRICS = ("iou", "precision", "recall", "pq", "aji", "hd95_um")

UInt8 = npt.NDArray[np.uint8]


class Side(Protocol):
    """The labels of one image, prediction or truth."""

    def read(self, raster: Raster, box: Box) -> UInt8:
        """Return labels uint8 (box.height, box.width); 255 = not said."""


class _StoreSide:
    """A slide mask, its labels renumbered to those of the common class table by name."""

    def __init__(self, path: Path, classes: ClassTable) -> None:
        self.mask = SlideMask.open(path)
        self._labels = np.full(256, IGNORE, np.uint8)
        for label, name in enumerate(self.mask.classes.names):
            self._labels[label] = classes.names.index(name)

    def read(self, raster: Raster, box: Box) -> UInt8:
        return self._labels[self.mask.read(box)]


class _ImageSide:
    """A mask image with the label in each pixel, or 0 and 255 where there is one class."""

    def __init__(self, path: Path, classes: ClassTable, *, is_binary: bool) -> None:
        place = f"mask image '{path}'"
        values = read_values(path, place)
        num, largest = len(classes.classes), int(values[values < IGNORE].max(initial=0))
        if is_binary and num > 1:
            msg = f"{place} holds 0 and 255 only, the other side has {num} classes"
            raise AnnotationError(msg)
        if largest > num:
            msg = f"{place} holds the label {largest}, the other side has {num} classes"
            raise AnnotationError(msg)
        self._values: UInt8 = (values == IGNORE).astype(np.uint8) if is_binary else values
        self.size = values.shape[1], values.shape[0]

    def read(self, raster: Raster, box: Box) -> UInt8:
        if self.size == (raster.width_px, raster.height_px):
            values: UInt8 = self._values[box.y : box.bottom, box.x : box.right]
            return values
        return LabelImage(self._values).read(raster, box)


class _PolygonSide:
    """Polygons; what they leave out is background, unless they name a region of interest."""

    def __init__(self, path: Path, classes: ClassTable, *, bounds: Box | None) -> None:
        self._annotations = read_annotations(path, bounds=bounds)
        self._classes = replace(classes, roi=classes.roi or REGION)
        self._painted: AnnotationLabels | None = None

    @property
    def extent_px(self) -> tuple[int, int]:
        """Width and height in level-0 pixels that hold all polygons."""
        outlines = [polygon[0] for a in self._annotations for polygon in a.polygons]
        if not outlines:
            return 1, 1
        width, height = np.ceil(np.concatenate(outlines).max(axis=0)).astype(int).tolist()
        return max(1, width), max(1, height)

    def prepare(self, raster: Raster, name: str) -> None:
        """Check the annotations against the raster they will be painted on.

        An exported GeoJSON says all that was segmented, so what it leaves out is background.
        """
        width, height = _size_l0(raster)
        check_annotations(
            self._annotations, self._classes, slide_id=name, width_px_l0=width, height_px_l0=height
        )
        annotations = self._annotations
        if not any(a.class_name == self._classes.roi for a in annotations):
            corners = [(0, 0), (width, 0), (width, height), (0, height), (0, 0)]
            whole = Annotation(self._classes.roi, [[np.array(corners, np.float64)]], -1)
            annotations = [whole, *annotations]
        self._painted = AnnotationLabels(annotations, self._classes)

    def read(self, raster: Raster, box: Box) -> UInt8:
        if self._painted is None:
            msg = "prepare() comes before read()"
            raise RuntimeError(msg)
        return self._painted.read(raster, box)


@dataclass(frozen=True, slots=True)
class Pair:
    """One image with its prediction and its truth."""

    name: str
    prediction: Path
    truth: Path


def run(
    config: EvaluateConfig, *, prediction: Path, truth: Path, output: Path | None = None
) -> dict[str, Any]:
    """Compare mask stores, GeoJSON, mask images, or folders of them, matched by name.

    In the truth, 255 is left out. In the prediction, 255 (not predicted: no tissue) counts as
    background. A GeoJSON is background where it has no annotation, or is left out outside its
    regions of interest if it has any. Classes are matched by name; between images by number.

    Returns
    -------
    dict
        `images` by name and `pooled` over all, each with `classes` by name, `accuracy` and
        `confusion`; `confidence`: 95 % intervals over images by class and metric. Scores that do
        not exist (`wsiseg.training.metrics`) are None.

    Raises
    ------
    ConfigError
        A file of one side has no partner on the other, or their sizes, resolutions or classes
        differ.
    AnnotationError
        A mask image or GeoJSON cannot be used.
    StoreError
        A mask store is not one, or is unfinished.
    """
    pairs = find_pairs(prediction, truth)
    values = [_values_in(p.prediction for p in pairs), _values_in(p.truth for p in pairs)]
    classes = _class_table(pairs, values)
    is_binary = [side in ({0, IGNORE}, {IGNORE}) for side in values]
    scores = {pair.name: _compare(pair, classes, is_binary, config) for pair in pairs}
    result = {
        "images": {name: describe(image, classes) for name, image in scores.items()},
        "pooled": describe_all([*scores.values()], classes),
        "confidence": intervals(
            [*scores.values()], classes, resamples=config.bootstrap, seed=config.seed
        ),
    }
    if output is not None:
        write_json(output, {"schema_version": 1, **result})
    return result


def find_pairs(prediction: Path, truth: Path) -> list[Pair]:
    """Match the files of both sides; single files match whatever their names are."""
    for path in (prediction, truth):
        if not path.exists():
            msg = f"evaluate: '{path}': no such file or folder"
            raise ConfigError(msg)
    if not _is_folder(prediction) and not _is_folder(truth):
        return [Pair(_stem(prediction), prediction, truth)]
    found = [_files(prediction), _files(truth)]
    for here, there, path in ((found[0], found[1], truth), (found[1], found[0], prediction)):
        lonely = sorted(here.keys() - there.keys())
        if lonely:
            more = f" and {len(lonely) - 5} more" if len(lonely) > 5 else ""
            msg = f"evaluate: '{path}' holds no partner of {', '.join(lonely[:5])}{more}"
            raise ConfigError(msg)
    if not found[0]:
        msg = f"evaluate: '{prediction}' and '{truth}' hold no mask, GeoJSON or mask image"
        raise ConfigError(msg)
    return [Pair(name, found[0][name], found[1][name]) for name in sorted(found[0])]


def _is_folder(path: Path) -> bool:
    is_store = path.name.endswith(".zarr") or (path / "zarr.json").exists()
    return path.is_dir() and not is_store


def _files(path: Path) -> dict[str, Path]:
    """Return the files of a folder by stem."""
    if not _is_folder(path):
        return {_stem(path): path}
    # Where `segment` left several files of a slide, the mask is the most exact one.
    chosen: dict[str, Path] = {}
    for suffix in (MASK_SUFFIX, *GEOJSON_SUFFIXES, *IMAGE_SUFFIXES):
        for file in sorted(path.iterdir()):
            if file.name.lower().endswith(suffix):
                chosen.setdefault(_stem(file), file)
    return chosen


def _stem(path: Path) -> str:
    for suffix in (MASK_SUFFIX, ".zarr", *GEOJSON_SUFFIXES, *IMAGE_SUFFIXES):
        if path.name.lower().endswith(suffix):
            return path.name[: -len(suffix)]
    return path.stem


def _is_geojson(path: Path) -> bool:
    return not path.is_dir() and path.name.lower().endswith(GEOJSON_SUFFIXES)


def _is_image(path: Path) -> bool:
    return not path.is_dir() and not _is_geojson(path)


def _values_in(paths: Iterable[Path]) -> set[int]:
    """Return the values of all mask images of a side: they tell binary masks from labels.

    Of all, since an image of labels may by chance hold none but 0 and 255 (ignore).
    """
    found: set[int] = set()
    for path in paths:
        if _is_image(path):
            values = read_values(path, f"mask image '{path}'")
            found.update(np.flatnonzero(np.bincount(values.ravel(), minlength=256)).tolist())
    return found


def _class_table(pairs: Sequence[Pair], values: Sequence[set[int]]) -> ClassTable:
    """Return the classes to compare: those of mask stores, else of polygons, else numbered."""
    paths = [path for pair in pairs for path in (pair.truth, pair.prediction)]
    tables = [(path, SlideMask.open(path).classes) for path in paths if path.is_dir()]
    if tables:
        first_path, first = tables[0]
        for path, other in tables:
            if {*other.names} != {*first.names}:
                shown = f"{', '.join(first.names[1:])}; {', '.join(other.names[1:])}"
                msg = f"evaluate: classes of '{first_path}' and '{path}' differ: {shown}"
                raise ConfigError(msg)
        return first
    names = sorted({n for path in paths if _is_geojson(path) for n in _names_in(path)})
    largest = max((v for side in values for v in side if v < IGNORE), default=0)
    if names and any(values) and len(names) > 1:
        msg = (
            f"evaluate: mask images say which label is {', '.join(names)} by number only; hold "
            "polygons of several classes against a mask store"
        )
        raise ConfigError(msg)
    if not names:
        names = ["Foreground"] if largest <= 1 else [f"Label {i}" for i in range(1, largest + 1)]
    return ClassTable.of_names(names)


def _names_in(path: Path) -> set[str]:
    """Return the classes of a GeoJSON; "Tumor: Positive" is a Tumor, "Region*" and such none."""
    names = {a.class_name.split(":")[0] for a in read_annotations(path) if a.class_name}
    return {name for name in names if not name.endswith("*")}


def _compare(
    pair: Pair, classes: ClassTable, is_binary: Sequence[bool], config: EvaluateConfig
) -> ImageScores:
    bounds = _bounds(pair)
    guess, truth = (
        _open(path, classes, is_binary=binary, bounds=bounds)
        for path, binary in zip((pair.prediction, pair.truth), is_binary, strict=True)
    )
    raster = _common_raster(pair.name, (guess, truth), config.mpp)
    for side in (guess, truth):
        if isinstance(side, _PolygonSide):
            side.prepare(raster, pair.name)
    return compare(
        lambda box: truth.read(raster, box),
        lambda box: guess.read(raster, box),
        raster=raster,
        classes=classes,
        instances=config.instances,
        has_mpp=config.mpp is not None or any(isinstance(s, _StoreSide) for s in (guess, truth)),
    )


def _open(
    path: Path, classes: ClassTable, *, is_binary: bool, bounds: Box | None
) -> _StoreSide | _ImageSide | _PolygonSide:
    if path.is_dir():
        return _StoreSide(path, classes)
    if _is_geojson(path):
        return _PolygonSide(path, classes, bounds=bounds)
    return _ImageSide(path, classes, is_binary=is_binary)


def _bounds(pair: Pair) -> Box | None:
    """Return the bounds of the slide (MRXS), from whose corner QuPath counts."""
    for path in (pair.prediction, pair.truth):
        if path.is_dir() and (bounds := SlideMask.open(path).slide.get("bounds")):
            return Box(*bounds)
    return None


def _common_raster(name: str, sides: Sequence[Side], mpp: float | None) -> Raster:
    """Return the pixel grid of a pair: of a mask store, else of an image, else level 0."""
    masks = [side.mask for side in sides if isinstance(side, _StoreSide)]
    images = [side.size for side in sides if isinstance(side, _ImageSide)]
    if len(masks) == 2:
        _check_same_mpp(name, masks[0].raster, masks[1].raster)
    sizes = [*((m.raster.width_px, m.raster.height_px) for m in masks), *images]
    if not sizes:
        sizes = [_extent(name, [side for side in sides if isinstance(side, _PolygonSide)])]
    # An image of the whole slide is averaged to the mask's resolution, as it is for training.
    whole = (masks[0].slide.get("width_px_l0"), masks[0].slide.get("height_px_l0")) if masks else ()
    if len({*sizes}) > 1 and images != [whole]:
        shown = " and ".join(f"{w} x {h} px" for w, h in sizes)
        msg = f"evaluate: '{name}': prediction and truth differ in size: {shown}"
        raise ConfigError(msg)
    if masks:
        return masks[0].raster
    return Raster(*sizes[0], mpp or 1.0, mpp or 1.0, 1.0, 1.0)


def _extent(name: str, sides: Sequence[_PolygonSide]) -> tuple[int, int]:
    """Return the level-0 size that holds the polygons of both sides."""
    extents = [side.extent_px for side in sides]
    width, height = max(w for w, _ in extents), max(h for _, h in extents)
    if width * height > MAX_EXTENT_PIXELS:
        msg = f"evaluate: '{name}': polygons reach to {width} x {height} px, more than any slide"
        raise ConfigError(msg)
    return width, height


def _check_same_mpp(name: str, first: Raster, second: Raster) -> None:
    same_x = is_same_mpp(first.mpp_x, second.mpp_x)
    if not same_x or not is_same_mpp(first.mpp_y, second.mpp_y):
        msg = (
            f"evaluate: '{name}': prediction and truth differ in resolution: {first.mpp:.4g} and "
            f"{second.mpp:.4g} um/px; segment at the resolution of the truth"
        )
        raise ConfigError(msg)


def _size_l0(raster: Raster) -> tuple[int, int]:
    """Return the size of the slide under a raster, in level-0 pixels.

    A raster's last pixel may reach over the edge of the slide, by less than its own size.
    """
    width, height = raster.l0_from_raster(raster.width_px, raster.height_px)
    return math.ceil(width), math.ceil(height)


def summary_rows(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Return one row per class for the closing table; `ci` is the 95 % interval of Dice."""
    rows = []
    for name, scores in result["pooled"]["classes"].items():
        interval = result["confidence"][name]["dice"]
        rows.append(
            {
                "class": name,
                "dice": scores["dice"],
                "ci": None if interval is None else "{:.3f}..{:.3f}".format(*interval),
                **{metric: scores[metric] for metric in SUMMARY_METRICS},
                "images": len(result["images"]),
            }
        )
    return rows
