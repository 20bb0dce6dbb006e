"""The reward equals the released rule on ordinary answers, and survives whatever a response says."""

import importlib.util
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from support import reward
from support.reward import accuracy_reward, compute_score, format_reward
from support.sandbox import Grader

ROOT = Path(reward.__file__).parent
linux_only = pytest.mark.skipif(
    sys.platform != "linux", reason="rests on Linux: prctl, RLIMIT_AS, /proc"
)

# A copy of mathruler's grader that reward.py has not guarded.
_spec = importlib.util.find_spec("mathruler.grader")
plain = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(plain)


def released(response, answer, format_weight=0.1):
    """The released rule, word for word."""
    response = re.sub(r"\s*(<|>|/)\s*", r"\1", response)
    form = 1.0 if re.fullmatch(r"<think>.*</think>.*\\boxed\{.*\}.*", response, re.DOTALL) else 0.0
    accuracy = 1.0 if plain.grade_answer(plain.extract_boxed_content(response), answer) else 0.0
    return {
        "overall": (1 - format_weight) * accuracy + format_weight * form,
        "format": form,
        "accuracy": accuracy,
    }


def boxed(text):
    return f"<think>so</think> \\boxed{{{text}}}"


ORDINARY = [  # boxed, answer, accuracy
    ("12", "12", 1),
    ("12.0", "12", 1),
    ("1,200", "1200", 1),
    ("13", "12", 0),
    ("B", "B", 1),
    ("b", "B", 1),
    (r"\text{B}", "B", 1),
    ("A", "B", 0),
    (r"\frac{1}{2}", "1/2", 1),
    (r"\dfrac{1}{2}", r"\frac{1}{2}", 1),
    ("0.5", r"\frac{1}{2}", 1),
    ("2/4", "1/2", 0),
    (r"\frac{ 3 }{ 4 }", "3 / 4", 1),
    (r"2\sqrt{3}", r"\sqrt{12}", 1),
    (r"2\sqrt{3}", r"3\sqrt{2}", 0),
    ("x+x", "2x", 1),
    ("(x+1)(x-1)", "x^2-1", 1),
    ("x^2+1", "x^2-1", 0),
    ("x_1+1", "1+x_1", 1),
    (r"\frac{\pi}{3}", r"\pi/3", 1),
    ("36^\\circ", "36", 1),
    ("45 cm", "45", 1),
    ("50\\%", "50", 1),
    ("$7", "7", 1),
    ("3 1/2", "7/2", 1),
    ("(1, 2)", "(1,2)", 1),
    ("(2, 1)", "(1,2)", 0),
    ("(1/2, x+x)", "(0.5, 2x)", 1),
    ("[1,2]", "(1,2)", 0),
    ("x = 3", "3", 1),
    ("", "3", 0),
    ("di", "id", 0),
    ("3!", "6.0001", 0),
    ("4!/5", "4.8", 1),
    ("0.1[6]", "1.0/6", 1),
    ("nobody knows", "3.5", 0),
    (r"\frac", "0.5", 0),
    (r"\sqrt{3}-√2", r"\sqrt{3}-√2+0", 1),
    (r"\frac{1}{2}\pi 1", r"\frac{1}{2}\pi 1+0", 1),
    ("x'", "0.5", 0),
]


@pytest.fixture(scope="module")
def grader():
    with Grader(workers=2, deadline=0.75) as grader:
        yield grader


def write(folder, text):
    path = folder / "mine.py"
    path.write_text("import os, signal, sys, time\n\ndef zero(**more):\n"
                    "    return {'overall': 0.0, 'format': 0.0, 'accuracy': 0.0, **more}\n\n" + text)  # fmt: skip
    return path


