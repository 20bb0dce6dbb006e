"""The Grader scores a batch whatever its responses do, and leaves no process behind."""

import os
import random
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
from test_reward import ORDINARY, attacks, boxed, released

from support.reward import format_reward
from support.sandbox import ROOT, Grader, RewardError

linux_only = pytest.mark.skipif(
    sys.platform != "linux", reason="rests on Linux: prctl, RLIMIT_AS, /proc"
)

HANGS = ["99999999!", "9**9**9", "1e999999999", "2**(10**10)", "(x+y)**999"]
ODD = [
    "(" * 3000 + "1" + ")" * 3000,  # hangs before Python 3.13
    *("\ud800\x00", "9" * 5000, "1/0", "nan", "1e999", "", "{" * 50_000),
    *("[0]*9999999999", "\\frac" * 50, "²", "(" * 300),
]


@pytest.fixture(scope="module")
def grader():
    with Grader(workers=2) as grader:
        yield grader


PRELUDE = """
import os, signal, sys, time

def zero(**more):
    return {"overall": 0.0, "format": 0.0, "accuracy": 0.0, **more}

"""


def write(folder, text):
    """A user's file, of which the given text starts in line 7."""
    path = folder / "mine.py"
    path.write_text(PRELUDE + text)
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


def wait_for_pid(file):
    """The number that another process writes to the file."""
    end = time.monotonic() + 60
    while not (file.exists() and file.read_text().strip()):
        assert time.monotonic() < end
        time.sleep(0.05)
    return int(file.read_text())


def accuracies(scores):
    return [score["accuracy"] for score in scores]


# ---- batches


@pytest.mark.filterwarnings("ignore:.*raise --reward_deadline")
def test_hostile_and_ordinary_responses_in_one_batch(grader):
    ordinary = [(boxed(given), answer) for given, answer, _ in ORDINARY]
    hostile = [(boxed(text), "0.5") for text in HANGS + ODD]
    hostile.append(("<think>" * 10_000 + "\\boxed{" * 10_000, "0.5"))
    mixed = ordinary + hostile
    random.Random(1).shuffle(mixed)
    scores = grader(*zip(*mixed, strict=True))
    assert grader.timeouts >= len(HANGS)
    assert grader.errors == grader.unscored == 0
    for row, score in zip(mixed, scores, strict=True):
        if row in hostile:
            form = format_reward(row[0])
            assert score == {"overall": 0.1 * form, "format": form, "accuracy": 0.0}
        else:
            assert score == released(*row)
    assert grader([], []) == []
    assert grader.timeouts == 0


def test_no_code_runs_in_a_worker(tmp_path, grader):
    path = tmp_path / "executed"
    responses = [boxed(attack) for attack in attacks(path)]
    assert accuracies(grader(responses, ["0.5"] * len(responses))) == [0.0] * len(responses)
    assert not path.exists()


SLEEP = """
def f(response, answer):
    time.sleep(float(response))
    return zero(accuracy=1.0)
"""


@pytest.mark.filterwarnings("ignore:.*raise --reward_deadline")
def test_budget(tmp_path):
    """One by one, the 20 sleepers would take 10 s with the deadline and 1,200 s without."""
    path = write(tmp_path, SLEEP)
    with Grader(f"{path}:f", workers=2, deadline=0.5, budget=1.5) as grader:
        left = r"f left \d+ of 26 responses unscored after 1.5 s: raise --reward_budget"
        with pytest.warns(UserWarning, match=left):
            scores = grader(["0"] * 5 + ["60"] * 20 + ["0"], ["a"] * 26)
        assert accuracies(scores) == [1.0] * 5 + [0.0] * 21
        assert grader.timeouts >= 1
        assert grader.unscored >= 10
        assert grader.timeouts + grader.unscored == 21
        assert sum("unscored" in score for score in scores) == grader.unscored
        assert accuracies(grader(["0"], ["a"])) == [1.0]
        assert grader.timeouts == grader.unscored == 0


CRASHES = """
def f(response, answer):
    print("noise on stdout " * 100)
    if response == "crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    if response == "bomb":
        bytearray(300 << 20)
    if response == "exit":
        sys.exit("enough")
    return zero(accuracy=1.0, format=float("torch" in sys.modules), overall=len(response))
"""


@linux_only
def test_crashes_memory_and_prints_stay_in_the_worker(tmp_path, capfd):
    path = write(tmp_path, CRASHES)
    words = ["fine", "crash", "bomb", "fine", "exit", "fine"]
    with Grader(f"{path}:f", workers=1, deadline=10.0, memory=0.2) as grader:
        with pytest.warns(UserWarning, match="failed on 3 of 6 .*: the worker process died"):
            scores = grader(words, words)
        assert (grader.errors, grader.timeouts) == (3, 0)
    assert accuracies(scores) == [float(word == "fine") for word in words]
    assert scores[0]["overall"] == 4.0
    assert scores[0]["format"] == 0.0  # a worker holds no torch
    printed = capfd.readouterr()
    assert "noise" in printed.err and "noise" not in printed.out


# ---- a user's function


ERRORS = """
def f(response, answer):
    if response == "partly":
        return {"overall": 1.0}
    if response == "nan":
        return zero(overall=float("nan"))
    return zero(accuracy=float(1 / int(response) == float(answer)))
"""


