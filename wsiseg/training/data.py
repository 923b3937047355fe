"""Tiles of many stores as one set, split by patient, in an order that needs no memory.

Which tiles make step k is a function of the seed and k alone, so that a run resumed at any step
goes on with the tiles it would have had.
"""

import functools
import logging
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from wsiseg.errors import StoreError
from wsiseg.geometry import MPP_SNAP_TOLERANCE
from wsiseg.store.tiles import TileStore

logger = logging.getLogger(__name__)

ValueT = TypeVar("ValueT")

CACHE_BYTES = 2 << 30
"""Decoded tiles kept in memory; a set that fits is read from disk once."""


@dataclass(frozen=True, slots=True)
class Tiles:
    """Images uint8 (n, S, S, 3), labels uint8 (n, S, S) with 255 = ignore, and their names."""

    images: npt.NDArray[np.uint8]
    labels: npt.NDArray[np.uint8]
    names: list[str]


class TileSet:
    """Some of the tiles of some stores, by number 0..len-1. Reads are thread-safe."""

    def __init__(self, stores: Sequence[TileStore], places: npt.NDArray[np.int64]) -> None:
        """Take `places` int64 (n, 2): store number and tile number."""
        self._stores = stores
        self._places = places
        self._cache: dict[int, tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]] = {}
        self.tile_size_px = stores[0].tile_size_px if stores else 0
        self._can_cache = len(places) * self.tile_size_px**2 * 4 <= CACHE_BYTES

    def __len__(self) -> int:
        return len(self._places)

    def name(self, index: int) -> str:
        """Return the slide and number of a tile, for messages."""
        store, tile = self._places[index]
        return f"{self._stores[store].slide_id}[{tile}]"

    def read(self, indices: Sequence[int] | npt.NDArray[np.int64]) -> Tiles:
        """Return tiles in the order of `indices`."""
        pairs = [self._read_one(int(i)) for i in indices]
        return Tiles(
            np.stack([image for image, _ in pairs]),
            np.stack([label for _, label in pairs]),
            [self.name(int(i)) for i in indices],
        )

    def _read_one(self, index: int) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]:
        found = self._cache.get(index)
        if found is None:
            store, tile = self._places[index]
            source = self._stores[store]
            found = source.read_images([tile])[0], source.read_labels([tile])[0]
            if self._can_cache:
                self._cache[index] = found
        return found


class Sampler:
    """The tiles of each step: every epoch is a new permutation of all."""

    def __init__(self, num_tiles: int, *, batch_size: int, seed: int) -> None:
        self._num_tiles = num_tiles
        self._batch_size = batch_size
        self._order = functools.lru_cache(maxsize=2)(
            lambda epoch: np.random.default_rng([seed, epoch]).permutation(num_tiles)
        )

    def indices(self, step: int) -> npt.NDArray[np.int64]:
        """Return the tile numbers of a step (counted from 0): int64 (batch_size,)."""
        first = step * self._batch_size
        positions = range(first, first + self._batch_size)
        places = (divmod(position, self._num_tiles) for position in positions)
        return np.array([self._order(epoch)[place] for epoch, place in places], np.int64)


def read_ahead(read: Callable[[int], ValueT], steps: range) -> Iterator[tuple[int, ValueT]]:
    """Yield (step, read(step)); the next one is read in a thread while the caller works."""
    with ThreadPoolExecutor(1) as pool:
        following = pool.submit(read, steps.start) if steps else None
        for step in steps:
            assert following is not None
            value = following.result()
            following = pool.submit(read, step + 1) if step + 1 < steps.stop else None
            yield step, value


