"""Dataclass fields -> command-line flags, and their defaults per task."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import os
import sys
import time
from dataclasses import field
from pathlib import Path

from transformers import (
    AutoConfig,
)

from support import distributed, toy
from support.qwen_vl import PROMPT_SUFFIX


def flag(default, doc: str):
    """A dataclass field that is a command-line flag with one line of help."""
    return field(default=default, metadata={"doc": doc})


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line that names the choices, printed by one rank."""

    def error(self, message: str):
        if message.startswith("unrecognized arguments: "):
            name = message.removeprefix("unrecognized arguments: ").split()[0].split("=")[0]
            flags = sorted(
                s
                for s in self._option_string_actions
                if s.startswith("--") and not s.startswith("--no-")
            )
            close = difflib.get_close_matches(name, flags, 1)
            hint = f"did you mean {close[0]}? " if close else ""
            message = f"unknown flag {name}: {hint}the flags are {' '.join(flags)}"
        exit_with_error(message)


def exit_with_error(message) -> None:
    """End the program with one line on standard error and exit status 2."""
    if (
        os.environ.get("RANK", "0") != "0"
    ):  # the first rank says it and torchrun ends this one, unless it is alone
        time.sleep(3)
    text = str(message).strip() or repr(message)
    print(f"{Path(sys.argv[0]).name}: error: {text.splitlines()[0]}", file=sys.stderr, flush=True)
    raise SystemExit(2)


def parse_flags(doc: str, *classes, argv=None) -> dict:
    """The flags that were given, by name; each field of the dataclasses is one flag."""
    about = dict(description=doc.strip().splitlines()[0], usage="%(prog)s [--flag value ...]")
    parser = Parser(**about, allow_abbrev=False, argument_default=argparse.SUPPRESS)
    for cls in classes:
        for f in (f for f in dataclasses.fields(cls) if f.name != "name"):
            kind = type(f.default)
            how = (
                {"action": argparse.BooleanOptionalAction}
                if kind is bool
                else {"type": kind, "metavar": ""}
            )
            how = {"nargs": "+", "metavar": ""} if kind is tuple else how
            text = f.metadata["doc"]
            shown = (
                ""
                if f.default in ("", (), PROMPT_SUFFIX)
                else f" [{'preset' if cls.__name__ == 'Algo' else f.default}]"
            )
            parser.add_argument(f"--{f.name}", help=(text + shown).replace("%", "%%"), **how)
    return vars(parser.parse_args(argv))


def model_folder(name: str, seed: int = 0) -> str:
    """Where a model's name leads: a toy is made (once, by the first rank) and becomes a folder like any other."""
    if not (setting := toy.setting_of(name)):
        return name
    distributed.on_first_rank(lambda: toy.build(seed, setting=setting))
    return str(toy.build(seed, setting=setting))


def data_of(given: dict) -> str:
    """The data that the flags mean: where they name none, a toy's for a model of that name or with so few words."""
    model = given.get("model", "toy")
    if given.get("data") or toy.setting_of(model):
        return given.get("data") or model
    few = (
        Path(model).is_dir()
        and AutoConfig.from_pretrained(model).get_text_config().vocab_size < 1000
    )
    return "toy" if few else ""


def resolve_config(cls, given: dict):
    """The config of a command: given flags over the toy's own defaults (where the data is the toy) over cls's."""
    defaults, spec = {}, data_of(given)
    if setting := toy.setting_of(spec):
        defaults = toy.task_defaults(setting) | toy.MODEL_DEFAULTS | {"data": spec, "val_data": spec}
    names = {f.name for f in dataclasses.fields(cls)}
    return cls(**{k: v for k, v in (defaults | given).items() if k in names})
