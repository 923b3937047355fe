"""One small slide through every command, killed, failed and resumed; compared byte for byte."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from PIL import Image
from reliability.zygote import Done, Zygote

ItemT = TypeVar("ItemT")
ResultT = TypeVar("ResultT")

MODULES = (
    "reliability.faults",
    "wsiseg.cli.check_commands",
    "wsiseg.cli.labels",
    "wsiseg.cli.segment_commands",
    "wsiseg.cli.segment_job",
    "wsiseg.cli.slide_commands",
    "wsiseg.cli.train_commands",
    "wsiseg.slides.probe_server",
    "wsiseg.stages.finetune",
    "wsiseg.stages.pretrain",
    "wsiseg.stages.tile",
    "wsiseg.store.verify",
)

LANES = 2

TINY = ("--preset", "tiny", "--set", "model.dim=8", "--set", "model.mults=[1, 2]",
        "--set", "model.groups=4", "--device", "cpu")  # fmt: skip
STEPS = ("--steps", 12, "--batch-size", 2, "--validate-every", 4, "--save-every", 3)

SLIDE = ("--slide-mpp", 0.5, "--tissue", "none")


@dataclass(frozen=True)
class Command:
    """A command line, what it reads and what it leaves, relative to the folder it runs in."""

    args: tuple[object, ...]
    reads: tuple[str, ...]
    writes: tuple[str, ...]


def commands(slide: str) -> dict[str, Command]:
    """Return the commands by name, on "small" (2 shards, 2 chunks) or "large" (12, 12)."""
    picture, store = f"{slide}.png", f"tiles/{slide}.zarr"
    return {
        "tile": Command(
            ("tile", picture, "-o", "tiles", "--mpp", 0.5, "--tile-size", 64, *SLIDE,
             "--labels", "labels", "--classes", "classes.yaml"),
            (picture, "labels", "classes.yaml"),
            (store,),
        ),
        "pretrain": Command(
            ("pretrain", store, "-o", "pre", *TINY, *STEPS, "--set", "sample_steps=2"),
            (store,),
            ("pre",),
        ),
        "finetune": Command(
            ("finetune", store, "-o", "run", "--pretrained", "pre", "--device", "cpu", *STEPS),
            (store, "pre"),
            ("run",),
        ),
        "segment": Command(
            ("segment", picture, "--model", "run", "-o", "out", "--device", "cpu", *SLIDE,
             "--set", "chunk=128"),
            (picture, "run"),
            tuple(f"out/{slide}.{suffix}" for suffix in ("mask.zarr", "geojson", "png")),
        ),
        "export": Command(
            ("export", f"out/{slide}.mask.zarr", "-o", f"{slide}.geojson.gz"),
            (f"out/{slide}.mask.zarr",),
            (f"{slide}.geojson.gz",),
        ),
    }  # fmt: skip


class Bench:
    """Runs commands in fresh folders, beside the results of runs that nobody disturbed."""

    def __init__(self, zygote: Zygote, root: Path) -> None:
        self.zygote = zygote
        self.root = root
        self._num_folders = 0
        self.whole = root / "whole"
        """Where everything was made in one go."""
        self.whole.mkdir()
        for name, width, height in (("small", 256, 128), ("large", 512, 384)):
            make_slide(self.whole, name, width, height)
        (self.whole / "classes.yaml").write_text("classes:\n  - {name: A, color: [200, 0, 0]}\n")
        self.seconds: dict[tuple[str, str], float] = {}
        for slide in ("large", "small"):
            for name, command in commands(slide).items():
                if not all((self.whole / out).exists() for out in command.writes):
                    done = self.run(command, self.whole)
                    self.seconds[slide, name] = done.seconds
                    assert done.returncode == 0, (command.args, done.stderr)

    def run(self, command: Command, folder: Path, *extra: object, **options: Any) -> Done:
        """Run a command there."""
        done: Done = self.zygote.run(*command.args, *extra, cwd=folder, **options)
        return done

    def folder(self, command: Command) -> Path:
        """Return a new folder with what the command reads."""
        self._num_folders += 1
        return self.furnish(self.root / f"trial-{self._num_folders}", command)

    def furnish(self, folder: Path, command: Command) -> Path:
        """Put what the command reads into a folder, as links."""
        for name in command.reads:
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.symlink_to(self.whole / name)
        return folder

    def copy_results(self, command: Command, folder: Path) -> None:
        """Put copies of what an undisturbed run of the command left into a folder."""
        for name in command.writes:
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            copy = shutil.copytree if (self.whole / name).is_dir() else shutil.copy
            copy(self.whole / name, target)

    def calls(self, command: Command, *extra: object) -> list[str]:
        """Return the calls that change files in an undisturbed run."""
        done = self.run(command, self.folder(command), *extra, fault=("kill", 0))
        assert done.returncode == 0, done.stderr
        calls: list[str] = done.calls
        return calls

    def differences(self, command: Command, folder: Path) -> list[str]:
        """Return the files that differ from those of the undisturbed run, and left-overs."""
        wanted: dict[str, str] = {}
        found: dict[str, str] = {}
        for name in command.writes:
            wanted |= snapshot(self.whole, name)
            found |= snapshot(folder, name)
        bad = [n for n in sorted({*wanted, *found}) if wanted.get(n) != found.get(n)]
        return bad + left_over(folder)

    def each(self, function: Callable[[ItemT], ResultT], items: Iterable[ItemT]) -> list[ResultT]:
        """Return `function(item)` of each, as many at once as the zygote has lanes."""
        with ThreadPoolExecutor(LANES) as pool:
            return list(pool.map(function, items))


def make_slide(folder: Path, name: str, width: int, height: int) -> None:
    """Write a picture of noise with blobs, and its labels."""
    rng = np.random.default_rng(len(name))
    y, x = np.mgrid[:height, :width]
    labels = (np.sin(x / 17) * np.sin(y / 13) > 0.3).astype(np.uint8)
    image = rng.integers(150, 230, (height, width, 3), dtype=np.uint8)
    image[labels == 1] -= 90
    Image.fromarray(image).save(folder / f"{name}.png")
    (folder / "labels").mkdir(exist_ok=True)
    Image.fromarray(labels).save(folder / "labels" / f"{name}.png")


def snapshot(folder: Path, name: str) -> dict[str, str]:
    """Return file -> sha256 of an output; the speed in a training log is left out."""
    top = folder / name
    files = [top] if top.is_file() else sorted(p for p in top.rglob("*") if p.is_file())
    return {p.relative_to(folder).as_posix(): _hash(p) for p in files}


def _hash(path: Path) -> str:
    data = path.read_bytes()
    if path.name == "metrics.jsonl":
        lines = [json.loads(line) for line in data.splitlines()]
        data = repr([{k: v for k, v in x.items() if k != "images_per_s"} for x in lines]).encode()
    return hashlib.sha256(data).hexdigest()


def left_over(folder: Path) -> list[str]:
    """Return what a finished run must not leave: partial files, locks, journals, resume points."""
    names = [p.relative_to(folder).as_posix() for p in folder.rglob("*")]
    return [
        n
        for n in sorted(names)
        if ".partial" in n or n.endswith((".lock", ".jsonl.tmp", "ledger.jsonl", "/resume"))
    ]


def journal_files(store: Path) -> dict[Path, tuple[int, int]]:
    """Return the files of the units that an unfinished store has acknowledged, with identities."""
    journal, ledger = store / "ledger.jsonl", store / "ledger.json"
    if ledger.exists():
        names: Sequence[str] = list(json.loads(ledger.read_text())["files"])
    elif journal.exists():
        lines = [x for x in journal.read_bytes().splitlines(keepends=True) if x.endswith(b"\n")]
        names = [name for line in lines for name in json.loads(line)["files"]]
    else:
        names = []
    return {store / name: identity(store / name) for name in names}


def identity(path: Path) -> tuple[int, int]:
    """Return what changes when a file is written again under its name."""
    status = os.stat(path)  # noqa: PTH116
    return status.st_ino, status.st_mtime_ns
