"""TileGrid: where tiles lie on a raster. Pure: the same input always gives the same grid."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from wsiseg.geometry import Box, Raster


def axis_origins(length_px: int, tile_size_px: int, stride_px: int) -> npt.NDArray[np.int64]:
    """Return the origins that cover [0, length) along one axis with tiles of one size.

    Regular steps from 0; the last tile is moved back so that it ends at the border, and hence
    overlaps its neighbour more. A length below the tile size gives the single origin 0.

    Examples
    --------
    length 10, tile 4, stride 4 -> 0, 4, 6
    """
    if tile_size_px < 1 or not 1 <= stride_px <= tile_size_px:
        msg = f"grid: need 1 <= stride <= tile_size, got {stride_px} and {tile_size_px}"
        raise ValueError(msg)
    last = max(0, length_px - tile_size_px)
    regular = np.arange(0, last + 1, stride_px, dtype=np.int64)
    if regular[-1] == last:
        return regular
    return np.append(regular, np.int64(last))


@dataclass(frozen=True, slots=True)
class TileGrid:
    """Square tiles on a raster.

    `origins` : int64 (N, 2) as (x, y) in raster pixels, unique, sorted by (y, x).
    """

    raster: Raster
    tile_size_px: int
    stride_px: int
    origins: npt.NDArray[np.int64]

    @classmethod
    def covering(cls, raster: Raster, *, tile_size_px: int, overlap_px: int = 0) -> "TileGrid":
        """Return the grid that covers the whole raster, edges included."""
        stride_px = tile_size_px - overlap_px
        xs = axis_origins(raster.width_px, tile_size_px, stride_px)
        ys = axis_origins(raster.height_px, tile_size_px, stride_px)
        grid_y, grid_x = np.meshgrid(ys, xs, indexing="ij")
        origins = np.stack([grid_x.ravel(), grid_y.ravel()], axis=1)
        return cls(raster, tile_size_px, stride_px, origins)

    def __len__(self) -> int:
        return len(self.origins)

    def box(self, index: int) -> Box:
        """Return tile `index` as a box; it reaches over the edge of a raster smaller than it."""
        x, y = self.origins[index]
        return Box(int(x), int(y), self.tile_size_px, self.tile_size_px)

    def select(self, keep: npt.NDArray[np.bool_]) -> "TileGrid":
        """Return the grid with only the tiles where `keep` (N,) is true."""
        return TileGrid(self.raster, self.tile_size_px, self.stride_px, self.origins[keep])

    @property
    def origins_l0(self) -> npt.NDArray[np.int64]:
        """Origins in level-0 pixels, rounded to whole pixels: int64 (N, 2) as (x, y)."""
        scale = np.array([self.raster.downsample_x, self.raster.downsample_y])
        origins_l0: npt.NDArray[np.int64] = np.rint(self.origins * scale).astype(np.int64)
        return origins_l0
