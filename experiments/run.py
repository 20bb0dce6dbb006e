r"""The paper's experiments at toy scale: train and evaluate, one JSON file per run, on a CPU.

    python -m experiments.run table1           one experiment; --help lists them
    python -m experiments.run all --jobs 2     every run without a result, two at a time
    python -m experiments.run table1 --list    what would be run

A run is one variant (flags of train.py) at one seed: `train.py`, then `evaluate.py` on the exported
model, each a command of its own. Its result goes to results/VARIANT-sSEED.json and is not computed
again. An interrupted run continues from its checkpoint in --work. report.py draws tables and
figures from the JSON files alone. protocols.md says what is compared, by which test, with which
seeds.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from statistics import fmean

import torch
import transformers

from experiments import start_model, tasks
from experiments.protocol import (
    ENVIRONMENTS,
    EVALUATION,
    EXPERIMENTS,
    MISREAD,
    TRAINING,
    VARIANTS,
)
from experiments.tasks import SPLITS, is_misread, share_of_cells_right
from support.run_folder import read_log

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
RESULTS = HERE / "results"

# The metrics of each step that a result keeps.
METRICS = (
    "reward",
    "accuracy",
    "kl_prcp",
    "kl_ref",
    "entropy",
    "masked_entropy",
    "clip_frac",
    "grad_norm",
    "response_length",
    "rounds",
    "truncated",
    "tokens_per_second",
    "seconds",
)

# The same instructions on every x86 CPU with AVX2, in MKL, in oneDNN (which does the convolution)
# and in torch's own kernels. It takes twice as long, so it makes the start models alone.
SAME_ON_EVERY_CPU = {
    "MKL_CBWR": "COMPATIBLE",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "ATEN_CPU_CAPABILITY": "avx2",
}


def list_jobs(names: list[str], seeds: list[int] | None) -> list[tuple[str, int]]:
    """(variant, seed) pairs of the experiments, each once, seed by seed.

    Start models come first because a seed's other runs begin with them.
    """
    jobs = []
    for name in names:
        variants, all_seeds = EXPERIMENTS[name]
        chosen = [seed for seed in all_seeds if seeds is None or seed in seeds]
        jobs += [(variant, seed) for seed in chosen for variant in variants]
    unique = list(dict.fromkeys(jobs))
    return sorted(unique, key=lambda job: not is_start(job[0]))


def is_start(variant: str) -> bool:
    return not VARIANTS[variant]


def result_file(variant: str, seed: int) -> Path:
    return RESULTS / f"{variant}-s{seed}.json"


def has_result(variant: str, seed: int) -> bool:
    file = result_file(variant, seed)
    if not file.exists():
        return False
    if not is_start(variant):
        check_flags(json.loads(file.read_text())["config"], variant, file)
    return True


# One run


def run(variant: str, seed: int, work: Path) -> Path:
    """Train, evaluate, write the result; continues an interrupted run. Returns the result's file.

    RuntimeError with the last line of the log where a command fails.
    """
    log = work / f"{variant}-s{seed}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    result_file(variant, seed).parent.mkdir(exist_ok=True)
    start = build_start_model(variant, seed, log)
    origin_file = log.with_suffix(".origin")
    if not (work / f"{variant}-s{seed}" / "config.json").exists():
        origin_file.unlink(missing_ok=True)  # of a run that was removed
    result = origin(variant, seed, start, origin_file)
    if is_start(variant):
        model = start
    else:
        run_dir = train(variant, seed, work, log)
        result |= training_record(run_dir)
        model = run_dir / "model"
    task = task_of(variant)
    out = work / f"{variant}-s{seed}-eval"
    flags = {"model": model, "seed": seed, "out": out} | task.evaluation(seed) | EVALUATION
    run_python(["evaluate.py"], flags, log)
    result["final"] = {split: measure(out / f"{split}.jsonl", task) for split in SPLITS}
    write_json(result_file(variant, seed), result)
    return result_file(variant, seed)


def origin(variant: str, seed: int, start: Path, file: Path) -> dict:
    """What a run's numbers depend on beside its flags, as it was when the run began.

    Kept in `file` for a run that continues. RuntimeError if its start model is another one now.
    """
    model = sha256(start / start_model.WEIGHTS)
    if not file.exists():
        environment = ENVIRONMENTS.get(variant, {})
        facts = {"variant": variant, "seed": seed, "commit": current_commit()}
        facts |= {"machine": machine(environment), "environment": environment}
        write_json(file, facts | {"evaluation": EVALUATION, "start_model": model})
    facts = json.loads(file.read_text())
    if facts["start_model"] != model:
        raise RuntimeError(f"{file}: the start model has changed since this run began: remove it")
    return facts


def check_flags(config: dict, variant: str, source: Path) -> None:
    """ValueError if a run had other flags than the protocol has now."""
    for name, value in (TRAINING | VARIANTS[variant]).items():
        if config.get(name) != value:
            found = f"{name}={config.get(name)}, the protocol has {value}"
            raise ValueError(f"{source} was made with {found}: remove it")


def write_json(file: Path, content: dict) -> None:
    partial = file.with_suffix(".partial")
    partial.write_text(json.dumps(content) + "\n")
    os.replace(partial, file)


def task_of(variant: str):
    """The task of a variant: digits for digits/NAME and digits_LEVEL/NAME, else dots."""
    task, _, level = variant.partition("/")[0].partition("_")
    made = tasks.Digits if task == "digits" else tasks.Dots
    return made(MISREAD.get(level))


def use_own_cache() -> None:
    """Keep start models apart from those that train.py made, whose rounding may differ."""
    cache = Path(os.environ.get("PAPO_CACHE") or "~/.cache/papo").expanduser()
    os.environ["PAPO_CACHE"] = str(cache / "experiments")


def build_start_model(variant: str, seed: int, log: Path) -> Path:
    """The start model of a seed, from the cache or built in a process of its own."""
    code = f"from experiments import run; run.task_of({variant!r}).build({seed})"
    run_python(["-c", code], {}, log, SAME_ON_EVERY_CPU)
    return task_of(variant).build(seed)


def train(variant: str, seed: int, work: Path, log: Path) -> Path:
    """The folder of a finished training run; continues it if it was interrupted."""
    run_dir = work / f"{variant}-s{seed}"
    weights = run_dir / "model" / "model.safetensors"
    config = run_dir / "config.json"
    if config.exists():
        check_flags(json.loads(config.read_text()), variant, run_dir)
    if weights.exists():
        return run_dir
    if config.exists():
        flags = {"resume": run_dir}
    else:
        inputs = task_of(variant).training(seed)
        flags = inputs | {"seed": seed, "out": run_dir} | TRAINING | VARIANTS[variant]
    run_python(["train.py"], flags, log, ENVIRONMENTS.get(variant))
    if not weights.exists():
        raise RuntimeError(f"training stopped early: run the same command to continue ({log})")
    return run_dir


def run_python(
    words: list[str], flags: dict, log: Path, environment: dict[str, str] | None = None
) -> None:
    """Run Python on one thread, its output appended to `log`."""
    command = [sys.executable, *words]
    for name, value in flags.items():
        command += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | (environment or {})
    with open(log, "a") as out:
        done = subprocess.run(command, stdout=out, stderr=out, env=environment, cwd=ROOT)
    if done.returncode:
        last_line = log.read_text(errors="replace").strip().rpartition("\n")[2]
        raise RuntimeError(f"{words[0]} exited with {done.returncode}: {last_line} ({log})")


def sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def current_commit() -> str:
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude=*"]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip() or "unknown"


def machine(environment: dict[str, str]) -> dict:
    """Library versions, CPU and threads of a run with these environment variables."""
    return {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "processor": processor(),
        "threads": int(environment.get("OMP_NUM_THREADS", 1)),
    }


def processor() -> str:
    """The CPU's name, family and model, where Linux tells; rounding may differ between them."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    facts = dict(re.split(r"\s*:\s*", line, maxsplit=1) for line in lines if ":" in line)
    name, family, model = (facts.get(key) for key in ("model name", "cpu family", "model"))
    return f"{name}, family {family}, model {model}"


