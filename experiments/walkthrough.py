r"""Run the walkthrough's two pages: Python blocks top to bottom, figures, printed numbers.

    python -m experiments.walkthrough              run both pages, draw their figures
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

ROOT = Path(__file__).resolve().parent.parent
PAGES = (ROOT / "docs" / "walkthrough.md", ROOT / "docs" / "walkthrough-training.md")
# What may come out differently, as a share of a number's size, or of 1 for smaller ones. Rounding
# depends on the CPU's instructions: the page is from a CPU without AVX-512; with it, three numbers
# were 2 to 4% off.
TOLERANCES = {"text": 0.05, "text roughly": 0.25}
NUMBER = re.compile(r"[-+]?\d+(?:\.\d+)?(?:e[-+]?\d+)?")
BLOCK = re.compile(r"^```(python|text|text roughly)\n(.*?)^```\n", re.M | re.S)


def run(page: str, path: Path, namespace: dict) -> tuple[str, list[str]]:
    """Run a page's Python blocks in `namespace`.

    Returns the page with the outputs that came out, and a line for every one that is not the
    page's. A block that fails raises its own error, with the line of the page in the traceback.
    """
    if re.search(r"^```(python|text)", BLOCK.sub("", page), re.M):
        raise ValueError(f"{path.name}: a block is not closed")
    printed, problems = "", []

    def rerun(block: re.Match) -> str:
        nonlocal printed
        kind, text = block.groups()
        line = page.count("\n", 0, block.start()) + 2
        if kind == "python":
            print(f"{path.name}:{line}: {text.splitlines()[0]}", file=sys.stderr)
            code = compile("\n" * (line - 1) + text, str(path), "exec")  # with the page's lines
            with contextlib.redirect_stdout(io.StringIO()) as out:
                exec(code, namespace)
            printed = out.getvalue()
            return block[0]
        problem = difference(text, printed, TOLERANCES[kind])
        problems.extend([f"{path.name}:{line}: {problem}"] if problem else [])
        return f"```{kind}\n{printed}```\n"

    return BLOCK.sub(rerun, page), problems


def difference(expected: str, found: str, tolerance: float) -> str:
    """In which words or numbers two outputs differ by more than the tolerance, or ""."""
    expected_words, found_words = (NUMBER.sub("#", text).split() for text in (expected, found))
    if expected_words != found_words:
        return f"the page says {expected!r}, the code {found!r}"
    for ours, theirs in zip(NUMBER.findall(expected), NUMBER.findall(found), strict=True):
        if not math.isclose(float(ours), float(theirs), rel_tol=tolerance, abs_tol=tolerance):
            return f"the page says {ours}, the code {theirs}"
    return ""


def main() -> None:
    parser = argparse.ArgumentParser(description="Run the walkthrough's pages.")
    parser.add_argument("--write", action="store_true", help="put what comes out into the pages")
    args = parser.parse_args()
    os.chdir(ROOT)
    namespace, problems = {"__name__": "walkthrough"}, []
    for path in PAGES:
        page, differing = run(path.read_text(), path, namespace)
        problems += differing
        if args.write:
            path.write_text(page)
    print("\n".join(problems) or "every printed number is the page's")
    sys.exit(bool(problems) and not args.write)


if __name__ == "__main__":
    main()
