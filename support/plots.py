"""Figures of runs: the curves of one, and several compared.

train.py draws curves.png at a run's end; evaluate.py draws --compare. Everything is drawn without
pyplot, so a notebook keeps its backend. Not in the paper: t intervals over seeds.

    python -c "from support import plots; print(plots.curves('runs/papo_g-toy-s0'))"
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib import ticker
from matplotlib.figure import Figure

# 97.5% quantiles of Student's t for 1 to 9 degrees of freedom. No library we require has them.
T_TABLE = (12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622)


class Axis(NamedTuple):
    """How far a metric's axis reaches at least, so that noise does not fill the panel."""

    least_span: float = 0.0
    least_relative_span: float = 0.0  # as a share of the value in the middle of the axis
    from_zero: bool = False
    highest: float = math.inf  # the metric's own maximum; its minimum is 0

    def limits(self, low: float, high: float) -> tuple[float, float]:
        """The axis for values from `low` to `high`: widened evenly on both sides, but not across 0
        or `highest`."""
        if self.from_zero:
            low = min(low, 0.0)
        middle = (low + high) / 2
        least_span = max(self.least_span, self.least_relative_span * abs(middle))
        missing = max(least_span - (high - low), 0.0)
        below = min(missing / 2, max(low, 0.0))
        above = min(missing - below, max(self.highest - high, 0.0))
        return low - (missing - above), high + above


SHARE = Axis(least_span=0.1, highest=1.0)


class Panel(NamedTuple):
    """A panel of a run's curves."""

    title: str
    labels: dict[str, str]  # metric -> label in the legend
    axis: Axis


EVALUATION = Panel("evaluation accuracy", {}, SHARE)  # a line per evaluation set in the log

PANELS = (
    Panel(
        "reward on training prompts",
        {"reward": "reward", "accuracy": "accuracy", "format": "format"},
        SHARE,
    ),
    EVALUATION,
    Panel(
        "KL_prcp: clean view against masked view",
        {"kl_prcp": "KL_prcp"},
        Axis(least_span=0.01, from_zero=True),
    ),
    Panel(
        "KL_ref: distance from the starting model",
        {"kl_ref": "KL_ref"},
        Axis(least_span=0.01, from_zero=True),
    ),
    Panel(
        "entropy (minus mean log-prob)",
        {"entropy": "clean image", "masked_entropy": "masked image"},
        Axis(least_span=0.1),
    ),
    Panel(
        "share of tokens clipped",
        {"clip_frac": "PPO clip", "clip_frac_dual": "dual clip"},
        Axis(least_span=0.01, from_zero=True),
    ),
    Panel(
        "response length",
        {"response_length": "tokens"},
        Axis(least_span=4, least_relative_span=0.1),
    ),
    Panel("responses cut off", {"truncated": "share"}, SHARE),
    Panel("gradient norm", {"grad_norm": "before clipping"}, Axis(from_zero=True)),
)

COMPARED = (
    "reward",
    "kl_prcp",
    "kl_ref",
    "entropy",
    "masked_entropy",
    "clip_frac",
    "response_length",
)

# Fields of config.json that do not set two runs apart: they may differ between repetitions.
NOT_SETTINGS = set(
    "seed out resume steps epochs keep save_every eval_every eval_n eval_rows wandb tensorboard "
    "tokens_per_forward rollout_batch shard_size".split()
)

Series = dict[int, float]  # step -> value


def curves(run_folder, out=None) -> Path:
    """Draw the metrics of one run that move; `out` defaults to curves.png in its folder.

    ValueError if there are none.
    """
    folder = Path(run_folder)
    steps, evals = read_metrics(folder)
    lines = steps + evals
    panels = {}
    for panel in PANELS:
        labels = panel.labels
        if panel is EVALUATION:
            labels = {key: key.removeprefix("eval/") for key in eval_keys(evals)}
        series = {metric: [finite_series(lines, metric)] for metric in labels}
        panels[panel.title] = {
            labels[metric]: runs for metric, runs in series.items() if _worth_drawing(metric, runs)
        }
    config = _config(folder)
    heading = [config["algo"], Path(config.get("model", "")).name]
    if "seed" in config:
        heading.append(f"seed {config['seed']}")
    axes = {panel.title: panel.axis for panel in PANELS}
    return draw(panels, ", ".join(filter(None, heading)), out or folder / "curves.png", axes=axes)


