r"""Kill a run again and again, resume it each time, and compare what comes out with a run that nobody touched.

    python tests/faults.py --kills 20                   one process, SIGKILL
    python tests/faults.py --kills 20 --ranks 2         torchrun with two workers; one, or all of it, is killed

Every other kill waits for a checkpoint that is just being written, the rest fall anywhere from the start-up on.
Printed: a line a kill, then whether metrics.jsonl has every step once and whether metrics and weights are those of the
untouched run, bit for bit. Exit status 1 if they are not. Minutes: most of them are start-ups.
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
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
TINY = (
    "--data toy --val_data toy --prompts_per_step 5 --mini_batch 3 --group_size 3 --max_new_tokens 6 --eval_rows 4 "
    "--eval_every 3 --tokens_per_forward 150 --rollout_batch 6 --lr 1e-3 --save_every 1"
).split()
ENV = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def launch(ranks: int, *flags: str) -> subprocess.Popen:
    """A run as its user starts it: plain Python for one rank, torchrun for more."""
    torchrun = ["-m", "torch.distributed.run", "--nproc_per_node", str(ranks)] if ranks > 1 else []
    command = [sys.executable, *torchrun, str(ROOT / "train.py"), *flags]
    return subprocess.Popen(
        command, env=ENV, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )


def family(pid: int) -> list[int]:
    """A process and all below it."""
    children = Path(f"/proc/{pid}/task/{pid}/children")
    below = [int(child) for child in children.read_text().split()] if children.exists() else []
    return [pid, *(p for child in below for p in family(child))]


def kill(process: subprocess.Popen, whole: bool) -> None:
    """SIGKILL to the process and everything it started, or to one worker of torchrun's, which then ends the rest."""
    pids = family(process.pid)
    workers = [
        p
        for p in pids
        if p != process.pid and b"train.py" in Path(f"/proc/{p}/cmdline").read_bytes()
    ]
    for pid in pids if whole or not workers else workers[-1:]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.communicate()


def lines(folder: Path) -> list[dict]:
    """The whole lines of a run's metrics, without what a clock decides."""
    path = folder / "metrics.jsonl"
    texts = path.read_text().split("\n")[:-1] if path.exists() else []
    clock = ("seconds", "tokens_per")
    return [
        {k: v for k, v in json.loads(text).items() if not k.startswith(clock)} for text in texts
    ]


def half_written(out: Path) -> set:
    """The folders of saves or deletions under way, or left by a kill; the time tells a new one from an old one."""
    found = set()
    for path in (out / "checkpoints").glob(".step_*"):
        with contextlib.suppress(FileNotFoundError):
            found.add((path.name, path.stat().st_ctime_ns))
    return found


def wait(process: subprocess.Popen, out: Path, mid_save: bool, rng: random.Random) -> str:
    """Until the moment of the kill; says what the run was doing."""
    start, before, left = time.time(), len(lines(out)), half_written(out)
    more, early = (
        rng.randrange(3),
        rng.choice([1e9, 1e9, 15 * rng.random()]),
    )  # a third: perhaps before the first step
    while process.poll() is None:
        if mid_save and len(lines(out)) >= before + more and half_written(out) - left:
            time.sleep(rng.random() * 0.02)
            break
        if not mid_save and len(lines(out)) > before + more:
            time.sleep(rng.random())
            break
        if not mid_save and time.time() - start > early:
            break
        time.sleep(0.002)
    assert process.poll() is None, f"the run ended by itself: {process.stderr.read()[-2000:]}"
    return (
        "saving" if half_written(out) - left else "at work" if lines(out)[before:] else "starting"
    )


def weights(folder: Path) -> dict:
    from safetensors.torch import load_file

    return load_file(folder / "model" / "model.safetensors")


def ordeal(model: str, scratch: Path, kills: int, ranks: int, steps: int, seed: int = 0) -> dict:
    """The untouched run and the killed one, compared; the table is printed on the way."""
    from support import checkpoint

    rng, flags = random.Random(seed), [*TINY, "--model", model, "--steps", str(steps)]
    whole, killed = scratch / "whole", scratch / "killed"
    reference = launch(ranks, *flags, "--out", str(whole))
    print(
        f"{'kill':>4} {'after s':>8}  {'while':<9} {'whole checkpoints':<26} {'lines':>5}  half-written",
        flush=True,
    )
    during = []
    for number in range(kills):
        start = time.time()
        again = (
            ["--resume", str(killed)]
            if (killed / "config.json").exists()
            else [*flags, "--out", str(killed)]
        )
        process = launch(ranks, *again)
        during.append(wait(process, killed, number % 2 == 0, rng))
        kill(process, whole=ranks == 1 or number % 4 < 2)
        found = [p.name for p in checkpoint.complete(killed)]
        seconds, left = (
            time.time() - start,
            " ".join(sorted(name for name, _ in half_written(killed))),
        )
        text = f"{number + 1:>4} {seconds:>8.1f}  {during[-1]:<9} {' '.join(found):<26} {len(lines(killed)):>5}  {left}"
        print(text, flush=True)
    process = launch(ranks, "--resume", str(killed))
    _, errors = process.communicate()
    assert process.returncode == 0, errors[-3000:]
    reference.communicate()
    one, other = weights(whole), weights(killed)
    return {
        "during": during,
        "every step once": [m["step"] for m in lines(killed) if "reward" in m]
        == list(range(1, steps + 1)),
        "metrics equal": lines(whole) == lines(killed),
        "weights equal": all(one[name].equal(other[name]) for name in one),
        "nothing half-written is left": not half_written(killed),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    import toy

    with tempfile.TemporaryDirectory() as scratch:
        model = toy.build(seed=0, folder=Path(scratch) / "model", steps=2)
        result = ordeal(
            str(model), Path(scratch), given.kills, given.ranks, 2 * given.kills + 4, given.seed
        )
    during = result.pop("during")
    print(", ".join(f"{during.count(what)} while {what}" for what in dict.fromkeys(during)))
    for what, holds in result.items():
        print(f"{what}: {'yes' if holds else 'NO'}")
    sys.exit(not all(result.values()))


if __name__ == "__main__":
    main()
