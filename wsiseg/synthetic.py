"""A procedural H&E-like slide whose truth is known exactly: for the demo, tests and benchmarks.

Glands (a pale lumen, a ring of epithelium with crowded nuclei) lie in pink stroma with scattered
nuclei and patches of lymphocytes, on an irregular piece of tissue on white glass. Colour alone
does not tell gland from lymphocytes: a network has to look at the arrangement.

Every pixel is a pure function of its position in um and the seed, so that a region can be made at
any place and size without the rest, and slides of any size cost no memory.
"""

import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numba
import numpy as np
import numpy.typing as npt
import tifffile

from wsiseg.geometry import Box

GLAND = 1
"""Label of a gland, its lumen included; 0 is everything else."""

TILE_PX = 256
PYRAMID_STEP = 4

LARGE_MPP = 0.25
PIECE_PX = 4096
"""Side of the pieces of tissue that a large slide is laid with, in level-0 pixels."""
BLOCK_PX = 1024
"""Its tissue ends at multiples of this: one tile of the second level."""
NUM_PIECES = 2
LARGE_SPREAD = 1.14
"""The disc of tissue, shrunk by this, covers half of the slide."""

_GLAND_CELL_UM = 120.0
_GLAND_SHARE = 0.75
_MAX_GLAND_UM = 61.0
_EPITHELIUM_CELL_UM = 8.5
_STROMA_CELL_UM = 14.0
_LYMPH_CELL_UM = 8.0

UInt8 = npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True, kw_only=True)
class SyntheticTissue:
    """One synthetic slide: its size in level-0 pixels, resolution in um/px and seed."""

    width_px: int
    height_px: int
    mpp: float = 0.5
    seed: int = 0

    def region(self, box: Box) -> tuple[UInt8, UInt8]:
        """Return the pixels and the truth of a level-0 box.

        Returns
        -------
        image, labels
            uint8 (H, W, 3) RGB and uint8 (H, W), `GLAND` or 0.
        """
        image = np.empty((box.height, box.width, 3), np.uint8)
        labels = np.empty((box.height, box.width), np.uint8)
        _render(
            image,
            labels,
            np.int64(box.x),
            np.int64(box.y),
            self.mpp,
            self.width_px * self.mpp,
            self.height_px * self.mpp,
            np.int64(self.seed),
        )
        return image, labels


