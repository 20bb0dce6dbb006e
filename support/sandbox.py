r"""Scoring in processes that can be killed.

A response can hang the scoring rule (\boxed{9**9**9} does), exhaust memory or crash the
interpreter. The released trainer scores in its own process; Grader scores in others:

    trainer (torch, CUDA) --pipe--> server (the scoring function, loaded) --fork--> workers

The trainer holds threads and CUDA and must not fork, so it starts one light server. For each batch
the server forks a pool of workers (pebble), in which one that exceeds its deadline or dies is
replaced in milliseconds. The server and its workers end with the trainer, even if it is killed.

    python -c "from support.sandbox import Grader; print(Grader()([r'\boxed{9**9**9}'], ['1']))"
"""

from __future__ import annotations

import ctypes
import importlib.util
import math
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import traceback
import types
import warnings
from collections import Counter
from concurrent.futures import Future, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import AbstractContextManager, suppress
from multiprocessing.connection import Connection, Pipe

from pebble import ProcessExpired, ProcessPool

from support import StepError, reward

KEYS = ("overall", "format", "accuracy")
ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
LINUX = sys.platform == "linux"
GIB = 2**30
MAX_LIMIT = 1e6  # of seconds, GiB and workers alike: waiting for longer overflows
START_SECONDS = 120.0  # to import sympy (a second) and the user's file, perhaps from a slow disk
WARN_SHARE = 0.1  # of a call's responses
RESPONSES_PER_WORKER = 500  # then a new one takes over: memory that stays in use would starve it

# ("score", the scores), ("error", its text), ("timeout", None) or ("unscored", None)
Outcome = tuple[str, dict | str | None]


class RewardError(StepError):
    """Rewards cannot be computed."""


class Grader(AbstractContextManager):
    """Scores batches: grader(responses, answers) -> overall, format and accuracy of each response.

    function: compute_score, another function at the top level of a file, or
        "path/file.py:function"; called with (response, answer). The server loads the file once and
        then forks, so CUDA and threads may only be started inside the function.
    workers: number of processes, by default min(4, CPUs).
    deadline: seconds per response.
    budget: seconds per call.
    memory: GiB that a worker may use beyond what the loaded function takes. Linux only.

    A response that exceeds the deadline, makes the function raise or kills its worker gets accuracy
    0 and what its format earns; 0 under a user's function. Responses left when the budget is spent
    get 0 and a key "unscored". `timeouts`, `errors` and `unscored` count them for the latest call.

    Warns of errors, and when more than a tenth of the responses time out or are left unscored.
    Raises ValueError for bad arguments and a function that does not load, and RewardError if the
    server dies or a user's function scores no response of a call. The messages are one line.
    """

    def __init__(
        self, function=reward.compute_score, workers=None, deadline=2.0, budget=60.0, memory=1.0
    ):
        path, name = _locate(function)
        workers = min(4, os.cpu_count() or 1) if workers is None else workers
        _check_limits(workers, deadline, budget, memory)
        self.spec = f"{path}:{name}"
        self.deadline = deadline
        self.budget = budget
        self.timeouts = self.errors = self.unscored = 0
        self._is_default = function is reward.compute_score
        self._server, self._pipe = _start_server()
        try:
            settings = (path, name, workers, deadline, int(memory * GIB))
            problem = self._ask(settings, START_SECONDS)
            if problem:
                raise ValueError(problem)
        except BaseException:
            self.close()
            raise

    def __call__(
        self, responses: list[str], answers: list[str], budget: float | None = None
    ) -> list[dict[str, float]]:
        """Score one batch. `budget` replaces the Grader's for this call."""
        _check_texts(responses, answers)
        budget = self.budget if budget is None else budget
        outcomes = self._ask((responses, answers, budget), budget + START_SECONDS)
        kinds = Counter(kind for kind, _ in outcomes)
        self.timeouts = kinds["timeout"]
        self.errors = kinds["error"]
        self.unscored = kinds["unscored"]
        problems = self._problems(outcomes)
        if outcomes and not kinds["score"] and not self._is_default:
            raise RewardError(f"reward {self.spec} {'; '.join(problems)}")
        for problem in problems:
            warnings.warn(f"reward {self.spec} {problem}", stacklevel=2)
        return [self._scores(*pair) for pair in zip(responses, outcomes, strict=True)]

    def _problems(self, outcomes: list[Outcome]) -> list[str]:
        """What the user should know about the latest call."""
        problems = []
        total = len(outcomes)
        if self.errors:
            first = next(text for kind, text in outcomes if kind == "error")
            problems.append(f"failed on {self.errors} of {total} responses: {first}")
        if self.timeouts > WARN_SHARE * total:
            problems.append(
                f"took more than {self.deadline:g} s on {self.timeouts} of {total} responses: "
                "raise --reward_deadline"
            )
        if self.unscored > WARN_SHARE * total:
            problems.append(
                f"left {self.unscored} of {total} responses unscored after {self.budget:g} s: "
                "raise --reward_budget"
            )
        return problems

    def _scores(self, response: str, outcome: Outcome) -> dict[str, float]:
        kind, result = outcome
        if kind == "score":
            return result
        if kind == "unscored":
            return dict.fromkeys(KEYS, 0.0) | {"unscored": 1.0}
        format_score = reward.format_reward(response) if self._is_default else 0.0
        return reward.weigh(format_score, accuracy=0.0)

    def _ask(self, message, seconds: float):
        """The server's answer to a message."""
        try:
            self._pipe.send(message)
            if self._pipe.poll(seconds):
                return self._pipe.recv()
        except (EOFError, OSError):
            raise RewardError(
                f"reward {self.spec}: the scoring server died; stderr may say why"
            ) from None
        raise RewardError(
            f"reward {self.spec}: no answer from the scoring server in {seconds:.0f} s"
        )

    def close(self) -> None:
        """Kill the server and everything it started."""
        if self._server.returncode is None:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(self._server.pid, signal.SIGKILL)
            self._server.wait()
        self._pipe.close()

    def __exit__(self, *exception) -> None:
        self.close()


