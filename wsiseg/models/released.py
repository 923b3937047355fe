"""Reading the checkpoints that the released code of GenSelfDiff-HIS writes.

Such a file is a pickle, `{"epoch", "loss", "model_state_dict"}`. It is opened by PyTorch's
restricted unpickler, which builds tensors and plain containers and calls nothing else. Nothing
of the released code is used or needed.
"""

import hashlib
import math
import re
import warnings
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from wsiseg.errors import CheckpointError
from wsiseg.models.unet import tensor_shapes
from wsiseg.models.weights import check_tensors
from wsiseg.settings.model import UNET_PRESETS

MAX_BYTES = 2_000_000_000
"""Unpacked; a released file has 125 MB. A few kilobytes of zip can claim terabytes."""

STATE_KEY = "model_state_dict"

PREFIX = "net."
"""The released modules hold their U-Net as `net`."""

WRAPPER = "module."
"""What DistributedDataParallel and DataParallel put before the names."""

OUTPUT_BIAS = PREFIX + "final_conv.1.bias"
"""Its length is the number of outputs."""

_PLACES = (
    (r"stem", r"init_conv"),
    (r"time\.expand", r"time_mlp.1"),
    (r"time\.project", r"time_mlp.3"),
    (r"encoder\.(\d+)\.blocks\.(\d+)", r"downs.\1.\2"),
    (r"encoder\.(\d+)\.attention", r"downs.\1.2.fn"),
    (r"down\.(\d+)", r"downs.\1.3"),
    (r"middle\.first", r"mid_block1"),
    (r"middle\.attention", r"mid_attn.fn"),
    (r"middle\.second", r"mid_block2"),
    (r"decoder\.(\d+)\.blocks\.(\d+)", r"ups.\1.\2"),
    (r"decoder\.(\d+)\.attention", r"ups.\1.2.fn"),
    (r"up\.(\d+)", r"ups.\1.3"),
    (r"head\.block", r"final_conv.0"),
    (r"head\.project", r"final_conv.1"),
)
"""Where our modules are in the released network: pattern of our name, their name."""

_PARTS = {
    "time": "mlp.1",
    "first.conv": "block1.proj",
    "first.norm": "block1.norm",
    "second.conv": "block2.proj",
    "second.norm": "block2.norm",
    "shortcut": "res_conv",
    "norm": "norm",
    "qkv": "fn.to_qkv",
    "out": "fn.to_out",
    "out_norm": "fn.to_out.1",
}
"""What the parts of our blocks and attentions are called there."""