def write_slide(path: Path, tissue: SyntheticTissue, *, jpeg_quality: int = 90) -> None:
    """Write a tiled, pyramidal JPEG TIFF that OpenSlide opens, resolution in its tags.

    Memory: one row of tiles, and the levels below the first (1/16 of the area in RGB).
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    small = np.empty(
        (-(-tissue.height_px // PYRAMID_STEP), -(-tissue.width_px // PYRAMID_STEP), 3), np.uint8
    )
    mpp = tissue.mpp
    with tifffile.TiffWriter(path, bigtiff=tissue.width_px * tissue.height_px > 1 << 30) as tiff:
        shape = (tissue.height_px, tissue.width_px, 3)
        _write_level(tiff, _level_0_tiles(tissue, small), shape, mpp, jpeg_quality, subfile=0)
        while True:
            mpp *= PYRAMID_STEP
            _write_level(tiff, _tiles_of(small), small.shape, mpp, jpeg_quality, subfile=1)
            if max(small.shape) <= 4 * TILE_PX:
                break
            small = _shrink(small)


def write_large_slide(path: Path, *, side_px: int, seed: int = 0, jpeg_quality: int = 80) -> None:
    """Write a square slide of any size at 0.25 um/px, about half tissue, for benchmarks of scale.

    The tissue is a mosaic of a few pieces that are made and compressed once, so that 10^10 pixels
    take a minute; which piece lies where is random. Levels at 1/4, 1/16, ... as in `write_slide`.
    Memory: the pieces, and the levels from 1/16 on (1/256 of the area in RGB).
    """
    mosaic = _Mosaic.make(side_px, seed=seed, jpeg_quality=jpeg_quality)
    path.parent.mkdir(parents=True, exist_ok=True)
    mpp = LARGE_MPP
    with tifffile.TiffWriter(path, bigtiff=True) as tiff:
        for level in (0, 1):
            side = -(-side_px // PYRAMID_STEP**level)
            tiles = mosaic.tiles(level)
            _write_level(tiff, tiles, (side, side, 3), mpp, jpeg_quality, subfile=level)
            mpp *= PYRAMID_STEP
        small = mosaic.overview()
        while True:
            _write_level(tiff, _tiles_of(small), small.shape, mpp, jpeg_quality, subfile=1)
            if max(small.shape) <= 4 * TILE_PX:
                break
            mpp *= PYRAMID_STEP
            small = _shrink(small)


@dataclass(frozen=True, slots=True)
class _Mosaic:
    """Where glass and which piece of tissue lies on a large slide, and the pieces themselves.

    `pieces` : index per block of `BLOCK_PX` level-0 pixels, -1 is glass. `compressed` :
    for each piece (glass is the last) and each of the two finest levels its JPEG tiles in reading
    order. `small` : each piece at 1/16 of its size.
    """

    side_px: int
    pieces: npt.NDArray[np.int64]
    compressed: list[list[list[bytes]]]
    small: list[UInt8]

    @classmethod
    def make(cls, side_px: int, *, seed: int, jpeg_quality: int) -> "_Mosaic":
        images = [_piece(number, seed) for number in range(NUM_PIECES)]
        images.append(_glass(seed))
        compressed, small = [], []
        for image in images:
            quarter = _shrink(image)
            compressed.append([_compress(level, jpeg_quality) for level in (image, quarter)])
            small.append(_shrink(quarter))
        return cls(side_px, _layout(side_px, seed), compressed, small)

    def tiles(self, level: int) -> Iterator[bytes]:
        """Yield the compressed tiles of level 0 or 1 in reading order."""
        tile_px_l0 = TILE_PX * PYRAMID_STEP**level
        across = PIECE_PX // tile_px_l0
        for y in range(0, self.side_px, tile_px_l0):
            for x in range(0, self.side_px, tile_px_l0):
                piece = self.pieces[y // BLOCK_PX, x // BLOCK_PX]
                place = y // tile_px_l0 % across * across + x // tile_px_l0 % across
                yield self.compressed[piece][level][place]

    def overview(self) -> UInt8:
        """Return the slide at 1/16 of its size, uint8 (h, w, 3)."""
        step = PYRAMID_STEP**2
        side, block = -(-self.side_px // step), BLOCK_PX // step
        out = np.empty((len(self.pieces) * block, len(self.pieces) * block, 3), np.uint8)
        for row, column in np.ndindex(self.pieces.shape):
            y, x = (i * block % (PIECE_PX // step) for i in (row, column))
            out[row * block : (row + 1) * block, column * block : (column + 1) * block] = (
                self.small[self.pieces[row, column]][y : y + block, x : x + block]
            )
        return out[:side, :side]


def _layout(side_px: int, seed: int) -> npt.NDArray[np.int64]:
    """Return the piece of each block: int64 (n, n), -1 for glass outside a wavy disc."""
    blocks = -(-side_px // BLOCK_PX)
    rng = np.random.default_rng(seed)
    per_piece = PIECE_PX // BLOCK_PX
    chosen = rng.integers(0, NUM_PIECES, (blocks // per_piece + 1,) * 2)
    chosen = chosen.repeat(per_piece, axis=0).repeat(per_piece, axis=1)[:blocks, :blocks]
    for row, column in np.ndindex(blocks, blocks):
        u, v = (LARGE_SPREAD * (2 * (i + 0.5) / blocks - 1) for i in (column, row))
        if not _is_tissue((u + 1) / 2, (v + 1) / 2, 1.0, 1.0, seed):
            chosen[row, column] = -1
    return chosen


def _piece(number: int, seed: int) -> UInt8:
    far_px = 1 << 20  # the middle of a slide so large that the piece is all tissue
    tissue = SyntheticTissue(width_px=far_px, height_px=far_px, mpp=LARGE_MPP, seed=seed)
    start = far_px // 2 + number * PIECE_PX
    return tissue.region(Box(start, far_px // 2, PIECE_PX, PIECE_PX))[0]


def _glass(seed: int) -> UInt8:
    rng = np.random.default_rng(seed)
    noise = rng.integers(0, 5, (PIECE_PX, PIECE_PX, 1), dtype=np.uint8)
    return noise + np.array([241, 239, 242], np.uint8)


def _compress(image: UInt8, jpeg_quality: int) -> list[bytes]:
    """Return the tiles of an image as they lie in a file of ours."""
    file = io.BytesIO()
    with tifffile.TiffWriter(file) as tiff:
        _write_level(tiff, _tiles_of(image), image.shape, LARGE_MPP, jpeg_quality, subfile=0)
    file.seek(0)
    data = file.getvalue()
    with tifffile.TiffFile(file) as tiff:
        page = tiff.pages.first
        places = zip(page.dataoffsets, page.databytecounts, strict=True)
        return [data[offset : offset + size] for offset, size in places]


def _write_level(
    tiff: tifffile.TiffWriter,
    tiles: Iterator[UInt8] | Iterator[bytes],
    shape: tuple[int, ...],
    mpp: float,
    jpeg_quality: int,
    *,
    subfile: int,
) -> None:
    pixels_per_cm = 1e4 / mpp
    tiff.write(
        tiles,
        shape=shape,
        dtype=np.uint8,
        tile=(TILE_PX, TILE_PX),
        photometric="rgb",
        compression="jpeg",
        compressionargs={"level": jpeg_quality},
        resolution=(pixels_per_cm, pixels_per_cm),
        resolutionunit="CENTIMETER",
        subfiletype=subfile,
        metadata=None,
        software=False,
    )


def _level_0_tiles(tissue: SyntheticTissue, small: UInt8) -> Iterator[UInt8]:
    """Yield level 0 tile by tile in reading order, filling `small` on the way."""
    step = PYRAMID_STEP
    for y in range(0, tissue.height_px, TILE_PX):
        height = min(TILE_PX, tissue.height_px - y)
        row, _ = tissue.region(Box(0, y, tissue.width_px, height))
        shrunk = _shrink(row)
        small[y // step : y // step + len(shrunk)] = shrunk
        yield from _tiles_of(row)


def _tiles_of(image: UInt8) -> Iterator[UInt8]:
    for y in range(0, image.shape[0], TILE_PX):
        for x in range(0, image.shape[1], TILE_PX):
            part = image[y : y + TILE_PX, x : x + TILE_PX]
            lacking = ((0, TILE_PX - part.shape[0]), (0, TILE_PX - part.shape[1]), (0, 0))
            yield np.pad(part, lacking, mode="edge")


def _shrink(image: UInt8) -> UInt8:
    """Return the image at a quarter of its size, each pixel the mean of 4 x 4."""
    step = PYRAMID_STEP
    height, width = image.shape[:2]
    padded = np.pad(image, ((0, -height % step), (0, -width % step), (0, 0)), mode="edge")
    blocks = padded.reshape(padded.shape[0] // step, step, padded.shape[1] // step, step, 3)
    means = blocks.mean(axis=(1, 3), dtype=np.float32)
    shrunk: UInt8 = np.rint(means).astype(np.uint8)
    return shrunk


@numba.njit(cache=True, inline="always")
def _random(x: int, y: int, seed: int, channel: int) -> float:
    """Return a uniform number in [0, 1) that depends on the integers alone (a mixing hash)."""
    h = (
        np.uint64(x) * np.uint64(0x9E3779B97F4A7C15)
        ^ np.uint64(y) * np.uint64(0xC2B2AE3D27D4EB4F)
        ^ np.uint64(seed * 64 + channel) * np.uint64(0x165667B19E3779F9)
    )
    h ^= h >> np.uint64(33)
    h *= np.uint64(0xFF51AFD7ED558CCD)
    h ^= h >> np.uint64(33)
    h *= np.uint64(0xC4CEB9FE1A85EC53)
    h ^= h >> np.uint64(33)
    return float(h >> np.uint64(11)) * (1.0 / (1 << 53))


@numba.njit(cache=True)
def _noise(x: float, y: float, seed: int, channel: int) -> float:
    """Return smooth value noise in [0, 1] with features of size 1."""
    ix, iy = np.int64(np.floor(x)), np.int64(np.floor(y))
    fx, fy = x - ix, y - iy
    fx, fy = fx * fx * (3 - 2 * fx), fy * fy * (3 - 2 * fy)
    top = _random(ix, iy, seed, channel) * (1 - fx) + _random(ix + 1, iy, seed, channel) * fx
    bottom = (
        _random(ix, iy + 1, seed, channel) * (1 - fx) + _random(ix + 1, iy + 1, seed, channel) * fx
    )
    return float(top * (1 - fy) + bottom * fy)


@numba.njit(cache=True)
def _gland_depth(x: float, y: float, seed: int) -> float:
    """Return the distance from a gland's centre over its radius there; >= 1 is outside."""
    best = 9.0
    cell_x, cell_y = np.int64(np.floor(x / _GLAND_CELL_UM)), np.int64(np.floor(y / _GLAND_CELL_UM))
    for iy in range(cell_y - 1, cell_y + 2):
        for ix in range(cell_x - 1, cell_x + 2):
            if _random(ix, iy, seed, 1) > _GLAND_SHARE:
                continue
            dx = x - (ix + 0.4 + 0.2 * _random(ix, iy, seed, 2)) * _GLAND_CELL_UM
            dy = y - (iy + 0.4 + 0.2 * _random(ix, iy, seed, 3)) * _GLAND_CELL_UM
            if dx * dx + dy * dy > _MAX_GLAND_UM**2:
                continue
            angle = np.arctan2(dy, dx)
            turn = 6.2831853 * _random(ix, iy, seed, 4)
            lobes = 1 + 0.16 * np.sin(2 * angle + turn) + 0.09 * np.sin(5 * angle + 2 * turn)
            radius = (28 + 20 * _random(ix, iy, seed, 5)) * lobes
            best = min(best, np.sqrt(dx * dx + dy * dy) / radius)
    return best


