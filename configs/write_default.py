"""Write `default.yaml` from the settings dataclasses, so that the two cannot drift apart.

python configs/write_default.py
"""

import dataclasses
import textwrap
from collections.abc import Iterator
from pathlib import Path

import yaml

from wsiseg.settings.evaluate import EvaluateConfig
from wsiseg.settings.export import ExportConfig
from wsiseg.settings.segment import SegmentConfig
from wsiseg.settings.tile import TileConfig
from wsiseg.settings.training import FinetuneConfig, PretrainConfig

SECTIONS = {
    "tile": TileConfig(),
    "pretrain": PretrainConfig(),
    "finetune": FinetuneConfig(),
    "segment": SegmentConfig(),
    "export": ExportConfig(),
    "evaluate": EvaluateConfig(),
}

HEADER = """\
# Every setting of wsiseg with its default: copy the lines that you change, leave out the rest.
# A section is the command that reads it (`wsiseg tile --config FILE`); flags win over the file.
# `wsiseg segment` also reads `export`.
# Written by `python configs/write_default.py` from wsiseg/settings/.
"""

INDENT = "  "
WIDTH = 100


def render() -> str:
    """Return the text of `default.yaml`."""
    sections = ("\n".join([f"{name}:", *_lines(config, 1)]) for name, config in SECTIONS.items())
    return HEADER + "\n" + "\n\n".join(sections) + "\n"


def _lines(config: object, depth: int) -> Iterator[str]:
    indent = INDENT * depth
    for field in dataclasses.fields(config):  # type: ignore[arg-type] # any settings dataclass
        value = getattr(config, field.name)
        yield from textwrap.wrap(
            _comment(field), WIDTH, initial_indent=f"{indent}# ", subsequent_indent=f"{indent}# "
        )
        if dataclasses.is_dataclass(value):
            yield f"{indent}{field.name}:"
            yield from _lines(value, depth + 1)
        else:
            yield f"{indent}{field.name}: {_scalar(value)}"


def _comment(field: "dataclasses.Field[object]") -> str:
    choices = field.metadata["choices"]
    return field.metadata["help"] + (f" One of: {', '.join(choices)}." if choices else "")


def _scalar(value: object) -> str:
    plain = list(value) if isinstance(value, tuple) else value
    text = yaml.safe_dump(plain, default_flow_style=True, width=WIDTH)
    return text.removesuffix("\n").removesuffix("\n...")


if __name__ == "__main__":
    Path(__file__).with_name("default.yaml").write_text(render(), encoding="utf-8")
