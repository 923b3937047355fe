"""Stain normalisation by tiatoolbox: Macenko, Vahadane, Reinhard."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt

from wsiseg.errors import ConfigError
from wsiseg.slides.images import open_image

UInt8 = npt.NDArray[np.uint8]

MAX_TARGET_PIXELS = 64_000_000


def make_normalizer(method: str, target: Path | None = None) -> Callable[[UInt8], UInt8]:
    """Return a function that gives an image uint8 (H, W, 3) the stain of the target image.

    An image in which the method finds no stain (glass, a speck) comes back as it is.

    Parameters
    ----------
    method
        "macenko", "vahadane" or "reinhard".
    target
        Image whose stain is wanted; default: tiatoolbox's own example.

    Raises
    ------
    ConfigError
        tiatoolbox is not installed, or the target cannot be used.
    """
    try:  # 20 s and 1.3 GB: only where it is asked for
        from tiatoolbox.data import stain_norm_target
        from tiatoolbox.tools.stainnorm import get_normalizer
    except ImportError as error:
        msg = f"--stain-norm {method} needs tiatoolbox: pip install 'wsiseg[tia]'"
        raise ConfigError(msg) from error
    normalizer = get_normalizer(method)
    image = stain_norm_target() if target is None else _read_target(target)
    try:
        normalizer.fit(image)
    except (ValueError, np.linalg.LinAlgError, IndexError, ZeroDivisionError) as error:
        msg = f"--stain-target '{target}': {method} finds no stain in it: {error}"
        raise ConfigError(msg) from error

    def normalize(pixels: UInt8) -> UInt8:
        try:
            return np.asarray(normalizer.transform(pixels.copy()), np.uint8)
        except (ValueError, np.linalg.LinAlgError, IndexError, ZeroDivisionError):
            return pixels

    return normalize


def _read_target(path: Path) -> UInt8:
    try:
        with open_image(path) as image:
            if image.width * image.height > MAX_TARGET_PIXELS:
                msg = f"--stain-target '{path}': larger than {MAX_TARGET_PIXELS} px"
                raise ConfigError(msg)
            return np.array(image.convert("RGB"))  # tiatoolbox writes into it
    except (OSError, SyntaxError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        msg = f"--stain-target '{path}': cannot be read as an image: {error}"
        raise ConfigError(msg) from error