@numba.njit(cache=True)
def _in_nucleus(
    x: float, y: float, seed: int, channel: int, cell_um: float, radius_um: float, share: float
) -> bool:
    """Whether a point lies in one of the ellipses on a jittered grid, `share` of them present."""
    cell_x, cell_y = np.int64(np.floor(x / cell_um)), np.int64(np.floor(y / cell_um))
    for iy in range(cell_y - 1, cell_y + 2):
        for ix in range(cell_x - 1, cell_x + 2):
            if _random(ix, iy, seed, channel) > share:
                continue
            dx = x - (ix + _random(ix, iy, seed, channel + 1)) * cell_um
            dy = y - (iy + _random(ix, iy, seed, channel + 2)) * cell_um
            if dx * dx + dy * dy > (1.25 * radius_um) ** 2:
                continue
            turn = 3.1415927 * _random(ix, iy, seed, channel + 3)
            along = dx * np.cos(turn) + dy * np.sin(turn)
            across = dy * np.cos(turn) - dx * np.sin(turn)
            if (along / (1.25 * radius_um)) ** 2 + (across / (0.8 * radius_um)) ** 2 < 1:
                return True
    return False


@numba.njit(cache=True)
def _is_tissue(x: float, y: float, width_um: float, height_um: float, seed: int) -> bool:
    """Whether a point lies in the piece of tissue: a disc with a wavy outline."""
    u, v = 2 * x / width_um - 1, 2 * y / height_um - 1
    wave = 0.25 * (_noise(3 * u, 3 * v, seed, 6) - 0.5) + 0.06 * (
        _noise(14 * u, 14 * v, seed, 7) - 0.5
    )
    return bool(u * u + v * v < (0.92 + wave) ** 2)


