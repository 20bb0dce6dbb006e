"""The reward: a response and the true answer -> format, accuracy and their weighted sum.

Place in the pipeline: rollout.py samples the responses, a Grader scores them, losses.py makes advantages of a group's
scores. A policy in training writes anything at all, so this is the one step whose input is not trusted.

The rule is the released one (EasyR1's math reward), and mathruler 0.1.0 decides accuracy. We differ in:

1. An unboxed response is never accurate. (mathruler puts "None" for the missing answer, and so accepts every unboxed
   response when the true answer is the word None.)
2. The rewrite and the format test are the released regular expressions as linear scans: those take quadratic time and
   worse on long runs of blanks or tags.
3. mathruler gives the boxed text to sympy's parser, which calls eval on it, and its own check (at most two different
   letters) can be got round: frac('...') with the string in octal runs any Python. We check the syntax tree first.
4. The released trainer grades in its own process, where one `\\boxed{99999999!}` hangs it. Grader uses processes that
   can be killed, with a deadline a response and a budget a batch.

    python -c "import reward; print(reward.compute_score(r'<think>1 + 1</think> \\boxed{2}', '2'))"
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


def rewrite(response: str) -> str:
    r"""Remove white space around <, > and /, as re.sub(r"\s*(<|>|/)\s*", r"\1", response) does, in linear time."""
    first, *rest = re.split("([<>/])", response)
    return (
        "".join([first.rstrip(), *(piece.strip() for piece in rest[:-1]), rest[-1].lstrip()])
        if rest
        else first
    )


def format_reward(response: str) -> float:
    r"""1.0 when the whole rewritten response matches `<think>.*</think>.*\boxed{.*}.*` (a dot matches anything)."""
    text, end = rewrite(response), 0
    # The leftmost place of each piece leaves the most room for the next, so no backtracking is needed.
    for piece in ("<think>", "</think>", r"\boxed{", "}"):
        start = text.find(piece, end)
        if start < 0 or (end == 0 and start > 0):
            return 0.0
        end = start + len(piece)
    return 1.0


def accuracy_reward(response: str, answer: str) -> float:
    """1.0 when mathruler takes the last boxed content of the rewritten response for the answer, else 0.0.

    Executes nothing the response says. It runs here and now, though, and some answers take for ever: see Grader.
    """
    text = rewrite(response)
    boxed = mathruler.extract_boxed_content(text)
    # "None" means that there is no box, or that the last one holds this word.
    if boxed == "None" and not re.match(
        r"\\boxed\{\s*None\s*\}", text[max(text.rfind(r"\boxed{"), 0) :]
    ):
        return 0.0
    return float(mathruler.grade_answer(boxed, answer))


def compute_score(response: str, answer: str, format_weight: float = 0.1) -> dict[str, float]:
    """{"overall", "format", "accuracy"}, each in [0, 1]. No deadline, like accuracy_reward."""
    return _combine(format_reward(response), accuracy_reward(response, answer), format_weight)


def _combine(form: float, accuracy: float, format_weight: float = 0.1) -> dict[str, float]:
    return {
        "overall": (1 - format_weight) * accuracy + format_weight * form,
        "format": form,
        "accuracy": accuracy,
    }


# The names that parse_expr puts in reach of its eval: sympy's, and the built-in functions, here mere placeholders.
_NAMES = {name: getattr(sympy, name) for name in sympy.__all__}


_NAMES |= {
    name: object
    for name, value in vars(builtins).items()
    if isinstance(value, types.BuiltinFunctionType)
}


_NAMES |= {"max": sympy.Max, "min": sympy.Min, "__builtins__": {}}


_TRANSFORMS = (
    *sympy_parser.standard_transformations,
    sympy_parser.implicit_multiplication_application,
)


_FORMULA = (  # the syntax of a formula: no attribute, lambda, comprehension, f-string or assignment
    *(
        ast.Expression,
        ast.BinOp,
        ast.UnaryOp,
        ast.BoolOp,
        ast.Compare,
        ast.IfExp,
        ast.Call,
        ast.keyword,
        ast.Name,
    ),
    *(ast.Constant, ast.Tuple, ast.List, ast.Subscript, ast.Slice),
    *(ast.operator, ast.unaryop, ast.boolop, ast.cmpop, ast.expr_context),
)


def _parse(text: str):
    """Stands in for mathruler's _sympy_parse: the same value for a formula, ValueError for any other Python.

    Quotes are refused in the text itself, since sympy's functions eval a string they are given; those in the code come
    from the parser, around names and digits. mathruler takes every exception from here for "not equal".
    """
    if "'" in text or '"' in text:
        raise ValueError("not a formula: quotes in an answer")
    code = sympy_parser.stringify_expr(text.replace("^", "**"), {}, _NAMES, _TRANSFORMS)
    for node in ast.walk(ast.parse(code, mode="eval")):
        if not isinstance(node, _FORMULA):
            raise ValueError(f"not a formula: {type(node).__name__} in an answer")
    return sympy_parser.eval_expr(code, {}, _NAMES)


if not hasattr(mathruler, "_sympy_parse"):  # another version would go unguarded
    raise ImportError("this mathruler has no _sympy_parse to guard: pip install mathruler==0.1.0")


mathruler._sympy_parse = _parse


logging.getLogger("pylatexenc").setLevel(logging.ERROR)  # it would warn of every \frac cut short
