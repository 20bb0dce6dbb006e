r"""Experiments at toy scale: train and evaluate on a CPU, one line of results per run.

    python -m experiments.run my_idea.py papo_g --seeds 3    an idea beside a preset or a variant
    python -m experiments.run dots digits                    runs of protocols.md
    python -m experiments.run all --list                     what has no result yet

A run is one variant, flags of train.py, at one seed: train.py, then evaluate.py on its model, each
a command of its own. All runs of a task and seed share a start model. A finished run is not
repeated; an interrupted one continues. Results of the protocols are lines of results/NAME.jsonl,
from which report.py draws; those of ideas stay in runs/experiments.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

import torch
import transformers

from experiments import digits
from experiments.start_model import WEIGHTS
from papo import algo_class
from support import toy
from support.config import one_line_errors
from support.run_folder import read_log

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "experiments" / "results"
WORK = ROOT / "runs" / "experiments"  # unfinished runs, start models and ideas

METRICS = ("accuracy", "kl_prcp", "entropy", "masked_entropy", "clip_frac")  # kept of each step
METRICS += ("tokens_per_second", "seconds")

# The same instructions on every x86 CPU with AVX2, in MKL, in oneDNN and in torch's own kernels.
# They take twice as long, so they make the start models alone.
SAME_ON_EVERY_CPU = {
    "MKL_CBWR": "COMPATIBLE",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "ATEN_CPU_CAPABILITY": "avx2",
}

# -------------------------------------------------------------------------------------------- tasks

SPLITS = toy.EVAL_SPLITS
SPEC = "toy:grid=4,colours=4,most=6,warm_steps=400,plain_share=0"  # the dots
SETTING = toy.setting_of(SPEC)
MISREAD = {"easy": 0.04, "middle": 0.12, "hard": 0.2}  # of a cell, in labels of a warm start


def scene_of_dots(split: str, row: int) -> tuple[list[str], Callable[[list[str]], int]]:
    """What the cells of an evaluation image hold, and the answer as a function of the cells."""
    scene = toy.make_scene(split, row, setting=SETTING)
    return scene.cells, lambda cells: cells.count(scene.asked)


class Task(NamedTuple):
    """What its runs need. A folder holds a start model, in FOLDER/model, and the task's data."""

    start: str  # the command that makes a {folder}
    flags: Callable[[Path], tuple[dict, dict]]  # folder -> flags of train.py and evaluate.py
    scene_of: Callable  # as scene_of_dots


BUILD_DOTS = f"experiments.start_model {SPEC},misread={{misread}} --out={{folder}}/model"
BUILD_DIGITS = "experiments.digits {folder} --misread={misread}"
TASKS = {
    "dots": Task(BUILD_DOTS, lambda folder: ({}, {}), scene_of_dots),  # a toy's model has its task
    "digits": Task(BUILD_DIGITS, digits.flags, digits.scene_of),
}
WORDS = (*toy.COLOURS, toy.NO_DOT, *digits.WORDS)  # what a cell may hold


def task_of(variant: str) -> str:
    """dots or digits, with the level of its start model: "digits_hard"."""
    task = variant.removeprefix("cost/").partition("/")[0]
    return task if task.partition("_")[0] in TASKS else "dots"


# ------------------------------------------------------------------------------------ the protocols

VARIANTS: dict[str, dict] = {}  # FOLDER/NAME -> flags
JOBS: dict[tuple[str, int], None] = {}  # (variant, seed), in order


def plan(folder: str, seeds: Iterable[int], variants: dict[str, dict]) -> None:
    """Add runs. FOLDER.jsonl holds their results; a variant without flags is its start model."""
    VARIANTS.update({f"{folder}/{name}": flags for name, flags in variants.items()})
    JOBS.update({(f"{folder}/{name}", seed): None for seed in seeds for name in variants})


