"""Table and learning curve of `label_efficiency.py`, from its results/<run>.json."""

import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from matplotlib.figure import Figure

from wsiseg.outputs import atomic_file, write_json, write_text

RESAMPLES = 2000
"""Sets of test cases drawn with replacement, the same sets for every run."""

TITLES = {
    "scratch": "random weights",
    "noise": "noise diffusion",
    "masked": "masked diffusion",
    "autoencoding": "masked autoencoding",
}

Floats = npt.NDArray[np.float64]


class Run(Protocol):
    """What names a result."""

    arm: str
    percent: int
    name: str


def write_report(output: Path, runs: Sequence[Run]) -> None:
    """Write results.json, table.md and curve.png into the folder of a study.

    Dice and IoU are pooled over the test images of a run and averaged over seeds; HD95 is the mean
    over images that have one. Intervals (95 %) come from resampling test cases, since images of a
    case are alike; those of a difference compare the same cases and seeds, pair by pair.
    """
    found = {run.name: json.loads(_result(output, run).read_text("utf-8")) for run in runs}
    cases = sorted({image["case"] for image in found[runs[0].name]["test"].values()})
    draws = _draws(len(cases))
    points: dict[tuple[str, int], list[dict[str, Floats]]] = defaultdict(list)
    for run in runs:
        points[run.arm, run.percent].append(_scores(found[run.name]["test"], cases, draws))
    rows = []
    for (arm, percent), scores in points.items():
        base = points.get(("scratch", percent), scores)
        rows.append(_row(arm, percent, scores, base))
    first = found[runs[0].name]
    trivial = _trivial(first["test"])
    num = {
        percent: _sizes([found[run.name] for run in runs if run.percent == percent])
        for percent in {run.percent for run in runs}
    }
    write_json(output / "results.json", {"schema_version": 1, "trivial": trivial, "rows": rows})
    write_text(output / "table.md", _table(rows, trivial, num))
    with atomic_file(output / "curve.png") as temporary:
        _draw(rows, trivial["dice"]).savefig(temporary, format="png", dpi=110)


def _result(output: Path, run: Run) -> Path:
    return output / "results" / f"{run.name}.json"


def _draws(num_cases: int) -> Floats:
    """Return how often each case counts: once each in row 0, then in each resample."""
    drawn = np.random.default_rng(0).multinomial(
        num_cases, np.full(num_cases, 1 / num_cases), size=RESAMPLES
    )
    return np.concatenate([np.ones((1, num_cases)), drawn]).astype(np.float64)


def _scores(test: dict[str, Any], cases: list[str], draws: Floats) -> dict[str, Floats]:
    """Return Dice, IoU and HD95 of one run: of all cases at index 0, then of each resample."""
    confusion = np.zeros((len(cases), 2, 2))
    distance, count = np.zeros(len(cases)), np.zeros(len(cases))
    for image in test.values():
        case = cases.index(image["case"])
        confusion[case] += np.array(image["confusion"])
        if image["hd95_px"] is not None:
            distance[case] += image["hd95_px"]
            count[case] += 1
    pooled = np.tensordot(draws, confusion, axes=1)
    hit, missed, claimed = pooled[:, 1, 1], pooled[:, 1, 0], pooled[:, 0, 1]
    return {
        "dice": 2 * hit / (2 * hit + missed + claimed),
        "iou": hit / (hit + missed + claimed),
        "hd95_px": (draws @ distance) / np.where(draws @ count > 0, draws @ count, np.nan),
    }


def _row(
    arm: str, percent: int, scores: list[dict[str, Floats]], base: list[dict[str, Floats]]
) -> dict[str, Any]:
    row: dict[str, Any] = {"arm": arm, "percent": percent, "seeds": len(scores)}
    for name in ("dice", "iou", "hd95_px"):
        ours = np.mean([score[name] for score in scores], axis=0)
        theirs = np.mean([score[name] for score in base], axis=0)
        row[name] = _finite(ours[0])
        row[f"{name}_interval"] = _interval(ours[1:])
        row[f"{name}_of_seeds"] = [_finite(score[name][0]) for score in scores]
        row[f"{name}_gain"] = _finite(ours[0] - theirs[0])
        row[f"{name}_gain_interval"] = _interval((ours - theirs)[1:])
    return row


def _finite(value: float) -> float | None:
    """Return None for the distance of a run in which no image has one."""
    return float(value) if np.isfinite(value) else None


def _interval(values: Floats) -> list[float] | None:
    known = values[np.isfinite(values)]
    return [float(end) for end in np.percentile(known, [2.5, 97.5])] if len(known) else None


def _trivial(test: dict[str, Any]) -> dict[str, float]:
    """Return the scores of the answer that all is gland."""
    total = np.sum([image["confusion"] for image in test.values()], axis=0)
    gland, other = float(total[1].sum()), float(total[0].sum())
    return {"dice": 2 * gland / (2 * gland + other), "iou": gland / (gland + other)}


def _table(rows: list[dict[str, Any]], trivial: dict[str, float], num: dict[int, str]) -> str:
    lines = [
        "| labels | start | Dice [95 %] | seeds | gain over random [95 %] | IoU | HD95, px |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in sorted(rows, key=lambda row: row["percent"]):
        low, high = row["dice_interval"]
        spread = f"{min(row['dice_of_seeds']):.3f} to {max(row['dice_of_seeds']):.3f}"
        gain = "-"
        if row["arm"] != "scratch":
            ends = row["dice_gain_interval"]
            gain = f"{row['dice_gain']:+.3f} [{ends[0]:+.3f}, {ends[1]:+.3f}]"
        lines.append(
            f"| {row['percent']} % ({num[row['percent']]}) | {TITLES[row['arm']]} "
            f"| {row['dice']:.3f} [{low:.3f}, {high:.3f}] | {spread} | {gain} "
            f"| {row['iou']:.3f} | {_pixels(row['hd95_px'])} |"
        )
    lines.append(f"| none | all is gland | {trivial['dice']:.3f} | | | {trivial['iou']:.3f} | |")
    return "\n".join(lines) + "\n"


def _sizes(results: list[dict[str, Any]]) -> str:
    """Return how many cases and images were learned from; seeds draw cases of other sizes."""
    images = sorted({result["images"] for result in results})
    several = f"{images[0]} to {images[-1]}" if len(images) > 1 else f"{images[0]}"
    return f"{results[0]['cases']} cases, {several} images"


def _pixels(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def _draw(rows: list[dict[str, Any]], trivial_dice: float) -> Figure:
    """Return Dice against the share of labels, an arm a line, its interval a bar."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    arms = list(dict.fromkeys(row["arm"] for row in rows))
    for shift, arm in enumerate(arms):
        own = sorted((r for r in rows if r["arm"] == arm), key=lambda r: r["percent"])
        x = [row["percent"] * 1.04 ** (shift - (len(arms) - 1) / 2) for row in own]
        y = np.array([row["dice"] for row in own])
        ends = np.array([row["dice_interval"] for row in own]).T
        axes.errorbar(x, y, abs(ends - y), marker="o", capsize=3, label=TITLES[arm])
    axes.axhline(trivial_dice, color="grey", linestyle="--", label="all is gland")
    axes.set_xscale("log")
    ticks = sorted({row["percent"] for row in rows})
    axes.set_xticks(ticks, [f"{tick} %" for tick in ticks])
    axes.minorticks_off()
    axes.set_xlabel("training cases with labels")
    axes.set_ylabel("Dice of test images (95 % over cases)")
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    return figure
