"""The scoring rule equals the released one on ordinary answers and runs nothing from a response."""

import importlib.util
import random
import re
import time

import pytest

from support import reward
from support.reward import accuracy_reward, compute_score, format_reward

# A copy of mathruler's grader that support/reward.py has not guarded.
_spec = importlib.util.find_spec("mathruler.grader")
unguarded = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(unguarded)


def released(response, answer, format_weight=0.1):
    """The released rule, word for word."""
    response = re.sub(r"\s*(<|>|/)\s*", r"\1", response)
    form = 1.0 if re.fullmatch(r"<think>.*</think>.*\\boxed\{.*\}.*", response, re.DOTALL) else 0.0
    content = unguarded.extract_boxed_content(response)
    accuracy = 1.0 if unguarded.grade_answer(content, answer) else 0.0
    overall = (1 - format_weight) * accuracy + format_weight * form
    return {"overall": overall, "format": form, "accuracy": accuracy}


def boxed(text):
    return f"<think>so</think> \\boxed{{{text}}}"


ORDINARY = [  # boxed, answer, accuracy
    ("1,200", "1200", 1),
    (r"\frac{1}{2}", "1/2", 1),
    ("0.5", r"\frac{1}{2}", 1),
    ("2/4", "1/2", 0),
    (r"2\sqrt{3}", r"\sqrt{12}", 1),
    ("(x+1)(x-1)", "x^2-1", 1),
    ("x_1+1", "1+x_1", 1),
    ("45 cm", "45", 1),
    ("(1/2, x+x)", "(0.5, 2x)", 1),
    ("", "3", 0),
    ("di", "id", 0),
    ("4!/5", "4.8", 1),
    ("0.1[6]", "1.0/6", 1),
    (r"\frac", "0.5", 0),
    (r"\sqrt{3}-√2", r"\sqrt{3}-√2+0", 1),
    ("x'", "0.5", 0),
]


def test_ordinary_answers_score_as_released():
    for given, answer, accuracy in ORDINARY:
        score = compute_score(boxed(given), answer)
        assert score == released(boxed(given), answer)
        assert (score["format"], score["accuracy"]) == (1.0, accuracy), given
    score = compute_score(r"\boxed{1}", "1", format_weight=0.25)
    assert score == {"overall": 0.75, "format": 0.0, "accuracy": 1.0}


def test_random_responses_score_as_released():
    tags = ["<think>", "</think>", r"\boxed{", "}", "think", "a"]
    pieces = [*tags, "<", ">", "/", " ", "\n", "\t", "\x1c", "\u3000"]
    rng = random.Random(0)
    formed = 0
    for _ in range(5000):
        start = rng.choice(["", "<think>", "<think>a</think>"])
        response = start + "".join(rng.choices(pieces, k=rng.randrange(12)))
        assert reward.rewrite(response) == re.sub(r"\s*(<|>|/)\s*", r"\1", response)
        assert format_reward(response) == released(response, "")["format"]
        formed += format_reward(response)
    assert 100 < formed < 4900


def test_format_takes_linear_time():
    start = time.monotonic()
    closings = "<think>" + r"</think>\boxed{" * 30_000
    for hostile in (" " * 500_000, "<think></think>" * 30_000, closings):
        assert format_reward(hostile) == 0.0
    assert time.monotonic() - start < 10.0  # the regular expressions take minutes


def test_unboxed_is_never_accurate():
    assert released("None", "None")["accuracy"] == 1.0  # the release differs here
    for response in ("None", "I do not know", r"\boxed{None", "", r"\boxed{None} or \boxed{"):
        for answer in ("None", "none", "3"):
            assert accuracy_reward(response, answer) == 0.0
    for response in (r"\boxed{None}", r"\boxed{ none }", r"\boxed{3} \boxed{None}"):
        assert accuracy_reward(response, "None") == 1.0


def test_only_formulas_are_evaluated_and_built_in_functions_are_out_of_reach():
    for text in ("x.y", "().__class__", "frac('1')", "[x for x in y]", "(x := 1)", "f'{x}'"):
        with pytest.raises((ValueError, SyntaxError)):
            reward._parse_formula(text)
    for text in ("exec(1)", "open(1)", "abs(1)", "id(1)", "__import__(1)"):
        with pytest.raises((TypeError, NameError)):
            reward._parse_formula(text)
    formula = "max(1, 2.5) + 2x - x"
    assert reward._parse_formula(formula) == unguarded._sympy_parse(formula)


def attacks(path):
    """Boxed texts that create the file `path`, with at most two different letters for mathruler."""
    code = f"__import__('pathlib').Path({str(path)!r}).touch()"
    octal = "'" + "".join(f"\\textbackslash {ord(letter):03o}" for letter in code) + "'"
    return [f"frac({octal})", f"2.5+ln({octal})", f"1/sqrt(re({octal}))"]


def test_no_code_runs(tmp_path):
    path = tmp_path / "executed"
    for attack in attacks(path):
        unguarded.grade_answer(attack, "0.5")
        assert path.exists()  # the unguarded mathruler runs it
        path.unlink()
        assert accuracy_reward(boxed(attack), "0.5") == 0.0
    assert not path.exists()
