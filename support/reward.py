r"""The scoring rule: a response and the true answer -> format, accuracy and their weighted sum.

support/sandbox.py applies this rule in processes that can be killed: a policy in training writes
anything at all, so this is the one step whose input is not trusted.

The rule is the released one (EasyR1's math reward); mathruler 0.1.0 decides accuracy. Differences:

1. A response without a box is never accurate. mathruler reads a missing answer as the word "None",
   and so the release accepts every unboxed response where the true answer is that word.
2. The regular expressions match what the released ones do, but never backtrack: the released take
   quadratic time or worse on long runs of blanks or tags.
3. Only formulas are evaluated. mathruler passes the boxed text to sympy, which calls eval on it.
   mathruler's own check, at most two different letters, lets frac('...') run any Python in octal.

    python -c "from support import reward; print(reward.compute_score(r'\boxed{2}', '2'))"
"""

from __future__ import annotations

import ast
import builtins
import logging
import re
import types

import sympy
from mathruler import grader as mathruler
from sympy.parsing import sympy_parser

# The leftmost match of each tag leaves the most room for the next, so (?>...) may keep it.
FORMAT = re.compile(r"<think>(?>.*?</think>)(?>.*?\\boxed\{).*?\}", re.DOTALL)


def rewrite(response: str) -> str:
    r"""Strip white space around <, > and /, as re.sub(r"\s*(<|>|/)\s*", r"\1", response) does."""
    before = re.sub(r"(?<!\s)\s++(?=[<>/])", "", response)
    return re.sub(r"(?<=[<>/])\s++", "", before)


def format_reward(response: str) -> float:
    r"""1.0 if all of the rewritten response matches (?s)<think>.*</think>.*\boxed{.*}.*, else 0."""
    return float(FORMAT.match(rewrite(response)) is not None)


def accuracy_reward(response: str, answer: str) -> float:
    """1.0 if mathruler finds the content of the response's last box equal to the answer, else 0.0.

    Runs no code from the response. Some responses take forever, though: see support/sandbox.py.
    """
    content = boxed(response)
    return float(content is not None and mathruler.grade_answer(content, answer))


def boxed(response: str) -> str | None:
    r"""The content of the last \boxed{...}, or None where there is none or it is not closed."""
    text = rewrite(response)
    content = mathruler.extract_boxed_content(text)
    if content != "None":
        return content
    # "None" stands for no box, unless a box holds that very word.
    _, box, inside = text.rpartition(r"\boxed{")
    holds_none = box and re.match(r"\s*None\s*\}", inside)
    return content if holds_none else None


def compute_score(response: str, answer: str, format_weight: float = 0.1) -> dict[str, float]:
    """The scores "overall", "format" and "accuracy", each in [0, 1]."""
    return combine(format_reward(response), accuracy_reward(response, answer), format_weight)


def combine(format_score: float, accuracy: float, format_weight: float = 0.1) -> dict[str, float]:
    """The dict that compute_score returns, from its two parts."""
    return {
        "overall": (1 - format_weight) * accuracy + format_weight * format_score,
        "format": format_score,
        "accuracy": accuracy,
    }


# ---------------------------------------------------------------------- only formulas are evaluated

# No attribute, lambda, comprehension, f-string or assignment.
_OPERANDS = (ast.Constant, ast.Name, ast.Tuple, ast.List, ast.Subscript, ast.Slice)
_OPERATIONS = (ast.BinOp, ast.UnaryOp, ast.BoolOp, ast.Compare, ast.IfExp, ast.Call, ast.keyword)
_OPERATORS = (ast.operator, ast.unaryop, ast.boolop, ast.cmpop, ast.expr_context)
FORMULA_SYNTAX = (ast.Expression, *_OPERANDS, *_OPERATIONS, *_OPERATORS)

TRANSFORMATIONS = (
    *sympy_parser.standard_transformations,
    sympy_parser.implicit_multiplication_application,
)


def _formula_names() -> dict:
    """The names that sympy's parse_expr offers to eval, with Python's built-in functions disarmed.

    The parser takes an unknown name for a symbol. The names of built-ins therefore have to stay
    known: "id" is not the product of i and d.
    """
    names = {name: getattr(sympy, name) for name in sympy.__all__}
    for name, value in vars(builtins).items():
        if isinstance(value, types.BuiltinFunctionType):
            names[name] = object
    return names | {"max": sympy.Max, "min": sympy.Min, "__builtins__": {}}


FORMULA_NAMES = _formula_names()


def _parse_formula(text: str):
    """Replaces mathruler's _sympy_parse: the same value for a formula, an exception for other code.

    mathruler reads every exception as "not equal". Quotes are refused in the text itself, since
    sympy's functions evaluate strings; the quotes in `code` are the parser's own, around names and
    digits.
    """
    if "'" in text or '"' in text:
        raise ValueError("not a formula: quotes in an answer")
    code = sympy_parser.stringify_expr(text.replace("^", "**"), {}, FORMULA_NAMES, TRANSFORMATIONS)
    for node in ast.walk(ast.parse(code, mode="eval")):
        if not isinstance(node, FORMULA_SYNTAX):
            raise ValueError(f"not a formula: {type(node).__name__} in an answer")
    return sympy_parser.eval_expr(code, {}, FORMULA_NAMES)


if not hasattr(mathruler, "_sympy_parse"):
    raise ImportError("this mathruler has no _sympy_parse to guard: pip install mathruler==0.1.0")
mathruler._sympy_parse = _parse_formula

logging.getLogger("pylatexenc").setLevel(logging.ERROR)  # it warns about every unfinished \frac
