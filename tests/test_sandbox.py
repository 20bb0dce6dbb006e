"""The Grader scores a batch whatever its responses do, and leaves no process behind."""

import os
import random
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import ROOT, random_image, readme_example
from test_reward import ORDINARY, attacks, boxed, released

from support import StepError
from support.batch import Example
from support.reward import format_reward
from support.sandbox import Grader

HANGS = ["99999999!", "9**9**9", "1e999999999", "2**(10**10)", "(x+y)**999"]
ODD = [
    "(" * 3000 + "1" + ")" * 3000,  # hangs before Python 3.13
    *("\ud800\x00", "9" * 5000, "1/0", "nan", "1e999", "", "{" * 50_000),
    *("[0]*9999999999", "\\frac" * 50, "²", "(" * 300),
]
PRELUDE = """
import os, signal, sys, time

def zero(**more):
    return {"overall": 0.0, "format": 0.0, "accuracy": 0.0, **more}

"""


@pytest.fixture(scope="module")
def grader():
    with Grader(workers=2) as grader:
        yield grader


@pytest.fixture()
def write(tmp_path):
    """write(text) -> the spec of the function f in a user's file, of which text starts in line 8"""

    def write_file(text):
        (tmp_path / "mine.py").write_text(PRELUDE + text)
        return f"{tmp_path}/mine.py:f"

    return write_file


def accuracies(scores):
    return [score["accuracy"] for score in scores]


