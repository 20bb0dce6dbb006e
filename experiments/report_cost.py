"""The part of the report on cost: accuracy against the seconds and the sampled tokens it took."""

from __future__ import annotations

from pathlib import Path
from statistics import fmean

import numpy as np
from matplotlib.figure import Figure

from experiments.measures import Results, interval, markdown, overall_curve
from experiments.protocol import TASKS
from support import metrics

UNITS = ("seconds", "sampled tokens")
BUDGETS = (0.25, 0.5, 0.75, 1.0)  # of what the baseline spent in all
RESAMPLES = 2000


def cost_per_step(runs: list[dict], unit: str) -> float:
    """What a step of a method costs: the median of its seconds, or the mean of its tokens.

    The median leaves out steps that waited for other work on the machine.
    """
    seconds = np.concatenate([run["metrics"]["seconds"] for run in runs])
    if unit == "seconds":
        return float(np.median(seconds))
    per_second = np.concatenate([run["metrics"]["tokens_per_second"] for run in runs])
    return float(np.mean(seconds * per_second))


def differences(found: Results, method: str, base: str, unit: str) -> tuple[np.ndarray, np.ndarray]:
    """Budgets [N], and at each of them accuracy minus the baseline's at each seed [seeds, N]."""
    runs, base_runs = found[method], found[base]
    seeds = sorted(runs.keys() & base_runs.keys())
    cost = cost_per_step([runs[seed] for seed in seeds], unit)
    base_cost = cost_per_step([base_runs[seed] for seed in seeds], unit)
    budgets = np.linspace(0, base_cost * max(overall_curve(base_runs[seeds[0]])), 201)
    rows = []
    for seed in seeds:
        own = at_budgets(runs[seed], cost, budgets)
        rows.append(own - at_budgets(base_runs[seed], base_cost, budgets))
    return budgets, np.array(rows)


def at_budgets(run: dict, cost: float, budgets: np.ndarray) -> np.ndarray:
    """Accuracy by the time each budget is spent, interpolated between evaluations."""
    curve = overall_curve(run)
    return np.interp(budgets, cost * np.array(list(curve)), list(curve.values()))


def crossing(budgets: np.ndarray, difference: np.ndarray) -> float | None:
    """The last budget at which a difference [N] changes its sign; None if it keeps it."""
    signs = np.sign(difference)
    signs[signs == 0] = 1
    changes = np.flatnonzero(signs[1:] != signs[:-1])
    return float(budgets[changes[-1] + 1]) if len(changes) else None


def crossing_cell(budgets: np.ndarray, of_seeds: np.ndarray) -> str:
    """The crossing of the mean over seeds, and its bootstrap interval over the seeds.

    Resamples without a crossing are named: of them nothing else is known.
    """
    rng = np.random.default_rng(0)
    found = []
    for _ in range(RESAMPLES):
        chosen = rng.integers(len(of_seeds), size=len(of_seeds))
        found.append(crossing(budgets[1:], of_seeds[chosen, 1:].mean(0)))
    crossings = [each for each in found if each is not None]
    at = crossing(budgets[1:], of_seeds[:, 1:].mean(0))
    none = f"none in {100 * (1 - len(crossings) / RESAMPLES):.0f}% of resamples"
    if at is None:
        return f"none ({none})"
    low, high = np.percentile(crossings, [2.5, 97.5])
    return f"{at:.0f} ({low:.0f} to {high:.0f}; {none})"


def pay_table(found: Results, pairs: list[tuple[str, str]]) -> str:
    """What a method is ahead of its baseline when both have spent the same."""
    shares = [f"at {share:.0%}" for share in BUDGETS]
    rows = [["", "unit", "per step, relative", *shares, "crossing"]]
    for method, base in pairs:
        if method not in found or base not in found:
            continue
        for unit in UNITS:
            budgets, of_seeds = differences(found, method, base, unit)
            costs = [cost_per_step(list(found[name].values()), unit) for name in (method, base)]
            cells = []
            for share in BUDGETS:
                at = round(share * (len(budgets) - 1))
                cells.append(interval(of_seeds[:, at].tolist(), sign=True))
            relative = f"{costs[0] / costs[1]:.2f}"
            rows.append([method, unit, relative, *cells, crossing_cell(budgets, of_seeds)])
    return markdown(rows)


def pay_figure(found: Results, methods: list[str], figures: Path) -> str:
    """Mean accuracy of the seeds against what was spent: a row per task, a column per unit."""
    shown = [task for task in TASKS if f"{task}/{methods[0]}" in found]
    if not shown:
        return ""
    figure = Figure(figsize=(11, 3.6 * len(shown)), layout="constrained")
    axes = figure.subplots(len(shown), len(UNITS), squeeze=False)
    for row, task in zip(axes, shown, strict=True):
        for ax, unit in zip(row, UNITS, strict=True):
            for index, method in enumerate(methods):
                runs = list(found.get(f"{task}/{method}", {}).values())
                if runs:
                    _draw_mean(ax, runs, unit, method, f"C{index}")
            ax.set_title(f"{task}: overall accuracy in %", fontsize=9.5)
            ax.set_xlabel(unit, fontsize=8)
            ax.grid(alpha=0.3)
    figure.legend(*ax.get_legend_handles_labels(), loc="outside lower center", ncols=len(methods))
    figure.savefig(figures / "cost.png", dpi=110)
    return "![accuracy against seconds and sampled tokens](figures/cost.png)"


def _draw_mean(ax, runs: list[dict], unit: str, label: str, colour: str) -> None:
    curves = [overall_curve(run) for run in runs]
    spent = cost_per_step(runs, unit) * np.array(list(curves[0]))
    means = [fmean(curve[step] for curve in curves) for step in curves[0]]
    halves = [metrics.mean_interval([curve[step] for curve in curves])[1] for step in curves[0]]
    low, high = np.subtract(means, halves), np.add(means, halves)
    ax.plot(spent, means, color=colour, label=label)
    ax.fill_between(spent, low, high, color=colour, alpha=0.12, linewidth=0)
