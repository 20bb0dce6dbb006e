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
    kinds = [each for each in vars(module).values() if isinstance(each, type)]
    classes = [k for k in kinds if issubclass(k, base) and k.__module__ == module.__name__]
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
    if "__dataclass_params__" not in vars(variant):
        raise ValueError(f"algo={where}: decorate {variant.__name__} with @dataclass(frozen=True)")
    fields = dataclasses.fields(variant)
    settings = [field.name for field in fields]
    known = {name for parent in variant.__mro__[1:] for name in vars(parent)}
    known |= {field.name for field in fields if "help" in field.metadata}
    for name in vars(variant):
        if name.startswith("_"):
            continue
        if name not in known:
            steps = [step for step in vars(base) if step[0] != "_" and step not in settings]
            raise ValueError(
                f"algo={where}: {name} is no step ({', '.join(steps)}) and no setting; a new "
                f"setting is {name}: float = flag(...), a helper's name begins with _"
            )
        if name in settings and name not in variant.__annotations__:
            raise ValueError(f"algo={where}: write the type, {name}: float = ..., or it is ignored")


def check_view(view, algo, name: str, prompt: Prompt) -> None:
    """StepError if a step `view` returned anything but pixels of its own."""
    n, width = prompt.pixel_values.shape
    step = f"{type(algo).__name__}.view({name!r})"
    _check(step, _describe(view), f"float32[{n}, {width}]")
    if view.data_ptr() == prompt.pixel_values.data_ptr():  # what is written there changes the image
        raise StepError(f"{step} must return a copy of prompt.pixel_values, not the tensor itself")


def check_weights(weights, algo, groups: list[Group]) -> None:
    """StepError if a step `weigh` returned anything but a factor of each group's advantages."""
    step = f"{type(algo).__name__}.weigh"
    found = f"a list of {len(weights)}" if isinstance(weights, list) else _describe(weights)
    _check(step, found, f"a list of {len(groups)}", "a list of 0")
    for weight, group in zip(weights, groups, strict=False):
        n, length = group.tokens.shape
        _check(step, _describe(weight), f"float32[{n}, 1]", f"float32[{n}, {length}]")


def _check(step: str, found: str, *choices: str) -> None:
    if found not in choices:
        raise StepError(f"{step} must return {' or '.join(choices)}, not {found}")


def _describe(value) -> str:
    if not isinstance(value, Tensor):
        return type(value).__name__
    shape = f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
    return shape if value.isfinite().all() else f"{shape} with NaN or inf"