def gone(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


@pytest.mark.filterwarnings("ignore:.*took longer")
def test_hostile_and_ordinary_responses_in_one_batch(tmp_path, grader):
    """Each costs its deadline at most, and no code of a response runs in a worker."""
    ordinary = [(boxed(given), answer) for given, answer, _ in ORDINARY]
    texts = HANGS + ODD + attacks(tmp_path / "executed")
    hostile = [(boxed(text), "0.5") for text in texts]
    hostile.append(("<think>" * 10_000 + "\\boxed{" * 10_000, "0.5"))
    mixed = ordinary + hostile
    random.Random(1).shuffle(mixed)
    start = time.monotonic()
    scores = grader(*zip(*mixed, strict=True))
    assert time.monotonic() - start < 2.5 * len(hostile)
    assert grader.timeouts >= len(HANGS)
    assert grader.errors == grader.unscored == 0
    for row, score in zip(mixed, scores, strict=True):
        if row in hostile:
            form = format_reward(row[0])
            assert score == {"overall": 0.1 * form, "format": form, "accuracy": 0.0}
        else:
            assert score == released(*row)
    assert not (tmp_path / "executed").exists()
    # Hostile responses alone are no error of the rule.
    assert [each["overall"] for each in grader([boxed("9**9**9")], ["1"])] == [0.1]
    assert grader([], []) == []
    assert grader.timeouts == 0


SLEEP = """
def f(response, answer):
    time.sleep(float(response))
    return zero(accuracy=1.0)
"""


def test_the_budget_ends_a_call(write):
    """One by one, the 20 sleepers would take 10 s with the deadline and 1,200 s without."""
    with Grader(write(SLEEP), workers=2, deadline=0.5, budget=1.5) as grader:
        with pytest.warns(UserWarning, match=r"of 26 responses \d+ left when the time"):
            scores = grader(["0"] * 5 + ["60"] * 20 + ["0"], ["a"] * 26)
        assert accuracies(scores)[:5] == [1.0] * 5
        assert grader.timeouts >= 2
        assert grader.timeouts + grader.unscored + sum(accuracies(scores)) == 26
        assert sum("unscored" in score for score in scores) == grader.unscored >= 10
        # A slow judge is not taken for one that rewards nothing; a tenth is tolerated.
        with pytest.warns(UserWarning, match="of 4 responses 1 took longer than --reward_deadl"):
            assert accuracies(grader(["0", "9", "0", "0"], ["a"] * 4)) == [1.0, 0.0, 1.0, 1.0]
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert sum(accuracies(grader(["9"] + ["0"] * 9, ["a"] * 10))) == 9.0
        assert (grader.timeouts, grader.unscored) == (1, 0)


CRASHES = """
def f(response, answer):
    print("noise on stdout " * 100)
    if response == "crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    if response == "bomb":
        bytearray(300 << 20)
    if response == "exit":
        sys.exit("enough")
    if response == "alarm":  # of its own
        signal.signal(signal.SIGALRM, lambda *_: None)
        signal.alarm(1)
        9**9**9
    return zero(accuracy=1.0, format=float("torch" in sys.modules), overall=len(response))
"""


def test_crashes_memory_and_prints_stay_in_the_worker(write, capfd):
    words = ["fine", "crash", "bomb", "fine", "exit", "alarm", "fine"]
    with Grader(write(CRASHES), workers=1, deadline=1.0, memory=0.2) as grader:
        with pytest.warns(UserWarning, match="of 7 responses 1 killed their process .*; 1 Mem"):
            scores = grader(words, words)
        assert (grader.errors, grader.timeouts) == (3, 1)
    assert accuracies(scores) == [float(word == "fine") for word in words]
    assert scores[0]["overall"] == 4.0
    assert scores[0]["format"] == 0.0  # a worker holds no torch
    printed = capfd.readouterr()
    assert "noise" in printed.err and "noise" not in printed.out


ERRORS = """
def f(response, answer):
    if response == "number":
        return 1.0
    if response == "nan":
        return zero(overall=float("nan"))
    return zero(accuracy=float(1 / int(response) == float(answer)))
"""


def test_errors_of_a_users_function(write):
    with Grader(write(ERRORS), workers=1) as grader:
        message = r"of 3 responses 1 ZeroDivisionError: division by zero \(mine.py:13\)"
        with pytest.warns(UserWarning, match=message):
            assert accuracies(grader(["2", "0", "4"], ["0.5"] * 3)) == [1.0, 0.0, 0.0]
        assert grader.errors == 1
        for word, value in [("number", "1.0"), ("nan", ".*nan,")]:
            message = f"2 returned {value}.* no dict with finite overall"
            with pytest.raises(StepError, match=message):
                grader([word] * 2, ["1"] * 2)


ROW = """
def f(response, answer, row):
    sizes = [image.size for image in row["images"]]
    right = [row["question"], row["answer"], row["id"], sizes] == ["?", answer, "7", [(28, 56)]]
    right = right and answer == response
    row.pop("unit")  # the next response's is whole
    return zero(accuracy=float(right), overall=float(id(row["images"])))
"""


def test_a_function_may_see_the_row(write):
    """It is sent once per prompt: both workers inherit the same object."""
    groups = []
    for answer in ("3", "4"):
        columns = {"unit": "h", "id": "not it"}
        example = Example("?", answer, [random_image(28, 56)], "7", columns=columns)
        prompt = SimpleNamespace(example=example)
        groups.append(SimpleNamespace(prompt=prompt, responses=[answer] * 4))
    with Grader(write(ROW), workers=2) as grader:
        scores = grader.of_groups(groups)
        assert accuracies(scores) == [1.0] * 8
        assert len({score["overall"] for score in scores}) == 2
        with pytest.raises(ValueError, match="takes a row, which files of responses .--grade"):
            grader(["a"], ["3"])
    with Grader(workers=1) as grader:
        assert accuracies(grader([boxed("3")], ["3"], ["no row is made of this"])) == [1.0]


def test_the_reward_in_the_readme_compares_units(tmp_path):
    """As it stands there."""
    (tmp_path / "units.py").write_text(readme_example("row: dict"))
    example = Example("How long?", "3", [], columns={"unit": "hours"})
    responses = [boxed("3 hours"), boxed("3 minutes"), boxed("4 hours"), boxed("3"), "3 hours"]
    with Grader(f"{tmp_path}/units.py:score", workers=1) as grader:
        scores = grader(responses, ["3"] * 5, [example] * 5)
    assert accuracies(scores) == [1.0, 0.0, 0.0, 0.0, 0.0]
    assert [score["overall"] for score in scores] == [1.0, 0.1, 0.1, 0.1, 0.0]


def test_a_dead_server_is_noticed_while_a_worker_hangs(write):
    """A worker inherits the server's pipe to the trainer, which must not stay open there."""
    kills = (
        "def f(response, answer):\n    os.kill(os.getppid(), signal.SIGKILL)\n    time.sleep(60)\n"
    )
    start = time.monotonic()
    with Grader(write(kills), workers=1, deadline=50.0) as grader:
        with pytest.raises(StepError, match="the scoring server died"):
            grader(["a"], ["a"])
    assert time.monotonic() - start < 40


def test_a_signal_to_the_whole_job_leaves_scoring_to_the_trainer(tmp_path, monkeypatch):
    """Until it closes. And a module of the current folder hides none of Python's."""
    (tmp_path / "queue.py").write_text("raise SystemExit('not the standard library')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PYTHONPATH", raising=False)
    with Grader(workers=1) as grader:
        os.kill(grader._server.pid, signal.SIGTERM)
        assert accuracies(grader(["\\boxed{2}"], ["2"])) == [1.0]
    with pytest.raises(ProcessLookupError):
        os.kill(grader._server.pid, 0)


HANG = """
def f(response, answer):
    print(os.getpid(), os.getppid(), file=open("pids", "w"), flush=True)
    9**9**9
"""


def test_a_killed_trainer_leaves_no_process(write, tmp_path):
    """Not even a worker inside one big-integer power, which sees no signal and no closed pipe."""
    code = (
        "from support.sandbox import Grader;"
        f"Grader({write(HANG)!r}, workers=1, deadline=60)(['a'], ['a'])"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    trainer = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, env=environment)
    file, end = tmp_path / "pids", time.monotonic() + 60
    while not (file.exists() and file.read_text().strip()) and time.monotonic() < end:
        time.sleep(0.05)
    pids = file.read_text().split()
    assert not any(map(gone, pids))
    trainer.kill()
    trainer.wait()
    end = time.monotonic() + 5
    while not all(map(gone, pids)) and time.monotonic() < end:
        time.sleep(0.05)
    assert all(map(gone, pids))
