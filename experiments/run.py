r"""The paper's experiments in the small: train, evaluate, and keep one JSON a run, on a CPU, an interruptible while.

    python -m experiments.run table1            one experiment: table1, gamma, masking, regularisation, no_kl_ref, ...
    python -m experiments.run all --jobs 2      every run that is still missing, two at a time, a core each
    python -m experiments.run table1 --list     what would be run

A run is one variant (flags of train.py) at one seed: `train.py`, then `evaluate.py` on the exported model, both as
anyone would call them. What counts is written to experiments/results/VARIANT-sSEED.json and never run again; a run cut
short goes on from its checkpoint in --work. report.py draws tables and figures from the JSON files alone. The protocol
(what is compared, by which test, with which seeds) is in README.md here and was committed before the seeds were run.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from support import toy

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
RESULTS = HERE / "results"


SPEC = "toy:grid=4,colours=4,most=6,warm_steps=400"
TRAINING = {
    "steps": 30,
    "lr": 1e-4,
    "eval_every": 10,
    "eval_rows": 128,
    "save_every": 10,
    "keep": 1,
}
EVALUATION = {"n": 2, "eval_rows": 512, "protocol": "training", "rollout_batch": 256}
KEPT = (
    "reward accuracy kl_prcp kl_ref entropy masked_entropy clip_frac grad_norm response_length rounds "
    "truncated seconds"
).split()  # metrics of each step that a result holds

ALGOS = ["grpo", "papo_g", "dapo", "papo_d", "grpo_no_kl_ref", "papo_g_no_kl_ref"]
VARIANTS: dict[str, dict] = {
    name: {"algo": name} for name in ["start", *ALGOS]
}  # name -> flags of train.py
# "start" is the model before any step. All that follow are papo_g with one thing changed.
VARIANTS |= {f"gamma_{gamma}": {"kl_prcp_coef": gamma} for gamma in (0.1, 0.2, 0.5, 1.0)}
VARIANTS |= {f"mask_{ratio}": {"mask_ratio": ratio} for ratio in (0.4, 0.8, 1.0)}
VARIANTS |= {f"mask_{strategy}": {"mask_strategy": strategy} for strategy in ("semantic", "noise")}
VARIANTS |= {
    "estimator_paper": {"kl_prcp_estimator": "paper"},
    "masked_grad": {"masked_grad": True},
}
# Regularisation, where gamma, step size and steps invite a collapse: two updates a step, so that the PPO clip is alive.
LARGE = {"kl_prcp_coef": 0.5, "mini_batch": 8, "lr": 2e-4, "steps": 40}
DOUBLE = {
    "entropy_coef": 1.25,
    "masked_entropy_coef": 1.25,
}  # 2.5 gamma, the ratio of the paper's papo_g 7B
VARIANTS |= {
    "large": LARGE, "large_no_kl_ref": LARGE | {"kl_ref_coef": 0.0}, "large_kl_ref_0.1": LARGE | {"kl_ref_coef": 0.1},
    "large_single": LARGE | {"entropy_coef": 1.25}, "large_double": LARGE | DOUBLE,
    "large_double_grad": LARGE | DOUBLE | {"masked_grad": True},
}  # fmt: skip
MANY, FEW = range(10, 18), range(10, 13)  # the reported seeds; 0 to 2 were used to find the setting
EXPERIMENTS: dict[str, tuple[list[str], range]] = {  # name -> variants, seeds
    "table1": (["start", "grpo", "papo_g", "dapo", "papo_d"], MANY),
    "gamma": (["grpo", "papo_g", "gamma_0.1", "gamma_0.2", "gamma_0.5", "gamma_1.0"], FEW),
    "regularisation": ([name for name in VARIANTS if name.startswith("large")], FEW),
    "no_kl_ref": (["grpo", "grpo_no_kl_ref", "papo_g", "papo_g_no_kl_ref"], FEW),
    "masking": (["papo_g", "mask_0.4", "mask_0.8", "mask_1.0", "mask_semantic", "mask_noise"], FEW),
    "estimator": (["papo_g", "estimator_paper", "masked_grad"], FEW),
}


def jobs_of(names: list[str], seeds: list[int] | None) -> list[tuple[str, int]]:
    """(variant, seed) of the experiments, each once: starts first, because they make the models, then seed by seed."""
    jobs = [
        (variant, seed)
        for name in names
        for seed in EXPERIMENTS[name][1]
        for variant in EXPERIMENTS[name][0]
    ]
    jobs = [job for job in dict.fromkeys(jobs) if seeds is None or job[1] in seeds]
    return sorted(jobs, key=lambda job: job[0] != "start")


def result_file(variant: str, seed: int) -> Path:
    return RESULTS / f"{variant}-s{seed}.json"


def call(words: list[str], flags: dict, log: Path) -> None:
    """Run Python on one thread with words and flags, its output appended to `log`; RuntimeError with its last line."""
    words = [sys.executable, *words]
    for name, value in flags.items():
        words += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    with open(log, "a") as out:
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        code = subprocess.run(words, stdout=out, stderr=out, env=environment, cwd=ROOT).returncode
    if code:
        last = log.read_text(errors="replace").strip().splitlines()[-1]
        raise RuntimeError(f"{words[1]} ended with {code}: {last} ({log})")


def run(variant: str, seed: int, work: Path) -> Path:
    """One run from start to JSON; goes on where an earlier one was cut short."""
    folder, log = work / f"{variant}-s{seed}", work / f"{variant}-s{seed}.log"
    model = folder / "model"
    if variant == "start":
        make = f"from support import toy; toy.build({seed}, setting=toy.setting_of({SPEC!r}))"
        call(
            ["-c", make], {}, log
        )  # on one thread: their number decides the last digits of the weights
        model = toy.build(seed, setting=toy.setting_of(SPEC))
    if variant != "start" and not (model / "model.safetensors").exists():
        whole = folder / "config.json"
        flags = (
            {"resume": folder} if whole.exists() else {"model": SPEC, "seed": seed, "out": folder}
        )
        flags |= {} if whole.exists() else TRAINING | VARIANTS[variant]
        call(["train.py"], flags, log)
    if not (model / "model.safetensors").exists():
        raise RuntimeError(f"stopped before its end: the same command goes on ({log})")
    out = work / f"{variant}-s{seed}-eval"
    call(
        ["evaluate.py"], {"model": model, "data": SPEC, "seed": seed, "out": out} | EVALUATION, log
    )
    result = {
        "variant": variant,
        "seed": seed,
        "commit": commit(),
        "spec": SPEC,
        "evaluation": EVALUATION,
    }
    if variant != "start":
        result |= history(folder)
    result["final"] = {
        name: measure(out / f"{name}.jsonl") for name in ("general", "vision_dependent")
    }
    half = result_file(variant, seed).with_suffix(".half")
    half.write_text(json.dumps(result) + "\n")
    os.replace(half, result_file(variant, seed))
    return result_file(variant, seed)


def commit() -> str:
    words = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude=*"]
    return subprocess.run(words, capture_output=True, text=True).stdout.strip() or "unknown"


def history(folder: Path) -> dict:
    """Config, kept metrics of every step, and the evaluations on the way."""
    lines = [json.loads(text) for text in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "reward" in line]
    evals = {
        line["step"]: {k[5:]: v for k, v in line.items() if k != "step"}
        for line in lines
        if "reward" not in line
    }
    metrics = {name: [round(line[name], 5) for line in steps] for name in KEPT if name in steps[0]}
    return {
        "config": json.loads((folder / "config.json").read_text()),
        "metrics": metrics,
        "curve": evals,
    }


def measure(predictions: Path) -> dict:
    """Accuracy of a file of predictions, and what went wrong: see `misread`."""
    records = [json.loads(text) for text in predictions.read_text().splitlines()]
    split, setting = predictions.stem, toy.setting_of(SPEC)
    wrong = [record for record in records if not record["accuracy"]]
    kinds = [misread(record["predict"], split, record["row"], setting) for record in wrong]
    cells = [cells_right(record["predict"], split, record["row"], setting) for record in records]
    return {
        "accuracy": sum(r["accuracy"] for r in records) / len(records), "responses": len(records),
        "wrong": len(wrong), "misread": sum(kinds), "cells_right": sum(cells) / len(cells),
        "unboxed": sum(r["unboxed"] for r in records) / len(records),
    }  # fmt: skip


def read_cells(response: str, setting: toy.Setting) -> list[str]:
    """The colour a response names for each cell, "" where it names none."""
    words = "|".join([*toy.COLOURS, "none"])
    found = dict(re.findall(rf"\b([a-i][1-9])\s+({words})\b", response))
    return [found.get(name, "") for name in toy.cell_names(setting)]


def misread(response: str, split: str, row: int, setting: toy.Setting) -> bool:
    """Whether the reading is at fault: it holds another number of dots of the asked colour than the picture."""
    cells, asked, _, _ = toy.layout(split, row, setting=setting)
    return read_cells(response, setting).count(asked) != cells.count(asked)


def cells_right(response: str, split: str, row: int, setting: toy.Setting) -> float:
    cells, *_ = toy.layout(split, row, setting=setting)
    return sum(a == b for a, b in zip(read_cells(response, setting), cells, strict=True)) / len(
        cells
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="The paper's experiments in the small.")
    parser.add_argument("names", nargs="+", help=f"{', '.join(EXPERIMENTS)}, all")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one core each")
    parser.add_argument("--seeds", type=int, nargs="+", help="only these of an experiment's seeds")
    parser.add_argument(
        "--work", type=Path, default=ROOT / "runs" / "experiments", help="folder of unfinished runs"
    )
    parser.add_argument("--list", action="store_true", help="say what is missing, and stop")
    args = parser.parse_args()
    names = list(EXPERIMENTS) if args.names == ["all"] else args.names
    if unknown := [name for name in names if name not in EXPERIMENTS]:
        parser.error(f"{' '.join(unknown)}: choose from {', '.join(EXPERIMENTS)}, all")
    everything = jobs_of(names, args.seeds)
    missing = [job for job in everything if not result_file(*job).exists()]
    print(f"{len(everything)} runs, {len(missing)} missing")
    if args.list:
        return print("\n".join(f"{variant} seed {seed}" for variant, seed in missing))
    args.work = args.work.resolve()
    args.work.mkdir(parents=True, exist_ok=True)
    failed, start = 0, time.time()
    with ThreadPoolExecutor(args.jobs) as pool:
        todo = {pool.submit(run, *job, args.work): job for job in missing}
        try:
            for number, done in enumerate(as_completed(todo), 1):
                error = done.exception()
                failed += error is not None
                told = f"{todo[done]}: {error}" if error else done.result().name
                print(
                    f"{number}/{len(missing)} after {(time.time() - start) / 60:.0f} min: {told}",
                    flush=True,
                )
        except KeyboardInterrupt:  # the runs at work have had it too: they save and end
            pool.shutdown(cancel_futures=True)
            sys.exit("stopped: the same command goes on")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