def test_errors_of_a_users_function(tmp_path):
    path = write(tmp_path, ERRORS)
    with Grader(f"{path}:f", workers=1) as grader:
        message = r"f failed on 1 of 3 .*: ZeroDivisionError: division by zero \(mine.py:13"
        with pytest.warns(UserWarning, match=message):
            assert accuracies(grader(["2", "0", "4"], ["0.5"] * 3)) == [1.0, 0.0, 0.0]
        assert grader.errors == 1
        for word, message in [
            ("0", "failed on 2 of 2 responses: ZeroDivisionError"),
            ("partly", "finite overall, format, accuracy, the function returned {'overall': 1.0}"),
            ("nan", "the function returned {'overall': nan"),
        ]:
            with pytest.raises(RewardError, match=message):
                grader([word] * 2, ["1"] * 2)
        assert accuracies(grader(["2"], ["0.5"])) == [1.0]


def test_a_function_that_does_not_load_is_named(tmp_path):
    good = write(tmp_path, "def score(response, answer):\n    return zero()\n")
    broken = tmp_path / "broken.py"
    broken.write_text("import no_such_module\n")
    for spec, message in [
        ("mine.py", "reward 'mine.py': no colon; expected path/file.py:function"),
        (f"{tmp_path}/absent.py:f", "there is no file .*absent.py'; expected path/file.py:functio"),
        (f"{good}:scor", "no function 'scor' there, it has: zero, score"),
        (f"{broken}:f", "the file does not load: ModuleNotFoundError: No module named 'no_such_m"),
        (3, "reward 3: no colon"),
    ]:
        with pytest.raises(ValueError, match=message) as error:
            Grader(spec, workers=1)
        assert "\n" not in str(error.value)
    silent = tmp_path / "silent.py"
    silent.write_text("import os\nos._exit(1)\n")
    with pytest.raises(RewardError, match="the scoring server died"):
        Grader(f"{silent}:f", workers=1)


def test_bad_arguments(grader):
    with pytest.raises(ValueError, match="one answer per response, got 2 and 1"):
        grader(["a", "b"], ["a"])
    with pytest.raises(ValueError, match="must be strings, got int 3"):
        grader(["a"], [3])


def test_limits_are_checked():
    for limits, message in [
        ({"workers": 0}, "workers must be above 0 and at most 1e\\+06, got 0"),
        ({"deadline": float("nan")}, "deadline must be above 0 and at most 1e\\+06, got nan"),
        ({"budget": float("inf")}, "budget must be above 0 and at most 1e\\+06, got inf"),
        ({"memory": -1}, "memory must be above 0 and at most 1e\\+06, got -1"),
        (
            {"deadline": 90},
            "deadline of 90 s exceeds its budget of 60 s per call: raise --reward_budget",
        ),
    ]:
        with pytest.raises(ValueError, match=message) as error:
            Grader(**limits)
        assert "\n" not in str(error.value)


# ---- too slow


def test_a_slow_function_is_reported(tmp_path):
    """A judge that is slower than the deadline is not taken for one that rewards nothing."""
    path = write(tmp_path, SLEEP)
    with Grader(f"{path}:f", workers=2, deadline=0.5) as grader:
        slow = r"f took more than 0.5 s on 2 of 4 responses: raise --reward_deadline"
        with pytest.warns(UserWarning, match=slow):
            assert accuracies(grader(["0", "9", "0", "9"], ["a"] * 4)) == [1.0, 0.0, 1.0, 0.0]
        with pytest.raises(
            RewardError, match="0.5 s on 2 of 2 .*: raise --reward_deadline"
        ) as error:
            grader(["9"] * 2, ["a"] * 2)
        assert "\n" not in str(error.value)
        with warnings.catch_warnings():  # a tenth is tolerated
            warnings.simplefilter("error")
            assert grader([], []) == []
            assert sum(accuracies(grader(["9"] + ["0"] * 9, ["a"] * 10))) == 9.0


def test_hostile_responses_alone_are_no_error_of_the_rule():
    with Grader(workers=2, deadline=0.5) as grader:
        with pytest.warns(UserWarning, match="compute_score took more than 0.5 s on 2 of 2"):
            scores = grader([boxed("9**9**9")] * 2, ["0.5"] * 2)
    assert [score["overall"] for score in scores] == [0.1, 0.1]


# ---- no process is left


def test_a_closed_grader_has_no_process():
    grader = Grader(workers=2)
    pid = grader._server.pid
    grader.close()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    grader.close()
    with pytest.raises(RewardError, match="the scoring server died"):
        grader(["a"], ["a"])


def test_a_signal_to_the_whole_job_leaves_scoring_to_the_trainer(tmp_path, monkeypatch):
    """The server outlives SIGTERM, and a module of the current folder hides none of Python's."""
    (tmp_path / "queue.py").write_text("raise SystemExit('not the standard library')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PYTHONPATH", raising=False)
    with Grader(workers=1) as grader:
        os.kill(grader._server.pid, signal.SIGTERM)
        [score] = grader(["\\boxed{2}"], ["2"])
    assert score["accuracy"] == 1.0


HANG = """
def f(response, answer):
    print(os.getpid(), file=open("pid", "w"), flush=True)
    9**9**9
"""


@linux_only
def test_a_killed_trainer_leaves_no_process(tmp_path):
    """Not even a worker inside one big-integer power, which sees no signal and no closed pipe."""
    write(tmp_path, HANG)
    code = (
        "from support.sandbox import Grader;"
        "Grader('mine.py:f', workers=1, deadline=60)(['a'], ['a'])"
    )
    environment = os.environ | {"PYTHONPATH": ROOT}
    trainer = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, env=environment)
    try:
        worker = wait_for_pid(tmp_path / "pid")
        assert not gone(worker)
    finally:
        trainer.send_signal(signal.SIGKILL)
        trainer.wait()
    assert all_gone([worker])
