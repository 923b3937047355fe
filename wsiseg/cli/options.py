"""Click options generated from a stage's Config, and the Config built back from them.

One default, one help text, one place: the dataclass. Precedence: default < file < flag.
"""

import dataclasses
import functools
import types
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from wsiseg.config import build, check_known_keys, merge, parse_assignments, read_yaml

ConfigT = TypeVar("ConfigT")
Command = Callable[..., Any]

SECTIONS = ("tile", "pretrain", "finetune", "segment", "export", "evaluate")
"""Sections of a configuration file: the stages, in the order of the pipeline."""

_SEPARATOR = "__"


def config_options(
    config: type[Any], section: str, **further: type[Any]
) -> Callable[[Command], Command]:
    """Add an option for each flagged field of `config`, `--config` and `--set`.

    The command receives the finished config as its argument `config`. `further` are sections of
    stages that the command goes on with: their flags are options too, and each finished config is
    the argument of its section's name.
    """
    classes = {section: config, **further}
    fields = [
        (name, field)
        for key, owner in classes.items()
        for name, field in _flagged_fields(owner, (key,))
    ]

    def decorate(command: Command) -> Command:
        @functools.wraps(command)
        def wrapper(
            *args: Any,  # noqa: ANN401 - click passes any value
            config_file: Path | None,
            assignments: tuple[str, ...],
            **kwargs: Any,  # noqa: ANN401 - click passes any value
        ) -> object:
            flags: dict[str, Any] = {}
            for name, _ in fields:
                value = kwargs.pop(name)
                if value is not None:
                    flags = merge(flags, _nest(name.split(_SEPARATOR), value))
            base = kwargs.pop("preset", None)
            values = {key: file_section(config_file, key) for key in classes}
            if base is not None:
                values[section] = merge(values[section], {"model": base})
            values[section] = merge(values[section], parse_assignments(assignments))
            values = merge(values, flags)
            finished = {key: build(owner, values[key], where=key) for key, owner in classes.items()}
            return command(*args, config=finished.pop(section), **finished, **kwargs)

        decorated: Command = click.option(
            "--set",
            "assignments",
            multiple=True,
            metavar="KEY=VALUE",
            help="Any other setting of this stage, such as --set optim.grad_clip=0.5.",
        )(wrapper)
        named = " and ".join(f"'{key}'" for key in classes)
        used = f"section {named} is" if len(classes) == 1 else f"sections {named} are"
        decorated = click.option(
            "--config",
            "config_file",
            type=click.Path(path_type=Path),
            metavar="FILE",
            help=f"YAML file; its {used} used (see configs/default.yaml).",
        )(decorated)
        for name, field in reversed(fields):
            decorated = _option(name, field, typing.get_type_hints(field.owner))(decorated)
        return decorated

    return decorate


def file_section(path: Path | None, section: str) -> dict[str, Any]:
    """Return one section of a configuration file; an unknown section is an error."""
    if path is None:
        return {}
    data = read_yaml(path)
    check_known_keys(data, SECTIONS, f"config '{path}'")
    values = data.get(section) or {}
    if not isinstance(values, dict):
        raise click.UsageError(f"config '{path}': section {section!r} must hold keys and values")
    return values


@dataclasses.dataclass(frozen=True)
class _Field:
    """A config field together with the class that declares it."""

    owner: type[Any]
    field: dataclasses.Field[Any]


def _flagged_fields(
    config: type[Any], prefix: tuple[str, ...]
) -> typing.Iterator[tuple[str, _Field]]:
    hints = typing.get_type_hints(config)
    for field in dataclasses.fields(config):
        hint = hints[field.name]
        path = (*prefix, field.name)
        if isinstance(hint, type) and dataclasses.is_dataclass(hint):
            yield from _flagged_fields(hint, path)
        elif field.metadata.get("flag"):
            yield _SEPARATOR.join(path), _Field(config, field)


def _nest(keys: list[str], value: object) -> dict[str, Any]:
    for key in reversed(keys):
        value = {key: value}
    return typing.cast("dict[str, Any]", value)


def _option(name: str, field: _Field, hints: dict[str, Any]) -> Callable[[Command], Command]:
    metadata, default = field.field.metadata, field.field.default
    flag = metadata["flag"]
    kebab = "--" + field.field.name.replace("_", "-")
    spellings = flag.split() if isinstance(flag, str) else [kebab]
    hint = _without_none(hints[field.field.name])
    shown = "" if default is None else f" [default: {_shown(default)}]"
    help_text = metadata["help"] + shown
    if hint is bool:
        if not any("/" in s for s in spellings):
            spellings = [f"{s}/--no-{s.removeprefix('--')}" for s in spellings]
        return click.option(*spellings, name, default=None, help=help_text)
    kind: Any = hint
    if metadata.get("choices"):
        kind = click.Choice(metadata["choices"])
    elif hint is Path:
        kind = click.Path(path_type=Path)
    return click.option(*spellings, name, type=kind, default=None, help=help_text)


def _without_none(hint: Any) -> Any:  # noqa: ANN401 - a type expression
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return next(o for o in typing.get_args(hint) if o is not type(None))
    return hint


def _shown(default: object) -> str:
    if isinstance(default, bool):
        return "yes" if default else "no"
    return f"{default:g}" if isinstance(default, float) else str(default)