@numba.njit(cache=True, nogil=True)
def _render(
    image: UInt8,
    labels: UInt8,
    left: int,
    top: int,
    mpp: float,
    width_um: float,
    height_um: float,
    seed: int,
) -> None:
    for row in range(labels.shape[0]):
        for column in range(labels.shape[1]):
            px, py = left + column, top + row
            x, y = (px + 0.5) * mpp, (py + 0.5) * mpp
            label = 0
            if not _is_tissue(x, y, width_um, height_um, seed):
                red, green, blue = 243.0, 241.0, 244.0
                grain = 3.0
            else:
                grain = 14.0
                depth = _gland_depth(x, y, seed)
                fibre = _noise(x / 40 + y / 9, y / 40 - x / 25, seed, 8)
                if depth < 1:
                    label = GLAND
                    red, green, blue = 206.0, 150.0, 196.0
                    if depth < 0.38:
                        red, green, blue = 240.0, 226.0, 238.0
                    elif depth > 0.55 and _in_nucleus(
                        x, y, seed, 10, _EPITHELIUM_CELL_UM, 3.6, 0.95
                    ):
                        red, green, blue = 104.0, 70.0, 146.0
                else:
                    red, green, blue = 222.0 + 16 * fibre, 156.0 + 40 * fibre, 190.0 + 22 * fibre
                    is_lymph = _noise(x / 90, y / 90, seed, 9) > 0.72
                    cell_um = _LYMPH_CELL_UM if is_lymph else _STROMA_CELL_UM
                    share = 0.9 if is_lymph else 0.35
                    if _in_nucleus(x, y, seed, 20 if is_lymph else 30, cell_um, 2.9, share):
                        red, green, blue = 96.0, 64.0, 140.0
            shade = grain * (_random(px, py, seed, 40) - 0.5) + grain * (
                _noise(x / 3, y / 3, seed, 41) - 0.5
            )
            labels[row, column] = label
            image[row, column, 0] = np.uint8(min(255.0, max(0.0, red + shade)))
            image[row, column, 1] = np.uint8(min(255.0, max(0.0, green + shade)))
            image[row, column, 2] = np.uint8(min(255.0, max(0.0, blue + shade)))
