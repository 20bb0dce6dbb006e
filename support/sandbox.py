"""Scoring in processes that can be killed."""

from __future__ import annotations

import ctypes
import importlib.util
import math
import os
import resource
import signal
import subprocess
import sys
import time
import traceback
import types
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, suppress
from itertools import repeat
from multiprocessing.connection import Connection, Pipe
from queue import SimpleQueue

from support import memory, reward
from support.reward import _combine, accuracy_reward, compute_score, format_reward

KEYS = ("overall", "format", "accuracy")


ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
START_SECONDS = 120.0  # for a worker to import sympy (under a second) and the user's file, perhaps from a slow disk


def _one_line(error: Exception) -> str:
    frame = traceback.extract_tb(error.__traceback__)[-1]
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return f"{text[:300]} ({os.path.basename(frame.filename)}:{frame.lineno})"


def _load(path: str, name: str):
    """The function `name` of the Python file `path`. ValueError, in one line, when there is none."""
    try:
        spec = importlib.util.spec_from_file_location("user_reward", path)
        module = sys.modules["user_reward"] = importlib.util.module_from_spec(spec)
        sys.path.append(os.path.dirname(path))
        spec.loader.exec_module(module)
    except (
        Exception
    ) as error:  # whatever the user's file raises: reported, and the Grader does not start
        raise ValueError(
            f"reward {path}:{name}: the file does not load: {_one_line(error)}"
        ) from error
    if not callable(getattr(module, name, None)):
        found = [
            key
            for key, value in vars(module).items()
            if isinstance(value, types.FunctionType) and key[0] != "_"
        ]
        raise ValueError(
            f"reward {path}:{name}: no function {name!r} there, it has: {', '.join(found) or 'none'}"
        )
    return getattr(module, name)


def _score(function, response: str, answer: str) -> tuple[str, dict | str]:
    """("score", the dict), or ("error", one line) for whatever the function raises or returns amiss."""
    try:
        result = function(response, answer)
        if not isinstance(result, dict) or not all(
            math.isfinite(result.get(key, math.nan)) for key in KEYS
        ):
            raise ValueError(
                f"expected a dict with finite {', '.join(KEYS)}, the function returned {result!r}"
            )
        return "score", {key: float(result[key]) for key in KEYS}
    except Exception as error:  # not hidden: the Grader counts it and shows the first
        return "error", _one_line(error)


def _address_space() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[0]) * resource.getpagesize()