def compare(run_folders, out) -> tuple[str, Path]:
    """Draw several runs over one another, in `out`/compare.png. Returns a table of first and last
    values, and the path of the figure.

    Runs that agree in all settings but the seed form a group. A group is drawn as the mean over
    the runs that logged a step, with a 95% t interval where all of its runs (two or more) did.
    Metrics that move in no run and are the same in all are left out of the figure.
    """
    groups = {}
    for label, folders in _groups([Path(folder) for folder in run_folders]).items():
        groups[label] = [steps + evals for steps, evals in map(read_metrics, folders)]
    sets = eval_keys(line for runs in groups.values() for lines in runs for line in lines)
    metrics = [*sets, *COMPARED]
    series = {}  # metric -> {label: one series per run}
    for metric in metrics:
        series[metric] = {}
        for label, runs in groups.items():
            of_runs = [finite_series(lines, metric) for lines in runs]
            series[metric][label] = [values for values in of_runs if values]
    panels = {
        metric: by_label
        for metric, by_label in series.items()
        if _worth_drawing(metric, sum(by_label.values(), []))
    }
    heading = "mean over seeds; band: 95% interval"
    axes = {metric: axis_of(metric) for metric in metrics}
    Path(out).mkdir(parents=True, exist_ok=True)
    figure = draw(panels, heading, Path(out, "compare.png"), shared_legend=True, axes=axes)
    return _comparison_table(series, list(groups), [*sets, "reward", "kl_prcp"]), figure


def axis_of(metric: str) -> Axis:
    """The axis of the panel in which `curves` draws this metric."""
    if metric.startswith("eval/"):
        return EVALUATION.axis
    [axis] = [panel.axis for panel in PANELS if metric in panel.labels]
    return axis


def _worth_drawing(metric: str, runs: list[Series]) -> bool:
    """Whether a metric takes more than one value in these runs.

    A reward or an evaluation that does not move is news, and drawn all the same.
    """
    values = {value for run in runs for value in run.values()}
    if metric == "reward" or metric.startswith("eval/"):
        return len(values) > 0
    return len(values) > 1


def _config(folder: Path) -> dict:
    """A run's config.json; a folder without one stands for an algorithm of its own."""
    file = folder / "config.json"
    config = json.loads(file.read_bytes()) if file.is_file() else {}
    return {"algo": folder.name} | config


def _groups(folders: list[Path]) -> dict[str, list[Path]]:
    """Label -> runs that are repetitions of one another.

    Runs of one algorithm with different settings are not averaged; their labels name the settings
    in which they differ.
    """
    by_algo: dict[str, dict[frozenset, list[Path]]] = {}
    for folder in folders:
        config = _config(folder)
        settings = frozenset((k, str(v)) for k, v in config.items() if k not in NOT_SETTINGS)
        by_algo.setdefault(config["algo"], {}).setdefault(settings, []).append(folder)
    groups = {}
    for algo, runs_by_settings in by_algo.items():
        common = frozenset.intersection(*runs_by_settings)
        for settings, runs in runs_by_settings.items():
            differences = sorted(f"{name}={value}" for name, value in settings - common)
            groups[" ".join([algo, *differences])] = runs
    return groups


def _comparison_table(series: dict, labels: list[str], metrics: list[str]) -> str:
    """Plain text: per group and metric, the means of its runs' first and last values."""
    lines = [["runs", "measure", "seeds", "first", "at step", "last", "at step"]]
    for label in labels:
        for metric in metrics:
            runs = series[metric][label]
            if runs:
                first = _mean_at([min(run) for run in runs], runs)
                last = _mean_at([max(run) for run in runs], runs)
                lines.append([label, metric, str(len(runs)), *first, *last])
    return align_columns(lines, left=7)


def _mean_at(steps: list[int], runs: list[Series]) -> tuple[str, str]:
    """("mean +- half interval", "step or range of steps") of each run at a step of its own."""
    mean, half = mean_interval(run[step] for step, run in zip(steps, runs, strict=True))
    value = f"{mean:.3f} +- {half:.3f}" if math.isfinite(half) else f"{mean:.3f}"
    first, last = min(steps), max(steps)
    return value, f"{first}-{last}" if first < last else str(first)


