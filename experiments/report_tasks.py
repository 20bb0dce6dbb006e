"""The part of the report on both tasks: how far the methods get, and how fast."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from statistics import fmean

from experiments import report_cost
from experiments.measures import (
    READING,
    Results,
    accuracy,
    accuracy_over_training,
    interval,
    markdown,
    overall_curve,
    paired,
    reading_cells,
    sign_flip_p,
)
from experiments.protocol import COMPARED, DEVELOPMENT_SEEDS, GAMMAS, TASKS
from experiments.tasks import SPLITS
from support import plots


def baseline_of(method: str) -> str | None:
    if not method.startswith("papo"):
        return None
    return "dapo" if method.startswith("papo_d") else "grpo"


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
    """Errors of the start model and of every method: reading must limit the start model."""
    rows = [["", *READING]]
    for method in COMPARED:
        runs = found.get(f"{task}/{method}", {}).values()
        if runs:
            rows.append([method, *reading_cells(runs)])
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


def cost_sections(found: Results, figures: Path) -> list[str]:
    """What PAPO gains over its baseline when both have spent the same."""
    parts = []
    for task in TASKS:
        pairs = [
            (f"{task}/{method}", f"{task}/{baseline_of(method)}")
            for method in COMPARED
            if baseline_of(method)
        ]
        parts += [f"## {task}: at equal cost", report_cost.pay_table(found, pairs)]
    return [*parts, report_cost.pay_figure(found, COMPARED[1:], figures)]


def sections(found: Results, figures: Path) -> list[str]:
    parts = []
    for task in TASKS:
        parts += [f"## {task}", task_table(found, task), reading_table(found, task)]
    parts += [curves_figure(found, figures), *cost_sections(found, figures)]
    parts += ["## choice of the number of steps", steps_table(found)]
    parts += ["## choice of gamma", gamma_table(found)]
    return parts