# Flags of every run, unless its variant changes them, and of its evaluation.
TRAINING = {
    "steps": 30,
    "lr": 1e-4,
    "eval_every": 10,
    "eval_rows": 128,
    "save_every": 10,
    "keep": 1,
}
EVALUATION = {"n": 2, "eval_rows": 512, "protocol": "training", "rollout_batch": 256}

# The development seeds made the protocols' choices. The others are reported.
DEVELOPMENT_SEEDS, THREE_SEEDS, EIGHT_SEEDS = range(3), range(10, 13), range(10, 18)
NEW_SEEDS, CONFIRMING_SEEDS = range(20, 28), range(28, 36)

# The first protocol: the dots, 30 steps. Without "algo" a variant is papo_g with these flags.
TABLE1 = {name: {"algo": name} for name in ("grpo", "papo_g", "dapo", "papo_d")}
LARGE = {"kl_prcp_coef": 0.5, "mini_batch": 8, "lr": 2e-4, "steps": 40}  # invites a collapse
SINGLE = LARGE | {"entropy_coef": 1.25}  # 2.5 gamma, the paper's ratio at 7B
DOUBLE = SINGLE | {"masked_entropy_coef": 1.25}
COLLAPSING = {
    "large_no_kl_ref": LARGE | {"kl_ref_coef": 0.0},
    "large": LARGE,
    "large_kl_ref_0.1": LARGE | {"kl_ref_coef": 0.1},
    "large_single": SINGLE,
    "large_double_grad": DOUBLE | {"masked_grad": True},
}
plan("first", EIGHT_SEEDS, {"start": {}} | TABLE1)
plan("first", THREE_SEEDS, COLLAPSING | {"large_double": DOUBLE})
WITHOUT_KL_REF = {name: {"algo": name} for name in ("grpo_no_kl_ref", "papo_g_no_kl_ref")}
OTHER_GAMMAS = {f"gamma_{x}": {"kl_prcp_coef": x} for x in (0.1, 0.2, 0.5, 1.0)}
OTHER_MASKS = {f"mask_{x}": {"mask_ratio": x} for x in (0.4, 0.8, 1.0)}
OTHER_MASKS |= {f"mask_{x}": {"mask_strategy": x} for x in ("semantic", "noise")}
OTHER_KLS = {
    "estimator_paper": {"kl_prcp_estimator": "paper"},
    "masked_grad": {"masked_grad": True},
}
plan("first", THREE_SEEDS, OTHER_GAMMAS | OTHER_MASKS | WITHOUT_KL_REF | OTHER_KLS)

# The relatives as published. Who samples under two images takes half of the responses under each.
RELATIVES = TABLE1 | {name: {"algo": name} for name in ("vppo", "pgpo", "dvrp", "dyco_rl", "tor")}
RELATIVES |= {
    "noisy_rollout": {"algo": "noisy_rollout", "group_size": 4},
    "noisy_rollout_papo": {"algo": "noisy_rollout", "group_size": 4, "kl_prcp_coef": 0.02},
    "tapo": {"algo": "tapo", "group_size": 4},
}
NO_CURVE = {"eval_every": 0}
plan("variants", EIGHT_SEEDS, {name: flags | NO_CURVE for name, flags in RELATIVES.items()})
plan("compare", EIGHT_SEEDS, {"papo_g": NO_CURVE | {"kl_prcp_coef": 0.2}})

