"""The six files at the top stay within their line budget, and imports go in one direction."""

import ast
from pathlib import Path

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
    lines = {path.stem: len(path.read_text().splitlines()) for path in ROOT.glob("*.py")}
    assert max(lines.values()) <= 290 and sum(lines.values()) <= 1400, lines
    for path in (ROOT / "variants").glob("*.py"):
        limit = 140 if path.stem == "dyco_rl" else 75
        assert len(path.read_text().splitlines()) <= limit, path.name


def test_imports_go_in_one_direction():
    for name in SIX:
        assert imports(ROOT / f"{name}.py") <= MAY_IMPORT[name], name
    for path in (ROOT / "support").glob("*.py"):
        assert imports(path) <= {"support"}, path.name
        assert "matplotlib.pyplot" not in path.read_text(), path.name  # it would choose a backend
    for path in (ROOT / "variants").glob("*.py"):
        assert "train" not in imports(path), path.name
