"""Who may import whom, held as data. A newcomer reads the table to know where a thing belongs."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "wsiseg"

LAYERS = {
    "cli": 6,
    "demo": 5,
    "__main__": 7,
    "stages": 4,
    "training": 3,
    "inference": 3,
    "vector": 3,
    "slides": 2,
    "store": 2,
    "models": 2,
    "cluster": 2,
    "child": 1,
    "sequence": 1,
    "outcome": 1,
    "grid": 1,
    "synthetic": 1,
    "pretrained": 0,
    "settings": 1,
    "geometry": 0,
    "errors": 0,
    "config": 0,
    "runinfo": 0,
    "outputs": 0,
    "classes": 0,
    "progress": 0,
    "jpeg": 0,
    "interrupts": 0,
    "memory": 0,
}

SIBLINGS_ALLOWED = {0, 1, 6}
"""Layers whose modules may import each other; in the others only the same room may."""

ONLY_IN = {
    "openslide": {"slides", "cli"},  # cli: the doctor reports its version
    "tiatoolbox": {"slides", "store", "cli"},
    "zarr": {"store"},
    "shapely": {"vector"},
    "geojson": {"vector"},
    "distributed": {"cluster"},
    "dask": {"cluster"},
    "torch": {"models", "training", "inference", "stages", "cli"},
    "click": {"cli"},
    "rich": {"cli"},
    "matplotlib": {"training", "stages", "cli"},
}


def modules():
    return sorted(p for p in PACKAGE.rglob("*.py"))


def room(path):
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import in line {node.lineno}"
            assert node.module is not None
            yield node.module, node.lineno
            yield from ((f"{node.module}.{alias.name}", node.lineno) for alias in node.names)


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_downwards(path):
    here = room(path)
    if here == "__init__":
        return
    for name, line in imports(path):
        parts = name.split(".")
        if parts[0] != "wsiseg" or len(parts) == 1 or parts[1] == "__version__":
            continue
        there = parts[1]
        assert there in LAYERS, f"{path}:{line}: {there} has no layer"
        if here == there and here != "stages":
            continue
        is_below = LAYERS[there] < LAYERS[here]
        is_sibling = LAYERS[there] == LAYERS[here] and LAYERS[here] in SIBLINGS_ALLOWED
        assert is_below or is_sibling, f"{path}:{line}: {here} must not import {name}"


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_each_outside_library_has_its_rooms(path):
    for name, line in imports(path):
        top = name.split(".")[0]
        if top in ONLY_IN:
            assert room(path) in ONLY_IN[top], f"{path}:{line}: {top} belongs in {ONLY_IN[top]}"


@pytest.mark.parametrize("path", [p for p in modules() if p.name == "__init__.py"], ids=str)
def test_init_files_hold_a_docstring_only(path):
    body = ast.parse(path.read_text()).body
    assert ast.get_docstring(ast.parse(path.read_text()))
    allowed = 2 if path.parent == PACKAGE else 1  # the package's own also holds __version__
    assert len(body) <= allowed


HEAVY = {"torch", "dask", "distributed", "tiatoolbox"}


@pytest.mark.parametrize(
    "command",
    [
        "info",
        "doctor",
        "tile",
        "pretrain",
        "finetune",
        "segment",
        "export",
        "evaluate",
        "check",
        "verify",
        "import-checkpoint",
        "demo",
    ],
)
def test_help_of_every_command_imports_nothing_heavy(command):
    code = (
        "import sys\n"
        "from wsiseg.cli.main import cli\n"
        f"cli.main(['{command}', '--help'], standalone_mode=False)\n"
        f"print(sorted({HEAVY!r} & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip().splitlines()[-1] == "[]"


def test_reading_tiling_and_exporting_load_no_torch():
    code = (
        "import sys, wsiseg.stages.tile, wsiseg.stages.export\n"
        f"print(sorted({HEAVY!r} & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
