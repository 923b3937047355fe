"""Write a cohort CSV for a folder of images with masks of the same names (NuInsSeg's layout).

    python pipelines/image_cohort.py DATA --mpp 0.25 -o cohort.csv

Neighbouring images are often cut from one slide and nothing says which, so blocks of neighbours
count as one patient: no block is in two splits, and a test image has no near twin in training.
"""

import argparse
import csv
from pathlib import Path

SPLITS = ("train", "val", "train", "test", "train", "train", "train", "train", "test", "train")
"""Split of one block after the other: 70 % train, 10 % val, 20 % test."""

COLUMNS = ("slide_id", "patient_id", "path", "mpp", "annotation", "split")


Row = tuple[str, str, str, float | str, str, str]


def rows(data: Path, *, mpp: float, block: int) -> list[Row]:
    """Return the rows of the cohort, with absolute paths; an image without mask is an error."""
    result: list[Row] = []
    for index, image in enumerate(sorted((data / "images").glob("*.png"))):
        mask = data / "masks" / image.name
        if not mask.is_file():
            msg = f"image '{image.name}' has no mask '{mask}'"
            raise SystemExit(msg)
        number = index // block
        paths = (str(image.resolve()), str(mask.resolve()))
        split = SPLITS[number % len(SPLITS)]
        result.append((image.stem, f"block-{number:03d}", paths[0], mpp, paths[1], split))
    if not result:
        msg = f"'{data / 'images'}' holds no *.png"
        raise SystemExit(msg)
    return result


def slide_row(path: Path) -> Row:
    """Return the row of a slide that has its resolution, but no labels, in it."""
    if not path.is_file():
        msg = f"slide '{path}' does not exist"
        raise SystemExit(msg)
    return path.stem, path.stem, str(path.resolve()), "", "", "train"


def main() -> None:
    """Write the cohort."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("data", type=Path, help="folder with images/ and masks/")
    parser.add_argument("--mpp", type=float, required=True, help="um/px of the images")
    parser.add_argument("--block", type=int, default=10, help="images that count as one patient")
    parser.add_argument(
        "--slide", type=Path, action="append", default=[], help="unlabelled slide to learn from too"
    )
    parser.add_argument("-o", "--output", type=Path, required=True)
    arguments = parser.parse_args()
    found = rows(arguments.data, mpp=arguments.mpp, block=arguments.block)
    found += [slide_row(path) for path in arguments.slide]
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    with arguments.output.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([COLUMNS, *found])


if __name__ == "__main__":
    main()