def gone(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


def all_gone(pids, seconds=5.0):
    end = time.monotonic() + seconds
    while time.monotonic() < end and not all(map(gone, pids)):
        time.sleep(0.05)
    return all(map(gone, pids))


# ---- the rule


@pytest.mark.parametrize("given, answer, accuracy", ORDINARY)
def test_ordinary_answers_score_as_released(given, answer, accuracy):
    score = compute_score(boxed(given), answer)
    assert score == released(boxed(given), answer)
    assert (score["format"], score["accuracy"]) == (1.0, accuracy)


@pytest.mark.parametrize(
    "response, form",
    [
        (r"<think>a</think> \boxed{1}", 1),
        ("< think >\na\n< / think >\nso \\boxed{1}.\n", 1),
        (r"<think></think>\boxed{}", 1),
        (r"<think>a</think>\boxed{1}<think>b", 1),
        (r"<think>\boxed{1}</think>", 0),
        (r" <think>a</think>\boxed{1}", 1),
        (r"so <think>a</think>\boxed{1}", 0),
        (r"<think>a</think>\boxed 1}", 0),
        (r"<think>a</think>\boxed{1", 0),
        (r"<think>a \boxed{1}", 0),
        (r"</think><think>\boxed{1}", 0),
        (r"\boxed{1}", 0),
        ("", 0),
    ],
)
def test_format(response, form):
    assert format_reward(response) == form == released(response, "1")["format"]


def test_scans_agree_with_the_regular_expressions():
    pieces = [
        "<think>",
        "</think>",
        r"\boxed{",
        "}",
        "<",
        ">",
        "/",
        " ",
        "\n",
        "\t",
        "\x1c",
        "\u3000",
        "a",
        "think",
    ]
    rng = random.Random(0)
    formed = 0
    for _ in range(5000):
        start = rng.choice(["", "<think>", "<think>a</think>"])
        response = start + "".join(rng.choices(pieces, k=rng.randrange(12)))
        assert reward.rewrite(response) == re.sub(r"\s*(<|>|/)\s*", r"\1", response)
        assert format_reward(response) == released(response, "")["format"]
        formed += format_reward(response)
    assert 100 < formed < 4900


@pytest.mark.parametrize(
    "hostile", [" " * 500_000, "<think></think>" * 30_000, "<think>" + r"</think>\boxed{" * 30_000]
)
def test_format_takes_linear_time(hostile):
    start = time.monotonic()
    assert format_reward(hostile) == 0.0
    assert time.monotonic() - start < 5.0  # the regular expressions take minutes


def test_unboxed_is_never_accurate():
    assert released("None", "None")["accuracy"] == 1.0  # what we depart from
    for response in (
        "None",
        "I do not know",
        r"\boxed{None",
        r"\boxed 3",
        "",
        r"\boxed{None} or \boxed{",
    ):
        for answer in ("None", "none", "3"):
            assert accuracy_reward(response, answer) == 0.0
    assert (
        accuracy_reward(r"\boxed{None}", "None")
        == accuracy_reward(r"\boxed{ None }", "None")
        == 1.0
    )
    assert (
        accuracy_reward(r"\boxed{none}", "None")
        == accuracy_reward(r"\boxed{3} \boxed{None}", "None")
        == 1.0
    )
    assert accuracy_reward(r"\boxed{None}", "3") == 0.0


def test_weight():
    assert compute_score(r"\boxed{1}", "1", format_weight=0.25) == {
        "overall": 0.75,
        "format": 0.0,
        "accuracy": 1.0,
    }


# ---- nothing in a response runs


def attacks(path):
    """Boxed texts that make Python run, to create the file `path`, past mathruler's limit of two different letters."""
    code = f"__import__('pathlib').Path({str(path)!r}).touch()"
    octal = "'" + "".join(f"\\textbackslash {ord(letter):03o}" for letter in code) + "'"
    return [f"frac({octal})", f"2.5+ln({octal})", f"1/sqrt(re({octal}))"]


def test_no_code_runs(tmp_path, grader):
    path = tmp_path / "executed"
    for attack in attacks(path):
        plain.grade_answer(attack, "0.5")
        assert path.exists()  # the unguarded mathruler does run it
        path.unlink()
        assert accuracy_reward(boxed(attack), "0.5") == 0.0
        assert grader([boxed(attack)], ["0.5"])[0]["accuracy"] == 0.0
    assert not path.exists()


@pytest.mark.parametrize(
    "text",
    [
        "x.y",
        "().__class__",
        "frac('1')",
        "1 or 'x'",
        "[x for x in y]",
        "(x := 1)",
        "f'{x}'",
        "b'x'",
    ],
)
def test_only_formulas_are_evaluated(text):
    with pytest.raises((ValueError, SyntaxError)):
        reward._parse(text)


def test_built_in_functions_are_out_of_reach():
    for text in ("exec(1)", "open(1)", "abs(1)", "id(1)", "__import__(1)"):
        with pytest.raises((TypeError, NameError)):
            reward._parse(text)
    assert reward._parse("max(1, 2.5) + 2x - x") == plain._sympy_parse("max(1, 2.5) + 2x - x")


# ---- the Grader


HANGS = [
    "99999999!",
    "9**9**9",
    "1e999999999",
    "2**(10**10)",
    "(x+y)**999",
    "(" * 3000 + "1" + ")" * 3000,
]
ODD = [
    "\ud800\x00",
    "9" * 5000,
    "1/0",
    "nan",
    "1e999",
    "",
    "{" * 50_000,
    "[0]*9999999999",
    "\\frac" * 50,
    "²",
    "(" * 300,
]


def test_hostile_and_ordinary_responses_in_one_batch(grader):
    rows = [(boxed(given), answer) for given, answer, _ in ORDINARY]
    hostile = [(boxed(text), "0.5") for text in HANGS + ODD] + [
        ("<think>" * 10_000 + "\\boxed{" * 10_000, "0.5")
    ]
    mixed = rows + hostile
    random.Random(1).shuffle(mixed)
    scores = grader(*zip(*mixed, strict=True))
    assert grader.timeouts == len(HANGS) and grader.errors == grader.unscored == 0
    for row, score in zip(mixed, scores, strict=True):
        if row in hostile:
            assert score["accuracy"] == 0.0 and score["overall"] == pytest.approx(
                0.1 * score["format"]
            )
            assert score["format"] == format_reward(row[0])
        else:
            assert score == released(*row)
    scores = grader(*zip(*rows, strict=True))  # the same workers, or their successors
    assert scores == [released(*row) for row in rows] and grader.timeouts == 0
    assert grader([], []) == []


def test_budget(tmp_path):
    path = write(
        tmp_path,
        "def f(response, answer):\n    time.sleep(float(response))\n    return zero(accuracy=1.0)\n",
    )
    with Grader(f"{path}:f", workers=2, deadline=0.5, budget=1.5) as grader:
        start = time.monotonic()
        scores = grader(["0"] * 5 + ["60"] * 20 + ["0"], ["a"] * 26)
        assert (
            time.monotonic() - start < 10.0
        )  # one by one they would take 600 s without a deadline
        assert [score["accuracy"] for score in scores] == [1.0] * 5 + [0.0] * 21
        assert (
            grader.timeouts >= 1
            and grader.unscored >= 10
            and grader.timeouts + grader.unscored == 21
        )
        assert sum("unscored" in score for score in scores) == grader.unscored
        grader.budget = 60.0
        assert (
            grader(["0"], ["a"])[0]["accuracy"] == 1.0 and grader.timeouts == grader.unscored == 0
        )


@linux_only
def test_crashes_memory_and_prints_stay_in_the_worker(tmp_path):
    path = write(
        tmp_path,
        """
kept = []

def f(response, answer):
    print("noise on stdout " * 100)
    if response == "crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    if response == "exit":
        os._exit(0)
    if response == "bomb":
        bytearray(300 << 20)
    if response == "leak":  # too much for one process, but not for one that is replaced in time
        kept.append(bytearray(60 << 20))
    return zero(accuracy=1.0, format=float("torch" in sys.modules), overall=len(response))
""",
    )
    words = [
        "fine",
        "crash",
        "leak",
        "bomb",
        "leak",
        "exit",
        "leak",
        "leak",
        "leak",
        "leak",
        "fine",
    ]
    with Grader(f"{path}:f", workers=1, deadline=10.0, memory=200 << 20) as grader:
        with pytest.warns(
            UserWarning, match="failed on 3 of 11 responses: the worker process died"
        ):
            scores = grader(words, words)
        assert grader.errors == 3 and grader.timeouts == 0
    assert [score["accuracy"] for score in scores] == [
        float(word not in ("crash", "bomb", "exit")) for word in words
    ]
    assert scores[0]["overall"] == 4.0 and all(
        score["format"] == 0.0 for score in scores
    )  # and without torch


def test_errors_of_a_users_function(tmp_path):
    path = write(
        tmp_path,
        """
def f(response, answer):
    if response == "partly":
        return {"overall": 1.0}
    if response == "nan":
        return zero(overall=float("nan"))
    return zero(accuracy=float(1 / int(response) == float(answer)))
""",
    )
    with Grader(f"{path}:f", workers=1) as grader:
        with pytest.warns(
            UserWarning,
            match=r"f failed on 1 of 3 .*: ZeroDivisionError: division by zero \(mine.py:12",
        ):
            assert [score["accuracy"] for score in grader(["2", "0", "4"], ["0.5"] * 3)] == [
                1.0,
                0.0,
                0.0,
            ]
        assert grader.errors == 1
        for word, message in [
            ("0", "failed on 2 of 2 responses: ZeroDivisionError"),
            (
                "partly",
                r"expected a dict with finite overall, format, accuracy, the function returned {'overall': 1.0}",
            ),
            ("nan", "the function returned {'overall': nan"),
        ]:
            with pytest.raises(RuntimeError, match=message):
                grader([word] * 2, ["1"] * 2)
        assert grader(["2"], ["0.5"])[0]["accuracy"] == 1.0


def test_a_function_that_cannot_be_loaded_is_named(tmp_path):
    good = write(tmp_path, "def score(response, answer):\n    return zero()\n")
    broken = tmp_path / "broken.py"
    broken.write_text("import no_such_module\n")
    for spec, message in [
        ("mine.py", "reward 'mine.py': no colon; expected path/file.py:function"),
        (
            f"{tmp_path}/absent.py:f",
            "there is no file .*absent.py'; expected path/file.py:function",
        ),
        (f"{good}:scor", "no function 'scor' there, it has: zero, score"),
        (
            f"{broken}:f",
            "the file does not load: ModuleNotFoundError: No module named 'no_such_module'",
        ),
        (lambda response, answer: {}, "no function '<lambda>' there, it has: "),
        (3, "reward 3: no colon"),
    ]:
        with pytest.raises(ValueError, match=message) as error:
            Grader(spec, workers=1)
        assert "\n" not in str(error.value)
    silent = tmp_path / "silent.py"
    silent.write_text("import os\nos._exit(1)\n")
    with pytest.raises(RuntimeError, match="died before it was ready"):
        Grader(f"{silent}:f", workers=1)


def test_bad_arguments(grader):
    with pytest.raises(ValueError, match="one answer a response, got 2 and 1"):
        grader(["a", "b"], ["a"])
    with pytest.raises(ValueError, match="must be strings, got int 3"):
        grader(["a"], [3])
    with pytest.raises(ValueError, match="must be positive: workers=0 "):
        Grader(workers=0)


@linux_only
def test_close_leaves_no_process():
    grader = Grader(workers=2)
    pids = [
        worker.process.pid
        for worker in [grader._idle.get(), grader._idle.get()]
        if not grader._idle.put(worker)
    ]
    assert not any(map(gone, pids))
    grader.close()
    assert all_gone(pids)
    grader.close()
    with pytest.raises(RuntimeError):
        grader(["a"], ["a"])


@linux_only
def test_a_killed_trainer_leaves_no_process(tmp_path):
    """Also when its worker is inside one big-integer power, where Python sees neither signals nor closed pipes."""
    write(
        tmp_path,
        "def f(response, answer):\n    print(os.getpid(), file=open('pid', 'w'), flush=True)\n    9 ** 9 ** 9\n",
    )
    code = "from reward import Grader; Grader('mine.py:f', workers=1, deadline=600, budget=600)(['a'], ['a'])"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    trainer = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, env=environment)
    try:
        end = time.monotonic() + 60
        while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text().strip():
            assert time.monotonic() < end and trainer.poll() is None
            time.sleep(0.05)
        pid = int((tmp_path / "pid").read_text())
        assert not gone(pid)
    finally:
        trainer.send_signal(signal.SIGKILL)
        trainer.wait()
    assert all_gone([pid])
