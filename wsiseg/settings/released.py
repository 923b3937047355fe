"""Settings of `wsiseg import-checkpoint`: what a released checkpoint does not say of itself."""

from dataclasses import dataclass

from wsiseg.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class ImportConfig:
    """The tiles that a released network was trained on.

    `mpp` : their resolution in um/px, about 0.25 for MoNuSeg and 0.62 for GlaS. `tile_size_px` :
    their side.
    """

    mpp: float
    tile_size_px: int = 256

    def __post_init__(self) -> None:
        if not 0.01 <= self.mpp <= 100:
            msg = f"mpp must lie in 0.01..100 um/px, got {self.mpp}"
            raise ConfigError(msg)
        if self.tile_size_px < 8 or self.tile_size_px % 8:
            msg = f"tile size must be a multiple of 8 px, got {self.tile_size_px}"
            raise ConfigError(msg)
