"""One finished store of each kind."""

import pytest
import stores_on_disk as data


@pytest.fixture
def tiles(tmp_path):
    return data.write_tiles(tmp_path / "s1.zarr")


@pytest.fixture
def mask(tmp_path):
    return data.write_mask(tmp_path / "s1.mask.zarr")
