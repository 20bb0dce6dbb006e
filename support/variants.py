"""Find the class that --algo names, a subclass of papo.Algo, and check what its steps return.

Mistakes that Python would let pass (a misspelled step, a setting without its type) are errors of
one line here, since a run would silently train something else.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import importlib.util
import inspect
import sys
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from support.batch import Group, Prompt, seeded
from support.errors import StepError

RECORDS = ("old_log_probs", "entropies")  # what a variant may need
FOLDER = Path(__file__).resolve().parent.parent / "variants"


def variant_names() -> list[str]:
    return sorted(path.stem for path in FOLDER.glob("[!_]*.py"))


def load_variant(name: str, base: type, steps: tuple[str, ...], presets: tuple[str, ...]) -> type:
    """The subclass of `base` that variants/NAME.py or path/to/FILE.py defines.

    steps: what a subclass may replace beside its fields. ValueError, in one line, for an unknown
    name (presets: known ones beside the variants) or a file that does not define what it must.
    """
    if name in variant_names():
        module = _import(name, lambda: importlib.import_module(f"variants.{name}"))
    elif name.endswith(".py"):
        module = _import(name, lambda: _module_of(Path(name).resolve()))
    else:
        choices = ", ".join([*presets, *variant_names()])
        raise ValueError(f"algo={name!r}: choose one of {choices}, or path/to/FILE.py")
    of_module = [each for each in vars(module).values() if isinstance(each, type)]
    classes = [
        each for each in of_module if issubclass(each, base) and each.__module__ == module.__name__
    ]
    if len(classes) != 1:
        found = ", ".join(each.__name__ for each in classes) or "none"
        raise ValueError(f"algo={name}: must define one subclass of {base.__name__}, has {found}")
    check_variant(classes[0], base, steps, where=name)
    return classes[0]


def _import(name: str, load):
    try:
        return load()
    except Exception as error:  # whatever a user's file raises
        line = f"{type(error).__name__}: {error}"
        if "non-frozen dataclass" in line:
            line = "write @dataclass(frozen=True)"
        raise ValueError(f"algo={name}: cannot be imported: {line}") from error


def _module_of(path: Path):
    """The module of a file anywhere, which may import its neighbours. It is executed once."""
    name = f"variant_{path.stem}"  # unlike that of any other module
    if getattr(sys.modules.get(name), "__file__", None) == str(path):
        return sys.modules[name]
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses looks modules up by name
    spec.loader.exec_module(module)
    return module


def check_variant(variant: type, base: type, steps: tuple[str, ...], where: str) -> None:
    """ValueError for a setting or step that would not take effect."""
    if "__dataclass_params__" not in vars(variant):
        raise ValueError(f"algo={where}: decorate {variant.__name__} with @dataclass(frozen=True)")
    check_settings(variant, base, where)
    check_steps(variant, base, steps, where)
    if not isinstance(variant.needs, tuple) or set(variant.needs) - set(RECORDS):
        choices = ", ".join(RECORDS)
        raise ValueError(f"algo={where}: needs={variant.needs!r}: a tuple of some of {choices}")
    if not isinstance(variant.columns, tuple):
        raise ValueError(f"algo={where}: columns={variant.columns!r}: a tuple of column names")


def check_settings(variant: type, base: type, where: str) -> None:
    """ValueError for a field that replaces no setting and is no flag."""
    parents = [each for each in variant.__mro__[1:] if issubclass(each, base)]
    settings = [one.name for parent in parents for one in dataclasses.fields(parent)]
    for one in dataclasses.fields(variant):
        if one.name not in settings and "help" not in one.metadata:
            advice = _suggest(one.name, settings)
            new = f"a new setting is {one.name}: {type(one.default).__name__} = flag(...)"
            raise ValueError(f"algo={where}: {one.name} is no setting, {advice}; {new}")


def check_steps(variant: type, base: type, steps: tuple[str, ...], where: str) -> None:
    """ValueError for a member that is neither a setting, a step, nor a helper."""
    fields = {one.name for one in dataclasses.fields(variant)}
    annotated = vars(variant).get("__annotations__", {})
    for name in vars(variant):
        if name.startswith("_") or name in steps:
            continue
        if name in fields and name not in annotated:
            raise ValueError(f"algo={where}: write the type, {name}: float = ..., or it is ignored")
        if name not in fields:
            advice = f"{_suggest(name, list(steps))}; names of helpers begin with _"
            raise ValueError(f"algo={where}: {name} is no step, {advice}")
    for name in steps:
        check_parameters(name, getattr(variant, name), getattr(base, name), where)


def check_parameters(name: str, step, default, where: str) -> None:
    """ValueError if a step cannot be called as the one it replaces."""
    if not callable(default):
        return
    parameters = list(inspect.signature(default).parameters)
    try:
        inspect.signature(step).bind(*parameters)
    except TypeError:
        expected = ", ".join(parameters)
        raise ValueError(f"algo={where}: write def {name}({expected})") from None


def sampling_pairs(
    algo, prompts: list[Prompt], policy, group_size: int, key: tuple
) -> list[tuple[Prompt, Prompt]]:
    """The pairs of all prompts, see papo.Algo.images.

    Responses to the same prompt get different numbers, so that their random numbers differ.
    """
    pairs = []
    for prompt in prompts:
        generator = seeded("images", *key, prompt.index)
        of_prompt = algo.images(prompt, policy, generator)
        check_pairs(of_prompt, algo, prompt)
        for number, (sampled, trained) in enumerate(of_prompt):
            sampled = replace(sampled, first_sample=number * group_size)
            pairs.append((sampled, trained))
    return pairs


def check_pairs(pairs, algo, prompt: Prompt) -> None:
    """StepError if a step `images` returned anything but pairs made from its prompt."""
    must = f"algo={algo.name}: images must return a list of pairs of prompts"
    if not isinstance(pairs, list) or not pairs:
        raise StepError(f"{must}, not {'an empty list' if pairs == [] else _describe(pairs)}")
    for pair in pairs:
        prompts = pair if isinstance(pair, tuple) else (pair,)
        if len(prompts) != 2 or not all(isinstance(each, Prompt) for each in prompts):
            found = " and ".join(_describe(each) for each in prompts)
            raise StepError(f"{must}, not of {found}")
        if any(each.index != prompt.index for each in prompts):
            raise StepError(f"{must} made by dataclasses.replace from the one it was given")


def check_view(view, algo, name: str, prompt) -> tuple[Tensor, Tensor]:
    """What a step `view` returned; StepError if it is not pixels and a mask of patches."""
    n, width = prompt.pixel_values.shape
    tensors = view if isinstance(view, tuple) else (view,)
    found = [_describe(tensor) for tensor in tensors]
    expected = [f"float32[{n}, {width}]", f"bool[{n}]"]
    if found != expected:
        raise StepError(
            f"algo={algo.name}: view({name!r}) must return pixels and the changed patches, "
            f"{' and '.join(expected)}, not {' and '.join(found)}"
        )
    coefficient = algo.views()[name]
    if name == "mask" and coefficient not in (0, -algo.kl_prcp_coef):
        advice = "set kl_prcp_coef instead, or give the view another name"
        raise StepError(f"algo={algo.name}: views()['mask']={coefficient} has no effect: {advice}")
    return view


def check_weights(weights, algo, groups: list[Group]) -> list[Tensor]:
    """What a step `weigh` returned; StepError if it is not a factor of each group, or nothing."""
    must = f"algo={algo.name}: weigh must return"
    if not isinstance(weights, list) or len(weights) not in (0, len(groups)):
        found = f"{len(weights)}" if isinstance(weights, list) else _describe(weights)
        raise StepError(f"{must} a list of {len(groups)} tensors, one per group, not {found}")
    for weight, group in zip(weights, groups, strict=False):
        n, length = group.tokens.shape
        choices = (f"float32[{n}, 1]", f"float32[{n}, {length}]")
        if _describe(weight) not in choices:
            raise StepError(f"{must} {' or '.join(choices)} per group, not {_describe(weight)}")
        if not weight.isfinite().all():
            raise StepError(f"{must} finite weights, not {weight.flatten().tolist()[:8]} ...")
    return weights


def _describe(value) -> str:
    if not isinstance(value, Tensor):
        return type(value).__name__
    return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"


def _suggest(name: str, choices: list[str]) -> str:
    close = difflib.get_close_matches(name, choices, n=1)
    hint = f"did you mean {close[0]}? " if close else ""
    return f"{hint}choose one of {', '.join(choices)}"