# The second protocol: two tasks, 60 steps, start models that misread a cell more or less often, and
# the choices of gamma and steps.
METHODS = {name: flags | {"steps": 60} for name, flags in TABLE1.items()}
METHODS |= {f"{name}_0.1": METHODS[name] | {"kl_prcp_coef": 0.1} for name in ("papo_g", "papo_d")}
GAMMAS = {
    f"papo_g_{gamma}": METHODS["papo_g"] | {"kl_prcp_coef": gamma}
    for gamma in (0.05, 0.1, 0.2, 0.5, 1.0)
}
SMALL_MASKS = METHODS["papo_g_0.1"] | {"mask_ratio": 0.17}  # as much as dots cover
MASKS = {"random_0.17": SMALL_MASKS, "semantic_0.17": SMALL_MASKS | {"mask_strategy": "semantic"}}
PAIR = {name: METHODS[name] for name in ("grpo", "papo_g_0.1")}
for _task in TASKS:
    plan(_task, NEW_SEEDS, {"start": {}} | METHODS)
    plan(_task, DEVELOPMENT_SEEDS, {"start": {}, "grpo_long": {"algo": "grpo", "steps": 100}})
    plan(_task, DEVELOPMENT_SEEDS, {name: GAMMAS[name] for name in [*GAMMAS][:3]})
    for _level in ("easy", "hard"):
        plan(f"{_task}_{_level}", NEW_SEEDS, {"start": {}} | PAIR)
plan("dots", NEW_SEEDS, GAMMAS | MASKS | COLLAPSING)
CONFIRMED = {"grpo": METHODS["grpo"], "semantic_0.17": MASKS["semantic_0.17"]}
plan("dots", CONFIRMING_SEEDS, CONFIRMED)

# The same two methods with all weights and with adapters.
ADAPTERS = {"lora_rank": 8, "lr": 1e-3}
WITH_ADAPTERS = {f"{name}_r8": flags | ADAPTERS for name, flags in CONFIRMED.items()}
plan("lora", EIGHT_SEEDS, CONFIRMED | WITH_ADAPTERS)

# What a step costs: the same runs, one at a time on an otherwise idle machine (--jobs 1).
TIMED = {f"{task}/{name}": METHODS[name] for task in TASKS for name in ("papo_g", *PAIR)}
plan("cost", NEW_SEEDS[:1], TIMED)
plan("cost", CONFIRMING_SEEDS[:1], {f"dots/{name}": flags for name, flags in CONFIRMED.items()})


# ------------------------------------------------------------------------------------------ results


def read_cells(response: str, count: int) -> list[str]:
    """The word that a response names for each of these cells, "" where it names none."""
    named = dict(re.findall(rf"\b([a-i][1-9])\s+({'|'.join(WORDS)})\b", response))
    grid = toy.Setting(grid=math.isqrt(count))
    return [named.get(name, "") for name in toy.cell_names(grid)]


def measure(task: Task, predictions: Path) -> dict:
    """Accuracy on a split, and how many wrong answers rest on a misread image: their cells, as the
    response names them, have another answer than the image's."""
    records = read_log(predictions)
    wrong, misread, shares = 0, 0, []
    for record in records:
        cells, answer = task.scene_of(predictions.stem, record["row"])
        read = read_cells(record["predict"], len(cells))
        shares.append(fmean(a == b for a, b in zip(cells, read, strict=True)))
        if not record["accuracy"]:
            wrong += 1
            misread += answer(read) != answer(cells)
    return {
        "accuracy": fmean(record["accuracy"] for record in records),
        "responses": len(records),
        "wrong": wrong,
        "misread": misread,
        "cells_right": fmean(shares),
    }


def append(file: Path, record: dict) -> None:
    """Add a line, in one write: others may do so at the same time."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with open(file, "ab", buffering=0) as results:
        results.write(json.dumps(record, separators=(",", ":")).encode() + b"\n")


def missing_of(folders: list[str], results: Path) -> list[tuple[str, int]]:
    """Planned runs of these folders without a result. One that other flags made does not count."""
    lines = [line for folder in folders for line in read_log(results / f"{folder}.jsonl")]
    found = [(line["variant"], line["seed"], line.get("flags")) for line in lines]
    jobs = [job for job in JOBS if job[0].partition("/")[0] in folders]
    return [(name, seed) for name, seed in jobs if (name, seed, flags_of(name)) not in found]


def flags_of(variant: str) -> dict:
    """What defines a variant's runs."""
    evaluation = {f"evaluation_{name}": value for name, value in EVALUATION.items()}
    return (VARIANTS[variant] and TRAINING | VARIANTS[variant]) | evaluation


