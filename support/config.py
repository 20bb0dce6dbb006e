"""Dataclass fields -> command-line flags, with transformers' HfArgumentParser.

A flag that is given beats what a resumed run, a preset, a protocol or a task supplies, and that
beats the dataclass's own default. Whatever is wrong with a flag is one line that names the value.
"""

from __future__ import annotations

import argparse
import dataclasses
import io
import json
import math
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import field
from pathlib import Path

from transformers import HfArgumentParser

from support import StepError

# Flags that may change when a run is resumed, among them those that a failed run is told to change.
FREE_ON_RESUME = """resume steps keep save_every eval_every wandb tensorboard tokens_per_forward
rollout_batch shard_size reward_budget reward_memory""".split()


def flag(default, help: str, low: float = -math.inf, high: float = math.inf):
    """A dataclass field that is a command-line flag, from low to high; a list takes several
    values."""
    metadata = {"help": help, "limits": (low, high)}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def metadata_of(kind: type, name: str) -> dict:
    """A flag's help and limits; a subclass that changes a default keeps those of its parent."""
    declared = (vars(each).get("__dataclass_fields__", {}).get(name) for each in kind.__mro__)
    return next((field.metadata for field in declared if field and field.metadata), {})


class Flags:
    """Base class of the dataclasses of flags. ValueError for a value outside a flag's limits."""

    def __post_init__(self):
        for name, value in vars(self).items():
            low, high = metadata_of(type(self), name).get("limits", (-math.inf, math.inf))
            if isinstance(value, (int, float)) and not low <= value <= high:
                allowed = f"at least {low}" if high == math.inf else f"between {low} and {high}"
                raise ValueError(f"{name}={value}: must be {allowed}")


class Parser(HfArgumentParser):
    """argparse whose errors are one line, printed by one rank."""

    def add_argument(self, *names, limits=None, **options):
        return super().add_argument(*names, **options)  # which knows no limits

    def error(self, message: str):
        exit_with_error(message)


def early_flags(*names: str, argv=None) -> dict[str, str]:
    """Those of these flags that were given: they decide which others there are, and defaults."""
    parser = argparse.ArgumentParser(
        add_help=False, allow_abbrev=False, argument_default=argparse.SUPPRESS
    )
    for name in names:
        parser.add_argument(f"--{name}", nargs="?", const="")
    given, _ = parser.parse_known_args(argv)
    return vars(given)


def parse_flags(doc: str, *classes: type, defaults: dict, argv=None) -> tuple:
    """An instance of each dataclass. `doc`: its first line heads --help.

    defaults: replace those of the dataclasses; names that they do not have are ignored.
    """
    parser = Parser(classes, description=doc.strip().splitlines()[0], allow_abbrev=False)
    known = {action.dest for action in parser._actions}
    parser.set_defaults(**{name: defaults[name] for name in defaults.keys() & known})
    for each in classes:  # HfArgumentParser's own groups would be handed the limits
        group = parser.add_argument_group(each.__name__)
        names = {field.name for field in dataclasses.fields(each)}
        for action in [action for action in parser._actions if action.dest in names]:
            parser._optionals._group_actions.remove(action)
            group._group_actions.append(action)
            action.help = action.help or metadata_of(each, action.dest).get("help")
    *configs, unknown = parser.parse_args_into_dataclasses(
        argv, return_remaining_strings=True, look_for_args_file=False
    )
    if unknown:
        exit_with_error(f"unknown flag {unknown[0]}: the flags are {' '.join(sorted(known))}")
    return tuple(configs)


def saved_config(run_folder) -> dict:
    """The flags of a run. ValueError if there are none."""
    path = Path(run_folder) / "config.json"
    if not path.is_file():
        raise ValueError(f"{run_folder}: no config.json there: give the folder of a run")
    return json.loads(path.read_text())


def check_resumed(flags: dict, saved: dict) -> None:
    """ValueError for a flag that contradicts the run that is resumed."""
    for name in saved.keys() & flags.keys() - set(FREE_ON_RESUME):
        if flags[name] != saved[name]:
            raise ValueError(f"--{name} {flags[name]} contradicts the run's {saved[name]}")


@contextmanager
def one_line_errors() -> Iterator[None]:
    """End the program with one line where the block meets bad input or a missing file."""
    try:
        yield
    except (ValueError, OSError, ImportError, StepError) as error:
        exit_with_error(error)


def escape_unprintable() -> None:
    """A character that stdout or stderr cannot encode is printed as an escape, and ends nothing."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a notebook's is not
            stream.reconfigure(errors="backslashreplace")


def exit_with_error(message) -> None:
    """End the program with one line on standard error and exit status 2."""
    if os.environ.get("RANK", "0") != "0":
        time.sleep(3)  # the first rank speaks, and torchrun then ends this one
    text = str(message).strip() or repr(message)
    program = Path(sys.argv[0]).name
    print(f"{program}: error: {text.splitlines()[0]}", file=sys.stderr, flush=True)
    raise SystemExit(2)


def flags_of(*configs) -> dict:
    """All flags of these dataclasses, as config.json keeps them."""
    return {name: value for each in configs for name, value in dataclasses.asdict(each).items()}
