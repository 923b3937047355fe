"""Pictures of a training run: its curves, and grids of images."""

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.figure import Figure
from PIL import Image

from wsiseg.classes import IGNORE, ClassTable
from wsiseg.outputs import write_bytes

GAP_PX = 4

UInt8 = npt.NDArray[np.uint8]


def write_curves(metrics: Path, path: Path, *, title: str) -> None:
    """Draw the figures of a metrics.jsonl against the steps as a PNG."""
    lines = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for key, name in (("loss", "training"), ("val_loss", "validation")):
        _plot(left, lines, key, name)
    left.set_yscale("log")
    left.set_ylabel("loss")
    left.set_title(title)
    scores = sorted({k for line in lines for k in line if k.startswith("val_dice")})
    for key in scores:
        _plot(right, lines, key, key.removeprefix("val_").replace("_", " "))
    if scores:
        right.set_ylim(0, 1)
        right.set_ylabel("validation Dice")
    else:
        _plot(right, lines, "learning_rate", "learning rate")
        right.set_ylabel("learning rate")
    for axes in (left, right):
        axes.set_xlabel("step")
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            axes.legend()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, metadata={"Software": None})
    write_bytes(path, buffer.getvalue())


def _plot(axes: Any, lines: Sequence[dict[str, Any]], key: str, name: str) -> None:  # noqa: ANN401 - matplotlib has no types
    points = [
        (line["step"], line[key])
        for line in lines
        if line.get(key) is not None and "skipped" not in line
    ]
    if points:
        steps, values = zip(*points, strict=True)
        axes.plot(steps, values, marker="o" if len(points) < 30 else None, markersize=3, label=name)


def image_grid(images: UInt8, columns: int) -> UInt8:
    """Lay images uint8 (n, S, S, 3) out in rows, with white gaps."""
    num, size = len(images), images.shape[1]
    rows = -(-num // columns)
    step = size + GAP_PX
    grid = np.full((rows * step - GAP_PX, columns * step - GAP_PX, 3), 255, np.uint8)
    for i, image in enumerate(images):
        y, x = i // columns * step, i % columns * step
        grid[y : y + size, x : x + size] = image
    return grid


def paint_labels(images: UInt8, labels: UInt8, classes: ClassTable) -> UInt8:
    """Return images uint8 (n, S, S, 3) with labels (n, S, S) tinted; ignored pixels grey."""
    painted = images.astype(np.float32)
    for item in classes.classes:
        chosen = labels == item.label
        painted[chosen] = 0.45 * painted[chosen] + 0.55 * np.array(item.color)
    painted[labels == IGNORE] *= 0.5
    result: UInt8 = np.rint(painted).astype(np.uint8)
    return result


def write_image(path: Path, image: UInt8) -> None:
    """Write a PNG."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    write_bytes(path, buffer.getvalue())
