"""Open an image file with PIL without the limit that PIL has for photographs."""

import threading
from pathlib import Path

from PIL import Image

_LIMIT_LOCK = threading.Lock()


def open_image(path: Path, formats: tuple[str, ...] | None = None) -> Image.Image:
    """Return an image of which only the header was read; its size must be checked before more is.

    PIL warns of 89 megapixels on stderr and refuses 178, which are small for a slide or its mask.

    Parameters
    ----------
    formats
        Those of PIL's that are tried; all if None.

    Raises
    ------
    OSError, SyntaxError, ValueError
        The file cannot be read, or is no image of these formats.
    """
    with _LIMIT_LOCK:
        limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            return Image.open(path, formats=formats)
        finally:
            Image.MAX_IMAGE_PIXELS = limit
