"""Reading a safetensors file of weights that somebody else may have made.

Every tensor's name, type, shape and place is compared with what the architecture needs before
anything as large as the file is read, so a hostile header costs nothing.
"""

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch

from wsiseg.errors import CheckpointError

MAX_HEADER_BYTES = 4_000_000
"""The header of the largest network we can build has some 200 kB."""

LENGTH_BYTES = 8
"""A safetensors file begins with the length of its header, a little-endian uint64."""

METADATA_KEY = "__metadata__"

FLOAT32_BYTES = 4

Shapes = Mapping[str, tuple[int, ...]]


def check_names(given: set[str], wanted: set[str], *, where: str) -> None:
    """Raise CheckpointError, naming some of the tensors that are missing or too many."""
    missing, unknown = sorted(wanted - given), sorted(given - wanted)
    if missing or unknown:
        parts = [
            f"{len(names)} {what} ({', '.join(name[:80] for name in names[:3])})"
            for what, names in (("missing", missing), ("unknown", unknown))
            if names
        ]
        msg = f"{where}: tensors do not fit the network: {'; '.join(parts)}"
        raise CheckpointError(msg)


def check_tensors(tensors: Mapping[str, torch.Tensor], shapes: Shapes, *, where: str) -> None:
    """Raise CheckpointError unless names, shapes and the type (float32) are those of `shapes`."""
    check_names({*tensors}, {*shapes}, where=where)
    for name, tensor in tensors.items():
        if tuple(tensor.shape) != shapes[name] or tensor.dtype != torch.float32:
            found = f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"
            raise CheckpointError(_misfit(name, found, shapes[name], where))


def read_weights(path: Path, *, sha256: str, shapes: Shapes) -> dict[str, torch.Tensor]:
    """Return the tensors of a safetensors file that must hold exactly `shapes` in float32.

    Raises
    ------
    CheckpointError
        The file is missing, no safetensors, damaged (its sha256 differs), or holds other tensors.
    """
    where = f"weights '{path}'"
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            header, start = _read_header(file.read(LENGTH_BYTES), file.read, size, where)
            _check_header(header, shapes, num_data_bytes=size - start, where=where)
            file.seek(0)
            data = file.read()
    except OSError as error:
        msg = f"{where}: cannot be read: {error}; copy the whole run folder"
        raise CheckpointError(msg) from error
    if hashlib.sha256(data).hexdigest() != sha256:
        msg = f"{where}: damaged: its sha256 is not the one in model.json; restore it from a copy"
        raise CheckpointError(msg)
    try:
        tensors = safetensors.torch.load(data)
    except (safetensors.SafetensorError, ValueError, KeyError) as error:
        msg = f"{where}: not valid safetensors: {error}"
        raise CheckpointError(msg) from error
    check_tensors(tensors, shapes, where=where)
    return tensors


def _read_header(
    length: bytes, read: Callable[[int], bytes], size: int, where: str
) -> tuple[dict[str, Any], int]:
    """Return the parsed header and the offset of the data behind it."""
    num_bytes = int.from_bytes(length, "little")
    if len(length) < LENGTH_BYTES or num_bytes > min(MAX_HEADER_BYTES, size - LENGTH_BYTES):
        msg = f"{where}: not safetensors, or cut off: a header of {num_bytes} bytes in {size}"
        raise CheckpointError(msg)
    try:
        header = json.loads(read(num_bytes))
    except (ValueError, RecursionError) as error:
        msg = f"{where}: damaged header: {str(error)[:200]}"
        raise CheckpointError(msg) from error
    if not isinstance(header, dict):
        msg = f"{where}: damaged header: not an object"
        raise CheckpointError(msg)
    header.pop(METADATA_KEY, None)
    return header, LENGTH_BYTES + num_bytes


def _check_header(
    header: Mapping[str, Any], shapes: Shapes, *, num_data_bytes: int, where: str
) -> None:
    """Check names, types and shapes, and that the tensors tile the data without gap or overlap."""
    check_names({*header}, {*shapes}, where=where)
    spans = []
    for name, entry in header.items():
        match entry:
            case {"dtype": "F32", "shape": [*shape], "data_offsets": [int(start), int(stop)]}:
                fits = tuple(shape) == shapes[name]
            case _:
                fits, start, stop = False, 0, 0
        if not fits:
            raise CheckpointError(_misfit(name, str(entry)[:120], shapes[name], where))
        if stop - start != FLOAT32_BYTES * math.prod(shapes[name]):
            msg = f"{where}: tensor '{name[:80]}' lies at bytes {start} to {stop}: wrong length"
            raise CheckpointError(msg)
        spans.append((start, stop))
    end = 0
    for start, stop in sorted(spans):
        if start != end:
            msg = f"{where}: tensors overlap or leave a gap at byte {start} of the data"
            raise CheckpointError(msg)
        end = stop
    if end != num_data_bytes:
        msg = f"{where}: {num_data_bytes} bytes of data, the tensors take {end}; cut off?"
        raise CheckpointError(msg)


def _misfit(name: str, found: str, shape: tuple[int, ...], where: str) -> str:
    return f"{where}: tensor '{name[:80]}' is {found}, the network needs float32 {shape}"
