"""Settings of `wsiseg tile`: what is read from a slide and what counts as tissue."""

from dataclasses import dataclass
from pathlib import Path

from wsiseg.config import setting
from wsiseg.errors import ConfigError

TISSUE_METHODS = ("default", "otsu", "morphological", "annotation", "none")
STAIN_METHODS = ("none", "macenko", "vahadane", "reinhard")
CODECS = ("auto", "delta", "zstd", "jpeg", "source")


@dataclass(frozen=True, slots=True, kw_only=True)
class TissueConfig:
    """How the tissue mask is made."""

    method: str = setting(
        "default",
        "Tissue mask: our own (saturation, Otsu), tiatoolbox's otsu or morphological, "
        "a QuPath GeoJSON given by --tissue-annotation, or none (the whole slide).",
        flag="--tissue",
        choices=TISSUE_METHODS,
    )
    annotation: Path | None = setting(
        None,
        "QuPath GeoJSON (or a folder of <slide_id>.geojson) that outlines tissue.",
        flag="--tissue-annotation",
    )
    mpp: float = setting(
        8.0,
        "Resolution of the mask in um/px; tissue borders need no more.",
        flag=False,
        minimum=0.5,
        maximum=128.0,
    )
    min_object_um2: float = setting(
        20_000.0,
        "Smaller pieces of tissue are dropped (um2); about 160 um across.",
        flag=False,
        minimum=0.0,
    )
    min_hole_um2: float = setting(
        20_000.0, "Smaller holes in tissue are filled (um2).", flag=False, minimum=0.0
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class TileConfig:
    """What `wsiseg tile` does with each slide."""

    mpp: float = setting(
        0.5,
        "Resolution of the tiles in um/px; 0.5 (20x) shows nuclei and glands both.",
        minimum=0.01,
        maximum=100.0,
    )
    tile_size: int = setting(
        256, "Side of a tile in pixels.", flag="--tile-size --patch-size", minimum=16, maximum=8192
    )
    overlap: int = setting(0, "Overlap of neighbouring tiles in pixels.", minimum=0)
    slide_mpp: float | None = setting(
        None,
        "Resolution of the slide at level 0 in um/px, overriding its metadata; needed where "
        "the slide states none.",
        minimum=0.01,
        maximum=100.0,
    )
    min_tissue: float = setting(
        0.1, "Smallest fraction of tissue that keeps a tile.", minimum=0.0, maximum=1.0
    )
    stain: str = setting(
        "none",
        "Stain normalisation of the tiles (tiatoolbox).",
        flag="--stain-norm",
        choices=STAIN_METHODS,
    )
    stain_target: Path | None = setting(
        None,
        "Image whose stain the tiles are normalised to; default: tiatoolbox's.",
        flag="--stain-target",
    )
    codec: str = setting(
        "auto",
        "How images are stored. auto: as source where the tiles asked for are the slide's own "
        "JPEG tiles, each decoded once to see that it is whole, else as delta; no pixel changes "
        "either way. delta: lossless, 1.1 to 1.4 times smaller than zstd. zstd: lossless, for zarr "
        "readers in any language. jpeg: quality 95, 4:4:4; 3 times smaller, not lossless. source: "
        "the slide's own JPEG tiles or an error; at disk speed, so that damage inside a tile shows "
        "only when it is read.",
        choices=CODECS,
    )
    labelled_only: bool = setting(False, "Keep only tiles that hold at least one labelled pixel.")
    tissue: TissueConfig = setting(TissueConfig(), "How the tissue mask is made.", flag=False)

    def __post_init__(self) -> None:
        if self.overlap >= self.tile_size:
            msg = (
                f"overlap ({self.overlap} px) must be smaller than tile_size ({self.tile_size} px)"
            )
            raise ConfigError(msg)
        if self.codec == "source" and (self.stain != "none" or self.overlap):
            msg = (
                "--codec source stores the slide's own JPEG tiles untouched; it goes with neither "
                "--stain-norm nor --overlap"
            )
            raise ConfigError(msg)
        if (self.tissue.method == "annotation") != (self.tissue.annotation is not None):
            msg = "--tissue annotation and --tissue-annotation FILE go together"
            raise ConfigError(msg)
