r"""Run docs/walkthrough.md: its Python blocks top to bottom, its figures, its printed numbers.

    python -m experiments.walkthrough              run the page, draw its figures
    python -m experiments.walkthrough --write      put what the blocks print into the page
    python -m experiments.walkthrough --notebook walkthrough.ipynb     the page as a notebook

A page is Markdown. Its ```python blocks run in order and share one namespace. A ```text block after
one of them holds what it prints; numbers there must agree with those that come out, up to rounding,
or in a ```text roughly block up to what rounding does to fifty steps of training.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import math
import os
import re
import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "walkthrough.md"
# What may come out differently, as a share of a number's size, or of 1 for smaller ones. Rounding
# depends on the CPU's instructions: the page is from a CPU without AVX-512; with it, three numbers
# were 2 to 4% off.
TOLERANCES = {"text": 0.05, "text roughly": 0.25}
NUMBER = re.compile(r"[-+]?\d+(?:\.\d+)?(?:e[-+]?\d+)?")


class Part(NamedTuple):
    """A piece of the page: prose, code, or the output of the code before it."""

    kind: str  # "prose", "python", "text" or "text roughly"
    text: str  # without the fences
    line: int  # where it starts in the page, from 1


def parse(page: str) -> list[Part]:
    """The page in parts. ValueError for a fence that is not closed."""
    parts, kind, start, lines = [], "prose", 1, []
    for number, line in enumerate(page.splitlines(), start=1):
        opens = re.fullmatch(r"```(python|text|text roughly)", line)
        closes = line == "```" and kind != "prose"
        if not opens and not closes:
            lines.append(line)
            continue
        if lines or closes:
            parts.append(Part(kind, "\n".join(lines), start))
        kind, start, lines = (opens[1] if opens else "prose"), number + 1, []
    if kind != "prose":
        raise ValueError(f"line {start}: a {kind} block is not closed")
    if lines:
        parts.append(Part(kind, "\n".join(lines), start))
    return parts


def run(parts: list[Part], name: str) -> list[str]:
    """Run the Python parts in one namespace; returns what each part printed, "" for the others.

    A block that fails raises its own error, with the line of the page in the traceback.
    """
    namespace = {"__name__": "walkthrough"}
    printed = []
    for part in parts:
        out = io.StringIO()
        if part.kind == "python":
            above = "\n" * (part.line - 1)  # so that a traceback names the page's lines
            code = compile(above + part.text, name, "exec")
            with contextlib.redirect_stdout(out):
                exec(code, namespace)
            show_progress(part, out.getvalue())
        printed.append(out.getvalue().rstrip("\n"))
    return printed


def show_progress(part: Part, printed: str) -> None:
    print(f"line {part.line}: {part.text.splitlines()[0]}", file=sys.stderr)
    for line in printed.splitlines():
        print(f"    {line}", file=sys.stderr)


def pairs(parts: list[Part], printed: list[str]) -> list[tuple[Part, str]]:
    """Each text part with what the Python part before it printed."""
    found, last = [], ""
    for part, output in zip(parts, printed, strict=True):
        if part.kind == "python":
            last = output
        elif part.kind in TOLERANCES:
            found.append((part, last))
    return found


def difference(expected: str, found: str, tolerance: float) -> str:
    """The first line in which two outputs differ by more than the tolerance, or ""."""
    expected_lines, found_lines = expected.splitlines(), found.splitlines()
    for theirs, ours in zip(expected_lines, found_lines, strict=False):
        same_words = NUMBER.sub("#", theirs).split() == NUMBER.sub("#", ours).split()
        numbers = zip(NUMBER.findall(theirs), NUMBER.findall(ours), strict=False)
        close = all(
            math.isclose(float(a), float(b), rel_tol=tolerance, abs_tol=tolerance)
            for a, b in numbers
        )
        if not same_words or not close:
            return f"the page says {theirs!r}, the code {ours!r}"
    if len(expected_lines) != len(found_lines):
        return f"the page has {len(expected_lines)} lines, the code prints {len(found_lines)}"
    return ""


def differences(parts: list[Part], printed: list[str]) -> list[str]:
    """A line for every output that is not the page's."""
    problems = []
    for part, found in pairs(parts, printed):
        problem = difference(part.text, found, TOLERANCES[part.kind])
        if problem:
            problems.append(f"line {part.line}: {problem}")
    return problems


def write(parts: list[Part], printed: list[str]) -> str:
    """The page with the outputs that came out."""
    outputs = {part.line: found for part, found in pairs(parts, printed)}
    lines = []
    for part in parts:
        text = outputs.get(part.line, part.text) if part.kind in TOLERANCES else part.text
        if part.kind != "prose":
            text = f"```{part.kind}\n{text}\n```"
        lines.append(text)
    return "\n".join(lines) + "\n"


def notebook(parts: list[Part]) -> dict:
    """The page as a Jupyter notebook without outputs, to be run in the repository's root."""
    cells = []
    for part in parts:
        text = part.text.strip("\n")
        if part.kind in TOLERANCES or not text:
            continue
        cell = {"metadata": {}, "source": text.splitlines(keepends=True)}
        if part.kind == "prose":
            cells.append({"cell_type": "markdown", **cell})
        else:
            cells.append({"cell_type": "code", "execution_count": None, "outputs": [], **cell})
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    return {
        "cells": cells,
        "metadata": {"kernelspec": kernel, "language_info": {"name": "python"}},
        "nbformat": 4,
        "nbformat_minor": 4,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Run docs/walkthrough.md.")
    parser.add_argument("--write", action="store_true", help="put what comes out into the page")
    parser.add_argument("--notebook", type=Path, help="write the page as a notebook, run nothing")
    args = parser.parse_args()
    parts = parse(PAGE.read_text())
    if args.notebook:
        args.notebook.write_text(json.dumps(notebook(parts), indent=1) + "\n")
        print(args.notebook)
        return
    os.chdir(ROOT)
    printed = run(parts, str(PAGE))
    if args.write:
        PAGE.write_text(write(parts, printed))
        return
    problems = differences(parts, printed)
    print("\n".join(problems) or "every printed number is the page's")
    sys.exit(1 if problems else 0)


if __name__ == "__main__":
    main()
