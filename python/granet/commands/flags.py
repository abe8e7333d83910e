"""The command line's ways to give a run's fields: a flag for each, KEY=VALUE, and files by -c."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from typing import Any

from granet import recipes
from granet.training.config import GROUPS, field_kinds, field_schemas, refuse_unknown

SPARSITY_NOTE = (
    "A TIME is a number of steps, or a share of the run such as 50%. In brackets: what holds where "
    "nothing is given; methods differ, and `granet methods NAME` says what one has. A dense run uses "
    "none of these but --method."
)


def add_config_flags(parser: argparse.ArgumentParser) -> None:
    """The other ways to give settings: files and recipes by -c, and KEY=VALUE."""
    parser.add_argument(
        "-c",
        "--config",
        action="append",
        default=[],
        metavar="NAME",
        help="YAML file with any of the settings below, or a recipe (granet recipes); may be repeated",
    )
    parser.add_argument(
        "settings", nargs="*", metavar="KEY=VALUE", help="The settings below in another form"
    )


class HelpFormatter(argparse.HelpFormatter):
    """Wide enough for a flag and its help to share a line; text of several lines stays as it is."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=34)

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return text if "\n" in text else super()._fill_text(text, width, indent)


def add_flags(parser: argparse.ArgumentParser, titles: Iterable[str] = GROUPS) -> None:
    """Give `parser` one flag for each field of these groups; flags not given leave no trace."""
    parser.formatter_class = HelpFormatter
    parser.allow_abbrev = False  # an abbreviation would change its meaning with the next field
    for title in titles:
        names = GROUPS[title]
        note = SPARSITY_NOTE if title == "sparsity" else None
        group = parser.add_argument_group(title, note)
        for name in names.split():
            _add_flag(group, name)


def _add_flag(group: Any, name: str) -> None:
    schema = field_schemas()[name]
    flags = [*(["-b"] if name == "batch_size" else []), "--" + name.replace("_", "-")]
    help_text = schema["description"].rstrip(".")
    default = schema["default"]
    if default is not None and default is not False:
        help_text += f" (default: {'yes' if default is True else default})"
    options: dict[str, Any] = {}
    if schema.get("type") == "boolean":
        options["action"] = argparse.BooleanOptionalAction
    elif "enum" in schema:
        options["choices"] = schema["enum"]
    else:
        options["metavar"] = (
            "DIR" if name in ("data_dir", "output") else _metavar(field_kinds(name))
        )
    group.add_argument(
        *flags,
        dest=name,
        default=argparse.SUPPRESS,
        help=help_text.replace("%", "%%"),
        **options,
    )


def _metavar(kinds: list[str]) -> str:
    if {"integer", "string"} <= set(kinds):
        return "TIME"
    return {"integer": "N", "number": "X"}.get(kinds[0], "NAME")


def flags_given(namespace: argparse.Namespace) -> dict[str, object]:
    """The fields among the parsed flags: only those given, and as text unless a flag has no value."""
    return {name: value for name, value in vars(namespace).items() if name in field_schemas()}


def settings_given(args: argparse.Namespace) -> dict[str, object]:
    """The fields given in files and recipes, then as KEY=VALUE, then by flags: later ones win.

    Raises:
        FileNotFoundError: -c names neither a file nor a recipe.
        ValueError: a file or an argument does not hold settings.
    """
    return settings_in_files(args) | settings_typed(args)


def settings_in_files(args: argparse.Namespace) -> dict[str, object]:
    """The fields in the files and recipes of -c; raises what `settings_given` does."""
    given: dict[str, object] = {}
    for name in args.config:
        given |= recipes.read(name)
    return given


def settings_typed(args: argparse.Namespace) -> dict[str, object]:
    """The fields on the command line itself: KEY=VALUE, then flags; ValueError as `settings_given`."""
    return parse_settings(args.settings) | flags_given(args)


def parse_settings(settings: Iterable[str]) -> dict[str, object]:
    """The fields in arguments of the form KEY=VALUE, as text; keys with - or _.

    Raises:
        ValueError: an argument has another form, or its key is not a field.
    """
    fields: dict[str, object] = {}
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals:
            raise ValueError(f"settings: expected KEY=VALUE, got {setting!r}")
        name = key.strip().replace("-", "_")
        refuse_unknown([name], "settings")
        fields[name] = value.strip()
    return fields
