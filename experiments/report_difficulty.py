"""The part of the report on difficulty: PAPO's gain by how much perception limits the start."""

from __future__ import annotations

from collections.abc import Callable
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
from experiments.report_tasks import PRIMARY, QUESTIONS, gains, last_steps_table
from support import metrics

LEVELS = ("easy", "middle", "hard")


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


def figure(found: Results, figures: Path) -> str:
    """The gain at each level against the share of cells that the start models read right."""
    drawn = Figure(figsize=(10, 6.4), layout="constrained")
    grid = drawn.subplots(len(TASKS), len(QUESTIONS))
    for row, (axes, task) in enumerate(zip(grid, TASKS, strict=True)):
        shares = [share_read(found, name_at(task, level)) for level in LEVELS]
        ticks = [f"{level}\n{share:.0f}%" for level, share in zip(LEVELS, shares, strict=True)]
        for ax, (question, measure) in zip(axes, QUESTIONS.items(), strict=True):
            levels = [gains(found, name_at(task, level), PRIMARY, measure) for level in LEVELS]
            ax.plot(shares, levels, color=f"C{row}", linewidth=0.7, alpha=0.6)  # one line per seed
            for seed, gain in zip(NEW_SEEDS, levels[-1], strict=True):
                ax.text(shares[-1], gain, f"  {seed}", fontsize=6.5, va="center")
            means, halves = zip(*(metrics.mean_interval(values) for values in levels), strict=True)
            ax.errorbar(shares, means, halves, fmt="o", color="black", capsize=4)
            ax.axhline(0, color="black", linewidth=0.8)
            ax.set_title(f"{task}, {question}: {PRIMARY} minus grpo, points", fontsize=9.5)
            ax.set_xticks(shares, ticks)
            ax.invert_xaxis()  # harder to the right
            ax.grid(alpha=0.3)
    for ax in grid[-1]:
        ax.set_xlabel("cells that the start models read right", fontsize=8)
    drawn.savefig(figures / "difficulty.png", dpi=110)
    return "![gain by difficulty](figures/difficulty.png)"


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
    return ["## difficulty", trend_table(found), *tables, late, figure(found, figures)]
