"""Resume points: everything a run needs to go on at a step, in folders that are whole or absent.

RUN/resume/step-00000250/ holds `state.safetensors` and `state.json`; the latter has the hash of
both. Nothing is pickled.
"""

import dataclasses
import hashlib
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError

from wsiseg import outputs

logger = logging.getLogger(__name__)

FOLDER = "resume"
KEPT = 2
"""Resume points kept: should the newest be damaged, the one before still serves."""

STATE_VERSION = 2


@dataclass(slots=True)
class TrainState:
    """Where a run is. `step` : steps done. `losses` : of those since the last line of metrics."""

    step: int = 0
    validated_step: int = 0
    best_step: int = 0
    best_metric: float | None = None
    num_without_gain: int = 0
    num_bad_steps: int = 0
    is_stopped_early: bool = False
    metrics: dict[str, float] = field(default_factory=dict)
    losses: list[float] = field(default_factory=list)


def save_state(run: Path, state: TrainState, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write a resume point and drop the older ones."""
    folder = run / FOLDER / f"step-{state.step:08d}"
    partial = outputs.partial_path(folder)
    outputs.remove_tree(partial)
    partial.mkdir(parents=True)
    plain = {
        name: tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        for name, tensor in tensors.items()
    }
    data = safetensors.torch.save(plain)
    outputs.write_bytes(partial / "state.safetensors", data)
    values = dataclasses.asdict(state)
    content = {"version": STATE_VERSION, "sha256": _digest(values, data), "state": values}
    (partial / "state.json").write_text(json.dumps(content))
    outputs.fsync_file(partial / "state.json")
    outputs.promote_folder(partial, folder)
    for old in _points(run)[:-KEPT]:
        outputs.remove_tree(old)


def load_newest(
    run: Path, shapes: Mapping[str, tuple[int, ...]]
) -> tuple[TrainState, dict[str, torch.Tensor]] | None:
    """Return the newest resume point that is whole, None if there is none.

    `shapes` are the model's; a point of another model does not count.
    """
    for folder in reversed(_points(run)):
        try:
            return _load(folder, shapes)
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            logger.warning("resume point '%s' is damaged and left out: %s", folder, error)
    return None


def _load(
    folder: Path, shapes: Mapping[str, tuple[int, ...]]
) -> tuple[TrainState, dict[str, torch.Tensor]]:
    content: dict[str, Any] = json.loads((folder / "state.json").read_text())
    data = (folder / "state.safetensors").read_bytes()
    if content["version"] != STATE_VERSION or _digest(content["state"], data) != content["sha256"]:
        msg = "its checksum differs"
        raise ValueError(msg)
    tensors = safetensors.torch.load(data)
    found = {
        n.removeprefix("model."): tuple(t.shape) for n, t in tensors.items() if n[:6] == "model."
    }
    if found != dict(shapes):
        msg = "it is of another model"
        raise ValueError(msg)
    return TrainState(**content["state"]), tensors


def _digest(values: Mapping[str, Any], data: bytes) -> str:
    """Return the sha256 of both files of a point: a changed counter is damage, too."""
    text = json.dumps(values, sort_keys=True).encode()
    return hashlib.sha256(text + data).hexdigest()


def remove_points(run: Path) -> None:
    """Drop all resume points of a run that is finished."""
    outputs.remove_tree(run / FOLDER)


def _points(run: Path) -> list[Path]:
    folder = run / FOLDER
    if not folder.is_dir():
        return []
    return sorted(p for p in folder.glob("step-*") if not p.name.endswith(outputs.PARTIAL_SUFFIX))
