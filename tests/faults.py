r"""Kill a run again and again, resume it each time, and compare it with a run that was left alone.

    python tests/faults.py --kills 20              one process, SIGKILL
    python tests/faults.py --kills 20 --ranks 2    torchrun with two workers

Every other kill waits for a checkpoint that is being written; the others come at any moment from
the start on. Prints what each kill hit, then whether metrics.jsonl holds every step once and
whether metrics and weights equal those of the untouched run bit for bit. Takes minutes.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]

from conftest import (  # noqa: E402  (needs the line above)
    ENVIRONMENT,
    ROOT,
    TORCHRUN,
    check_same_metrics,
    check_same_weights,
    run_flags,
)

from experiments import start_model  # noqa: E402
from support.run_folder import read_log  # noqa: E402


def launch(ranks: int, *flags: str) -> subprocess.Popen:
    """Start a run as a user would: plain Python for one rank, torchrun for more."""
    python = [sys.executable] if ranks == 1 else [*TORCHRUN, "--nproc_per_node", str(ranks)]
    command = [*python, str(ROOT / "train.py"), *flags]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env=ENVIRONMENT, **quiet)


def process_tree(pid: int) -> list[int]:
    """A process and all its descendants."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [pid, *(each for child in children for each in process_tree(int(child)))]


def is_saving(run_dir: Path) -> bool:
    """Whether the checkpoint of the last logged step is incomplete."""
    lines = read_log(run_dir / "metrics.jsonl")
    newest = run_dir / "checkpoints" / f"step_{lines[-1]['step'] if lines else 0:06d}"
    return newest.exists() and not (newest / ".metadata").exists()


def kill(process: subprocess.Popen, run_dir: Path, during_save: bool, rng: random.Random) -> str:
    """SIGKILL the process and its descendants at some moment. Returns what it was doing."""
    enough = len(read_log(run_dir / "metrics.jsonl")) + rng.randrange(3)
    latest = time.time() + rng.choice([1e9, 15 * rng.random()])
    while process.poll() is None:
        has_enough = len(read_log(run_dir / "metrics.jsonl")) > enough
        if during_save and has_enough and is_saving(run_dir):
            break
        if not during_save and (has_enough or time.time() > latest):
            time.sleep(rng.random())
            break
        time.sleep(0.002)
    assert process.poll() is None, f"the run ended by itself: {process.stderr.read()[-2000:]}"
    moment = "saving" if is_saving(run_dir) else "at work"
    for pid in process_tree(process.pid):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.communicate()
    return moment


def compare_with_killed(model: str, scratch: Path, kills: int, ranks: int) -> list[str]:
    """Run once untouched and once with kills, and compare. Returns what the kills hit."""
    untouched, killed, moments = scratch / "untouched", scratch / "killed", []
    rng = random.Random(0)
    flags = f"--steps {2 * kills + 4} --eval_every 3 --save_every 1"
    reference = launch(ranks, *run_flags(model, untouched, flags))
    for number in range(kills):
        begun = (killed / "config.json").exists()
        words = ["--resume", str(killed)] if begun else run_flags(model, killed, flags)
        moments.append(kill(launch(ranks, *words), killed, number % 2 == 0, rng))
        print(f"kill {number + 1}: {moments[-1]}", flush=True)
    for process in (launch(ranks, "--resume", str(killed)), reference):
        _, errors = process.communicate()
        assert process.returncode == 0, errors[-3000:]
    assert all((path / ".metadata").exists() for path in killed.glob("checkpoints/step_*"))
    check_same_metrics(untouched, killed)
    check_same_weights(untouched, killed)
    return moments


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--ranks", type=int, default=1)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        model = start_model.build(0, Path(scratch) / "model", steps=2)
        compare_with_killed(str(model), Path(scratch), args.kills, args.ranks)
    print("every step once, metrics and weights equal: yes")
