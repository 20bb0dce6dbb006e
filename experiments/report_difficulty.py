"""The part of the report on difficulty: PAPO's gain by how much perception limits the start."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from experiments.measures import (
    READING,
    Results,
    accuracy,
    complete,
    corrected_table,
    delta_rel,
    interval,
    markdown,
    reading_cells,
)
from experiments.protocol import MISREAD, NEW_SEEDS, TASKS, TRAINING
from experiments.report_tasks import (
    PRIMARY,
    QUESTIONS,
    curve_gain,
    gains,
    last_gain,
    last_steps_table,
)
from support import plots

LEVELS = ("easy", "middle", "hard")
PAIRS = [
    (f"{task}_{level}/{PRIMARY}", f"{task}_{level}/grpo") for task in TASKS for level in MISREAD
]


def name_at(task: str, level: str) -> str:
    """The task with start models of a level; "middle" is the task itself."""
    return task if level == "middle" else f"{task}_{level}"


def level_table(found: Results, task: str) -> str:
    """How well the start model of each level reads, and what PAPO gains on GRPO from there."""
    header = ["", "start: overall", *READING, "grpo at the end"]
    rows = [[*header, *(f"{name}, minus grpo" for name in QUESTIONS), "Delta_rel %"]]
    for level in LEVELS:
        name = name_at(task, level)
        starts = found[f"{name}/start"].values()
        ends = [accuracy(run) for run in found[f"{name}/grpo"].values()]
        cells = [interval([accuracy(run) for run in starts]), *reading_cells(starts)]
        cells.append(interval(ends))
        for gain in (*QUESTIONS.values(), delta_rel):
            cells.append(interval(gains(found, name, PRIMARY, gain), sign=True))
        rows.append([f"{task}, {level}", *cells])
    return markdown(rows)


def trends(found: Results, task: str, gain: Callable) -> list[float]:
    """The gain from the hard start model minus the gain from the easy one, seed by seed."""
    easy = gains(found, name_at(task, "easy"), PRIMARY, gain)
    hard = gains(found, name_at(task, "hard"), PRIMARY, gain)
    return np.subtract(hard, easy).tolist()


def trend_table(found: Results) -> str:
    """Whether the gain grows with difficulty, over the seeds of both tasks."""
    both_tasks = {
        question: [value for task in TASKS for value in trends(found, task, gain)]
        for question, gain in QUESTIONS.items()
    }
    return corrected_table("gain from hard minus gain from easy", both_tasks)


def task_trend_table(found: Results) -> str:
    """The trends of each task by itself."""
    rows = [["gain from hard minus gain from easy", *TASKS]]
    for question, gain in QUESTIONS.items():
        cells = [interval(trends(found, task, gain), sign=True) for task in TASKS]
        rows.append([question, *cells])
    return markdown(rows)


def leads_table(found: Results) -> str:
    """How far PAPO is ahead of GRPO at each evaluation during training, and the last change."""
    leads = {
        f"{task}, {level}": gains(found, name_at(task, level), PRIMARY, curve_gain)
        for task, level in product(TASKS, LEVELS)
    }
    steps = [step for step in next(iter(leads.values()))[0] if step > 0]
    change = f"change in the last {2 * TRAINING['eval_every']} steps"
    rows = [[f"{PRIMARY} minus grpo after step", *(str(step) for step in steps), change]]
    for name, curves in leads.items():
        columns = [[curve[step] for curve in curves] for step in steps]
        columns.append([last_gain(curve, evaluations=2) for curve in curves])
        rows.append([name, *(interval(column, sign=True) for column in columns)])
    return markdown(rows)


def figure(found: Results, figures: Path) -> str:
    """The gain at each level against the share of cells that the start models read right."""
    drawn = Figure(figsize=(10, 6.4), layout="constrained")
    grid = drawn.subplots(len(TASKS), len(QUESTIONS))
    for axes, task in zip(grid, TASKS, strict=True):
        shares = [share_read(found, name_at(task, level)) for level in LEVELS]
        for ax, (question, gain) in zip(axes, QUESTIONS.items(), strict=True):
            by_level = [gains(found, name_at(task, level), PRIMARY, gain) for level in LEVELS]
            ax.set_title(f"{task}, {question}: {PRIMARY} minus grpo, points", fontsize=9.5)
            draw_gains(ax, shares, by_level)
    for ax in grid[-1]:
        ax.set_xlabel("cells that the start models read right", fontsize=8)
    drawn.legend(*ax.get_legend_handles_labels(), loc="outside right center", fontsize=8)
    drawn.savefig(figures / "difficulty.png", dpi=110)
    return "![gain by difficulty](figures/difficulty.png)"


def draw_gains(ax, shares: list[float], by_level: list[list[float]]) -> None:
    """A line per seed; mean and 95% interval in black."""
    ax.axhline(0, color="black", linewidth=0.8)
    for seed, of_seed in zip(NEW_SEEDS, zip(*by_level, strict=True), strict=True):
        ax.plot(shares, of_seed, linewidth=0.9, alpha=0.8, label=f"seed {seed}")
    for share, values in zip(shares, by_level, strict=True):
        mean, half = plots.mean_interval(values)
        ax.errorbar(share, mean, half, fmt="o", color="black", capsize=4)
    ticks = [f"{level}\n{share:.0f}%" for level, share in zip(LEVELS, shares, strict=True)]
    ax.set_xticks(shares, ticks)
    ax.invert_xaxis()  # harder to the right
    ax.grid(alpha=0.3)


def share_read(found: Results, name: str) -> float:
    """Share of cells that the start models read right in %, mean over seeds and splits."""
    starts = found[f"{name}/start"].values()
    shares = [split["cells_right"] for run in starts for split in run["final"].values()]
    return 100 * float(np.mean(shares))


def sections(everything: Results, figures: Path) -> list[str]:
    """Nothing is reported until all runs are complete."""
    found = complete(everything, NEW_SEEDS)
    names = [name_at(task, level) for task in TASKS for level in LEVELS]
    needed = {f"{name}/{method}" for name in names for method in ("start", "grpo", PRIMARY)}
    if not needed <= found.keys():
        return ["## difficulty", "(not complete)"]
    return [
        "## difficulty",
        trend_table(found),
        task_trend_table(found),
        *(level_table(found, task) for task in TASKS),
        last_steps_table(found, [f"{name}/grpo" for name in names]),
        leads_table(found),
        figure(found, figures),
    ]
