"""Checkpoints: a folder with `weights.safetensors` and `model.json`, enough to use a model.

Nothing is ever unpickled. A checkpoint is judged in the order that costs least: the JSON, the
header of the weights against the architecture, the file's size, its sha256; only then are tensors
made. `model.json` is written last and holds the digest of the weights, so a folder without it is
no checkpoint, and one with it is whole. It also holds a digest of its own content: a flipped bit
in a class name, in um/px or in the range of the input would otherwise be another model.
"""

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast, overload

import safetensors.torch
import torch

from wsiseg.classes import ClassTable
from wsiseg.config import build, digest, to_dict
from wsiseg.errors import CheckpointError, ConfigError
from wsiseg.models.segmenter import InputRange, Segmenter
from wsiseg.models.unet import UNet, tensor_shapes
from wsiseg.models.weights import check_tensors, read_weights
from wsiseg.outputs import atomic_file, fsync_folder, json_text, write_json
from wsiseg.runinfo import RunInfo
from wsiseg.settings.model import UNetConfig

Kind = Literal["pretrain", "segmenter"]

FORMAT = "wsiseg-checkpoint"
FORMAT_VERSION = 1
"""Raised whenever an older reader would misread the files."""

WEIGHTS_NAME = "weights.safetensors"
META_NAME = "model.json"

DIGEST_KEY = "digest"
"""Of `model.json`: `config.digest` of all its other keys."""

MAX_META_BYTES = 4_000_000
"""Ours have some 5 kB; a larger file is not one and is refused before parsing."""

SEGMENTER_PREFIX = "unet."
"""A Segmenter's own state dict has this before the names of its U-Net."""

PICKLE_SUFFIXES = (".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".bin")


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """What a run folder holds.

    `state_dict` has the tensors of the U-Net (float32, CPU), EMA-averaged by the trainer.
    `timestep` is what a segmenter feeds for clean images. `digest` identifies the model.
    """

    kind: Kind
    unet_config: UNetConfig
    out_channels: int
    mpp: float
    tile_size_px: int
    timestep: int
    input_range: InputRange
    classes: ClassTable | None
    diffusion: dict[str, Any] | None
    metrics: dict[str, Any]
    run: dict[str, Any]
    digest: str
    state_dict: dict[str, torch.Tensor]

    def build_unet(self, device: torch.device | str = "cpu") -> UNet:
        """Return the bare U-Net in eval mode, in channels-last memory."""
        unet = UNet(self.unet_config, out_channels=self.out_channels)
        unet.load_state_dict(self.state_dict, strict=True)
        unet.to(memory_format=torch.channels_last)  # type: ignore[call-overload] # not in its stubs
        return unet.eval().to(device)


@dataclass(frozen=True, slots=True, kw_only=True)
class PretrainCheckpoint(Checkpoint):
    """A pretrained backbone."""

    def build(self, device: torch.device | str = "cpu") -> UNet:
        """Return the denoising U-Net in eval mode."""
        return self.build_unet(device)


@dataclass(frozen=True, slots=True, kw_only=True)
class SegmenterCheckpoint(Checkpoint):
    """A network that segments; its class table is always there."""

    classes: ClassTable

    def build(self, device: torch.device | str = "cpu") -> Segmenter:
        """Return the segmenter in eval mode."""
        unet = self.build_unet(device)
        return Segmenter(unet, self.classes, self.timestep, input_range=self.input_range).eval()


def save_checkpoint(  # noqa: PLR0913 - all of it is needed to use a model with no other file
    folder: Path,
    *,
    kind: Kind,
    unet_config: UNetConfig,
    out_channels: int,
    state: Mapping[str, torch.Tensor],
    mpp: float,
    tile_size_px: int,
    timestep: int,
    classes: ClassTable | None,
    diffusion: dict[str, Any] | None,
    metrics: Mapping[str, Any],
    run: RunInfo,
    input_range: InputRange = "symmetric",
) -> None:
    """Write a checkpoint into `folder`, replacing the one there.

    Parameters
    ----------
    state
        State dict of the U-Net, or of the Segmenter around it. Must fit the architecture.
    mpp, tile_size_px
        Resolution and side of the tiles it was trained on.
    metrics
        Figures to show with the model; those that are not finite are stored as null.

    Raises
    ------
    CheckpointError
        The state, the classes and the architecture do not fit each other.
    """
    if (kind == "segmenter") != (classes is not None):
        msg = f"a {kind} checkpoint {'needs a' if kind == 'segmenter' else 'has no'} class table"
        raise CheckpointError(msg)
    weights = _plain_state(state)
    shapes = tensor_shapes(unet_config, out_channels=out_channels)
    check_tensors(weights, shapes, where=f"checkpoint '{folder}'")
    data = safetensors.torch.save(weights, metadata={"format": "pt"})
    meta = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "kind": kind,
        "architecture": to_dict(unet_config),
        "out_channels": out_channels,
        "mpp": mpp,
        "tile_size_px": tile_size_px,
        "timestep": timestep,
        "input_range": input_range,
        "classes": classes.to_dict() if classes else None,
        "diffusion": diffusion,
        "metrics": _finite(dict(metrics)),
        "run": run.to_dict(),
        "weights": {"sha256": hashlib.sha256(data).hexdigest(), "num_bytes": len(data)},
    }
    folder.mkdir(parents=True, exist_ok=True)
    # A kill between the two files must not leave the old description beside the new weights.
    (folder / META_NAME).unlink(missing_ok=True)
    fsync_folder(folder)
    with atomic_file(folder / WEIGHTS_NAME) as temporary:
        temporary.write_bytes(data)
    write_json(folder / META_NAME, {**meta, DIGEST_KEY: digest(meta)})