def training_record(run_dir: Path) -> dict:
    """The run's config, kept metrics of every step, accuracies of its evaluations, and some of the
    last one's responses."""
    lines = [json.loads(text) for text in (run_dir / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "reward" in line]
    curve = {}
    for line in lines:
        if "reward" not in line:
            scores = {key.removeprefix("eval/"): value for key, value in line.items()}
            curve[scores.pop("step")] = scores
    metrics = {}
    for name in METRICS:
        if any(name in step for step in steps):
            # A step without any group to train on has no metrics of the update.
            metrics[name] = [round(step[name], 5) if name in step else None for step in steps]
    config = json.loads((run_dir / "config.json").read_text())
    samples = read_log(run_dir / "samples.jsonl")
    last = [sample for sample in samples if sample["step"] == len(steps)]
    kept = [{key: sample[key] for key in ("set", "row", "predict", "accuracy")} for sample in last]
    return {"config": config, "metrics": metrics, "curve": curve, "samples": kept}


# What went wrong in a response


def measure(predictions: Path, task) -> dict:
    """Accuracy of a split's predictions, and how many wrong answers rest on a misread image."""
    records = [json.loads(text) for text in predictions.read_text().splitlines()]
    split = predictions.stem
    wrong = [record for record in records if not record["accuracy"]]
    return {
        "accuracy": fmean(record["accuracy"] for record in records),
        "responses": len(records),
        "wrong": len(wrong),
        "misread": sum(is_misread(task, r["predict"], split, r["row"]) for r in wrong),
        "cells_right": fmean(
            share_of_cells_right(task, r["predict"], split, r["row"]) for r in records
        ),
        "unboxed": fmean(record["unboxed"] for record in records),
    }


# Command line


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Run the paper's experiments at toy scale.")
    choices = [*EXPERIMENTS, "all"]
    default_work = ROOT / "runs" / "experiments"
    parser.add_argument(
        "names", nargs="+", choices=choices, metavar="name", help=", ".join(choices)
    )
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one core each")
    parser.add_argument("--seeds", type=int, nargs="+", help="only these of an experiment's seeds")
    parser.add_argument("--work", type=Path, default=default_work, help="folder of unfinished runs")
    parser.add_argument("--list", action="store_true", help="list the missing runs and stop")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    names = list(EXPERIMENTS) if "all" in args.names else args.names
    jobs = list_jobs(names, args.seeds)
    try:
        missing = [job for job in jobs if not has_result(*job)]
    except ValueError as error:
        sys.exit(str(error))
    print(f"{len(jobs)} runs, {len(missing)} missing")
    if args.list:
        for variant, seed in missing:
            print(f"{variant} seed {seed}")
        return
    use_own_cache()
    work = args.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    failures = run_all(missing, args.jobs, work)
    sys.exit(1 if failures else 0)


def run_all(jobs: list[tuple[str, int]], at_a_time: int, work: Path) -> int:
    """Run the jobs and print one line for each. Returns how many failed."""
    failures, start = 0, time.time()
    with ThreadPoolExecutor(at_a_time) as pool:
        pending = {pool.submit(run, *job, work): job for job in jobs}
        try:
            for number, done in enumerate(as_completed(pending), 1):
                error = done.exception()
                failures += error is not None
                outcome = f"{pending[done]}: {error}" if error else done.result().name
                minutes = (time.time() - start) / 60
                print(f"{number}/{len(jobs)} after {minutes:.0f} min: {outcome}", flush=True)
        except KeyboardInterrupt:  # the running commands got it too: they save and exit
            pool.shutdown(cancel_futures=True)
            sys.exit("interrupted: run the same command to continue")
    return failures


if __name__ == "__main__":
    main()
