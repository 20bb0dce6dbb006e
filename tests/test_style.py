"""One sitting, enforced: short files, short functions, shallow nesting, narrow lines, one direction of imports."""

import ast
import io
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = sorted(ROOT.glob("*.py"))
OURS = {path.stem for path in FILES}
# What each module of ours may import of ours.
MAY_IMPORT = {
    "losses": set(), "masking": set(), "reward": set(), "plots": set(), "checkpoint": set(), "packing": set(),
    "papo": {"losses", "masking", "packing"}, "rollout": {"papo"}, "toy": {"papo"}, "data": {"papo", "toy"},
}  # fmt: skip


def code_lines(source):
    """Lines with code on them: not blank, not only a comment, not a docstring."""
    documented = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node) is not None:
            documented |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    skip = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    lines = {n for t in tokens if t.type not in skip for n in range(t.start[0], t.end[0] + 1)}
    return len(lines - documented)


def depth(node, level=0):
    nests = (ast.For, ast.While, ast.If, ast.With, ast.Try)
    deepest = level
    for name, child in ast.iter_fields(node):
        for part in child if isinstance(child, list) else [child]:
            if isinstance(part, ast.AST):
                chained = isinstance(node, ast.If) and name == "orelse" and isinstance(part, ast.If)  # elif
                deepest = max(deepest, depth(part, level + (isinstance(part, nests) and not chained)))
    return deepest


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.name)
def test_size(path):
    source = path.read_text()
    assert code_lines(source) <= 350
    assert max(map(len, source.splitlines())) <= 120
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno + 1 <= 60, node.name
            assert depth(node) <= 4, node.name
    assert ast.get_docstring(ast.parse(source)), "a header says what the file is"


def test_the_short_files_are_short():
    assert code_lines((ROOT / "losses.py").read_text()) <= 150
    assert code_lines((ROOT / "masking.py").read_text()) <= 120


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.name)
def test_imports_go_one_way(path):
    imported = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        names += [node.module] if isinstance(node, ast.ImportFrom) else []
        imported |= {name.split(".")[0] for name in names} & OURS
    assert "train" not in imported and imported <= MAY_IMPORT.get(path.stem, OURS)


def test_readme_lists_every_module():
    readme = (ROOT / "README.md").read_text()
    for path in FILES:
        assert f"]({path.name})" in readme, path.name