@overload
def load_checkpoint(path: Path, *, kind: Literal["pretrain"]) -> PretrainCheckpoint: ...
@overload
def load_checkpoint(path: Path, *, kind: Literal["segmenter"]) -> SegmenterCheckpoint: ...
def load_checkpoint(path: Path, *, kind: Kind) -> PretrainCheckpoint | SegmenterCheckpoint:
    """Read and verify the checkpoint in the run folder `path`.

    Raises
    ------
    CheckpointError
        Not a checkpoint (a pickle is named as such and not opened), of the other kind, of a newer
        version, or damaged.
    """
    meta, identity = _read_meta(path)
    _check_kind(meta, kind, path)
    fields = _parse_meta(meta, path)
    shapes = tensor_shapes(fields["unet_config"], out_channels=fields["out_channels"])
    sha256 = str(_section(meta, "weights", f"checkpoint '{path}'").get("sha256"))
    state_dict = read_weights(path / WEIGHTS_NAME, sha256=sha256, shapes=shapes)
    cls = PretrainCheckpoint if kind == "pretrain" else SegmenterCheckpoint
    return cls(**fields, kind=kind, digest=identity, state_dict=state_dict)


def model_digest(path: Path) -> str:
    """Return what identifies the model in a run folder: the sha256 of its `model.json`.

    That file holds the sha256 of the weights, which `load_checkpoint` verifies.
    """
    return _read_meta(path)[1]