def check_stores_agree(stores: Sequence[TileStore]) -> None:
    """Raise StoreError unless all stores have one tile size, resolution and class table."""
    first = stores[0]
    tables = [store for store in stores if store.classes is not None]
    for store in stores[1:]:
        if store.tile_size_px != first.tile_size_px:
            msg = (
                f"tile stores differ: '{first.slide_id}' has tiles of {first.tile_size_px} px, "
                f"'{store.slide_id}' of {store.tile_size_px} px; tile all slides alike"
            )
            raise StoreError(msg)
        if abs(store.raster.mpp / first.raster.mpp - 1) > 2 * MPP_SNAP_TOLERANCE:
            msg = (
                f"tile stores differ: '{first.slide_id}' is at {first.raster.mpp:.4g} um/px, "
                f"'{store.slide_id}' at {store.raster.mpp:.4g}; tile all slides with one --mpp"
            )
            raise StoreError(msg)
    for store in tables[1:]:
        if store.classes != tables[0].classes:
            msg = (
                f"tile stores differ: '{tables[0].slide_id}' has the classes "
                f"{_names(tables[0])}, '{store.slide_id}' {_names(store)}; tile all slides with "
                "one --classes FILE"
            )
            raise StoreError(msg)


def _names(store: TileStore) -> str:
    return ", ".join(store.classes.names[1:]) if store.classes else "none"


def split_tiles(
    stores: Sequence[TileStore], *, val_fraction: float, seed: int, labelled_only: bool
) -> tuple[TileSet, TileSet]:
    """Return the tiles to learn from and those to validate on; no patient gives to both.

    A split that the cohort names counts (test slides are left out of both); other patients are
    drawn by seed. With one patient only, validation takes the last tiles of each slide instead,
    which lie together in its lower part, and a warning says so.

    Raises
    ------
    StoreError
        Nothing is left to learn from.
    """
    chosen = [
        np.flatnonzero(store.labelled_px > 0) if labelled_only else np.arange(store.num_tiles)
        for store in stores
    ]
    named = named_splits((store.group_id, store.split) for store in stores)
    used = {s.group_id for s, tiles in zip(stores, chosen, strict=True) if len(tiles)}
    groups = {group: split for group, split in named.items() if group in used}
    splits = split_groups(groups, val_fraction=val_fraction, seed=seed)
    places: dict[str, list[tuple[int, int]]] = {"train": [], "val": [], "test": []}
    for number, (store, tiles) in enumerate(zip(stores, chosen, strict=True)):
        if len(tiles):
            places[splits[store.group_id]] += [(number, int(tile)) for tile in tiles]
    train, val = places["train"], places["val"]
    if not train:
        msg = (
            f"no {'labelled ' if labelled_only else ''}tile to learn from in {len(stores)} stores "
            "(slides of the splits val and test are not learned from)"
        )
        raise StoreError(msg)
    if not val and val_fraction > 0 and len(train) > 1:
        num = max(1, round(val_fraction * len(train)))
        train, val = train[:-num], train[-num:]
        logger.warning(
            "only one patient: validating on %d of its own tiles, which flatters the result", num
        )
    return _tile_set(stores, train), _tile_set(stores, val)


def named_splits(slides: Iterable[tuple[str, str | None]]) -> dict[str, str | None]:
    """Return the split that some slide of each group (patient) names, None where none does.

    Parameters
    ----------
    slides
        Group and split of each slide.

    Raises
    ------
    StoreError
        Slides of one patient are in two splits.
    """
    named: dict[str, str | None] = {}
    for group, split in slides:
        other = named.get(group)
        if other is not None and split is not None and other != split:
            msg = (
                f"slides of one patient are in the splits {other} and {split}; correct the cohort "
                "and run `wsiseg tile --overwrite`"
            )
            raise StoreError(msg)
        named[group] = other or split
    return named


def _tile_set(stores: Sequence[TileStore], places: list[tuple[int, int]]) -> TileSet:
    return TileSet(stores, np.array(places, np.int64).reshape(-1, 2))


def split_groups(
    groups: dict[str, str | None], *, val_fraction: float, seed: int
) -> dict[str, str]:
    """Return a split for every group (patient): the one it has, or train or val by seed.

    Nothing is drawn if some group is named val already. At least one group stays in train.
    """
    named = {group: split for group, split in groups.items() if split is not None}
    free = sorted(group for group, split in groups.items() if split is None)
    random.Random(seed).shuffle(free)
    num_val = 0
    if "val" not in named.values() and val_fraction > 0:
        num_val = max(1, round(val_fraction * len(free)))
        num_val = min(num_val, len(free) - (0 if "train" in named.values() else 1))
    drawn = {g: "val" if i < num_val else "train" for i, g in enumerate(free)}
    return named | drawn
