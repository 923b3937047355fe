"""How many um a level-0 pixel measures, and whether that can be believed. Never guessed."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

MIN_MPP, MAX_MPP = 0.01, 100.0
"""Between an oil immersion lens and a flatbed scanner; beyond lies a wrong unit (72 dpi is 353)."""

MAX_TAG_MPP = 25.0
"""Most resolution tags of a TIFF are about printing: 300 dpi would be 84.7 um/px, 600 dpi 42.3."""

MAX_ANISOTROPY = 0.1
"""Scanners differ by less than 1 % between the axes; more is a damaged or swapped value."""

_PIXELS = re.compile(r"<Pixels\b[^>]*\bPhysicalSizeX=[^>]*>")
"""The element of OME-XML that states a size; the first one is that of the first image."""

_OME_UM = {"µm": 1.0, "μm": 1.0, "&#181;m": 1.0, "um": 1.0, "nm": 1e-3, "mm": 1e3, "cm": 1e4}
"""The micro sign is written as either of two characters."""

_UM_PER_UNIT = {"inch": 25_400.0, "centimeter": 10_000.0}


@dataclass(frozen=True, slots=True)
class Resolution:
    """um per level-0 pixel and where it was found; `problem` says why there is none."""

    mpp_x: float | None
    mpp_y: float | None
    source: str | None
    problem: str | None


def read_resolution(properties: Mapping[str, str], slide_mpp: float | None) -> Resolution:
    """Return the resolution that the user gives, or a file's properties state, in this order.

    `openslide.mpp-x/y` count first, then OME-XML, then the resolution tags of a plain TIFF.
    """
    if slide_mpp is not None:
        return _checked(slide_mpp, slide_mpp, "user", "--slide-mpp")
    texts = properties.get("openslide.mpp-x"), properties.get("openslide.mpp-y")
    if texts != (None, None):
        is_tag = properties.get("openslide.vendor") == "generic-tiff"
        source = "tiff-resolution" if is_tag else "slide"
        return _checked(_number(texts[0]), _number(texts[1]), source, "its resolution (mpp)")
    ome = _PIXELS.search(properties.get("tiff.ImageDescription", ""))
    if ome is not None:
        mpp_x, mpp_y = (_ome_um(ome.group(), axis) for axis in "XY")
        return _checked(mpp_x, mpp_y, "slide", "the resolution (PhysicalSize) in its OME-XML")
    unit_um = _UM_PER_UNIT.get(properties.get("tiff.ResolutionUnit", ""))
    tags = [_number(properties.get(f"tiff.{axis}Resolution")) for axis in "XY"]
    if unit_um is not None and all(tag > 0 for tag in tags):
        mpp_x, mpp_y = (unit_um / tag for tag in tags)
        return _checked(mpp_x, mpp_y, "tiff-resolution", "the resolution (mpp) in its TIFF tags")
    return Resolution(None, None, None, "states no resolution (mpp)")


def _ome_um(pixels: str, axis: str) -> float:
    """Return an attribute PhysicalSize of an element Pixels in um; NaN if it is missing or odd."""
    size = re.search(rf'\bPhysicalSize{axis}="([^"]*)"', pixels)
    unit = re.search(rf'\bPhysicalSize{axis}Unit="([^"]*)"', pixels)
    um = 1.0 if unit is None else _OME_UM.get(unit.group(1), math.nan)
    return _number(size.group(1)) * um if size else math.nan


def _number(text: str | None) -> float:
    try:
        return float(text) if text is not None else math.nan
    except ValueError:
        return math.nan


def _checked(mpp_x: float, mpp_y: float, source: str, what: str) -> Resolution:
    shown = f"{what} is {mpp_x:.4g} x {mpp_y:.4g} um/px"
    highest = MAX_TAG_MPP if source == "tiff-resolution" else MAX_MPP
    if not all(MIN_MPP <= mpp <= highest for mpp in (mpp_x, mpp_y)):
        problem = f"{shown}, which cannot be (believable: {MIN_MPP} to {highest:.0f})"
        return Resolution(None, None, None, problem)
    if max(mpp_x, mpp_y) / min(mpp_x, mpp_y) - 1 > MAX_ANISOTROPY:
        return Resolution(None, None, None, f"{shown}: the axes differ by more than 10 %")
    return Resolution(mpp_x, mpp_y, source, None)