class _Inert:
    """Stands for an object that is in the file but not needed: swallows all, does nothing."""

    def __init__(self, *parts: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass


_UNREAD: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = [
    (_Inert, f"numpy{core}")
    for core in (
        ".ndarray",
        ".dtype",
        ".core.multiarray._reconstruct",
        ".core.multiarray.scalar",
        "._core.multiarray._reconstruct",
        "._core.multiarray.scalar",
    )
]
"""The released trainer stores the loss as a NumPy array, at which the restricted unpickler stops.
NumPy's own constructors are not made for hostile input, so none of them is admitted."""


@dataclass(frozen=True, slots=True)
class ReleasedWeights:
    """Weights of the released network under our names, for the preset `parity`.

    `state_dict` : float32. `epoch` : when they were saved, if the file says so. `sha256` : of the
    file.
    """

    out_channels: int
    state_dict: dict[str, torch.Tensor]
    epoch: int | None
    sha256: str


def read_released(path: Path) -> ReleasedWeights:
    """Read a checkpoint of the released pretraining or segmentation network.

    The two differ in the number of outputs only: 3 to predict noise, one per class to segment.

    Raises
    ------
    CheckpointError
        Not such a checkpoint, damaged, or one whose weights are not finite. Code in the file is
        never run.
    """
    where = f"released checkpoint '{path}'"
    content = _unpickle(path, where)
    state = _state_of(content)
    if state is None:
        found = f"keys {_shown(content)}" if isinstance(content, dict) else type(content).__name__
        msg = f"{where}: holds no '{STATE_KEY}' as the released code writes it, but {found}"
        raise CheckpointError(msg)
    if not all(isinstance(k, str) and type(v) is torch.Tensor for k, v in state.items()):
        msg = f"{where}: '{STATE_KEY}' holds other things than named tensors"
        raise CheckpointError(msg)
    out_channels = _num_outputs(state, where)
    ours = tensor_shapes(UNET_PRESETS["parity"], out_channels=out_channels)
    theirs = {released_name(name): shape for name, shape in ours.items()}
    check_tensors(state, theirs, where=where)
    _check_finite(state, where)
    epoch = content.get("epoch")
    with path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    return ReleasedWeights(
        out_channels=out_channels,
        state_dict={name: state[released_name(name)].contiguous() for name in ours},
        epoch=epoch if type(epoch) is int else None,
        sha256=sha256,
    )


def released_name(name: str) -> str:
    """Return what the released network calls a tensor of our U-Net.

    Examples
    --------
    >>> released_name("encoder.0.blocks.1.first.conv.weight")
    'net.downs.0.1.block1.proj.weight'
    """
    module, _, kind = name.rpartition(".")
    for pattern, place in _PLACES:
        match = re.fullmatch(rf"{pattern}(?:\.(?P<part>[a-z_.]+))?", module)
        if match is None:
            continue
        part = match["part"]
        inner = "" if part is None else "." + _PARTS[part]
        # Their linear attention ends in a sequence, the full one in the convolution itself.
        if part == "out" and not module.startswith("middle"):
            inner += ".0"
        return f"{PREFIX}{match.expand(place)}{inner}.{kind}"
    msg = f"the released network has no tensor '{name}'"
    raise ValueError(msg)


def _state_of(content: Any) -> dict[Any, Any] | None:  # noqa: ANN401 - whatever the file holds
    """Return the named tensors of a file, None if it has none.

    The released trainer writes those of the network inside its parallel wrapper; a file with
    the wrapper's `module.`, without `net.`, or of the tensors alone is the same network.
    """
    if not isinstance(content, dict):
        return None
    state = content.get(STATE_KEY, content)
    if not isinstance(state, dict) or not state:
        return None
    names = [name for name in state if isinstance(name, str)]
    if state is content and "." not in "".join(names):
        return None
    if all(name.startswith(WRAPPER) for name in names) and len(names) == len(state):
        state = {name.removeprefix(WRAPPER): tensor for name, tensor in state.items()}
    if OUTPUT_BIAS.removeprefix(PREFIX) in state:
        state = {f"{PREFIX}{name}": tensor for name, tensor in state.items()}
    return state


def _unpickle(path: Path, where: str) -> Any:  # noqa: ANN401 - whatever the file holds
    _check_size(path, where)
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals(_UNREAD):
            warnings.simplefilter("ignore")  # they say how to load the file after all, unsafely
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        # Damaged and hostile files end in almost any exception; all of them mean the same here.
        wanted = re.search(r"GLOBAL ([\w.]+)", str(error))
        reason = f"it asks for {wanted[1][:80]}" if wanted else "damaged, or of another kind"
        msg = f"{where}: cannot be read without running code from it ({reason})"
        raise CheckpointError(msg) from error


def _check_size(path: Path, where: str) -> None:
    """Refuse what is missing, and what would fill the memory."""
    if not path.is_file():
        msg = f"{where}: {'a folder; give the .pth file' if path.is_dir() else 'does not exist'}"
        raise CheckpointError(msg)
    size = path.stat().st_size
    if zipfile.is_zipfile(path):
        try:
            with zipfile.ZipFile(path) as archive:
                size = sum(entry.file_size for entry in archive.infolist())
        except (zipfile.BadZipFile, OSError, ValueError) as error:
            msg = f"{where}: damaged: {error}"
            raise CheckpointError(msg) from error
    if size > MAX_BYTES:
        msg = f"{where}: {size} bytes, a released checkpoint has fewer than {MAX_BYTES}"
        raise CheckpointError(msg)


def _num_outputs(state: dict[str, torch.Tensor], where: str) -> int:
    bias = state.get(OUTPUT_BIAS)
    if bias is None or bias.ndim != 1 or not 2 <= len(bias) <= 255:
        found = "absent" if bias is None else f"of shape {tuple(bias.shape)}"
        msg = f"{where}: not the released network: '{OUTPUT_BIAS}' is {found}"
        raise CheckpointError(msg)
    return len(bias)


def _check_finite(state: dict[str, torch.Tensor], where: str) -> None:
    """Refuse weights with NaN: the released loss is known to end in it (defect D1)."""
    for name, tensor in state.items():
        if not math.isfinite(tensor.sum()) and not tensor.isfinite().all():
            msg = f"{where}: '{name}' holds NaN or infinity; take a checkpoint of an earlier epoch"
            raise CheckpointError(msg)


def _shown(content: dict[Any, Any]) -> str:
    return ", ".join(repr(key)[:40] for key in list(content)[:5]) or "none"
