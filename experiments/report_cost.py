"""The part of the report on cost: accuracy against the seconds and the sampled tokens it took.

Seconds are those of cost.py, one run per method on an otherwise idle machine, at every seed: runs
that shared the machine say nothing about time. Tokens are each run's own. They are the responses'
alone; PAPO's forward under the masked view counts in seconds only.
"""

from __future__ import annotations

from pathlib import Path
from statistics import fmean

import numpy as np
from matplotlib.figure import Figure

from experiments.measures import Results, interval, markdown, overall_curve
from experiments.protocol import TASKS
from support import plots

UNITS = ("seconds", "sampled tokens")
BUDGETS = (0.25, 0.5, 0.75, 1.0)  # of what the baseline spends in all
RESAMPLES = 2000


def spent(run: dict, unit: str, costs: dict) -> np.ndarray:
    """What a run had spent at each of its evaluations.

    costs: variant -> {"seconds": of each step}.
    """
    if unit == "seconds":
        of_steps = np.array(costs[run["variant"]]["seconds"])
    else:
        of_steps = np.multiply(run["metrics"]["seconds"], run["metrics"]["tokens_per_second"])
    total = np.concatenate([[0.0], np.cumsum(of_steps)])
    return total[list(overall_curve(run))]


def accuracy_at(run: dict, unit: str, costs: dict, budgets: np.ndarray) -> np.ndarray:
    """Accuracy by the time each budget is spent, interpolated between evaluations; not a number
    beyond the run's end."""
    scores = list(overall_curve(run).values())
    return np.interp(budgets, spent(run, unit, costs), scores, right=np.nan)


def differences(
    found: Results, costs: dict, method: str, base: str, unit: str
) -> tuple[np.ndarray, np.ndarray]:
    """Budgets [N], and at each of them accuracy minus the baseline's at each seed [seeds, N].

    The last budget is what the cheapest of all runs spends.
    """
    seeds = sorted(found[method].keys() & found[base].keys())
    pairs = [(found[method][seed], found[base][seed]) for seed in seeds]
    least = min(spent(run, unit, costs)[-1] for pair in pairs for run in pair)
    budgets = np.linspace(0, least, 201)
    rows = []
    for run, base_run in pairs:
        own = accuracy_at(run, unit, costs, budgets)
        rows.append(own - accuracy_at(base_run, unit, costs, budgets))
    return budgets, np.array(rows)


def ahead_from(budgets: np.ndarray, difference: np.ndarray) -> float:
    """The budget from which a difference [N] is above 0 for good; infinite if it ends at or below.

    The first budget, 0, does not count: no method is ahead before it begins.
    """
    not_ahead = np.flatnonzero(difference[1:] <= 0)
    if len(not_ahead) == 0:
        return float(budgets[1])
    last = not_ahead[-1] + 1
    return float(budgets[last + 1]) if last + 1 < len(budgets) else np.inf


def ahead_cell(budgets: np.ndarray, of_seeds: np.ndarray) -> str:
    """From which budget the mean over seeds is ahead for good, with its 95% bootstrap interval."""
    rng = np.random.default_rng(0)
    resampled = []
    for _ in range(RESAMPLES):
        seeds = rng.integers(len(of_seeds), size=len(of_seeds))
        resampled.append(ahead_from(budgets, of_seeds[seeds].mean(0)))
    low, high = np.quantile(resampled, [0.025, 0.975], method="inverted_cdf")
    shown = []
    for value in (ahead_from(budgets, of_seeds.mean(0)), low, high):
        shown.append("never" if np.isinf(value) else f"{value:.0f}")
    return f"{shown[0]} ({shown[1]} to {shown[2]})"


def pay_table(found: Results, costs: dict, pairs: dict[str, str]) -> str:
    """What a method is ahead of its baseline when both have spent the same.

    pairs: method -> baseline.
    """
    shares = [f"{share:.0%} of the budget" for share in BUDGETS]
    rows = [["", "budget", *shares, "ahead from"]]
    for method, base in pairs.items():
        for unit in UNITS:
            if method not in found or base not in found:
                continue
            if unit == "seconds" and not {method, base} <= costs.keys():
                continue
            budgets, of_seeds = differences(found, costs, method, base, unit)
            cells = []
            for share in BUDGETS:
                column = round(share * (len(budgets) - 1))
                cells.append(interval(of_seeds[:, column].tolist(), sign=True))
            name = f"{method.rpartition('/')[2]}, {unit}"
            rows.append([name, f"{budgets[-1]:.0f}", *cells, ahead_cell(budgets, of_seeds)])
    return markdown(rows)


def pay_figure(found: Results, costs: dict, methods: list[str], figures: Path) -> str:
    """Mean accuracy of the seeds against what was spent: a row per task, a column per unit."""
    shown = [task for task in TASKS if f"{task}/{methods[0]}" in found]
    if not shown:
        return ""
    has_seconds = all(f"{task}/{methods[0]}" in costs for task in shown)
    units = UNITS if has_seconds else ("sampled tokens",)
    figure = Figure(figsize=(5.5 * len(units), 3.6 * len(shown)), layout="constrained")
    axes = figure.subplots(len(shown), len(units), squeeze=False)
    for row, task in zip(axes, shown, strict=True):
        for ax, unit in zip(row, units, strict=True):
            for index, method in enumerate(methods):
                runs = list(found.get(f"{task}/{method}", {}).values())
                if runs and (unit != "seconds" or f"{task}/{method}" in costs):
                    _draw_mean(ax, runs, unit, costs, method, f"C{index}")
            ax.set_title(f"{task}: overall accuracy in %", fontsize=9.5)
            ax.set_xlabel(unit, fontsize=8)
            ax.grid(alpha=0.3)
    figure.legend(*ax.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    figure.savefig(figures / "cost.png", dpi=110)
    return "![accuracy against seconds and sampled tokens](figures/cost.png)"


def _draw_mean(ax, runs: list[dict], unit: str, costs: dict, label: str, colour: str) -> None:
    """The mean of the runs at what they had spent on average, with a 95% interval."""
    x = np.mean([spent(run, unit, costs) for run in runs], axis=0)
    curves = np.array([list(overall_curve(run).values()) for run in runs])  # [runs, evaluations]
    means = [fmean(column) for column in curves.T]
    halves = [plots.mean_interval(column.tolist())[1] for column in curves.T]
    ax.plot(x, means, color=colour, label=label)
    low, high = np.subtract(means, halves), np.add(means, halves)
    ax.fill_between(x, low, high, color=colour, alpha=0.12, linewidth=0)
