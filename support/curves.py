"""Figures of runs: the curves of one, and several compared.

train.py draws curves.png at a run's end; evaluate.py draws --compare. Not in the paper: t intervals
over seeds.

    python -c "from support import curves; print(curves.draw_run('runs/papo_g-toy-s0'))"
"""

from __future__ import annotations

import math
from pathlib import Path
from statistics import fmean

from matplotlib import ticker
from matplotlib.figure import Figure

from support.config import FREE_ON_RESUME, saved_config
from support.run_folder import read_log

Series = dict[int, float]  # step -> value

PANELS: dict[str, tuple[str, ...]] = {  # title -> metrics
    "reward on training prompts": ("reward", "accuracy", "format"),
    "evaluation accuracy": (),  # whatever sets are in the log
    "KL_prcp: clean view against masked view": ("kl_prcp",),
    "KL_ref: distance from the start model": ("kl_ref",),
    "entropy (minus mean log-prob)": ("entropy", "masked_entropy"),
    "share of tokens clipped": ("clip_frac", "clip_frac_dual"),
    "response length in tokens": ("response_length",),
    "share of responses cut off": ("truncated",),
    "gradient norm before clipping": ("grad_norm",),
}
COMPARED = "reward kl_prcp kl_ref entropy masked_entropy clip_frac response_length".split()

# Fields of config.json that do not set two runs apart: they may differ between repetitions.
NOT_SETTINGS = {*FREE_ON_RESUME, "seed", "out", "epochs", "eval_n", "eval_rows"}


def read_metrics(run_folder) -> dict[str, Series]:
    """Metric -> {step: value}, the finite numbers of a run's metrics.jsonl.

    A resumed run repeats steps; the later line counts. FileNotFoundError where there is no log.
    """
    path = Path(run_folder) / "metrics.jsonl"
    if not path.is_file():
        raise FileNotFoundError(f"no {path}: give the folder of a run")
    series: dict[str, Series] = {}
    for line in read_log(path):
        for metric, value in line.items():
            if isinstance(value, (int, float)) and math.isfinite(value) and metric != "step":
                series.setdefault(metric, {})[line["step"]] = float(value)
    return {metric: dict(sorted(values.items())) for metric, values in series.items()}


def mean_interval(values) -> tuple[float, float]:
    """(mean, half width of its 95% t interval) of independent values; NaN wide for a single one."""
    from scipy import stats  # slow to import

    values = list(values)
    if len(values) == 1:
        return values[0], math.nan
    return fmean(values), float(stats.t.ppf(0.975, len(values) - 1) * stats.sem(values))


# ------------------------------------------------------------------------------ one run or several


def draw_run(run_folder) -> Path:
    """Draw the metrics of one run that move in its curves.png. ValueError if there are none."""
    folder = Path(run_folder)
    metrics = read_metrics(folder)
    results = {name for name in metrics if name == "reward" or name.startswith("eval/")}
    moving = {name for name, series in metrics.items() if len(set(series.values())) > 1}
    panels = {}
    for title, names in PANELS.items():
        names = names or [name for name in metrics if name.startswith("eval/")]
        panels[title] = {name: [metrics[name]] for name in names if name in results | moving}
    config = saved_config(folder)
    heading = f"{config['algo']}, {Path(config['model']).name}, seed {config['seed']}"
    return draw(panels, heading, folder / "curves.png")