def _locate(function) -> tuple[str, str]:
    """The absolute path and the name behind a function or a "path/file.py:function"."""
    if isinstance(function, types.FunctionType):
        function = f"{function.__code__.co_filename}:{function.__name__}"
    path, _, name = str(function).rpartition(":")
    if not name or not os.path.isfile(path):
        problem = f"there is no file {path!r}" if path else "no colon"
        raise ValueError(f"reward {function!r}: {problem}; expected path/file.py:function")
    return os.path.abspath(path), name


def _check_limits(workers: int, deadline: float, budget: float, memory: float) -> None:
    limits = {"workers": workers, "deadline": deadline, "budget": budget, "memory": memory}
    for name, value in limits.items():
        if not 0 < value <= MAX_LIMIT:
            raise ValueError(
                f"the reward's {name} must be above 0 and at most {MAX_LIMIT:g}, got {value:g}"
            )
    if deadline > budget:
        raise ValueError(
            f"the reward's deadline of {deadline:g} s exceeds its budget of {budget:g} s per call: "
            "raise --reward_budget"
        )


def _check_texts(responses: list[str], answers: list[str]) -> None:
    if len(responses) != len(answers):
        raise ValueError(
            f"expected one answer per response, got {len(responses)} and {len(answers)}"
        )
    for text in (*responses, *answers):
        if not isinstance(text, str):
            raise ValueError(
                f"responses and answers must be strings, got {type(text).__name__} {text!r}"
            )


def _start_server() -> tuple[subprocess.Popen, Connection]:
    """Start `serve` in a new process and return the process and the pipe to it."""
    ours, theirs = Pipe()
    # An empty part would stand for the current folder.
    python_path = os.pathsep.join(filter(None, [ROOT, os.environ.get("PYTHONPATH")]))
    command = f"from support.sandbox import serve; serve({theirs.fileno()}, {os.getpid()})"
    server = subprocess.Popen(
        # -u: what a function prints appears at once. -P: modules in the current folder hide none.
        [sys.executable, "-u", "-P", "-c", command],
        env=os.environ | {"PYTHONPATH": python_path},
        stdin=subprocess.DEVNULL,
        stdout=2,  # what a function prints goes to stderr
        pass_fds=[theirs.fileno()],
        start_new_session=True,  # Ctrl-C is for the trainer alone
    )
    theirs.close()
    return server, ours


# --------------------------------------------------------------------------------------- the server


