"""Find the class that --algo names, a subclass of papo.Algo, and check what its steps return.

Mistakes that Python would let pass, so that a run would silently train something else, are errors
of one line here. All other mistakes are tracebacks.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import sys
from pathlib import Path

from torch import Tensor

from support import StepError
from support.batch import Group, Prompt

FOLDER = Path(__file__).resolve().parent.parent / "variants"


def variant_names() -> list[str]:
    return sorted(path.stem for path in FOLDER.glob("[!_]*.py"))


def load_variant(name: str, base: type, presets: tuple[str, ...]) -> type:
    """The subclass of `base` that variants/NAME.py or path/to/FILE.py defines.

    presets: known names beside the variants. ValueError, in one line, for an unknown name or a
    class that would not do what it says.
    """
    if name in variant_names():
        module = importlib.import_module(f"variants.{name}")
    elif name.endswith(".py") and Path(name).is_file():
        module = _import_file(Path(name).resolve())
    else:
        choices = ", ".join([*presets, *variant_names()])
        raise ValueError(f"algo={name!r}: choose one of {choices}, or path/to/FILE.py")
    of_module = [each for each in vars(module).values() if isinstance(each, type)]
    own = [each for each in of_module if each.__module__ == module.__name__]
    classes = [each for each in own if issubclass(each, base)]
    if len(classes) != 1:
        found = ", ".join(each.__name__ for each in classes) or "none"
        raise ValueError(f"algo={name}: must define one subclass of {base.__name__}, has {found}")
    check_variant(classes[0], base, name)
    return classes[0]


def _import_file(path: Path):
    """The module of a file anywhere, which may import its neighbours."""
    name = f"variant_{path.stem}"  # unlike that of any other module
    sys.path.append(str(path.parent))
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses looks modules up by name
    spec.loader.exec_module(module)
    return module


def check_variant(variant: type, base: type, where: str) -> None:
    """ValueError for a setting or step that would not take effect."""
    of_base = {field.name for field in dataclasses.fields(base)}
    steps = [name for name in vars(base) if name not in of_base and not name.startswith("_")]
    if "__dataclass_params__" not in vars(variant):
        raise ValueError(f"algo={where}: decorate {variant.__name__} with @dataclass(frozen=True)")
    parents = [each for each in variant.__mro__[1:] if dataclasses.is_dataclass(each)]
    settings = {field.name for parent in parents for field in dataclasses.fields(parent)}
    flags = {field.name for field in dataclasses.fields(variant) if "help" in field.metadata}
    for name in vars(variant):
        if name.startswith("_") or name in steps:
            continue
        if name not in settings | flags:
            raise ValueError(
                f"algo={where}: {name} is no step ({', '.join(steps)}) and no setting; a new "
                f"setting is {name}: float = flag(...), a helper's name begins with _"
            )
        if name not in vars(variant).get("__annotations__", {}):
            raise ValueError(f"algo={where}: write the type, {name}: float = ..., or it is ignored")


def check_view(view, algo, name: str, prompt: Prompt) -> None:
    """StepError if a step `view` returned anything but pixels and a mask of patches."""
    n, width = prompt.pixel_values.shape
    expected = [f"float32[{n}, {width}]", f"bool[{n}]"]
    found = [_describe(each) for each in view] if isinstance(view, tuple) else [_describe(view)]
    if found != expected:
        raise StepError(
            f"{type(algo).__name__}.view({name!r}) must return pixels and the changed patches, "
            f"{' and '.join(expected)}, not {' and '.join(found)}"
        )


def check_weights(weights, algo, groups: list[Group]) -> None:
    """StepError if a step `weigh` returned anything but a factor of each group's advantages."""
    if not isinstance(weights, list) or len(weights) not in (0, len(groups)):
        found = f"{len(weights)}" if isinstance(weights, list) else _describe(weights)
        name = f"{type(algo).__name__}.weigh"
        raise StepError(f"{name} must return a list of {len(groups)} tensors, not {found}")
    for weight, group in zip(weights, groups, strict=False):
        n, length = group.tokens.shape
        choices = (f"float32[{n}, 1]", f"float32[{n}, {length}]")
        if _describe(weight) not in choices or not weight.isfinite().all():
            raise StepError(
                f"{type(algo).__name__}.weigh must return {' or '.join(choices)} per group, "
                f"finite, not {_describe(weight)}"
            )


def _describe(value) -> str:
    if not isinstance(value, Tensor):
        return type(value).__name__
    return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
