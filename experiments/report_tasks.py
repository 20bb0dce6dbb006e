"""The part of the report on both tasks: how far the methods get, how fast, and at what cost."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from statistics import fmean

import numpy as np
from matplotlib.figure import Figure

from experiments import report_cost
from experiments.measures import (
    MISREAD_CHANGE,
    READING,
    Results,
    accuracy,
    accuracy_gain,
    accuracy_over_training,
    at_seeds,
    complete,
    corrected_table,
    delta_rel,
    gain_over_training,
    interval,
    markdown,
    misread_change,
    overall_curve,
    paired,
    reading_cells,
    sign_flip_p,
)
from experiments.protocol import (
    COMPARED,
    DEVELOPMENT_SEEDS,
    GAMMA,
    GAMMAS,
    NEW_SEEDS,
    TASKS,
    TRAINING,
)
from experiments.tasks import SPLITS
from support import plots

BASELINES = {
    "papo_g": "grpo",
    f"papo_g_{GAMMA}": "grpo",
    "papo_d": "dapo",
    f"papo_d_{GAMMA}": "dapo",
}
PRIMARY = f"papo_g_{GAMMA}"
QUESTIONS = {"how far": accuracy_gain, "how fast": gain_over_training}


def gains(found: Results, task: str, method: str, gain: Callable) -> list[float]:
    """gain(result, baseline's result) at each seed."""
    return paired(found, f"{task}/{method}", f"{task}/{BASELINES[method]}", gain)


def primary_table(found: Results) -> str:
    """The two primary comparisons, over the seeds of both tasks; p as is and corrected by Holm."""
    all_gains = {}
    for question, gain in QUESTIONS.items():
        of_tasks = [gains(found, task, PRIMARY, gain) for task in TASKS]
        if not all(of_tasks):
            return "(not complete)"
        all_gains[question] = [value for of_task in of_tasks for value in of_task]
    return corrected_table(f"{PRIMARY} minus grpo", all_gains)


def task_table(found: Results, task: str) -> str:
    """Every method of one task: accuracy at the end, then the mean over training."""
    header = ["", "seeds", "overall", *SPLITS, "difference", "p", "Delta_rel %"]
    rows = [[*header, "mean over training", "difference", "p"]]
    for method in ["start", *COMPARED]:
        runs = list(found.get(f"{task}/{method}", {}).values())
        if not runs:
            continue
        far = [interval([accuracy(run, split) for run in runs]) for split in ("overall", *SPLITS)]
        fast = [accuracy_over_training(run) for run in runs if "curve" in run]
        row = [method, str(len(runs)), *far, *difference_cells(found, task, method, accuracy_gain)]
        relative = paired(found, f"{task}/{method}", f"{task}/{BASELINES.get(method)}", delta_rel)
        row += [
            interval(relative, sign=True) if relative else "",
            interval(fast),
            *difference_cells(found, task, method, gain_over_training),
        ]
        rows.append(row)
    return markdown(rows)


def difference_cells(found: Results, task: str, method: str, gain: Callable) -> list[str]:
    """The paired difference to the method's baseline and its p; blank where there is none."""
    values = gains(found, task, method, gain) if method in BASELINES else []
    if not values:
        return ["", ""]
    return [interval(values, sign=True), f"{sign_flip_p(values):.3f}"]


def reading_table(found: Results, task: str, methods: Iterable[str]) -> str:
    """Errors by split, and how many of them rest on a misread image."""
    rows = [["", "split", *READING, MISREAD_CHANGE]]
    for method in methods:
        runs = list(found.get(f"{task}/{method}", {}).values())
        for split in SPLITS:
            if runs:
                cells = reading_cells(runs, (split,))
                change = partial(misread_change, splits=(split,))
                base = f"{task}/{BASELINES.get(method)}"
                changes = paired(found, f"{task}/{method}", base, change)
                cells.append(interval(changes, sign=True) if changes else "")
                rows.append([method, split, *cells])
    return markdown(rows)


def last_steps_table(found: Results, variants: Iterable[str]) -> str:
    """How much accuracy the variants still gain at the end; those not complete are left out."""
    every = TRAINING["eval_every"]
    rows = [["", f"gain in the last {2 * every} steps", f"gain in the last {every} steps"]]
    for variant in variants:
        if variant in found:
            curves = [overall_curve(run) for run in found[variant].values()]
            gained = [[last_gain(curve, n) for curve in curves] for n in (2, 1)]
            rows.append([variant, *(interval(of_seeds, sign=True) for of_seeds in gained)])
    return markdown(rows)


def last_gain(curve: dict[int, float], evaluations: int) -> float:
    """What a curve {step: value} gains over its last evaluations."""
    values = list(curve.values())
    return values[-1] - values[-1 - evaluations]


def split_table(found: Results, task: str) -> str:
    """The difference to the baseline at the end, split by split, and at how many seeds it is larger
    where the note is never right."""
    rows = [["", *SPLITS, "larger on vision_dependent"]]
    for method in BASELINES:
        of_splits = [
            gains(found, task, method, partial(accuracy_gain, split=split)) for split in SPLITS
        ]
        if all(of_splits):
            on_general, on_vision = of_splits
            larger = sum(np.greater(on_vision, on_general))
            cells = [interval(of_split, sign=True) for of_split in of_splits]
            rows.append([method, *cells, f"{larger} of {len(of_splits[0])}"])
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
        of_tasks = [found.get(f"{task}/papo_g_{gamma}", {}) for task in TASKS]
        if all(len(runs) == len(DEVELOPMENT_SEEDS) for runs in of_tasks):
            means = [fmean(accuracy(run) for run in runs.values()) for runs in of_tasks]
            rows.append([str(gamma), *(f"{mean:.1f}" for mean in (*means, fmean(means)))])
    return markdown(rows)


def curves_figure(found: Results, figures: Path) -> str:
    """Overall accuracy over the steps, and the paired difference to each baseline; a row per task.

    The differences need a panel of their own: seeds differ more than methods.
    """
    shown = [task for task in TASKS if f"{task}/{COMPARED[0]}" in found]
    if not shown:
        return ""
    figure = Figure(figsize=(12, 3.4 * len(shown)), layout="constrained")
    rows = figure.subplots(len(shown), 3, squeeze=False)
    for task, axes in zip(shown, rows, strict=True):
        axes[0].set_title(f"{task}: overall accuracy in %, mean", fontsize=9.5)
        for method in COMPARED:
            curves = [overall_curve(run) for run in found.get(f"{task}/{method}", {}).values()]
            draw_mean(axes[0], curves, method, with_interval=False)
        for base, ax in zip(("grpo", "dapo"), axes[1:], strict=True):
            ax.set_title(f"{task}: minus {base}, points; mean and 95% interval", fontsize=9.5)
            ax.axhline(0, color="black", linewidth=0.8)
            for method, its_base in BASELINES.items():
                if its_base == base:
                    curves = paired(found, f"{task}/{method}", f"{task}/{base}", curve_gain)
                    draw_mean(ax, curves, method, with_interval=True)
            ax.set_visible(len(ax.lines) > 1)
        for ax in axes:
            ax.set_xlabel("step", fontsize=8)
            ax.grid(alpha=0.3)
    handles = {}
    for ax in rows[:, 0]:
        handles |= {line.get_label(): line for line in ax.lines}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=len(COMPARED))
    figure.savefig(figures / "both_tasks.png", dpi=110)
    return "![accuracy over the steps of both tasks](figures/both_tasks.png)"


