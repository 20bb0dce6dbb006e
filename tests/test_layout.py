"""The six files at the top stay within their line budget, and imports go in one direction."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SIX = ("train", "papo", "losses", "masking", "rollout", "evaluate")
MAY_IMPORT = {  # what each file at the top may import from this repository
    "losses": set(),
    "masking": set(),
    "papo": {"losses", "masking", "support"},
    "rollout": {"support"},
    "evaluate": {"losses", "masking", "papo", "rollout", "support"},
    "train": {"losses", "masking", "papo", "rollout", "evaluate", "support"},
}
OURS = {*SIX, "support", "variants", "experiments", "tests"}


def imports(path):
    """This repository's top-level names that a file imports, anywhere in the file."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module.split(".")[0])
    return found & OURS


def test_six_files_stay_within_their_budget():
    assert {path.stem for path in ROOT.glob("*.py")} == set(SIX)
    lines = {name: (ROOT / f"{name}.py").read_text().splitlines() for name in SIX}
    too_long = {name: len(text) for name, text in lines.items() if len(text) > 310}
    assert not too_long
    assert sum(map(len, lines.values())) <= 1455


def test_train_takes_few_names_from_support():
    tree = ast.parse((ROOT / "train.py").read_text())
    imports_ = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    ours = [node.names for node in imports_ if node.module.split(".")[0] == "support"]
    assert sum(map(len, ours)) <= 12


@pytest.mark.parametrize("name", SIX)
def test_top_files_import_in_one_direction(name):
    assert imports(ROOT / f"{name}.py") <= MAY_IMPORT[name]


def test_support_imports_only_support():
    for path in (ROOT / "support").glob("*.py"):
        assert imports(path) <= {"support"}, path.name


def test_nothing_imports_train():
    for folder in (".", "support", "variants"):
        for path in (ROOT / folder).glob("*.py"):
            assert "train" not in imports(path), path.name