def compare(run_folders, out) -> tuple[str, Path]:
    """Draw several runs over one another, in `out`/compare.png: (table of first and last values,
    path of the figure).

    Runs that agree in all settings but the seed form a group, drawn as its mean with a 95% t
    interval at the steps that all of its runs (two or more) logged.
    """
    groups = {
        label: [read_metrics(folder) for folder in folders]
        for label, folders in group_runs([Path(folder) for folder in run_folders]).items()
    }
    names = {name for runs in groups.values() for run in runs for name in run}
    sets = sorted(name for name in names if name.startswith("eval/"))
    of_further_views = sorted(name for name in names - {*COMPARED} if name.startswith("kl_"))
    panels = {
        metric: {k: [run[metric] for run in runs if metric in run] for k, runs in groups.items()}
        for metric in [*sets, *COMPARED, *of_further_views]
    }
    lines = [f"{'runs':<40} {'measure':<24} seeds  first           last"]
    for label in groups:
        for metric in [*sets, "reward", "kl_prcp"]:
            if runs := panels.get(metric, {}).get(label):
                ends = [_mean_of(run[step(run)] for run in runs) for step in (min, max)]
                lines.append(f"{label:<40} {metric:<24} {len(runs):>5}  {ends[0]:<15} {ends[1]}")
    figure = draw(panels, "mean over seeds; band: 95% interval", Path(out, "compare.png"))
    return "\n".join(line.rstrip() for line in lines), figure


def _mean_of(values) -> str:
    mean, half = mean_interval(values)
    return f"{mean:.3f} +- {half:.3f}" if math.isfinite(half) else f"{mean:.3f}"


def group_runs(folders: list[Path]) -> dict[str, list[Path]]:
    """Label -> runs that are repetitions of one another.

    Runs of one algorithm with different settings are not averaged; their labels name the settings
    in which they differ.
    """
    configs = {folder: saved_config(folder) for folder in folders}
    groups: dict[str, list[Path]] = {}
    for folder, config in configs.items():
        same_algo = [each for each in configs.values() if each["algo"] == config["algo"]]
        settings = [name for name in config if name not in NOT_SETTINGS]
        varying = [k for k in settings if any(each.get(k) != config[k] for each in same_algo)]
        label = " ".join([config["algo"], *(f"{name}={config[name]}" for name in sorted(varying))])
        groups.setdefault(label, []).append(folder)
    return groups


# ------------------------------------------------------------------------------------------ drawing


def draw(panels: dict[str, dict[str, list[Series]]], heading: str, out) -> Path:
    """Draw {title: {label: one series per run}}, three panels per row; no pyplot, so that a
    notebook keeps its backend.

    Each label is drawn as the mean of its runs with a 95% interval, at the steps that all of them
    have, in one colour everywhere. Empty panels are left out.
    """
    panels = {title: lines for title, lines in panels.items() if any(lines.values())}
    if not panels:
        raise ValueError(f"nothing to draw in {out}: no metric was logged")
    rows = math.ceil(len(panels) / 3)
    figure = Figure(figsize=(13.8, 2.9 * rows + 0.6), layout="constrained")
    figure.suptitle(heading, fontsize=12, parse_math=False)  # a "$" in a name starts no formula
    labels = list(dict.fromkeys(label for lines in panels.values() for label in lines))
    for position, (title, lines) in enumerate(panels.items(), 1):
        ax = figure.add_subplot(rows, 3, position)
        ax.set_title(title, fontsize=9.5, parse_math=False)
        ax.xaxis.set_major_locator(ticker.MaxNLocator(nbins=6, integer=True, min_n_ticks=1))
        ax.grid(alpha=0.3)
        for label, runs in lines.items():
            if runs:
                _plot_mean(ax, runs, label, f"C{labels.index(label) % 10}")
        ax.set_ylim(bottom=min(0.0, ax.dataLim.y0))  # so noise does not fill the panel
        ax.legend(fontsize=7.5, framealpha=0.6)
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=110)
    return Path(out)


def _plot_mean(ax, runs: list[Series], label: str, colour: str) -> None:
    steps = sorted(set.intersection(*map(set, runs)))
    points = [mean_interval(run[step] for run in runs) for step in steps]
    means = [mean for mean, _ in points]
    low, high = [m - h for m, h in points], [m + h for m, h in points]
    marker = "." if len(steps) <= 60 else ""
    name = label.removeprefix("eval/")
    ax.plot(steps, means, linewidth=1.2, label=name, color=colour, marker=marker)
    ax.fill_between(steps, low, high, color=colour, alpha=0.18, linewidth=0)
