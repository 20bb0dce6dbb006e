"""Dataclass fields -> command-line flags, and their defaults per task.

transformers' HfArgumentParser does the first half, but it cannot tell a flag that was given from
its default, and here a task, a protocol or a resumed run may supply the default instead.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import json
import math
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import field
from pathlib import Path

from support import distributed, toy
from support.sandbox import RewardError

# -------------------------------------------------------------------------------------------- flags


def flag(default, help: str, group: str = "", shown_default: str = ""):
    """A dataclass field that is a command-line flag.

    `group` starts a section of --help, to which the fields that follow belong too. `shown_default`
    replaces the default in --help.
    """
    metadata = {"help": help, "group": group, "shown_default": shown_default}
    return field(default=default, metadata=metadata)


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line that names the choices, printed by one rank."""

    def error(self, message: str):
        unknown = "unrecognized arguments: "
        if message.startswith(unknown):
            name = message.removeprefix(unknown).split()[0].split("=")[0]
            message = f"unknown flag {name}: {self._suggest(name)}"
        exit_with_error(message)

    def _suggest(self, name: str) -> str:
        flags = [f for f in self._option_string_actions if f.startswith("--")]
        flags = sorted(f for f in flags if not f.startswith("--no-"))
        close = difflib.get_close_matches(name, flags, n=1)
        hint = f"did you mean {close[0]}? " if close else ""
        return f"{hint}the flags are {' '.join(flags)}"


def early_flags(*names: str, argv=None) -> dict:
    """Those of these flags that were given: they decide which other flags there are."""
    parser = Parser(add_help=False, allow_abbrev=False, argument_default=argparse.SUPPRESS)
    for name in names:
        parser.add_argument(f"--{name}")
    given, _ = parser.parse_known_args(argv)
    return vars(given)


def with_flags(config, given: dict):
    """A copy of a dataclass with the given flags among its fields."""
    names = {one.name for one in dataclasses.fields(config)}
    return dataclasses.replace(config, **{name: given[name] for name in given.keys() & names})


def parse_flags(doc: str, *classes, argv=None) -> dict:
    """The flags that were given, by name. Every field of the dataclasses made with `flag` is one.

    doc: a module's docstring, whose first line heads --help.
    """
    parser = Parser(
        description=doc.strip().splitlines()[0],
        usage="%(prog)s [--flag value ...]",
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    section = parser
    sections = {}
    for cls in classes:
        for one in dataclasses.fields(cls):
            metadata = _metadata(cls, one.name)
            if "help" not in metadata:
                continue
            title = metadata["group"]
            if title:
                section = sections.get(title) or parser.add_argument_group(title)
                sections[title] = section
            if f"--{one.name}" in parser._option_string_actions:
                raise ValueError(f"{cls.__name__}.{one.name}: there is a flag of this name already")
            shown = metadata["shown_default"] if metadata == one.metadata else ""
            text = _help_text(metadata["help"], shown, one.default)
            section.add_argument(f"--{one.name}", help=text, **_value_options(one))
    return vars(parser.parse_args(argv))


def _metadata(cls: type, name: str) -> dict:
    """A field's metadata; of the class it comes from, where a subclass changes only the default."""
    for each in cls.__mro__:
        one = getattr(each, "__dataclass_fields__", {}).get(name)
        if one and one.metadata:
            return one.metadata
    return {}


def _value_options(one: dataclasses.Field) -> dict:
    is_float = one.type in (float, "float")  # as a string in a file that postpones annotations
    kind = float if is_float else type(one.default)
    if kind is bool:
        return {"action": argparse.BooleanOptionalAction}
    if kind is tuple:
        return {"nargs": "+", "metavar": "str"}
    return {"type": kind, "metavar": kind.__name__}


def _help_text(text: str, shown: str, default) -> str:
    if not shown and default not in ("", ()):
        shown = default
    if shown != "":
        text += f" [{shown}]"
    return text.replace("%", "%%")


@contextmanager
def one_line_errors() -> Iterator[None]:
    """End the program with one line where the block meets bad input or a missing file."""
    try:
        yield
    except (ValueError, OSError, ImportError, RewardError) as error:
        exit_with_error(error)


def exit_with_error(message) -> None:
    """End the program with one line on standard error and exit status 2."""
    if os.environ.get("RANK", "0") != "0":
        time.sleep(3)  # the first rank speaks, and torchrun then ends this one
    text = str(message).strip() or repr(message)
    program = Path(sys.argv[0]).name
    print(f"{program}: error: {text.splitlines()[0]}", file=sys.stderr, flush=True)
    raise SystemExit(2)


def check_counts(config, *names: str) -> None:
    """ValueError where a field that counts something is below 1."""
    for name in names:
        if getattr(config, name) < 1:
            raise ValueError(f"{name}={getattr(config, name)}: must be at least 1")


def check_not_negative(config, *names: str) -> None:
    """ValueError where a field is below 0."""
    for name in names:
        check_range(config, name, 0, math.inf)


def check_positive(config, *names: str) -> None:
    """ValueError where a field is not above 0."""
    for name in names:
        if not getattr(config, name) > 0:
            raise ValueError(f"{name}={getattr(config, name)}: must be above 0")


def check_choice(config, name: str, choices: tuple[str, ...]) -> None:
    """ValueError where a field has none of the choices."""
    value = getattr(config, name)
    if value not in choices:
        raise ValueError(f"{name}={value!r}: choose one of {', '.join(choices)}")


def check_range(config, name: str, low: float, high: float) -> None:
    """ValueError where a field is below `low` or above `high`, which may be infinite."""
    value = getattr(config, name)
    if not low <= value <= high:
        limits = f"at least {low}" if math.isinf(high) else f"between {low} and {high}"
        raise ValueError(f"{name}={value}: must be {limits}")


def check_top_p(config) -> None:
    if not 0 < config.top_p <= 1:
        raise ValueError(f"top_p={config.top_p}: must be above 0 and at most 1")


# ----------------------------------------------------------------------------------------- defaults


def model_folder(name: str, seed: int = 0) -> str:
    """The folder or hub id that a model's name stands for. A toy is built first, by one rank."""
    setting = toy.setting_of(name)
    if setting is None:
        return name
    distributed.on_first_rank(lambda: toy.build(seed, setting=setting))
    return str(toy.build(seed, setting=setting))


def data_of(given: dict) -> str:
    """The data that the flags stand for; "" where they leave it to the program's default.

    A toy model brings its own task, also as an exported folder (task.json).
    """
    if given.get("data"):
        return given["data"]
    model = given.get("model", "toy")
    if toy.setting_of(model):
        return model
    return _task_of(model).get("data", "")


def resolve_config(cls, given: dict):
    """A config: the given flags, over defaults that fit the data and the model, over cls's own.

    What belongs to the task (sizes, lengths, steps) follows the data; what belongs to the model
    (learning rate) follows the model.
    """
    defaults = {}
    data, model = data_of(given), given.get("model", "toy")
    setting = toy.setting_of(data)
    if setting:
        defaults = toy.task_defaults(setting) | {"data": data, "val_data": data}
    if toy.setting_of(model) or _task_of(model):
        defaults |= toy.MODEL_DEFAULTS
    names = {one.name for one in dataclasses.fields(cls)}
    values = {name: value for name, value in (defaults | given).items() if name in names}
    return cls(**values)


def _task_of(model: str) -> dict:
    """The content of a model folder's task.json, which the toy's models have; {} for others."""
    path = Path(model) / "task.json"
    return json.loads(path.read_text()) if path.is_file() else {}
