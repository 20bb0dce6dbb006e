r"""Scoring in processes that can be killed: a response like \boxed{9**9**9} hangs the scoring rule.

    trainer (torch, CUDA) --pipe--> server (the scoring function, loaded) --fork--> workers

The trainer holds threads and CUDA and must not fork, so it starts one light server. The server
forks workers for each batch and replaces those that exceed the deadline or die. It ends with its
workers when the trainer does, even if that is killed. The released trainer scores in its own
process.

    python -c "from support.sandbox import Grader; print(Grader()([r'\boxed{9**9**9}'], ['1']))"
"""

from __future__ import annotations

import importlib.util
import inspect
import math
import os
import resource
import signal
import subprocess
import sys
import time
import traceback
import warnings
from collections import Counter
from contextlib import AbstractContextManager, suppress
from multiprocessing import get_context
from multiprocessing.connection import Connection, Pipe, wait
from pathlib import Path

from support import StepError, reward

KEYS = ("overall", "format", "accuracy")
TIMEOUT = "took longer than --reward_deadline"
UNSCORED = "left when the time for all was spent"
DIED = "killed their process (a crash, or out of memory)"
FORK = get_context("fork")


class Grader(AbstractContextManager):
    """grader(responses, answers) -> the scores "overall", "format", "accuracy" of each response.

    function: compute_score, or "path/file.py:function", called with (response, answer), and with
    `row` if it has a parameter of that name. It is loaded once, then forked: CUDA and threads may
    only be started inside it. deadline: seconds per response. budget: seconds per call. memory: GiB
    per worker beyond what the loaded function takes, on Linux.

    A response that exceeds the deadline, makes the function raise or kills its worker gets accuracy
    0 and what its format earns; 0 under a user's function. Responses left when the budget is spent
    get 0 and a key "unscored". `timeouts`, `errors` and `unscored` count them for the latest call;
    a warning tells of errors, and where a tenth of a call fails. ValueError if the function does
    not load; StepError if the server dies or a user's function scores no response of a call.
    """

    def __init__(
        self, function=reward.compute_score, workers=None, deadline=2.0, budget=60.0, memory=1.0
    ):
        self._is_default = function is reward.compute_score
        if callable(function):
            function = f"{inspect.getsourcefile(function)}:{function.__name__}"
        self.spec, self.budget = function, budget
        self.timeouts = self.errors = self.unscored = 0
        self._pipe, theirs = Pipe()
        root = str(Path(__file__).resolve().parent.parent)
        code = f"import sys; sys.path.insert(0, {root!r}); from support import sandbox"
        self._server = subprocess.Popen(
            # -u: what a function prints appears at once. -P: no module of the current folder.
            [sys.executable, "-u", "-P", "-c", f"{code}; sandbox.serve({theirs.fileno()})"],
            stdin=subprocess.DEVNULL,
            stdout=2,  # what a function prints goes to stderr
            pass_fds=[theirs.fileno()],
            start_new_session=True,  # Ctrl-C is for the trainer alone
        )
        theirs.close()
        # The ranks of a machine score at the same time.
        cores = (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        workers = workers or max(1, min(4, cores))
        reply = self._ask((function, workers, deadline, memory))
        if isinstance(reply, str):
            self.close()
            raise ValueError(f"reward {function!r}: {reply}")
        self._takes_row = reply

    def of_groups(self, groups: list, budget=None) -> list[dict[str, float]]:
        """The scores of all responses of some batch.Groups, one group after the other."""
        responses = [text for group in groups for text in group.responses]
        examples = [group.prompt.example for group in groups for _ in group.responses]
        return self(responses, [example.answer for example in examples], examples, budget)

    def __call__(self, responses, answers, examples=None, budget=None) -> list[dict[str, float]]:
        """examples: the batch.Example of each response, for a function that takes its row.
        budget: replaces the Grader's."""
        rows = [None] * len(responses)
        if self._takes_row:
            if examples is None:
                problem = "takes a row, which files of responses (--grade, --baseline) do not hold"
                raise ValueError(f"reward {self.spec} {problem}")
            row_of = {id(example): example.as_row() for example in examples}
            rows = [row_of[id(example)] for example in examples]  # pickle writes each once
        tasks = list(zip(responses, answers, rows, strict=True))
        outcomes = self._ask((tasks, self.budget if budget is None else budget))

        failures = Counter(outcome for outcome in outcomes if isinstance(outcome, str))
        self.timeouts, self.unscored = failures[TIMEOUT], failures[UNSCORED]
        self.errors = failures.total() - self.timeouts - self.unscored
        reasons = "; ".join(f"{count} {text}" for text, count in failures.most_common(3))
        problem = f"reward {self.spec}: of {len(tasks)} responses {reasons}"
        if tasks and failures.total() == len(tasks) and not self._is_default:
            raise StepError(problem)
        if self.errors or failures.total() > len(tasks) / 10:
            warnings.warn(problem, stacklevel=2)
        return [self._scores(*pair) for pair in zip(responses, outcomes, strict=True)]

    def _scores(self, response: str, outcome: dict | str) -> dict[str, float]:
        if isinstance(outcome, dict):
            return outcome
        if outcome == UNSCORED:
            return dict.fromkeys(KEYS, 0.0) | {"unscored": 1.0}
        format_score = reward.format_reward(response) if self._is_default else 0.0
        return reward.combine(format_score, accuracy=0.0)

    def _ask(self, message):
        """The server's answer."""
        try:
            self._pipe.send(message)
            return self._pipe.recv()
        except (EOFError, OSError):
            raise StepError(f"reward {self.spec}: the scoring server died, see stderr") from None

    def close(self) -> None:
        """Kill the server and its workers, which are a process group."""
        if self._server.returncode is None:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(self._server.pid, signal.SIGKILL)
            self._server.wait()
        self._pipe.close()

    def __exit__(self, *exception) -> None:
        self.close()


# ------------------------------------------------------------------------- the server, its workers


def serve(fd: int) -> None:
    """Load the function; say whether it takes a row, or why it does not load; score batches."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # may go to a whole job; the trainer stops first
    trainer = Connection(fd)
    spec, workers, deadline, memory = trainer.recv()
    try:
        function = load(spec)
        reply = "row" in inspect.signature(function).parameters
    except Exception as error:
        reply = f"expected path/file.py:function: {one_line(error)}"
    warnings.simplefilter("ignore", SyntaxWarning)  # Python's, about a formula
    reward.accuracy_reward(r"\boxed{x+x}", "2x")  # sympy imports what it needs, for all workers
    with suppress(EOFError, ConnectionError):
        trainer.send(reply)
        while True:
            tasks, budget = trainer.recv()
            end = time.monotonic() + budget
            trainer.send(score_batch(trainer, function, tasks, workers, deadline, memory, end))


def load(spec: str):
    """The function of a "path/file.py:function"."""
    path, _, name = spec.rpartition(":")
    if not path.endswith(".py") or not os.path.isfile(path):
        raise ValueError(f"there is no Python file {path!r}")
    sys.path.append(os.path.dirname(os.path.abspath(path)))  # for its own imports
    found = importlib.util.spec_from_file_location("user_reward", path)
    sys.modules["user_reward"] = module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return getattr(module, name)


def score_batch(trainer, function, tasks, workers, deadline, memory, end) -> list[dict | str]:
    """The scores of each task, or why it has none. Tasks are dealt to the workers in turn."""
    outcomes: list[dict | str] = [UNSCORED] * len(tasks)
    running = {}  # a worker's pipe -> its process, the indices of its tasks, when the first is due
    waiting = [range(i, len(tasks), workers) for i in range(workers)]
    while time.monotonic() < end:
        for indices in filter(None, waiting):
            ours, theirs = Pipe(duplex=False)
            arguments = (trainer, theirs, function, [tasks[i] for i in indices], memory)
            process = FORK.Process(target=work, args=arguments)
            process.start()
            theirs.close()
            running[ours] = process, indices, time.monotonic() + deadline
        waiting = []
        if not running:
            break
        next_due = min(end, *(due for *_, due in running.values()))
        ready = wait([trainer, *running], max(next_due - time.monotonic(), 0.0))
        if trainer in ready:  # it has died: it says nothing while it waits
            os.killpg(0, signal.SIGKILL)
        for pipe, (process, indices, due) in list(running.items()):
            if pipe not in ready and time.monotonic() < due:
                continue
            outcome = TIMEOUT
            if pipe in ready:
                outcome = DIED
                with suppress(EOFError, OSError):
                    outcome = pipe.recv()
            index, rest = indices[0], indices[1:]
            outcomes[index] = outcome
            running[pipe] = process, rest, time.monotonic() + deadline
            if outcome in (TIMEOUT, DIED) or not rest:
                waiting.append(rest)
                end_worker(pipe, running.pop(pipe)[0])
    for pipe, (process, *_) in running.items():
        end_worker(pipe, process)
    return outcomes


def work(trainer, pipe, function, tasks: list, memory: float) -> None:
    """A worker: score the tasks one after another, with so much more memory than now, in GiB."""
    trainer.close()  # else the trainer would not notice the server's death
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # no file of its memory where it crashes
    if sys.platform == "linux":
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + int(memory * 2**30)
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    for task in tasks:
        pipe.send(score(function, *task))


def end_worker(pipe: Connection, process) -> None:
    process.kill()
    process.join()
    pipe.close()


def score(function, response: str, answer: str, row: dict | None) -> dict | str:
    """The scores, or what the function raised or returned amiss."""
    try:
        result = function(response, answer, **({} if row is None else {"row": dict(row)}))
        scores = result if isinstance(result, dict) else {}
        if all(math.isfinite(scores.get(key, math.nan)) for key in KEYS):
            return {key: float(scores[key]) for key in KEYS}
        return f"returned {str(result)[:200]}, no dict with finite {', '.join(KEYS)}"
    except BaseException as error:  # sys.exit() too
        return one_line(error)


def one_line(error: BaseException) -> str:
    frame = traceback.extract_tb(error.__traceback__)[-1]
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return f"{text[:300]} ({os.path.basename(frame.filename)}:{frame.lineno})"