def _work(pipe: Connection, parent: int, path: str, name: str, memory: int) -> None:
    """Answer each (response, answer) with (_score's two, whether this process is worn out) until the pipe closes."""
    linux = sys.platform == "linux"
    if linux:  # a hung worker never sees its pipe close: let the kernel end it with the trainer (1: PR_SET_PDEATHSIG)
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)
        if os.getppid() != parent:  # too late
            return
    try:
        function = _load(path, name)
    except ValueError as error:
        return pipe.send(str(error))
    accuracy_reward(
        r"\boxed{x+x}", "2x"
    )  # sympy's first simplify imports for a while: not on a response's time
    warnings.simplefilter("ignore", SyntaxWarning)  # of Python's about a formula
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    limit = _address_space() + memory if linux else math.inf
    if linux:
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    pipe.send("")  # ready
    with suppress(EOFError):
        while True:
            outcome = _score(function, *pipe.recv())
            # Memory that stays in use (sympy's caches) would starve later answers, and mathruler calls those wrong.
            pipe.send((outcome, linux and _address_space() > limit - memory // 2))


class _Worker:
    """A worker as its parent sees it."""

    def __init__(self, *command):
        self.pipe, theirs = Pipe()
        args = ["-m", "support.sandbox", "--worker", theirs.fileno(), os.getpid(), *command]
        # A session of its own: Ctrl-C is for the trainer alone, and a kill takes the worker's children along.
        self.process = subprocess.Popen(
            [sys.executable, *map(str, args)],
            env=os.environ | {"PYTHONPATH": os.pathsep.join([ROOT, os.environ.get("PYTHONPATH", "")])},
            stdin=subprocess.DEVNULL,
            stdout=2,  # a user's print goes to stderr
            pass_fds=[theirs.fileno()],
            start_new_session=True,
        )
        theirs.close()
        self.ready = False

    def receive(self, seconds: float):
        """The next message. TimeoutError when none comes in time, EOFError or OSError when the process is dead."""
        if not self.pipe.poll(max(0.0, seconds)):
            raise TimeoutError(f"no word from a grading worker in {seconds:.0f} s")
        return self.pipe.recv()

    def wait_until_ready(self, seconds: float) -> None:
        """TimeoutError when it is not yet; ValueError or RuntimeError, in one line, when it never will be."""
        if not self.ready:
            try:
                problem = self.receive(seconds)
            except (EOFError, ConnectionError):
                raise RuntimeError(
                    "a grading worker died before it was ready; stderr may say why"
                ) from None
            if problem:
                raise ValueError(problem)
            self.ready = True

    def kill(self) -> None:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.pipe.close()


class Grader(AbstractContextManager):
    """Scores batches in worker processes: grader(responses, answers) -> a dict with overall, format, accuracy for each.

    function: compute_score, another function at the top of a file, or "path/file.py:function", of the same signature.
    workers: processes, min(4, CPUs) by default.  memory: bytes a worker may take beyond what it holds once loaded.
    deadline: seconds a response; a worker that needs longer is killed and replaced, which takes it about a second.
    budget: seconds a call: n hostile responses cost about n * (deadline + 1) / workers, and never more than this.

    A response that runs out of time, makes the function raise or kills its worker gets accuracy 0 (and what the format
    earns; under a user's function, 0). When the budget is spent, the rest get 0 and a key "unscored". `timeouts`,
    `errors` and `unscored` count them for the latest call; errors are warned of with the first one's text, and
    RuntimeError is raised when a user's function fails on every response, which is a bug in it. ValueError: a function
    that cannot be loaded, or arguments of a wrong kind. One call at a time. The memory cap, and that no worker outlives
    a trainer killed outright, are Linux only.
    """

    def __init__(
        self, function=compute_score, workers=None, deadline=2.0, budget=60.0, memory=1 << 30
    ):
        if isinstance(function, types.FunctionType):
            function = f"{function.__code__.co_filename}:{function.__name__}"
        path, _, name = str(function).rpartition(":")
        if not name or not os.path.isfile(path):
            problem = f"there is no file {path!r}" if path else "no colon"
            raise ValueError(f"reward {function!r}: {problem}; expected path/file.py:function")
        workers = min(4, os.cpu_count() or 1) if workers is None else workers
        if min(workers, deadline, budget, memory) <= 0:
            raise ValueError(f"must be positive: {workers=} {deadline=} {budget=} {memory=}")
        self.deadline, self.budget = deadline, budget
        self.timeouts = self.errors = self.unscored = 0
        self._own_rule = os.path.samefile(path, reward.__file__) and name == "compute_score"
        self._command = (os.path.abspath(path), name, memory)
        # One thread a worker. The threads start the workers too: the kernel ends a worker with the thread it came from.
        self._threads = ThreadPoolExecutor(workers, "grader")
        self._idle: SimpleQueue[_Worker] = SimpleQueue()
        started = list(self._threads.map(lambda _: _Worker(*self._command), range(workers)))
        for worker in started:
            self._idle.put(worker)
        try:
            for worker in started:
                worker.wait_until_ready(START_SECONDS)
        except BaseException:
            self.close()
            raise

    def __call__(self, responses: list[str], answers: list[str]) -> list[dict[str, float]]:
        if len(responses) != len(answers):
            raise ValueError(
                f"expected one answer a response, got {len(responses)} and {len(answers)}"
            )
        for text in (*responses, *answers):
            if not isinstance(text, str):
                raise ValueError(
                    f"responses and answers must be strings, got {type(text).__name__} {text!r}"
                )
        end = time.monotonic() + self.budget
        outcomes = list(
            self._threads.map(self._grade, zip(responses, answers, strict=True), repeat(end))
        )
        kinds = [kind for kind, _ in outcomes]
        self.timeouts, self.errors, self.unscored = map(
            kinds.count, ("timeout", "error", "unscored")
        )
        if self.errors:
            first = outcomes[kinds.index("error")][1]
            line = f"reward {':'.join(self._command[:2])} failed on {self.errors} of {len(kinds)} responses: {first}"
            if self.errors == len(kinds) and not self._own_rule:
                raise RuntimeError(line)
            warnings.warn(line, stacklevel=2)
        scores = []
        for response, (kind, score) in zip(responses, outcomes, strict=True):
            if kind != "score":
                score = _combine(
                    format_reward(response) if self._own_rule and kind != "unscored" else 0.0, 0.0
                )
                score |= {"unscored": 1.0} if kind == "unscored" else {}
            scores.append(score)
        return scores

    def _grade(self, pair: tuple[str, str], end: float) -> tuple[str, dict | str | None]:
        """One pair, on one of the threads: ("score", dict), ("error", line), ("timeout", None), ("unscored", None)."""
        worker = self._idle.get_nowait()  # there are as many as threads
        outcome, worn = ("unscored", None), False
        try:
            worker.wait_until_ready(end - time.monotonic())
            seconds = min(self.deadline, end - time.monotonic())
            if seconds > 0:
                worn = True  # unless it answers
                worker.pipe.send(pair)
                outcome, worn = worker.receive(seconds)
        except TimeoutError:
            if worn and seconds == self.deadline:
                outcome = ("timeout", None)
        except (EOFError, ConnectionError):
            outcome = ("error", "the worker process died (a crash, or out of memory)")
        finally:
            if worn:
                worker.kill()
                worker = _Worker(*self._command)
            self._idle.put(worker)
        return outcome

    def close(self) -> None:
        """End the workers. They also end when the Grader is dropped, and with the trainer."""
        self._threads.shutdown(cancel_futures=True)
        while not self._idle.empty():
            self._idle.get().kill()

    def __exit__(self, *exception) -> None:
        self.close()


if __name__ == "__main__":
    if sys.argv[1:2] != ["--worker"]:
        sys.exit("reward.py is imported; its header shows a command that tries it")
    _, _, fd, parent, path, name, memory = sys.argv
    _work(Connection(int(fd)), int(parent), path, name, int(memory))
