"""What only tiatoolbox does: some formats, two maskers, three stain methods. One slow process."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("tiatoolbox") is None, reason="tiatoolbox is not installed"
    ),
]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    script = Path(__file__).with_name("tiatoolbox_script.py")
    folder = tmp_path_factory.mktemp("tia")
    command = [sys.executable, str(script), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=280)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    ("name", "reader", "most"),
    [
        ("ome", "openslide:generic-tiff", 0),
        ("planes", "tiatoolbox:", 0),
        ("ngff", "tiatoolbox:NGFFWSIReader", 0),
        ("jp2", "image", 0),
    ],
)
def test_a_format_is_read_with_its_resolution_and_true_pixels(results, name, reader, most):
    found = results[name]
    assert isinstance(found, list), found
    assert found[0].startswith(reader)
    assert found[1] == pytest.approx(0.5)
    assert found[2] <= most
    assert found[4], "a box is not what the whole shows there"


@pytest.mark.parametrize("method", ["otsu", "morphological"])
def test_a_masker_finds_the_tissue(results, method):
    share, agreed = results[method]
    assert 0.4 < share < 0.9
    assert agreed > 0.85


@pytest.mark.parametrize("method", ["macenko", "vahadane", "reinhard"])
def test_a_stain_method_moves_an_image_to_the_target_and_leaves_glass(results, method):
    found = results[method]
    assert isinstance(found, list), found
    before, after, untouched, dtype, glass = found
    if method != "vahadane":  # which tiatoolbox itself calls unstable
        assert after < 0.6 * before
    assert untouched
    assert dtype == "uint8"
    assert glass <= 12


def test_without_a_target_tiatoolboxs_own_is_used(results):
    assert isinstance(results["default target"], list)
