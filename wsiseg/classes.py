"""ClassTable: the integer label, name and colour of each class, and what counts as unlabelled.

Labels are uint8: 0 is always background, 255 is always "ignore" (unlabelled, or not predicted).
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wsiseg.config import check_known_keys, read_yaml
from wsiseg.errors import ConfigError

BACKGROUND = 0
IGNORE = 255
"""Unlabelled in training, not predicted in a slide mask: never a class of its own."""

_FORBIDDEN_IN_NAME = re.compile(r"[:\x00-\x1f\x7f]")

PALETTE = (
    (200, 0, 0),
    (0, 120, 220),
    (20, 160, 60),
    (240, 160, 0),
    (150, 60, 190),
    (0, 170, 170),
    (220, 90, 150),
    (120, 90, 50),
)
"""Colours of classes that name none; distinct on pink tissue and for colour-blind readers."""


@dataclass(frozen=True, slots=True)
class TissueClass:
    """One class: `label` in 1..254 (0 is background), QuPath name, RGB colour."""

    label: int
    name: str
    color: tuple[int, int, int]

    def __post_init__(self) -> None:
        if not 1 <= self.label < IGNORE:
            msg = f"class {self.name!r}: label must lie in 1..254, got {self.label}"
            raise ConfigError(msg)
        if not self.name.strip() or len(self.name) > 200 or _FORBIDDEN_IN_NAME.search(self.name):
            msg = (
                f"class {self.name[:60]!r}: a name needs 1 to 200 characters without ':' (QuPath "
                "reads it as a derived class) and without control characters"
            )
            raise ConfigError(msg)
        if any(not 0 <= c <= 255 for c in self.color):
            msg = f"class {self.name!r}: color must be three numbers 0..255, got {self.color}"
            raise ConfigError(msg)


@dataclass(frozen=True, slots=True)
class ClassTable:
    """The classes of a task, labels 1..N without gaps.

    `roi` names the annotation class inside which everything not annotated is background; without
    it, what nobody annotated is ignored. `ignore` names annotation classes whose area is ignored.
    """

    classes: tuple[TissueClass, ...]
    roi: str | None = None
    ignore: tuple[str, ...] = ("Ignore*",)

    def __post_init__(self) -> None:
        labels = [c.label for c in self.classes]
        if labels != list(range(1, len(labels) + 1)):
            msg = f"class table: labels must be 1, 2, ... in order, got {labels}"
            raise ConfigError(msg)
        names = [c.name for c in self.classes]
        if len({*names}) != len(names) or not names:
            msg = f"class table: needs at least one class and unique names, got {names}"
            raise ConfigError(msg)

    @classmethod
    def of_names(cls, names: list[str]) -> "ClassTable":
        """Return a table with labels 1, 2, ... and colours of the palette."""
        classes = [
            TissueClass(i + 1, name, PALETTE[i % len(PALETTE)]) for i, name in enumerate(names)
        ]
        return cls(tuple(classes))

    @classmethod
    def from_dict(cls, data: dict[str, Any], *, where: str) -> "ClassTable":
        """Parse `{classes: [{name, color}], roi, ignore}`; labels follow the order."""
        check_known_keys(data, ("classes", "roi", "ignore"), where)
        entries = data.get("classes")
        if not isinstance(entries, list) or not entries:
            msg = f"{where}: needs a list 'classes' with at least one entry"
            raise ConfigError(msg)
        parsed = []
        for i, entry in enumerate(entries):
            item = {"name": entry} if isinstance(entry, str) else entry
            place = f"{where}: classes[{i}]"
            if not isinstance(item, dict) or not isinstance(item.get("name"), str):
                msg = f"{place}: expected a name or {{name, color}}, got {entry!r}"
                raise ConfigError(msg)
            check_known_keys(item, ("name", "color", "label"), place)
            color = item.get("color") or PALETTE[i % len(PALETTE)]
            is_rgb = isinstance(color, list | tuple) and len(color) == 3
            if not is_rgb or not all(type(c) is int for c in color):
                msg = f"{place}: color must be three whole numbers, got {color!r}"
                raise ConfigError(msg)
            parsed.append(TissueClass(i + 1, item["name"], (color[0], color[1], color[2])))
        roi, ignore = data.get("roi"), data.get("ignore", ["Ignore*"])
        if not (roi is None or isinstance(roi, str)) or not isinstance(ignore, list | tuple):
            msg = f"{where}: roi must be a name, ignore a list of names"
            raise ConfigError(msg)
        return cls(tuple(parsed), roi=roi, ignore=tuple(map(str, ignore)))

    @classmethod
    def from_yaml(cls, path: Path) -> "ClassTable":
        """Read a class table file such as `configs/classes/nuclei.yaml`."""
        return cls.from_dict(read_yaml(path), where=f"class table '{path}'")

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values that `from_dict` reads back."""
        return {
            "classes": [{"name": c.name, "color": list(c.color)} for c in self.classes],
            "roi": self.roi,
            "ignore": list(self.ignore),
        }

    @property
    def num_labels(self) -> int:
        """Number of network outputs: the classes and background."""
        return len(self.classes) + 1

    @property
    def names(self) -> tuple[str, ...]:
        """Names by label, background first."""
        return ("Background", *(c.name for c in self.classes))

    def by_label(self, label: int) -> TissueClass:
        """Return the class of a label in 1..N."""
        return self.classes[label - 1]

    def by_name(self, name: str) -> TissueClass | None:
        """Return the class of a name, or None."""
        return next((c for c in self.classes if c.name == name), None)
