"""The part of the report on both tasks: how far the methods get, how fast, and at what cost."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import fmean

from experiments import report_cost
from experiments.measures import (
    READING,
    Results,
    accuracy,
    accuracy_over_training,
    at_seeds,
    complete,
    holm,
    interval,
    markdown,
    overall_curve,
    paired,
    reading_cells,
    sign_flip_p,
)
from experiments.protocol import COMPARED, DEVELOPMENT_SEEDS, GAMMA, GAMMAS, NEW_SEEDS, TASKS
from experiments.tasks import SPLITS
from support import plots

BASELINES = {
    "papo_g": "grpo",
    f"papo_g_{GAMMA}": "grpo",
    "papo_d": "dapo",
    f"papo_d_{GAMMA}": "dapo",
}
PRIMARY = f"papo_g_{GAMMA}"
QUESTIONS = {"how far": accuracy, "how fast": accuracy_over_training}


def gains(found: Results, task: str, method: str, measure: Callable) -> list[float]:
    """The differences to the method's baseline, seed by seed; none unless both are complete."""

    def gain(result: dict, base: dict) -> float:
        if result["start_model"] != base["start_model"]:
            raise ValueError(f"{task}/{method}: two start models at seed {result['seed']}")
        return measure(result) - measure(base)

    return paired(found, f"{task}/{method}", f"{task}/{BASELINES[method]}", gain)


def primary_table(found: Results) -> str:
    """The two primary comparisons, over the seeds of both tasks; p as is and corrected by Holm."""
    rows, ps = [], []
    for question, measure in QUESTIONS.items():
        of_tasks = [gains(found, task, PRIMARY, measure) for task in TASKS]
        if not all(of_tasks):
            return "(not complete)"
        values = [value for of_task in of_tasks for value in of_task]
        ahead = sum(value > 0 for value in values)
        rows.append([question, interval(values, sign=True), f"{ahead} of {len(values)}"])
        ps.append(sign_flip_p(values))
    for row, p, corrected in zip(rows, ps, holm(ps), strict=True):
        row += [f"{p:.4f}", f"{corrected:.4f}"]
    return markdown([["", f"{PRIMARY} minus grpo", "pairs ahead", "p", "corrected p"], *rows])


def task_table(found: Results, task: str) -> str:
    """Every method of one task: accuracy at the end, then the mean over training."""
    header = ["", "seeds", "overall", *SPLITS, "minus baseline", "p"]
    rows = [[*header, "mean over training", "minus baseline", "p"]]
    for method in ["start", *COMPARED]:
        runs = list(found.get(f"{task}/{method}", {}).values())
        if not runs:
            continue
        far = [interval([accuracy(run, split) for run in runs]) for split in ("overall", *SPLITS)]
        fast = [accuracy_over_training(run) for run in runs if "curve" in run]
        row = [method, str(len(runs)), *far, *difference_cells(found, task, method, accuracy)]
        row += [interval(fast), *difference_cells(found, task, method, accuracy_over_training)]
        rows.append(row)
    return markdown(rows)


def difference_cells(found: Results, task: str, method: str, measure: Callable) -> list[str]:
    """The paired difference to the method's baseline and its p; blank where there is none."""
    values = gains(found, task, method, measure) if method in BASELINES else []
    if not values:
        return ["", ""]
    return [interval(values, sign=True), f"{sign_flip_p(values):.3f}"]


def reading_table(found: Results, task: str, methods: Iterable[str]) -> str:
    """Errors by split, and how many of them rest on a misread image."""
    rows = [["", "split", *READING]]
    for method in methods:
        runs = list(found.get(f"{task}/{method}", {}).values())
        for split in SPLITS:
            if runs:
                rows.append([method, split, *reading_cells(runs, (split,))])
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
    """Overall accuracy over the steps of both tasks."""
    panels = {}
    for task in TASKS:
        lines = {}
        for method in COMPARED:
            runs = found.get(f"{task}/{method}", {}).values()
            lines[method] = [overall_curve(run) for run in runs]
        panels[f"{task}: overall accuracy in %"] = lines
    if not any(lines for of_task in panels.values() for lines in of_task.values()):
        return ""
    heading = "mean over the seeds; band: 95% interval"
    plots.draw(panels, heading, figures / "both_tasks.png", shared_legend=True)
    return "![accuracy over the steps of both tasks](figures/both_tasks.png)"


def sections(found: Results, costs: dict, figures: Path) -> list[str]:
    """Methods whose seeds are not complete are left out. costs: see report_cost.spent."""
    reported = complete(found, NEW_SEEDS)
    development = at_seeds(found, DEVELOPMENT_SEEDS)
    parts = ["## both tasks", primary_table(reported), curves_figure(reported, figures)]
    for task in TASKS:
        pairs = {f"{task}/{method}": f"{task}/{base}" for method, base in BASELINES.items()}
        parts += [f"## {task}", task_table(reported, task)]
        parts += [reading_table(reported, task, ["start", *COMPARED])]
        parts += [f"## {task}: at equal cost", report_cost.pay_table(reported, costs, pairs)]
    parts += [report_cost.pay_figure(reported, costs, COMPARED, figures)]
    parts += ["## choices on the development seeds"]
    parts += [reading_table(development, task, ["start"]) for task in TASKS]
    parts += [steps_table(development), gamma_table(development)]
    return parts