def curve_gain(result: dict, base: dict) -> dict[int, float]:
    """Step -> difference in overall accuracy."""
    base_curve = overall_curve(base)
    return {step: score - base_curve[step] for step, score in overall_curve(result).items()}


def draw_mean(ax, curves: list[dict[int, float]], method: str, with_interval: bool) -> None:
    """The mean over seeds of curves {step: value}, and its 95% interval."""
    if not curves:
        return
    steps = list(curves[0])
    intervals = [plots.mean_interval([curve[step] for curve in curves]) for step in steps]
    means, halves = np.transpose(intervals)
    colour = f"C{COMPARED.index(method)}"
    ax.plot(steps, means, ".-", color=colour, label=method)
    if with_interval:
        ax.fill_between(steps, means - halves, means + halves, color=colour, alpha=0.15)


def sections(found: Results, costs: dict, figures: Path) -> list[str]:
    """Methods whose seeds are not complete are left out. costs: see report_cost.spent."""
    reported = complete(found, NEW_SEEDS)
    development = at_seeds(found, DEVELOPMENT_SEEDS)
    parts = ["## both tasks", primary_table(reported), curves_figure(reported, figures)]
    baselines = [f"{task}/{method}" for task in TASKS for method in ("grpo", "dapo")]
    parts += [last_steps_table(reported, baselines)]
    for task in TASKS:
        pairs = {f"{task}/{method}": f"{task}/{base}" for method, base in BASELINES.items()}
        parts += [f"## {task}", task_table(reported, task)]
        parts += [split_table(reported, task), reading_table(reported, task, ["start", *COMPARED])]
        parts += [f"## {task}: at equal cost", report_cost.pay_table(reported, costs, pairs)]
    parts += [report_cost.pay_figure(reported, costs, COMPARED, figures)]
    parts += ["## choices on the development seeds"]
    parts += [reading_table(development, task, ["start"]) for task in TASKS]
    parts += [steps_table(development), gamma_table(development)]
    return parts