# ------------------------------------------------------------------------------------------ one run


def build_start(task: str, seed: int) -> None:
    """Make the start model that all runs of a task and seed share, unless it exists."""
    folder = WORK / "start" / f"{task}-s{seed}"
    if (folder / "model" / WEIGHTS).exists():
        return
    name, _, level = task.partition("_")
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Split before the folder, which may have spaces, is put in.
    words = f"-m {TASKS[name].start} --seed={seed}".split()
    command = [word.format(folder=folder, misread=MISREAD[level or "middle"]) for word in words]
    run_python(command, folder.with_suffix(".log"), SAME_ON_EVERY_CPU)


def run(variant: str, seed: int, results: Path) -> None:
    """Train, evaluate, add the result. RuntimeError with the log's last line if a command fails.

    The folder's name has a hash of the flags and of the start model, so that what is continued
    began with the same ones.
    """
    task = task_of(variant)
    start, needs = WORK / "start" / f"{task}-s{seed}", TASKS[task.partition("_")[0]]
    for_training, for_evaluation = needs.flags(start)
    model = start / "model"
    record = {"variant": variant, "seed": seed, "flags": flags_of(variant)}
    record["start_model"] = hashlib.sha256((model / WEIGHTS).read_bytes()).hexdigest()
    began = hashlib.sha256(json.dumps(record).encode()).hexdigest()[:8]
    out = WORK / f"{variant}-s{seed}-{began}"
    out.mkdir(parents=True, exist_ok=True)
    origin = out / "machine.json"  # as it was when the run began
    if not origin.exists():
        origin.write_text(json.dumps(machine()))
    record |= json.loads(origin.read_text())
    if VARIANTS[variant]:
        model = train(variant, for_training | {"model": model, "seed": seed}, out)
        record |= training_record(out / "train")
    flags = {"model": model, "seed": seed, "out": out / "eval"} | for_evaluation | EVALUATION
    run_python(["evaluate.py", *words_of(flags)], out / "log.txt")
    record["final"] = {split: measure(needs, out / "eval" / f"{split}.jsonl") for split in SPLITS}
    append(results / f"{variant.partition('/')[0]}.jsonl", record)


def machine() -> dict:
    """Commit, library versions, CPU and threads. Rounding differs between kinds of CPU."""
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude=*"]
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text() if cpuinfo.exists() else ""
    facts = dict(re.findall(r"^(model name|cpu family|model)\s*: (.*)$", text, re.M))
    return {
        "commit": subprocess.run(git, capture_output=True, text=True).stdout.strip() or "unknown",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "processor": ", ".join(facts.values()) or platform.machine(),
        "threads": 1,
    }


def train(variant: str, given: dict, out: Path) -> Path:
    """The trained model; continues an interrupted run."""
    folder, model = out / "train", out / "train" / "model"
    flags = given | {"out": folder} | TRAINING | VARIANTS[variant]
    if (folder / "config.json").exists():
        flags = {"resume": folder}
    if not (model / WEIGHTS).exists():
        run_python(["train.py", *words_of(flags)], out / "log.txt")
    if not (model / WEIGHTS).exists():
        raise RuntimeError(f"training stopped early: run the same command to continue ({out})")
    return model


def words_of(flags: dict) -> list[str]:
    return [f"--{name}" if value is True else f"--{name}={value}" for name, value in flags.items()]


