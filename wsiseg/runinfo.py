"""RunInfo: what made an output. It travels with every store, checkpoint and GeoJSON.

Holds no time stamp, no user name and no path, for two reasons: the same run twice gives the same
bytes, and nothing about a patient or a machine leaves with the result.
"""

import functools
import hashlib
import subprocess
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import wsiseg
from wsiseg.config import digest
from wsiseg.errors import OutputExistsError

FINGERPRINT_SAMPLE_BYTES = 1 << 16
FINGERPRINT_SAMPLES = 16
"""16 samples of 64 KiB find a replaced or truncated slide without reading its gigabytes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunInfo:
    """Version, commit, resolved configuration, seed and input fingerprints of one output."""

    stage: str
    config: dict[str, Any]
    seed: int | None = None
    inputs: dict[str, str] = field(default_factory=dict)
    version: str = wsiseg.__version__
    git_commit: str | None = None

    @classmethod
    def of(
        cls, stage: str, config: dict[str, Any], inputs: dict[str, str], *, seed: int | None = None
    ) -> "RunInfo":
        """Describe the present run; `config` are the result settings (`config.result_settings`)."""
        return cls(stage=stage, config=config, inputs=inputs, seed=seed, git_commit=git_commit())

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return asdict(self)

    @property
    def fingerprint(self) -> dict[str, Any]:
        """What must be equal for a run to be resumed: stage, settings, seed and inputs."""
        return fingerprint_of(self.to_dict())

    @property
    def digest(self) -> str:
        """Hash of `fingerprint`."""
        return digest(self.fingerprint)


def fingerprint_of(run: Mapping[str, Any]) -> dict[str, Any]:
    """Return the `RunInfo.fingerprint` part of a stored `RunInfo.to_dict()`."""
    return {key: run.get(key) for key in ("stage", "config", "seed", "inputs")}


def check_same_run(found: dict[str, Any], wanted: dict[str, Any], *, output: Path) -> None:
    """Refuse to go on with results of another run.

    Both are `RunInfo.fingerprint`s. Raises OutputExistsError with each difference, old -> new.
    """
    differences = list(_differences(found, wanted, ""))
    if differences:
        shown = "; ".join(differences[:8])
        msg = (
            f"output '{output}' holds results of a different run ({shown}); "
            "choose another output or pass --overwrite"
        )
        raise OutputExistsError(msg)


def _differences(found: object, wanted: object, place: str) -> "list[str]":
    if isinstance(found, dict) and isinstance(wanted, dict):
        result: list[str] = []
        for key in sorted({*found, *wanted}):
            inner = f"{place}.{key}" if place else str(key)
            result += _differences(found.get(key, "absent"), wanted.get(key, "absent"), inner)
        return result
    return [] if found == wanted else [f"{place}: {found} -> {wanted}"]


def fingerprint_file(path: Path) -> str:
    """Return sha256 over the size and evenly spaced samples of a file; folders by their files.

    Small files (up to 1 MiB) are hashed whole.
    """
    if path.is_dir():
        entries = {
            p.relative_to(path).as_posix(): fingerprint_file(p)
            for p in sorted(path.rglob("*"))
            if p.is_file()
        }
        return digest(entries)
    size = path.stat().st_size
    hasher = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        if size <= FINGERPRINT_SAMPLES * FINGERPRINT_SAMPLE_BYTES:
            hasher.update(file.read())
        else:
            last = size - FINGERPRINT_SAMPLE_BYTES
            for i in range(FINGERPRINT_SAMPLES):
                file.seek(last * i // (FINGERPRINT_SAMPLES - 1))
                hasher.update(file.read(FINGERPRINT_SAMPLE_BYTES))
    return hasher.hexdigest()


@functools.cache
def git_commit() -> str | None:
    """Return the commit of a source checkout ("-dirty" if changed), None for an installed one."""
    root = Path(wsiseg.__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--abbrev=40", "--dirty"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None
