r"""Run the walkthrough's two pages: Python blocks top to bottom, figures, printed numbers.

    python -m experiments.walkthrough              run both pages, draw their figures
    python -m experiments.walkthrough --first      the first alone, docs/walkthrough.md
    python -m experiments.walkthrough --write      put what the blocks print into the pages

A page is Markdown. The ```python blocks, folded ones too, run in order and share one namespace; the
second page goes on in that of the first. A ```text block after one of them holds what it prints.
The numbers there must agree with those that come out, up to rounding, or in a ```text roughly block
up to what rounding does to thirty steps of training.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import math
import os
import re
import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
PAGES = (ROOT / "docs" / "walkthrough.md", ROOT / "docs" / "walkthrough-training.md")
# What may come out differently, as a share of a number's size, or of 1 for smaller ones. Rounding
# depends on the CPU's instructions: the page is from a CPU without AVX-512; with it, three numbers
# were 2 to 4% off.
TOLERANCES = {"text": 0.05, "text roughly": 0.25}
NUMBER = re.compile(r"[-+]?\d+(?:\.\d+)?(?:e[-+]?\d+)?")
FENCE = re.compile(r"^```(python|text|text roughly)\n(.*?)^```\n", re.M | re.S)


class Part(NamedTuple):
    """A piece of a page: prose, code, or the output of the code before it."""

    kind: str  # "prose", "python", "text" or "text roughly"
    text: str  # without the fences
    line: int  # where it starts in the page, from 1


def parse(page: str) -> list[Part]:
    """The page in parts. ValueError for a fence that is not closed."""
    parts, end = [], 0
    for block in FENCE.finditer(page):
        parts.append(Part("prose", page[end : block.start()], page.count("\n", 0, end) + 1))
        line = page.count("\n", 0, block.start()) + 2
        parts.append(Part(block[1], block[2], line))
        end = block.end()
    parts.append(Part("prose", page[end:], page.count("\n", 0, end) + 1))
    for part in parts:
        if part.kind == "prose" and re.search(r"^```(python|text)", part.text, re.M):
            raise ValueError(f"line {part.line}: a block is not closed")
    return parts


def run(parts: list[Part], page: Path, namespace: dict) -> list[str]:
    """Run a page's Python parts in `namespace`; returns per part what the last of them printed.

    A block that fails raises its own error, with the line of the page in the traceback.
    """
    out, printed = io.StringIO(), []
    for part in parts:
        if part.kind == "python":
            print(f"{page.name}:{part.line}: {part.text.splitlines()[0]}", file=sys.stderr)
            above = "\n" * (part.line - 1)  # so that a traceback names the page's lines
            code = compile(above + part.text, str(page), "exec")
            with contextlib.redirect_stdout(io.StringIO()) as out:
                exec(code, namespace)
        printed.append(out.getvalue())
    return printed


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


def differences(parts: list[Part], printed: list[str], page: Path) -> list[str]:
    """A line for every output that is not the page's."""
    problems = []
    for part, found in zip(parts, printed, strict=True):
        if part.kind in TOLERANCES:
            problem = difference(part.text, found, TOLERANCES[part.kind])
            problems += [f"{page.name}:{part.line}: {problem}"] if problem else []
    return problems


def write(parts: list[Part], printed: list[str]) -> str:
    """The page with the outputs that came out."""
    page = ""
    for part, found in zip(parts, printed, strict=True):
        text = found if part.kind in TOLERANCES else part.text
        page += text if part.kind == "prose" else f"```{part.kind}\n{text}```\n"
    return page


def main() -> None:
    parser = argparse.ArgumentParser(description="Run the walkthrough's pages.")
    parser.add_argument("--first", action="store_true", help="the first page alone")
    parser.add_argument("--write", action="store_true", help="put what comes out into the pages")
    args = parser.parse_args()
    pages = {page: parse(page.read_text()) for page in PAGES[: 1 if args.first else None]}
    os.chdir(ROOT)
    namespace, problems = {"__name__": "walkthrough"}, []
    for page, parts in pages.items():
        printed = run(parts, page, namespace)
        if args.write:
            page.write_text(write(parts, printed))
        else:
            problems += differences(parts, printed, page)
    if not args.write:
        print("\n".join(problems) or "every printed number is the page's")
    sys.exit(1 if problems else 0)


if __name__ == "__main__":
    main()
