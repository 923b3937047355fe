"""Settings of `wsiseg export`."""

from dataclasses import dataclass

from wsiseg.config import setting


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportConfig:
    """How a slide mask becomes polygons."""

    origin: str = setting(
        "auto",
        "Frame of the coordinates: level 0 as OpenSlide counts it, or the cropped bounds "
        "that QuPath shows (MRXS); auto shifts where the slide has bounds, as QuPath does.",
        choices=("auto", "level0", "bounds"),
    )
    objects: str = setting(
        "auto",
        "Export as QuPath annotations or detections; auto makes detections of more than "
        "5000 objects, which QuPath handles far better.",
        choices=("auto", "annotation", "detection"),
    )
    min_area_um2: float = setting(0.0, "Smaller polygons are dropped (um2).", minimum=0.0)
    min_hole_um2: float = setting(0.0, "Smaller holes are filled (um2).", minimum=0.0)
    simplify_um: float = setting(
        0.0,
        "Tolerance of the outline in um; shared borders stay shared. 0 keeps every pixel edge.",
        minimum=0.0,
    )
    locked: bool = setting(
        True, "Lock the objects in QuPath against accidental dragging.", flag="--locked/--unlocked"
    )
