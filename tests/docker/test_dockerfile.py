"""The images, as far as a parser can tell: same pins, same Python, no root, both targets."""

import re
import shlex
import tomllib
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from packaging.specifiers import SpecifierSet

ROOT = Path(__file__).resolve().parents[2]
DOCKERFILE = ROOT / "docker" / "Dockerfile"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
TARGETS = ("cpu", "cuda")


@dataclass
class Stage:
    name: str
    base: str
    steps: list[tuple[str, str]] = field(default_factory=list)

    def last(self, instruction):
        return next((text for name, text in reversed(self.steps) if name == instruction), None)

    def all(self, instruction):
        return [text for name, text in self.steps if name == instruction]


def parse(text):
    """Read the stages of a Dockerfile by name."""
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    stages = {}
    for line in re.sub(r"\\\n\s*", "", "\n".join(lines)).splitlines():
        if not line.strip():
            continue
        name, _, rest = line.strip().partition(" ")
        if name == "FROM":
            base, _, alias = rest.partition(" AS ")
            current = stages[alias] = Stage(alias, base)
        else:
            current.steps.append((name, rest.strip()))
    return stages


@pytest.fixture(scope="module")
def stages():
    return parse(DOCKERFILE.read_text())


def chain(stages, name):
    """Return a stage and all that it is built from, itself first; copied-from stages too."""
    names = [name]
    for known in names:
        stage = stages[known]
        copied = re.findall(r"--from=(\S+)", " ".join(stage.all("COPY")))
        names += [n for n in (stage.base, *copied) if n in stages and n not in names]
    return [stages[n] for n in names]


def test_both_targets_exist_and_cpu_is_the_default(stages):
    assert set(TARGETS) <= set(stages)
    assert list(stages)[-1] == "cpu"


@pytest.mark.parametrize("target", TARGETS)
def test_a_target_does_not_run_as_root(stages, target):
    assert stages[target].last("USER") == "wsiseg"
    order = [name for name, _ in stages[target].steps]
    assert "RUN" not in order[order.index("USER") :]
    assert any("useradd" in run and "wsiseg" in run for run in stages["base"].all("RUN"))


@pytest.mark.parametrize("target", TARGETS)
def test_a_target_starts_the_command_line_of_the_project(stages, target):
    assert stages[target].last("ENTRYPOINT") == '["wsiseg"]'
    assert "wsiseg" in PROJECT["scripts"]


@pytest.mark.parametrize("target", TARGETS)
def test_every_dependency_is_installed_at_its_pinned_version(stages, target):
    installs = [
        command
        for stage in chain(stages, target)
        for run in stage.all("RUN")
        for command in run.split("&&")
        if "pip install" in command
    ]
    resolved = [c for c in installs if "--requirements pyproject.toml" in c]
    assert len(resolved) == 1
    assert "--constraint requirements.txt" in resolved[0]
    for command in installs:
        pinned = "--constraint" in command or "--no-deps" in command or "==" in command
        assert pinned, f"unpinned: {command}"


@pytest.mark.parametrize("target", TARGETS)
def test_the_final_image_holds_no_build_tools_of_ours(stages, target):
    assert stages[target].base == "base"
    assert not any("pip install" in run for run in stages[target].all("RUN"))


def test_outer_base_images_are_pinned_by_full_version(stages):
    outer = {stage.base for stage in stages.values() if stage.base not in stages}
    assert outer
    for image in outer:
        assert re.search(r":\d+\.\d+\.\d+", image), f"{image} is not pinned"


def test_no_image_is_latest():
    assert "latest" not in DOCKERFILE.read_text()


def test_the_python_of_the_image_is_one_that_the_project_supports(stages):
    version = re.match(r"python:(\d+\.\d+\.\d+)-", stages["base"].base)
    assert version is not None
    assert version[1] in SpecifierSet(PROJECT["requires-python"])


def test_uv_is_the_version_of_the_makefile(stages):
    makefile = re.search(r"^UV_VERSION := (\S+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert makefile is not None
    assert any(f"uv=={makefile[1]}" in run for run in stages["build"].all("RUN"))


def test_extras_are_extras_of_the_project(stages):
    default = next(a for a in stages["build"].all("ARG") if a.startswith("EXTRAS="))
    words = shlex.split(default.partition("=")[2])[0].split()
    extras = [word for word in words if word != "--extra"]
    assert "tia" in extras
    assert set(extras) <= set(PROJECT["optional-dependencies"])


def test_everything_that_is_copied_exists_and_is_not_ignored(stages):
    kept = [
        line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line[:1] == "!"
    ]
    for stage in stages.values():
        for copy in stage.all("COPY"):
            if "--from" in copy:
                continue
            for source in copy.split()[:-1]:
                assert (ROOT / source).exists(), source
                assert source in kept, f"{source} is in .dockerignore"
