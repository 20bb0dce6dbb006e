r"""Kill a run again and again, resume it each time, and compare it with a run that was left alone.

    python tests/faults.py --kills 20              one process, SIGKILL
    python tests/faults.py --kills 20 --ranks 2    torchrun with two workers

Every other kill waits for a checkpoint that is being written; the others come at any moment from
the start on. Under torchrun half of them hit the whole job, half one worker. Prints one line per
kill, then whether metrics.jsonl holds every step once and whether metrics and weights equal those
of the untouched run bit for bit. Exit status 1 if they do not. Takes minutes.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from experiments import start_model  # noqa: E402  (needs the line above)
from support import checkpoint  # noqa: E402

FLAGS = (
    "--data toy --val_data toy --prompts_per_step 5 --mini_batch 3 --group_size 3 "
    "--max_new_tokens 6 --eval_rows 4 --eval_every 3 --tokens_per_forward 150 --rollout_batch 6 "
    "--lr 1e-3 --save_every 1"
).split()
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
TIMED_METRICS = ("seconds", "tokens_per")  # prefixes of metrics that a clock decides


def launch(ranks: int, *flags: str) -> subprocess.Popen:
    """Start a run as a user would: plain Python for one rank, torchrun for more."""
    torchrun = ["-m", "torch.distributed.run", "--nproc_per_node", str(ranks)] if ranks > 1 else []
    return subprocess.Popen(
        [sys.executable, *torchrun, str(ROOT / "train.py"), *flags],
        env=ENVIRONMENT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def process_tree(pid: int) -> list[int]:
    """A process and all its descendants."""
    children = Path(f"/proc/{pid}/task/{pid}/children")
    pids = [pid]
    if children.exists():
        for child in children.read_text().split():
            pids += process_tree(int(child))
    return pids


def kill(process: subprocess.Popen, all_of_it: bool) -> None:
    """SIGKILL the process and its descendants, or one torchrun worker, which then ends the rest."""
    pids = process_tree(process.pid)
    if not all_of_it:
        workers = [pid for pid in pids[1:] if b"train.py" in command_line(pid)]
        pids = workers[-1:] or pids
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.communicate()


def command_line(pid: int) -> bytes:
    return Path(f"/proc/{pid}/cmdline").read_bytes()


def metric_lines(run_dir: Path) -> list[dict]:
    """The complete lines of a run's metrics, without the timed ones."""
    path = run_dir / "metrics.jsonl"
    if not path.exists():
        return []
    complete_lines = path.read_text().split("\n")[:-1]
    parsed = [json.loads(text) for text in complete_lines]
    return [
        {key: value for key, value in line.items() if not key.startswith(TIMED_METRICS)}
        for line in parsed
    ]


def partial_checkpoints(run_dir: Path) -> set[tuple[str, int]]:
    """Folders of saves or deletions that are under way or were killed: those without .metadata.

    The inode tells a new one from an old one of the same name.
    """
    found = set()
    for path in run_dir.glob("checkpoints/step_*"):
        with contextlib.suppress(FileNotFoundError):
            if not (path / ".metadata").exists():
                found.add((path.name, path.stat().st_ino))
    return found


def wait_for_kill(
    process: subprocess.Popen, run_dir: Path, during_save: bool, rng: random.Random
) -> str:
    """Wait until the moment of the kill. Returns what the run was doing."""
    start = time.time()
    lines_before, partial_before = len(metric_lines(run_dir)), partial_checkpoints(run_dir)
    enough_lines = lines_before + rng.randrange(3)
    # One time in three an unaimed kill may come before the first step.
    latest = rng.choice([1e9, 1e9, 15 * rng.random()])
    while process.poll() is None:
        lines = len(metric_lines(run_dir))
        if during_save:
            if lines >= enough_lines and partial_checkpoints(run_dir) - partial_before:
                time.sleep(rng.random() * 0.02)
                if partial_checkpoints(run_dir) - partial_before:  # still
                    break
        elif lines > enough_lines:
            time.sleep(rng.random())
            break
        elif time.time() - start > latest:
            break
        time.sleep(0.002)
    if process.poll() is not None:
        raise AssertionError(f"the run ended by itself: {process.stderr.read()[-2000:]}")
    if partial_checkpoints(run_dir) - partial_before:
        return "saving"
    return "at work" if len(metric_lines(run_dir)) > lines_before else "starting"


def weights(run_dir: Path) -> dict:
    return load_file(run_dir / "model" / "model.safetensors")


def compare_with_killed(
    model: str, scratch: Path, kills: int, ranks: int, steps: int, seed: int = 0
) -> dict:
    """Run once untouched and once with kills. Returns what the kills hit, and what is equal."""
    flags = [*FLAGS, "--model", model, "--steps", str(steps)]
    untouched, killed = scratch / "untouched", scratch / "killed"
    reference = launch(ranks, *flags, "--out", str(untouched))
    moments = kill_repeatedly(killed, flags, kills, ranks, random.Random(seed))
    last = launch(ranks, "--resume", str(killed))
    _, errors = last.communicate()
    assert last.returncode == 0, errors[-3000:]
    reference.communicate()
    steps_logged = [line["step"] for line in metric_lines(killed) if "reward" in line]
    expected, resumed = weights(untouched), weights(killed)
    return {
        "during": moments,
        "every step once": steps_logged == list(range(1, steps + 1)),
        "metrics equal": metric_lines(untouched) == metric_lines(killed),
        "weights equal": all(expected[name].equal(resumed[name]) for name in expected),
        "nothing partial is left": not partial_checkpoints(killed),
    }


def kill_repeatedly(
    run_dir: Path, flags: list[str], kills: int, ranks: int, rng: random.Random
) -> list[str]:
    """Start or resume the run and kill it, `kills` times. Returns what each kill interrupted."""
    print(f"{'kill':>4} {'after s':>8}  {'while':<9} {'checkpoints':<26} {'lines':>5}  partial")
    moments = []
    for number in range(kills):
        start = time.time()
        if (run_dir / "config.json").exists():
            process = launch(ranks, "--resume", str(run_dir))
        else:
            process = launch(ranks, *flags, "--out", str(run_dir))
        moment = wait_for_kill(process, run_dir, during_save=number % 2 == 0, rng=rng)
        kill(process, all_of_it=ranks == 1 or number % 4 < 2)
        moments.append(moment)
        complete = " ".join(path.name for path in checkpoint.complete(run_dir))
        partial = " ".join(sorted(name for name, _ in partial_checkpoints(run_dir)))
        print(
            f"{number + 1:>4} {time.time() - start:>8.1f}  {moment:<9} {complete:<26} "
            f"{len(metric_lines(run_dir)):>5}  {partial}",
            flush=True,
        )
    return moments


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0, help="of the moments of the kills")
    args = parser.parse_args()
    steps = 2 * args.kills + 4
    with tempfile.TemporaryDirectory() as scratch:
        model = start_model.build(0, Path(scratch) / "model", steps=2)
        result = compare_with_killed(
            str(model), Path(scratch), args.kills, args.ranks, steps, args.seed
        )
    moments = Counter(result.pop("during"))
    print(", ".join(f"{times} while {moment}" for moment, times in moments.items()))
    for what, holds in result.items():
        print(f"{what}: {'yes' if holds else 'NO'}")
    sys.exit(not all(result.values()))


if __name__ == "__main__":
    main()
