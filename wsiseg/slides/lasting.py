"""An OpenSlide that goes on after an error, which OpenSlide's own handle never does."""

from pathlib import Path

import openslide
from PIL import Image


class LastingSlide(openslide.OpenSlide):
    """A slide of which a damaged tile spoils no other read.

    After an error OpenSlide answers every read, of whatever place and thread, with that same error.
    Here a read that fails is done again with a handle of its own, so it fails only where the slide
    itself is damaged.
    """

    def __init__(self, path: Path) -> None:
        """Open as openslide.OpenSlide does."""
        super().__init__(path)
        self._path = path
        self._later: list[openslide.OpenSlide] = []

    def read_region(
        self, location: tuple[int, int], level: int, size: tuple[int, int]
    ) -> Image.Image:
        """Return a region as openslide.OpenSlide does, or raise its error about this region."""
        try:
            if self._later:
                return self._later[-1].read_region(location, level, size)
            return super().read_region(location, level, size)
        except openslide.OpenSlideError:
            again = openslide.OpenSlide(self._path)
        try:
            image = again.read_region(location, level, size)
        except openslide.OpenSlideError:
            again.close()
            raise
        self._later.append(again)  # the failed one stays open: another thread may be reading
        return image

    def close(self) -> None:
        """Close every handle."""
        for slide in self._later:
            slide.close()
        super().close()