def draw(
    panels: dict[str, dict[str, list[Series]]],
    heading: str,
    out,
    shared_legend: bool = False,
    axes: dict[str, Axis] | None = None,
) -> Path:
    """Draw {title: {label: one series per run}}, three panels per row; empty panels are left out.

    Each label is drawn as the mean of its runs with a 95% interval. With a shared legend a label
    has the same colour in all panels. axes: title -> Axis; matplotlib scales the others.
    """
    panels = {title: lines for title, lines in panels.items() if any(lines.values())}
    if not panels:
        raise ValueError(f"nothing to draw in {out}: no metric that moves was logged")
    rows = math.ceil(len(panels) / 3)
    figure = Figure(figsize=(13.8, 2.9 * rows + 0.6), layout="constrained")
    figure.suptitle(heading, fontsize=12, parse_math=False)  # a "$" in a name starts no formula
    all_labels = list(dict.fromkeys(label for lines in panels.values() for label in lines))
    handles = {}
    for position, (title, lines) in enumerate(panels.items(), 1):
        ax = figure.add_subplot(rows, 3, position)
        ax.set_title(title, fontsize=9.5, parse_math=False)
        ax.set_xlabel("step", fontsize=8)
        ax.xaxis.set_major_locator(ticker.MaxNLocator(nbins=6, integer=True, min_n_ticks=1))
        ax.grid(alpha=0.3)
        for index, (label, runs) in enumerate(lines.items()):
            colour = all_labels.index(label) if shared_legend else index
            handles[label] = _plot_mean(ax, runs, label, f"C{colour % 10}")
        if axes and title in axes:
            low, high = axes[title].limits(*ax.dataLim.intervaly)
            margin = 0.05 * (high - low)
            ax.set_ylim(low - margin, high + margin)
        if not shared_legend:
            ax.legend(fontsize=7.5, framealpha=0.6)
    if shared_legend:
        ordered = [handles[label] for label in all_labels]
        columns = min(4, len(ordered))
        figure.legend(handles=ordered, loc="outside lower center", ncols=columns, fontsize=9)
    figure.savefig(out, dpi=110)
    return Path(out)


def _plot_mean(ax, runs: list[Series], label: str, colour: str):
    """Plot the mean of the runs that logged a step, and its interval where all of them did."""
    steps = sorted(set().union(*runs))
    means, halves = [], []
    for step in steps:
        values = [run[step] for run in runs if step in run]
        mean, half = mean_interval(values)
        means.append(mean)
        halves.append(half if len(values) == len(runs) else math.nan)
    means, halves = np.array(means), np.array(halves)
    marker = "." if len(steps) <= 60 else ""
    (line,) = ax.plot(steps, means, linewidth=1.2, label=label, color=colour, marker=marker)
    ax.fill_between(steps, means - halves, means + halves, color=colour, alpha=0.18, linewidth=0)
    return line


# ---------------------------------------------------------------------- numbers behind the figures


def read_metrics(path) -> tuple[list[dict], list[dict]]:
    """Read metrics.jsonl, or the one in a run's folder: (training lines, evaluation lines).

    Both are sorted by step. A resumed run repeats steps: the later training line of a step
    replaces the earlier one. Lines with an "eval/..." key are evaluations; those of one step are
    merged. A line that is no JSON is skipped: a killed run may leave half a line.
    """
    path = Path(path)
    if path.is_dir():
        path = path / "metrics.jsonl"
    if not path.is_file():
        raise FileNotFoundError(
            f"no metrics file at {path}: give a run folder or its metrics.jsonl"
        )
    steps: dict[int, dict] = {}
    evals: dict[int, dict] = {}
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            continue
        if not isinstance(line, dict) or not isinstance(line.get("step"), int):
            raise ValueError(f"{path}: a line without an integer step: {text[:60]!r}")
        if eval_keys([line]):
            evals.setdefault(line["step"], {}).update(line)
        else:
            steps[line["step"]] = line
    return [steps[step] for step in sorted(steps)], [evals[step] for step in sorted(evals)]


def eval_keys(lines: Iterable[dict]) -> list[str]:
    """The names of all evaluation metrics ("eval/SET") in these lines, sorted."""
    return sorted({key for line in lines for key in line if key.startswith("eval/")})


def finite_series(lines: list[dict], metric: str) -> dict[int, float]:
    """{step: value} of the lines in which the metric is a finite number."""
    series = {}
    for line in lines:
        value = line.get(metric)
        if isinstance(value, (int, float)) and math.isfinite(value):
            series[line["step"]] = float(value)
    return series


def mean_interval(values: Iterable[float]) -> tuple[float, float]:
    """(mean, half width of its 95% t interval) of independent values; NaN wide for a single one."""
    values = np.asarray(list(values), dtype=float)
    df = len(values) - 1
    if df < 1:
        return float(values[0]), math.nan
    if df <= len(T_TABLE):
        t = T_TABLE[df - 1]
    else:  # Cornish-Fisher expansion, within 0.2%
        t = 1.95996 + 2.37227 / df + 2.8225 / df**2
    return float(values.mean()), float(t * values.std(ddof=1) / math.sqrt(len(values)))


def align_columns(lines: list[list[str]], left: int) -> str:
    """Lines of cells as text: the first `left` columns are flush left, the others flush right."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = []
    for line in lines:
        names = [cell.ljust(width) for cell, width in zip(line, widths, strict=True)]
        numbers = [cell.rjust(width) for cell, width in zip(line, widths, strict=True)]
        text.append("  ".join(names[:left] + numbers[left:]).rstrip())
    return "\n".join(text)