def serve(pipe_fd: int, trainer: int) -> None:
    """Load the scoring function, then answer each batch with its outcomes until the pipe closes."""
    _die_with_parent(trainer)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # may go to a whole job; the trainer stops first
    pipe = Connection(pipe_fd)
    path, name, workers, deadline, memory = pipe.recv()
    try:
        function = _load(path, name)
    except ValueError as error:
        pipe.send(str(error))
        return
    warnings.simplefilter("ignore", SyntaxWarning)  # Python's, about a formula
    # sympy's first simplify imports for a while. The workers inherit the result.
    reward.accuracy_reward(r"\boxed{x+x}", "2x")
    pipe.send(None)
    with suppress(EOFError):
        while True:
            responses, answers, budget = pipe.recv()
            pool = ProcessPool(
                workers,
                max_tasks=RESPONSES_PER_WORKER,
                initializer=_start_worker,
                initargs=(function, memory, os.getpid()),
                context=multiprocessing.get_context("fork"),
            )
            pipe.send(_score_batch(pool, responses, answers, deadline, budget))


def _load(path: str, name: str):
    """The function `name` of the Python file `path`. ValueError, in one line, if there is none."""
    sys.path.append(os.path.dirname(path))
    try:
        spec = importlib.util.spec_from_file_location("user_reward", path)
        module = importlib.util.module_from_spec(spec)
        sys.modules["user_reward"] = module
        spec.loader.exec_module(module)
    except Exception as error:
        problem = f"the file does not load: {_one_line(error)}"
        raise ValueError(f"reward {path}:{name}: {problem}") from error
    function = getattr(module, name, None)
    if not callable(function):
        names = [
            key
            for key, value in vars(module).items()
            if isinstance(value, types.FunctionType) and not key.startswith("_")
        ]
        problem = f"no function {name!r} there, it has: {', '.join(names) or 'none'}"
        raise ValueError(f"reward {path}:{name}: {problem}")
    return function


def _score_batch(
    pool: ProcessPool, responses: list[str], answers: list[str], deadline: float, budget: float
) -> list[Outcome]:
    """Score a batch on a new pool and stop the pool, whatever it is still doing."""
    futures = [
        pool.schedule(_score, args=pair, timeout=deadline)
        for pair in zip(responses, answers, strict=True)
    ]
    wait(futures, timeout=budget)
    outcomes = [_outcome(future) for future in futures]
    pool.stop()
    pool.join()
    return outcomes


def _outcome(future: Future) -> Outcome:
    if not future.done():
        return "unscored", None
    try:
        return future.result()
    except TimeoutError:
        return "timeout", None
    except (ProcessExpired, BrokenProcessPool):
        return "error", "the worker process died (a crash, or out of memory)"


# -------------------------------------------------------------------------------------- the workers

_function = None  # a worker's scoring function


def _start_worker(function, memory: int, server: int) -> None:
    global _function
    _function = function
    _die_with_parent(server)
    # pebble's handler for SIGTERM would wait for the end of a long computation inside C code.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if LINUX:
        with open("/proc/self/statm") as file:
            pages = int(file.read().split()[0])
        limit = pages * resource.getpagesize() + memory
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def _score(response: str, answer: str) -> Outcome:
    """Score one response. Whatever the function raises or returns amiss becomes an error."""
    try:
        return "score", _check_scores(_function(response, answer))
    except BaseException as error:  # sys.exit() too
        return "error", _one_line(error)


def _check_scores(result) -> dict[str, float]:
    if not isinstance(result, dict) or not all(
        math.isfinite(result.get(key, math.nan)) for key in KEYS
    ):
        raise ValueError(
            f"expected a dict with finite {', '.join(KEYS)}, the function returned {result!r}"
        )
    return {key: float(result[key]) for key in KEYS}


def _one_line(error: BaseException) -> str:
    frame = traceback.extract_tb(error.__traceback__)[-1]
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return f"{text[:300]} ({os.path.basename(frame.filename)}:{frame.lineno})"


def _die_with_parent(parent: int) -> None:
    """Let Linux kill this process when its parent dies, even amid a computation in C.

    For Linux, the parent is the thread that started the process. Elsewhere a process ends when it
    next looks at its closed pipe.
    """
    if LINUX:
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)
