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
    delta_rel,
    holm,
    interval,
    markdown,
    paired,
    reading_cells,
    sign_flip_p,
)
from experiments.protocol import MISREAD, NEW_SEEDS, TASKS
from experiments.report_tasks import PRIMARY, QUESTIONS, curve_gain, gains, last_steps_table
from support import metrics

LEVELS = ("easy", "middle", "hard")
PAIRS = [
    (f"{task}_{level}/{PRIMARY}", f"{task}_{level}/grpo") for task in TASKS for level in MISREAD
]


def name_at(task: str, level: str) -> str:
    """The task with start models of a level; "middle" is the task itself."""
    return f"{task}_{level}" if level in MISREAD else task


def level_table(found: Results, task: str) -> str:
    """How well the start model of each level reads, and what PAPO gains on GRPO from there."""
    header = ["", "start", *READING, "grpo at the end"]
    rows = [[*header, *(f"{name}, minus grpo" for name in QUESTIONS), "Delta_rel %"]]
    for level in LEVELS:
        name = name_at(task, level)
        starts = found[f"{name}/start"].values()
        ends = [accuracy(run) for run in found[f"{name}/grpo"].values()]
        cells = [interval([accuracy(run) for run in starts]), *reading_cells(starts)]
        measured = [gains(found, name, PRIMARY, measure) for measure in QUESTIONS.values()]
        measured.append(paired(found, f"{name}/{PRIMARY}", f"{name}/grpo", delta_rel))
        cells += [interval(ends), *(interval(values, sign=True) for values in measured)]
        rows.append([f"{task}, {level}", *cells])
    return markdown(rows)


def trends(found: Results, task: str, measure: Callable) -> list[float]:
    """The gain from the hard start model minus the gain from the easy one, seed by seed."""
    easy = gains(found, name_at(task, "easy"), PRIMARY, measure)
    hard = gains(found, name_at(task, "hard"), PRIMARY, measure)
    return np.subtract(hard, easy).tolist()


def trend_table(found: Results) -> str:
    """Whether the gain grows with difficulty, over the seeds of both tasks and of each."""
    rows, ps = [], []
    for question, measure in QUESTIONS.items():
        of_tasks = [trends(found, task, measure) for task in TASKS]
        values = [value for of_task in of_tasks for value in of_task]
        larger = sum(value > 0 for value in values)
        ps.append(sign_flip_p(values))
        cells = [interval(of_task, sign=True) for of_task in (values, *of_tasks)]
        rows.append([question, *cells, f"{larger} of {len(values)}"])
    for row, p, corrected in zip(rows, ps, holm(ps), strict=True):
        row += [f"{p:.5f}", f"{corrected:.5f}"]
    header = ["gain on hard minus on easy", "both tasks", *TASKS, "pairs larger on hard"]
    return markdown([[*header, "p", "corrected p"], *rows])


def leads_table(found: Results) -> str:
    """What PAPO is ahead of GRPO in the evaluations during training, by level."""
    rows = []
    for task, level in product(TASKS, LEVELS):
        name = name_at(task, level)
        curves = paired(found, f"{name}/{PRIMARY}", f"{name}/grpo", curve_gain)
        steps = [step for step in curves[0] if step > 0]
        if not rows:
            rows.append([f"{PRIMARY} minus grpo after step", *(str(step) for step in steps)])
        leads = [interval([curve[step] for curve in curves], sign=True) for step in steps]
        rows.append([f"{task}, {level}", *leads])
    return markdown(rows)


def figure(found: Results, figures: Path) -> str:
    """The gain at each level against the share of cells that the start models read right."""
    drawn = Figure(figsize=(10, 6.4), layout="constrained")
    grid = drawn.subplots(len(TASKS), len(QUESTIONS))
    for row, task in enumerate(TASKS):
        shares = [share_read(found, name_at(task, level)) for level in LEVELS]
        for column, (question, measure) in enumerate(QUESTIONS.items()):
            by_level = [gains(found, name_at(task, level), PRIMARY, measure) for level in LEVELS]
            ax = grid[row, column]
            ax.set_title(f"{task}, {question}: {PRIMARY} minus grpo, points", fontsize=9.5)
            draw_gains(ax, shares, by_level, color=f"C{row}")
    for ax in grid[-1]:
        ax.set_xlabel("cells that the start models read right", fontsize=8)
    drawn.savefig(figures / "difficulty.png", dpi=110)
    return "![gain by difficulty](figures/difficulty.png)"


def draw_gains(ax, shares: list[float], by_level: list[list[float]], color: str) -> None:
    """A line per seed with its number at the end; mean and 95% interval in black."""
    ax.axhline(0, color="black", linewidth=0.8)
    for seed, of_seed in zip(NEW_SEEDS, zip(*by_level, strict=True), strict=True):
        ax.plot(shares, of_seed, color=color, linewidth=0.7, alpha=0.6)
        ax.text(shares[-1], of_seed[-1], f"  {seed}", fontsize=6.5, va="center")
    for share, values in zip(shares, by_level, strict=True):
        mean, half = metrics.mean_interval(values)
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
        return ["## difficulty", "(not run yet)"]
    tables = [level_table(found, task) for task in TASKS]
    late = last_steps_table(found, [f"{name}/grpo" for name in names])
    parts = ["## difficulty", trend_table(found), *tables, late, leads_table(found)]
    return [*parts, figure(found, figures)]