def _plain_state(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return contiguous CPU copies under the names that the U-Net gives its tensors."""
    wrapped = all(name.startswith(SEGMENTER_PREFIX) for name in state)
    return {
        name.removeprefix(SEGMENTER_PREFIX) if wrapped else name: tensor.detach().to(
            "cpu", copy=True, memory_format=torch.contiguous_format
        )
        for name, tensor in state.items()
    }


def _finite(value: Any) -> Any:  # noqa: ANN401 - any JSON value
    """Return JSON values with null in the place of numbers that JSON cannot hold."""
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _read_meta(path: Path) -> tuple[dict[str, Any], str]:
    """Return the parsed `model.json` of a run folder and its sha256."""
    if not path.exists():
        msg = f"checkpoint '{path}': does not exist"
        raise CheckpointError(msg)
    if not path.is_dir():
        raise CheckpointError(_why_not_a_folder(path))
    meta_path = path / META_NAME
    if not meta_path.is_file():
        msg = f"checkpoint '{path}': holds no {META_NAME}; not a run folder, or unfinished"
        raise CheckpointError(msg)
    try:
        with meta_path.open("rb") as file:
            text = file.read(MAX_META_BYTES + 1)
    except OSError as error:
        msg = f"checkpoint '{path}': {META_NAME} cannot be read: {error}"
        raise CheckpointError(msg) from error
    if len(text) > MAX_META_BYTES:
        msg = f"checkpoint '{path}': {META_NAME} is larger than {MAX_META_BYTES} bytes"
        raise CheckpointError(msg)
    meta = _parse_json(text, where=f"checkpoint '{path}': {META_NAME}")
    if meta.get("format") != FORMAT:
        msg = f"checkpoint '{path}': {META_NAME} is not a model of wsiseg"
        raise CheckpointError(msg)
    version = meta.get("format_version")
    if type(version) is not int or version < 1:
        msg = f"checkpoint '{path}': format_version {version!r} is not a version"
        raise CheckpointError(msg)
    if version > FORMAT_VERSION:
        msg = (
            f"checkpoint '{path}': format_version {version} is newer than this wsiseg reads "
            f"({FORMAT_VERSION}); upgrade wsiseg"
        )
        raise CheckpointError(msg)
    _check_digest(meta, text, path)
    return meta, hashlib.sha256(text).hexdigest()


def _check_digest(meta: Mapping[str, Any], text: bytes, path: Path) -> None:
    """Hold `model.json` against the digest in it, and its bytes against what would be written."""
    if DIGEST_KEY not in meta:
        msg = (
            f"checkpoint '{path}': {META_NAME} has no digest of itself: damaged, or of a wsiseg "
            "before its first release; make the model again with the command that made it"
        )
        raise CheckpointError(msg)
    content = {key: value for key, value in meta.items() if key != DIGEST_KEY}
    try:
        is_whole = meta[DIGEST_KEY] == digest(content) and text == json_text(meta).encode()
    except (ValueError, RecursionError):  # what we never write: 1e400, half a surrogate pair
        is_whole = False
    if not is_whole:
        msg = (
            f"checkpoint '{path}': {META_NAME} is damaged (its own checksum differs); restore it "
            "from a copy, or make the model again"
        )
        raise CheckpointError(msg)


def _why_not_a_folder(path: Path) -> str:
    if path.suffix.lower() in PICKLE_SUFFIXES:
        return (
            f"checkpoint '{path}': a pickled file, which can run code when opened, so it was "
            "not; give a run folder of wsiseg, or convert a released model once with "
            "`wsiseg import-checkpoint`"
        )
    return f"checkpoint '{path}': a file; give the run folder that holds {META_NAME}"


def _parse_json(text: bytes, *, where: str) -> dict[str, Any]:
    def refuse(constant: str) -> None:
        msg = f"{constant} is not JSON"
        raise ValueError(msg)

    try:
        value = json.loads(text, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        msg = f"{where}: damaged or not JSON: {error}"
        raise CheckpointError(msg) from error
    if not isinstance(value, dict):
        msg = f"{where}: expected an object, found {type(value).__name__}"
        raise CheckpointError(msg)
    return value


def _check_kind(meta: Mapping[str, Any], kind: Kind, path: Path) -> None:
    if meta.get("kind") == kind:
        return
    remedy = {
        "pretrain": "a segmenter cannot be pretrained weights; give the folder of `pretrain`",
        "segmenter": "run `wsiseg finetune` on it first and give that folder",
    }[kind]
    msg = f"checkpoint '{path}': kind is {meta.get('kind')!r}, needed is {kind!r}; {remedy}"
    raise CheckpointError(msg)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Scalars:
    """The plain values of `model.json`, in a form that `config.build` type-checks."""

    out_channels: int
    mpp: float
    tile_size_px: int
    timestep: int
    input_range: InputRange


def _parse_meta(meta: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Return the fields of a Checkpoint but for kind, digest and weights."""
    where = f"checkpoint '{path}'"
    names = [field.name for field in dataclasses.fields(_Scalars)]
    try:
        scalars = build(_Scalars, {n: meta.get(n) for n in names}, where=where)
        unet_config = build(
            UNetConfig, _section(meta, "architecture", where), where=f"{where}, architecture"
        )
        classes = None
        if meta.get("kind") == "segmenter":
            classes = ClassTable.from_dict(_section(meta, "classes", where), where=where)
    except ConfigError as error:
        raise CheckpointError(str(error)) from error
    if scalars.mpp <= 0 or scalars.tile_size_px < 1 or scalars.timestep < 0:
        msg = f"{where}: mpp, tile_size_px and timestep must be positive, got {scalars}"
        raise CheckpointError(msg)
    wanted = classes.num_labels if classes else 3
    if scalars.out_channels != wanted:
        msg = f"{where}: {scalars.out_channels} outputs, expected {wanted}"
        raise CheckpointError(msg)
    diffusion = meta.get("diffusion")
    return {
        **dataclasses.asdict(scalars),
        "unet_config": unet_config,
        "classes": classes,
        "diffusion": diffusion if diffusion is None else _section(meta, "diffusion", where),
        "metrics": _section(meta, "metrics", where),
        "run": _section(meta, "run", where),
    }


def _section(meta: Mapping[str, Any], key: str, where: str) -> dict[str, Any]:
    value = meta.get(key)
    if not isinstance(value, dict):
        msg = f"{where}: {META_NAME} needs an object '{key}', found {type(value).__name__}"
        raise CheckpointError(msg)
    return cast("dict[str, Any]", value)