def run_python(words: list[str], log: Path, environment: dict | None = None) -> None:
    """Run Python on one thread, its output appended to `log`."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | (environment or {})
    with open(log, "a") as out:
        command = [sys.executable, *words]
        done = subprocess.run(command, stdout=out, stderr=out, env=environment, cwd=ROOT)
    if done.returncode:
        last_line = log.read_text(errors="replace").strip().rpartition("\n")[2]
        raise RuntimeError(f"{last_line} ({log})")


def training_record(out: Path) -> dict:
    """METRICS of every step, None where a step had nothing to train on, and the evaluations."""
    lines = read_log(out / "metrics.jsonl")
    steps = [line for line in lines if "reward" in line]
    record = {"curve": {}}
    for line in lines:
        if "reward" not in line:
            scores = {split: line[f"eval/{split}"] for split in SPLITS}
            record["curve"][str(line["step"])] = scores
    for name in METRICS:
        if any(name in step for step in steps):
            record[name] = [round(step[name], 5) if name in step else None for step in steps]
    return record


# ----------------------------------------------------------------------------------- command line


def plan_ideas(algos: list[str], seeds: int) -> dict[str, str]:
    """Plan runs of presets, variants or files; returns {algo: variant}.

    ValueError for an algo that does not load. A variant's name has a hash of its code, so that
    changed code runs again.
    """
    names = ("train", "papo", "losses", "masking", "rollout", "evaluate")
    shared = [ROOT / f"{name}.py" for name in names] + sorted((ROOT / "support").glob("*.py"))
    variants = {}
    for algo in algos:
        algo_class(algo)
        own = [path for path in (Path(algo), ROOT / f"variants/{algo}.py") if path.is_file()]
        code = b"".join(path.read_bytes() for path in shared + own)
        name = f"{Path(algo).stem}-{hashlib.sha256(code).hexdigest()[:8]}"
        flag = str(own[0].resolve()) if algo.endswith(".py") else algo
        plan("ideas", range(seeds), {name: NO_CURVE | {"algo": flag}})
        variants[algo] = f"ideas/{name}"
    return variants


def run_all(what: str, function: Callable, jobs: list[tuple], at_a_time: int) -> int:
    """Call function(*job) for every job, and print a line for each. Returns how many failed."""
    failures, start = 0, time.time()
    with ThreadPoolExecutor(at_a_time) as pool:
        pending = {pool.submit(function, *job): job for job in jobs}
        try:
            for number, done in enumerate(as_completed(pending), 1):
                name, seed, *_ = pending[done]
                error = done.exception()
                failures += error is not None
                outcome = f"failed: {error}" if error else "done"
                progress = f"{what} {number} of {len(jobs)}, {(time.time() - start) / 60:.0f} min"
                print(f"{progress}: {name} seed {seed} {outcome}", flush=True)
        except KeyboardInterrupt:  # the running commands got it too: they save and exit
            pool.shutdown(cancel_futures=True)
            sys.exit("interrupted: run the same command to continue")
    return failures


def main() -> None:
    parser = argparse.ArgumentParser(description="Run experiments at toy scale.")
    folders = dict.fromkeys(variant.partition("/")[0] for variant in VARIANTS)
    add = parser.add_argument
    add("names", nargs="+", help=f"all, {', '.join(folders)}; or presets, variants and FILE.py")
    add("--seeds", type=int, default=3, help="how many, of ideas; a protocol has its own")
    add("--jobs", type=int, default=2, help="runs at a time, one core each")
    add("--list", action="store_true", help="list the missing runs and stop")
    args = parser.parse_args()
    ideas = [name for name in args.names if name not in (*folders, "all")]
    if 0 < len(ideas) < len(args.names):
        parser.error(f"{ideas[0]} is no protocol's: give ideas or protocols, not both")
    with one_line_errors():
        variants = plan_ideas(ideas, args.seeds)
    results, chosen = (WORK, ["ideas"]) if ideas else (RESULTS, args.names)
    missing = missing_of([*folders] if "all" in chosen else chosen, results)
    print(f"{len(missing)} runs are missing", flush=True)
    if args.list:
        print("\n".join(f"{variant} seed {seed}" for variant, seed in missing))
        return
    starts = dict.fromkeys((task_of(variant), seed) for variant, seed in missing)
    run_all("start model", build_start, list(starts), args.jobs)
    failures = run_all("run", run, [(*job, results) for job in missing], args.jobs)
    if ideas:
        from experiments import report  # here, because it imports this file

        print(report.ideas_table(variants, results))
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
