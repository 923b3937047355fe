"""What both kinds of store have in common: attributes, versions, codecs, opening and checking."""

import dataclasses
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import zarr
from zarr.codecs import ZstdCodec

from wsiseg import outputs
from wsiseg.classes import ClassTable
from wsiseg.errors import OutputExistsError, StoreCorruptError, StoreError
from wsiseg.geometry import Raster
from wsiseg.runinfo import RunInfo, check_same_run, fingerprint_of
from wsiseg.store.ledger import LEDGER, check_sizes, read_ledger

logger = logging.getLogger(__name__)

FORMAT_VERSIONS: Mapping["Kind", int] = {"tiles": 1, "mask": 2}
"""The newest version of each kind that this wsiseg reads, and the one that it writes."""

ATTRIBUTES = "wsiseg"
"""Key of our attributes in the group's `zarr.json`."""

Kind = Literal["tiles", "mask"]


def checked_zstd() -> list[Any]:
    """Return zstd as the compressors of an array; it notices no flipped bit unless told to."""
    return [ZstdCodec(level=1, checksum=True)]


def shard_path(array: Path, shard: int, num_axes: int) -> Path:
    """Return the file of a shard of an array that is cut along its first axis only."""
    return array.joinpath("c", str(shard), *("0",) * (num_axes - 1))


def raster_to_dict(raster: Raster) -> dict[str, Any]:
    """Return plain JSON values that `raster_from_dict` reads back exactly."""
    return dataclasses.asdict(raster)


def read_attributes(path: Path, kind: Kind) -> dict[str, Any]:
    """Return our attributes of the group at `path`, checked for kind and version.

    Raises
    ------
    StoreError
        Not a zarr group, not ours, of the other kind, or of a newer format.
    """
    if not path.is_dir():
        found = "a file" if path.exists() else "no such folder"
        msg = f"store '{path}': {found}; expected a {kind} store made by wsiseg"
        raise StoreError(msg)
    try:
        attributes = zarr.open_group(path, mode="r").attrs.asdict().get(ATTRIBUTES)
    except Exception as error:
        msg = f"store '{path}': not a zarr group ({type(error).__name__}: {error})"
        raise StoreError(msg) from error
    if not isinstance(attributes, dict):
        msg = f"store '{path}': a zarr group, but not made by wsiseg"
        raise StoreError(msg)
    version = attributes.get("format_version")
    if not isinstance(version, int) or version < 1:
        msg = f"store '{path}': has no valid format version ({version!r})"
        raise StoreError(msg)
    if version > FORMAT_VERSIONS[kind]:
        msg = (
            f"store '{path}': has format version {version}, newer than {FORMAT_VERSIONS[kind]}, "
            "the newest this wsiseg reads; upgrade wsiseg"
        )
        raise StoreError(msg)
    if attributes.get("kind") != kind:
        msg = f"store '{path}': holds {attributes.get('kind')!r}, expected {kind!r}"
        raise StoreError(msg)
    return attributes


@contextmanager
def parsing(path: Path) -> Iterator[None]:
    """Turn what goes wrong while attributes are parsed into a StoreError that names the store."""
    try:
        yield
    except StoreError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        msg = f"store '{path}': its attributes are damaged ({type(error).__name__}: {error})"
        raise StoreError(msg) from error


@contextmanager
def reading(path: Path, what: str) -> Iterator[None]:
    """Turn any decoding failure (a checksum that differs, a short file) into StoreCorruptError."""
    try:
        yield
    except (IndexError, MemoryError):
        raise
    except Exception as error:
        msg = (
            f"store '{path}': {what} cannot be decoded ({type(error).__name__}: {error}); "
            "`wsiseg verify` tells which files are damaged"
        )
        raise StoreCorruptError(msg) from error


def open_finished(path: Path, kind: Kind) -> dict[str, Any]:
    """Return the attributes of a finished store after a check that all of its files are there."""
    attributes = read_attributes(path, kind)
    check_sizes(path, read_ledger(path))
    return attributes


def is_finished(path: Path, kind: Kind, run: RunInfo) -> bool:
    """Whether a finished store of the same run lies at `path`.

    One that lost a file or a part of one is not, so that the command that made it makes it again.

    Raises
    ------
    OutputExistsError
        Something else lies there.
    """
    outputs.recover(path)
    if not path.exists():
        return False
    try:
        attributes = read_attributes(path, kind)
    except StoreError as error:
        msg = f"output '{path}' exists already ({error}); choose another or pass --overwrite"
        raise OutputExistsError(msg) from error
    check_same_run(fingerprint_of(attributes.get("run", {})), run.fingerprint, output=path)
    if not (path / LEDGER).is_file():
        return False
    try:
        check_sizes(path, read_ledger(path))
    except StoreCorruptError as error:
        logger.warning("%s (which this command does now)", error)
        return False
    return True


def classes_from(attributes: Mapping[str, Any], path: Path) -> ClassTable | None:
    """Return the class table in the attributes of the store at `path`, if it has one."""
    value = attributes.get("classes")
    return None if value is None else ClassTable.from_dict(value, where=f"store '{path}'")


def array(group: zarr.Group, name: str) -> "zarr.Array[Any]":
    """Return an array of a group; TypeError if it is a group."""
    found = group[name]
    if not isinstance(found, zarr.Array):
        msg = f"{name} is not an array"
        raise TypeError(msg)
    return found
