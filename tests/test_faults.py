"""Slow: SIGKILL at any moment, and a full disk or a crash on one of two ranks.

For a fault on one rank this file is itself started under torchrun: it trains, with that fault.
"""

import contextlib
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import (
    ROOT,
    TORCHRUN,
    check_same_metrics,
    check_same_weights,
    checkpoint_names,
    full_disk,
    lines_with,
    on_ranks,
    run_flags,
)

import train
from support.run_folder import read_log

pytestmark = pytest.mark.slow
KILLS = 3  # per run; takes a minute. 28 were tried


def launch(ranks, *flags):
    """Start a run as a user would: plain Python for one rank, torchrun for more."""
    python = [sys.executable] if ranks == 1 else [*TORCHRUN, f"--nproc_per_node={ranks}"]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([*python, str(ROOT / "train.py"), *flags], **quiet)


def process_tree(pid):
    """A process and all its descendants."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [pid, *(each for child in children for each in process_tree(int(child)))]


def is_saving(run_dir):
    """Whether the checkpoint of the last logged step is incomplete."""
    lines = read_log(run_dir / "metrics.jsonl")
    newest = run_dir / "checkpoints" / f"step_{lines[-1]['step'] if lines else 0:06d}"
    return newest.exists() and not (newest / ".metadata").exists()


def kill(process, run_dir, during_save, rng):
    """SIGKILL the process and its descendants in a save, or after some steps or at the start."""
    log = run_dir / "metrics.jsonl"
    enough = len(read_log(log)) + rng.randrange(3) + during_save
    while process.poll() is None:
        if len(read_log(log)) >= enough and (is_saving(run_dir) or not during_save):
            break
        time.sleep(0.002)
    time.sleep(0 if during_save else 2 * rng.random())
    assert process.poll() is None, f"the run ended by itself: {process.stderr.read()[-2000:]}"
    for pid in process_tree(process.pid):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.communicate()


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_killed_run_resumes_exactly(folder, tmp_path, ranks):
    """Every other kill waits for a checkpoint that is being written."""
    untouched, killed, rng = tmp_path / "untouched", tmp_path / "killed", random.Random(0)
    flags = f"--steps {2 * KILLS + 4} --eval_every 3 --save_every 1"
    reference = launch(ranks, *run_flags(folder, untouched, flags))
    for number in range(KILLS):
        begun = (killed / "config.json").exists()
        words = ["--resume", str(killed)] if begun else run_flags(folder, killed, flags)
        kill(launch(ranks, *words), killed, number % 2 == 0, rng)
    for process in (launch(ranks, "--resume", str(killed)), reference):
        _, errors = process.communicate()
        assert process.returncode == 0, errors[-3000:]
    assert all((path / ".metadata").exists() for path in killed.glob("checkpoints/step_*"))
    check_same_metrics(untouched, killed)
    check_same_weights(untouched, killed)


def test_a_full_disk_on_one_rank_and_resuming_on_other_numbers(run, folder, tmp_path):
    """Two ranks, then one, then two replicas: the numbers of one rank throughout."""
    out, flags = tmp_path / "changing", "--eval_every 0 --save_every 1"
    args = run_flags(folder, out, f"{flags} --steps 2")
    done = on_ranks(2, *args, script=__file__, FAULT="full disk", PYTHONPATH=str(ROOT))
    assert done.returncode == 0, done.stderr[-3000:]
    [error] = lines_with(done.stderr, "error:")
    assert error.startswith("error: the checkpoint of step 1 is not written: ")
    assert checkpoint_names(out) == ["step_000002"]
    one_rank = run("one_rank", f"{flags} --steps 4")
    train.main(["--resume", str(out), "--steps", "3"])
    done = on_ranks(2, "--resume", str(out), "--steps", "4", "--shard_size", "1")
    assert done.returncode == 0, done.stderr[-3000:]
    check_same_metrics(one_rank, out, rel=1e-3, abs=1e-5)


def test_a_crashed_rank_ends_the_job_with_its_own_error(folder, tmp_path):
    args = run_flags(folder, tmp_path / "crashed", "--steps 3 --eval_every 0 --save_every 1")
    done = on_ranks(2, *args, script=__file__, FAULT="crash", PYTHONPATH=str(ROOT))
    assert done.returncode != 0
    error = re.compile(r"^(?:\[rank\d\]:? ?)?(\w*(?:Error|Exception)\b.*)", re.MULTILINE)
    assert error.search(done.stderr)[1] == "ZeroDivisionError: something broke on rank 1"


def train_with_fault(fault, save=train.Run.save):
    """On rank 1 the save after step 1 finds a full disk, or step 1 crashes."""

    def save_or_crash(run):
        if run.step == 1 and fault == "crash":
            raise ZeroDivisionError("something broke on rank 1")
        with full_disk(50_000) if run.step == 1 else contextlib.nullcontext():
            save(run)

    if os.environ["RANK"] == "1":
        train.Run.save = save_or_crash
    train.main()


if __name__ == "__main__":
    train_with_fault(os.environ["FAULT"])
