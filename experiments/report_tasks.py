"""The part of the report on both tasks: how far the methods get, and how fast."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from statistics import fmean

from experiments.measures import (
    Results,
    accuracy,
    accuracy_over_training,
    count,
    interval,
    markdown,
    paired,
    sign_flip_p,
)
from experiments.protocol import COMPARED, DEVELOPMENT_SEEDS, GAMMAS, TASKS
from experiments.tasks import SPLITS
from support import plots


def baseline_of(method: str) -> str | None:
    if not method.startswith("papo"):
        return None
    return "dapo" if method.startswith("papo_d") else "grpo"


def overall_curve(run: dict) -> dict[int, float]:
    """Step -> mean accuracy of both splits in %."""
    return {int(step): 100 * fmean(scores.values()) for step, scores in run["curve"].items()}


def gain(measure: Callable[[dict], float]) -> Callable[[dict, dict], float]:
    return lambda result, base: measure(result) - measure(base)


def difference_cells(found: Results, task: str, method: str, measure: Callable) -> list[str]:
    """The paired difference to the method's baseline and its p; blank for a baseline."""
    base = baseline_of(method)
    gains = paired(found, f"{task}/{method}", f"{task}/{base}", gain(measure))
    if len(gains) < 2:
        return ["", ""]
    return [interval(gains, sign=True), f"{sign_flip_p(gains):.3f}"]


def task_table(found: Results, task: str) -> str:
    """Every method of one task: accuracy at the end, then the mean over training."""
    header = ["", "seeds", "overall", *SPLITS, "minus baseline", "p"]
    rows = [[*header, "mean over training", "minus baseline", "p"]]
    for method in COMPARED:
        runs = list(found.get(f"{task}/{method}", {}).values())
        if not runs:
            continue
        far = [accuracy(run) for run in runs]
        by_split = [interval([accuracy(run, split) for run in runs]) for split in SPLITS]
        fast = [accuracy_over_training(run) for run in runs if "curve" in run]
        row = [method, str(len(runs)), interval(far), *by_split]
        row += difference_cells(found, task, method, accuracy)
        row.append(interval(fast))
        row += difference_cells(found, task, method, accuracy_over_training)
        rows.append(row)
    return markdown(rows)


def reading_table(found: Results, task: str) -> str:
    """The start model's errors: perception must limit it, not the shortcut."""
    rows = [["", "seeds", "cells read right %", "wrong %", "of these misread %"]]
    for method in COMPARED:
        runs = list(found.get(f"{task}/{method}", {}).values())
        if not runs:
            continue
        cells = [100 * count(run, "cells_right") / len(SPLITS) for run in runs]
        wrong = [100 * count(run, "wrong") / count(run, "responses") for run in runs]
        misread = [100 * count(run, "misread") / max(count(run, "wrong"), 1) for run in runs]
        row = [method, str(len(runs)), interval(cells), interval(wrong), interval(misread)]
        rows.append(row)
    return markdown(rows)


def steps_table(found: Results) -> str:
    """GRPO's overall accuracy over 100 steps, the mean of the development seeds."""
    rows = []
    for task in TASKS:
        runs = list(found.get(f"{task}/grpo_long", {}).values())
        if not runs:
            continue
        curves = [overall_curve(run) for run in runs]
        shown = [step for step in curves[0] if step % 20 == 0]
        if not rows:
            rows.append(["after step", *(str(step) for step in shown)])
        rows.append([task, *(f"{fmean(curve[step] for curve in curves):.1f}" for step in shown)])
    return markdown(rows)


def gamma_table(found: Results) -> str:
    """Overall accuracy at the end by gamma: mean of the development seeds, then of both tasks."""
    rows = [["gamma", *TASKS, "both"]]
    for gamma in GAMMAS:
        means = []
        for task in TASKS:
            runs = found.get(f"{task}/papo_g_{gamma}", {})
            chose = [accuracy(runs[seed]) for seed in DEVELOPMENT_SEEDS if seed in runs]
            if len(chose) == len(DEVELOPMENT_SEEDS):
                means.append(fmean(chose))
        if len(means) == len(TASKS):
            rows.append([str(gamma), *(f"{mean:.1f}" for mean in (*means, fmean(means)))])
    return markdown(rows)


def curves_figure(found: Results, figures: Path) -> str:
    """Overall accuracy over the steps of both tasks."""
    panels = {}
    for task in TASKS:
        lines = {}
        for method in COMPARED[1:]:
            runs = found.get(f"{task}/{method}", {}).values()
            lines[method] = [overall_curve(run) for run in runs]
        panels[f"{task}: overall accuracy in %"] = lines
    if not any(lines for of_task in panels.values() for lines in of_task.values()):
        return ""
    heading = "mean over the seeds; band: 95% interval"
    plots.draw(panels, heading, figures / "both_tasks.png", shared_legend=True)
    return "![accuracy over the steps of both tasks](figures/both_tasks.png)"


def sections(found: Results, figures: Path) -> list[str]:
    parts = []
    for task in TASKS:
        parts += [f"## {task}", task_table(found, task), reading_table(found, task)]
    parts += [curves_figure(found, figures)]
    parts += ["## choice of the number of steps", steps_table(found)]
    parts += ["## choice of gamma", gamma_table(found)]
    return parts
