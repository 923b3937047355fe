"""A prediction held against the truth, whatever files they are in."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from PIL import Image

from wsiseg.classes import BACKGROUND, IGNORE, ClassTable
from wsiseg.errors import AnnotationError, ConfigError
from wsiseg.geometry import Box, Raster
from wsiseg.outputs import write_json
from wsiseg.settings.evaluate import EvaluateConfig
from wsiseg.store.masks import SlideMask
from wsiseg.training.confusion import confusion_matrix
from wsiseg.training.metrics import accuracy, bootstrap_interval, class_scores, hausdorff_95
from wsiseg.training.objects import components, object_scores, watershed
from wsiseg.vector.labels import AnnotationLabels
from wsiseg.vector.qupath_read import Annotation, read_annotations

GEOJSON_SUFFIXES = (".geojson", ".geojson.gz", ".json", ".json.gz")
IMAGE_SUFFIXES = (".png", ".tif", ".tiff", ".bmp")
MASK_SUFFIX = ".mask.zarr"

MAX_IMAGE_PIXELS = 600_000_000
MAX_OBJECT_PIXELS = 64_000_000
"""Objects and distances are measured on images up to this size; pixels on any."""

BLOCK_PX = 2048

UInt8 = npt.NDArray[np.uint8]


class Side(Protocol):
    """The labels of one image, prediction or truth."""

    raster: Raster | None
    """Its pixel grid; None for polygons, which fit any."""
    has_mpp: bool
    class_names: tuple[str, ...] | None

    def read(self, raster: Raster, box: Box, classes: ClassTable) -> UInt8:
        """Return labels uint8 (h, w) of a box; 255 = not said."""


class _StoreSide:
    def __init__(self, path: Path) -> None:
        self._mask = SlideMask.open(path)
        self.raster: Raster | None = self._mask.raster
        self.has_mpp = True
        self.class_names: tuple[str, ...] | None = self._mask.classes.names[1:]

    def read(self, raster: Raster, box: Box, classes: ClassTable) -> UInt8:
        return self._mask.read(box)


class _ImageSide:
    """A mask image with the label in each pixel, or 0 and 255 where there is one class."""

    def __init__(self, path: Path, mpp: float | None) -> None:
        self._path = path
        try:
            with Image.open(path) as image:
                if image.width * image.height > MAX_IMAGE_PIXELS:
                    msg = f"mask image '{path}' has more than {MAX_IMAGE_PIXELS} px"
                    raise AnnotationError(msg)
                if image.mode not in ("1", "L", "P"):
                    msg = f"mask image '{path}' has mode {image.mode}, expected labels in 8 bits"
                    raise AnnotationError(msg)
                values = np.array(image).astype(np.uint8)
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            if isinstance(error, AnnotationError):
                raise
            msg = f"mask image '{path}' cannot be read: {error}"
            raise AnnotationError(msg) from error
        height, width = values.shape
        self._values = values
        self.raster: Raster | None = Raster(width, height, mpp or 1.0, mpp or 1.0, 1.0, 1.0)
        self.has_mpp = mpp is not None
        self.class_names: tuple[str, ...] | None = None

    def read(self, raster: Raster, box: Box, classes: ClassTable) -> UInt8:
        values: UInt8 = self._values[box.y : box.bottom, box.x : box.right]
        if len(classes.classes) == 1 and self.largest_label == IGNORE:
            return (values == IGNORE).astype(np.uint8)
        if len(classes.classes) < self.largest_label < IGNORE:
            msg = (
                f"mask image '{self._path}' holds the label {self.largest_label}, the other side "
                f"has only {len(classes.classes)} classes"
            )
            raise AnnotationError(msg)
        return values

    @property
    def largest_label(self) -> int:
        """The largest value; 255 alone beside 0 stands for the one class."""
        values = np.unique(self._values)
        inner = values[(values > 0) & (values < IGNORE)]
        return int(inner.max()) if len(inner) else int(values.max())


class _PolygonSide:
    """Polygons; what they leave out is background, unless they name a region of interest."""

    def __init__(self, path: Path) -> None:
        self._annotations: list[Annotation] = read_annotations(path)
        self.raster: Raster | None = None
        self.has_mpp = False
        names = sorted({a.class_name for a in self._annotations if a.class_name})
        self.class_names: tuple[str, ...] | None = tuple(names)
        self._labels: AnnotationLabels | None = None

    @property
    def extent_px(self) -> tuple[int, int]:
        """Width and height in level-0 pixels that hold all polygons."""
        points = [ring for a in self._annotations for p in a.polygons for ring in p]
        if not points:
            return 1, 1
        width, height = np.ceil(np.concatenate(points).max(axis=0)).astype(int)
        return max(1, int(width)), max(1, int(height))

    def read(self, raster: Raster, box: Box, classes: ClassTable) -> UInt8:
        if self._labels is None:
            self._labels = AnnotationLabels(self._annotations, classes)
        labels = self._labels.read(raster, box)
        has_region = any(a.class_name == classes.roi for a in self._annotations)
        if classes.roi is None or not has_region:
            ignored = any(a.class_name and a.class_name.startswith("Ignore")
                          for a in self._annotations)  # fmt: skip
            if not ignored:
                labels[labels == IGNORE] = BACKGROUND
        return labels


@dataclass(frozen=True, slots=True)
class Pair:
    """One image with its prediction and its truth."""

    name: str
    prediction: Path
    truth: Path


@dataclass(frozen=True, slots=True)
class _Scores:
    confusion: npt.NDArray[np.int64]
    objects: dict[str, dict[str, float | None]]


def run(
    config: EvaluateConfig, *, prediction: Path, truth: Path, output: Path | None = None
) -> dict[str, Any]:
    """Compare mask stores, GeoJSON, mask images, or folders of them, matched by name.

    In the truth, 255 is left out. In the prediction, 255 (not predicted: no tissue) counts as
    background.

    Returns
    -------
    dict
        `images` by name and `pooled` over all, each with `classes` by name and `accuracy`;
        `confidence`: 95 % intervals over images. Absent scores are None.

    Raises
    ------
    ConfigError
        A file of one side has no partner on the other, or their sizes differ.
    """
    pairs = find_pairs(prediction, truth)
    images: dict[str, Any] = {}
    confusions: list[npt.NDArray[np.int64]] = []
    classes: ClassTable | None = None
    for pair in pairs:
        sides = _open(pair.prediction, config.mpp), _open(pair.truth, config.mpp)
        if classes is None:
            classes = _class_table(sides)
        scores = _compare(pair, sides, classes, config)
        confusions.append(scores.confusion)
        images[pair.name] = _described(scores.confusion, classes, scores.objects)
    assert classes is not None  # find_pairs gives at least one
    pooled = _described(np.sum(confusions, axis=0), classes, _mean_objects(images, classes))
    result = {
        "images": images,
        "pooled": pooled,
        "confidence": _confidence(confusions, classes, config),
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
    found = {side: _files(side) for side in (prediction, truth)}
    lonely = sorted(found[prediction].keys() ^ found[truth].keys())
    if lonely or not found[truth]:
        where = "only one of the two" if lonely else "neither of them"
        names = f"{', '.join(lonely[:5])} " if lonely else "anything that can be compared "
        msg = f"evaluate: {names}is in {where}: '{prediction}', '{truth}'"
        raise ConfigError(msg)
    return [Pair(n, found[prediction][n], found[truth][n]) for n in sorted(found[truth])]


def _is_folder(path: Path) -> bool:
    return path.is_dir() and not path.name.endswith(".zarr")


def _files(path: Path) -> dict[str, Path]:
    if not _is_folder(path):
        return {_stem(path): path}
    suffixes = (MASK_SUFFIX, *GEOJSON_SUFFIXES, *IMAGE_SUFFIXES)
    # Where `segment` left several files of a slide, the mask is the most exact one.
    chosen: dict[str, Path] = {}
    for suffix in suffixes:
        for file in sorted(path.iterdir()):
            if file.name.endswith(suffix):
                chosen.setdefault(_stem(file), file)
    return chosen


def _stem(path: Path) -> str:
    for suffix in (MASK_SUFFIX, ".zarr", *GEOJSON_SUFFIXES, *IMAGE_SUFFIXES):
        if path.name.endswith(suffix):
            return path.name.removesuffix(suffix)
    return path.stem


def _open(path: Path, mpp: float | None) -> "_StoreSide | _ImageSide | _PolygonSide":
    if path.is_dir():
        return _StoreSide(path)
    if path.name.endswith(GEOJSON_SUFFIXES):
        return _PolygonSide(path)
    return _ImageSide(path, mpp)


def _class_table(sides: Sequence[Any]) -> ClassTable:
    """Return the classes to compare: those of a mask store, else of polygons, else numbered."""
    for kind in (_StoreSide, _PolygonSide):
        names = sorted({n for s in sides if isinstance(s, kind) for n in s.class_names or ()})
        stores = [s for s in sides if isinstance(s, _StoreSide)]
        if stores and kind is _StoreSide:
            return stores[0]._mask.classes
        if names:
            return ClassTable.of_names([n for n in names if not n.startswith("Ignore")])
    largest = max(s.largest_label for s in sides if isinstance(s, _ImageSide))
    return ClassTable.of_names(["Foreground"] if largest in (0, 1, IGNORE) else
                               [f"Label {i}" for i in range(1, largest + 1)])  # fmt: skip


def _compare(
    pair: Pair,
    sides: "tuple[Any, Any]",
    classes: ClassTable,
    config: EvaluateConfig,
) -> _Scores:
    guess_side, true_side = sides
    raster = _common_raster(pair, guess_side, true_side, config)
    num = classes.num_labels
    confusion = np.zeros((num, num), np.int64)
    for box in _blocks(raster):
        truth = true_side.read(raster, box, classes)
        confusion += confusion_matrix(truth, guess_side.read(raster, box, classes), num)
    objects: dict[str, dict[str, float | None]] = {}
    if config.instances != "none" and raster.width_px * raster.height_px <= MAX_OBJECT_PIXELS:
        truth = true_side.read(raster, raster.box, classes)
        guess = np.where(truth == IGNORE, BACKGROUND, guess_side.read(raster, raster.box, classes))
        has_um = guess_side.has_mpp or true_side.has_mpp
        spacing = (raster.mpp_y, raster.mpp_x) if has_um else None
        for item in classes.classes:
            masks = truth == item.label, guess == item.label
            objects[item.name] = _object_figures(*masks, config.instances, spacing)
    return _Scores(confusion, objects)


def _object_figures(
    truth: npt.NDArray[np.bool_],
    guess: npt.NDArray[np.bool_],
    method: str,
    spacing: tuple[float, float] | None,
) -> dict[str, float | None]:
    split = watershed if method == "watershed" else components
    figures = object_scores(split(truth), split(guess))
    figures["hd95_um"] = None if spacing is None else hausdorff_95(truth, guess, spacing)
    return figures


def _common_raster(pair: Pair, guess: Any, true: Any, config: EvaluateConfig) -> Raster:  # noqa: ANN401 - sides
    rasters = [side.raster for side in (guess, true) if side.raster is not None]
    if not rasters:
        extents = [guess.extent_px, true.extent_px]
        width, height = max(w for w, _ in extents), max(h for _, h in extents)
        mpp = config.mpp or 1.0
        return Raster(width, height, mpp, mpp, 1.0, 1.0)
    sizes = {(r.width_px, r.height_px) for r in rasters}
    if len(sizes) > 1:
        shown = " and ".join(f"{r.width_px} x {r.height_px} px" for r in rasters)
        msg = f"evaluate: '{pair.name}': prediction and truth differ in size: {shown}"
        raise ConfigError(msg)
    stores = [s.raster for s in (guess, true) if isinstance(s, _StoreSide)]
    raster: Raster = stores[0] if stores and stores[0] is not None else rasters[0]
    return raster


def _blocks(raster: Raster) -> Iterator[Box]:
    for y in range(0, raster.height_px, BLOCK_PX):
        for x in range(0, raster.width_px, BLOCK_PX):
            yield Box(x, y, BLOCK_PX, BLOCK_PX).intersection(raster.box)


def _described(
    confusion: npt.NDArray[np.int64],
    classes: ClassTable,
    objects: dict[str, dict[str, float | None]],
) -> dict[str, Any]:
    scores = {
        item.name: {**class_scores(confusion, item.label), **objects.get(item.name, {})}
        for item in classes.classes
    }
    return {
        "classes": scores,
        "accuracy": accuracy(confusion),
        "confusion": confusion.tolist(),
        "labels": list(classes.names),
    }


def _mean_objects(
    images: dict[str, Any], classes: ClassTable
) -> dict[str, dict[str, float | None]]:
    """Return the mean over images of each object metric; images without a score are left out."""
    pixel = {"dice", "iou", "precision", "recall"}
    means: dict[str, dict[str, float | None]] = {}
    for item in classes.classes:
        rows = [image["classes"][item.name] for image in images.values()]
        for key in [k for k in rows[0] if k not in pixel]:
            values = [row[key] for row in rows if row.get(key) is not None]
            means.setdefault(item.name, {})[key] = float(np.mean(values)) if values else None
    return means


def _confidence(
    confusions: Sequence[npt.NDArray[np.int64]], classes: ClassTable, config: EvaluateConfig
) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for item in classes.classes:
        interval = bootstrap_interval(
            confusions,
            lambda c, label=item.label: class_scores(c, label)["dice"],  # type: ignore[misc] # bound now
            resamples=config.bootstrap,
            seed=config.seed,
        )
        result[item.name] = {"dice": None if interval is None else list(interval)}
    return result


def summary_rows(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Return one row per class for the closing table."""
    rows = []
    for name, scores in result["pooled"]["classes"].items():
        interval = result["confidence"][name]["dice"]
        rows.append(
            {
                "class": name,
                "images": len(result["images"]),
                **{key: scores[key] for key in ("dice", "iou", "precision", "recall")},
                "dice_95": "" if interval is None else "{:.3f}..{:.3f}".format(*interval),
                **{key: scores[key] for key in ("aji", "pq", "hd95_um") if key in scores},
            }
        )
    return rows
