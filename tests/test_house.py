"""Facts about the repository itself: pins, configs, sizes of files, nothing of one machine."""

import importlib.util
import re
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from wsiseg.classes import ClassTable
from wsiseg.cli.options import SECTIONS
from wsiseg.config import build, read_yaml
from wsiseg.settings.evaluate import EvaluateConfig
from wsiseg.settings.export import ExportConfig
from wsiseg.settings.segment import SegmentConfig
from wsiseg.settings.tile import TileConfig
from wsiseg.settings.training import FinetuneConfig, PretrainConfig
from wsiseg.slides.cohort import Cohort

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = ROOT / "configs"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

CONFIG_TYPES = {
    "tile": TileConfig,
    "pretrain": PretrainConfig,
    "finetune": FinetuneConfig,
    "segment": SegmentConfig,
    "export": ExportConfig,
    "evaluate": EvaluateConfig,
}

INDEX_HOSTS = re.compile(r"pypi\.org|pythonhosted|download\.pytorch|/simple\b")
MACHINE_PATHS = re.compile(r"(?<![\w.{}$-])/(work|root|home/\w+|Users/\w+)/[\w.]")
"""Folders of somebody's machine."""

MAX_LINES = 400


def committed():
    """Return the files that git knows or would add, or all of an unpacked archive."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if listed.returncode != 0:
        pytest.skip("not a git repository")
    return [path for name in listed.stdout.splitlines() if (path := ROOT / name).is_file()]


def committed_text():
    for path in committed():
        if path == Path(__file__):  # it spells out what it looks for
            continue
        try:
            yield path.relative_to(ROOT), path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue


def offending(pattern):
    return [
        f"{path}:{number}: {line.strip()[:120]}"
        for path, text in committed_text()
        for number, line in enumerate(text.splitlines(), 1)
        if pattern.search(line)
    ]


def pins():
    """Return name -> pinned requirements of requirements.txt that apply to this interpreter."""
    result = {}
    for line in (ROOT / "requirements.txt").read_text().splitlines():
        if line.strip() and not line.lstrip().startswith("#"):
            requirement = Requirement(line)
            if requirement.marker is None or requirement.marker.evaluate():
                result[canonicalize_name(requirement.name)] = requirement
    return result


def direct_dependencies():
    extras = PROJECT["optional-dependencies"]
    texts = [*PROJECT["dependencies"], *(t for extra in extras.values() for t in extra)]
    return [Requirement(text) for text in texts]


def test_no_committed_file_names_a_package_index():
    assert offending(INDEX_HOSTS) == []


def test_no_committed_file_holds_a_path_of_one_machine():
    assert offending(MACHINE_PATHS) == []


def test_no_committed_file_is_large():
    large = [p for p in committed() if p.stat().st_size > 3_000_000]
    assert [p for p in large if "pretrained" not in p.parts] == []
    assert all(p.stat().st_size <= 10_000_000 for p in large)  # the packaged model


def test_requirements_hold_pins_and_nothing_else():
    for line in (ROOT / "requirements.txt").read_text().splitlines():
        if line.strip() and not line.lstrip().startswith("#"):
            assert not line.startswith("-"), line
            (specifier,) = Requirement(line).specifier
            assert specifier.operator == "==", line
            assert not specifier.version.endswith("*"), line


@pytest.mark.parametrize("requirement", direct_dependencies(), ids=lambda r: r.name)
def test_each_direct_dependency_is_pinned_within_its_range(requirement):
    pin = pins()[canonicalize_name(requirement.name)]
    (specifier,) = pin.specifier
    assert specifier.version in requirement.specifier


def test_pins_hold_for_each_python_that_the_project_supports():
    """A pin with a marker leaves no interpreter without that package."""
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    parsed = [Requirement(x) for x in lines if x.strip() and not x.lstrip().startswith("#")]
    for requirement in direct_dependencies():
        name = canonicalize_name(requirement.name)
        found = [r for r in parsed if canonicalize_name(r.name) == name]
        for version in ("3.11", "3.12", "3.13"):
            environment = {"python_version": version, "python_full_version": f"{version}.9"}
            fitting = [r for r in found if r.marker is None or r.marker.evaluate(environment)]
            assert len(fitting) == 1, f"{name} on Python {version}"


def test_default_yaml_is_what_the_settings_say():
    path = CONFIGS / "write_default.py"
    spec = importlib.util.spec_from_file_location("write_default", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    written = (CONFIGS / "default.yaml").read_text()
    assert written == module.render(), "run: python configs/write_default.py"


def test_default_yaml_builds_exactly_the_defaults():
    sections = read_yaml(CONFIGS / "default.yaml")
    assert tuple(sections) == SECTIONS == tuple(CONFIG_TYPES)
    for name, config in CONFIG_TYPES.items():
        assert build(config, sections[name], where=name) == config()


def test_every_line_of_default_yaml_is_explained():
    above = ""
    for line in (CONFIGS / "default.yaml").read_text().splitlines():
        if line.startswith(" ") and not line.lstrip().startswith("#"):
            assert above.lstrip().startswith("# "), line
        above = line


@pytest.mark.parametrize(
    "path",
    [CONFIGS / "smoke.yaml", *sorted((CONFIGS / "experiments").glob("*.yaml"))],
    ids=lambda p: p.stem,
)
def test_a_configuration_builds(path):
    for name, values in read_yaml(path).items():
        build(CONFIG_TYPES[name], values, where=name)


@pytest.mark.parametrize("path", sorted((CONFIGS / "classes").glob("*.yaml")), ids=lambda p: p.stem)
def test_a_class_table_builds(path):
    assert ClassTable.from_yaml(path).num_labels >= 2


def test_the_example_cohort_is_read():
    cohort = Cohort.from_csv(CONFIGS / "cohorts" / "example.csv")
    assert {entry.split for entry in cohort.entries} == {"train", "val", "test"}


def test_every_yaml_file_parses():
    for path in committed():
        if path.suffix in (".yaml", ".yml", ".cff"):
            assert yaml.safe_load(path.read_text())


def test_versions_agree():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == PROJECT["version"]
    assert citation["license"] == PROJECT["license"]
    assert f"## [{PROJECT['version']}]" in (ROOT / "CHANGELOG.md").read_text()


def test_files_stay_readable():
    long = {
        str(path.relative_to(ROOT)): count
        for path in sorted((ROOT / "wsiseg").rglob("*.py"))
        if (count := len(path.read_text().splitlines())) > MAX_LINES
    }
    assert long == {}


def test_nothing_is_called_utils():
    assert [
        p for p in (ROOT / "wsiseg").rglob("*") if re.match(r"(utils?|helpers?)\b", p.name)
    ] == []


def test_the_ci_script_can_be_run_and_builds_its_own_environment():
    script = ROOT / ".ci" / "run"
    assert script.stat().st_mode & 0o111
    text = script.read_text()
    assert text.startswith("#!/usr/bin/env bash\n")
    for part in ("set -euo pipefail", "rm -rf .venv", "make test", "make demo"):
        assert part in text
