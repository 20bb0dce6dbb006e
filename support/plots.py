"""Figures: a run's curves, runs compared, and per-token and per-patch image attribution.

train.py draws curves.png at a run's end; evaluate.py draws --compare and --explain. Everything is
drawn without pyplot, so a notebook keeps its backend. Not in the paper: t intervals over seeds, and
the perception gain (KL_prcp token by token).

    python -c "from support import plots; print(plots.curves('runs/papo_g-toy-s0'))"
"""

from __future__ import annotations

import base64
import functools
import html
import io
import json
import math
import textwrap
from pathlib import Path
from string import Template
from typing import NamedTuple

import numpy as np
from matplotlib import cm, colormaps, colors, font_manager, patches, ticker
from matplotlib.figure import Figure
from PIL import Image

from support.metrics import align_columns, eval_keys, finite_series, mean_interval, read_metrics


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
    "tokens_per_forward rollout_batch offload_optimizer".split()
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


def compare(run_folders, out) -> tuple[Path, str]:
    """Draw several runs over one another: (path of the figure, table of first and last values).

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
    figure = draw(panels, heading, out, shared_legend=True, axes=axes)
    return figure, _comparison_table(series, list(groups), [*sets, "reward", "kl_prcp"])


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


# ---------------------------------------------------------------------------- per-token attribution

LINE_WIDTH = 86  # characters per line of the PNG
CELL_WIDTH, CELL_HEIGHT = 0.0836, 0.21  # inches per character of 10-pt DejaVu Sans Mono

# The ends are pale, so that black text stays legible.
GAIN_COLOURS = colors.ListedColormap(colormaps["RdBu"](np.linspace(0.2, 0.8, 255)))

LEGEND = Template(
    "Perception gain: a token's log-prob with the image minus its log-prob with the image masked. "
    "Blue: the image makes it likelier (0.7: twice as likely). White: no difference. Red: likelier "
    "without the image. All tokens: log-prob $clean with the image, $masked with it masked, gain "
    "$gain. The mean, $mean per token, is the simplest estimate of KL_prcp, which PAPO raises."
)

PAGE = Template("""<!doctype html><html lang="en"><meta charset="utf-8">
<title>Per-token image attribution</title>
<style>
body {font: 15px/1.5 sans-serif; max-width: 70em; margin: 1em auto; background: #fff; color: #111}
figure {display: inline-block; margin: 0 1em 1em 0}
img {max-width: 22em; max-height: 22em; display: block}
#response {font: 15px/1.9 monospace; white-space: pre-wrap; overflow-wrap: anywhere;
           border: 1px solid #ccc; padding: .6em}
#response span {border-right: 1px solid #fff; padding: .15em 0}
#response span:hover {outline: 1px solid #111}
</style>
$figures<p>$heading</p>
<p>Response (hover over a token for its numbers):</p><div id="response">$tokens</div>
<p>$legend</p></html>
""")

TOOLTIP = Template(
    "token $token\nlog-prob with the image $clean (p = $p_clean)\n"
    "log-prob with it masked $masked (p = $p_masked)\ngain $gain"
)


class Attribution(NamedTuple):
    """What the PNG and the HTML page of a response share."""

    heading: str
    views: list[tuple[str, Image.Image]]  # name and image
    tokens: list[str]
    colours: np.ndarray  # [T, RGBA]
    limit: float  # the gain at the end of the colour scale
    legend: str


def perception_gain(
    images: list[Image.Image],
    masked_images: list[Image.Image],
    tokens: list[str],
    log_probs,
    masked_log_probs,
    out,
    question: str = "",
    answer: str = "",
) -> tuple[Path, Path]:
    """Draw how much each token of a response depends on the image.

    log_probs, masked_log_probs [T]: log pi(o_t) in nats given the clean and the masked view (the
    mean over several masks). The gain is their difference; the colour scale ends at the 95th
    percentile of its size, at least 0.5. Writes perception_gain.png and perception_gain.html, one
    self-contained page with all numbers, to the folder `out`; returns both paths. ValueError for
    unequal lengths or a value that is not finite.
    """
    if not 0 < len(tokens) == len(log_probs) == len(masked_log_probs):
        raise ValueError(
            f"{len(tokens)} tokens but {len(log_probs)} and {len(masked_log_probs)} log-probs"
        )
    clean = np.asarray(log_probs, dtype=float)
    masked = np.asarray(masked_log_probs, dtype=float)
    gains = clean - masked
    if not np.isfinite(gains).all():
        raise ValueError(f"token {np.argmin(np.isfinite(gains))} has a log-prob that is not finite")
    limit = max(0.5, float(np.percentile(np.abs(gains), 95)))
    attribution = Attribution(
        heading=f"Question: {question} True answer: {answer}",
        views=[("image", image.convert("RGB")) for image in images]
        + [("masked", image.convert("RGB")) for image in masked_images],
        tokens=tokens,
        colours=GAIN_COLOURS(0.5 + 0.5 * np.clip(gains / limit, -1, 1)),
        limit=limit,
        legend=LEGEND.substitute(
            clean=f"{clean.sum():.2f}",
            masked=f"{masked.sum():.2f}",
            gain=f"{gains.sum():.2f}",
            mean=f"{gains.mean():.3f}",
        ),
    )
    png, page = Path(out) / "perception_gain.png", Path(out) / "perception_gain.html"
    page.write_text(_attribution_page(attribution, clean, masked), encoding="utf-8")
    _attribution_figure(attribution).savefig(png, dpi=110)
    return png, page


def _attribution_page(attribution: Attribution, clean, masked) -> str:
    figures = spans = ""
    for name, view in attribution.views:
        buffer = io.BytesIO()
        view.save(buffer, format="PNG")
        data = base64.b64encode(buffer.getvalue()).decode()
        image = f'<img alt="{name}" src="data:image/png;base64,{data}">'
        figures += f"<figure>{image}<figcaption>{name}</figcaption></figure>"
    columns = zip(attribution.tokens, attribution.colours, clean, masked, strict=True)
    for token, colour, a, b in columns:
        tooltip = TOOLTIP.substitute(
            token=repr(token),
            clean=f"{a:+.3f}",
            p_clean=f"{math.exp(a):.2%}",
            masked=f"{b:+.3f}",
            p_masked=f"{math.exp(b):.2%}",
            gain=f"{a - b:+.3f}",
        )
        style, title = f"background:{colors.to_hex(colour)}", html.escape(tooltip)
        text = html.escape(_visible(token))
        spans += f'<span style="{style}" title="{title}">{text}</span>'
        if "\n" in token:
            spans += "\n"
    return PAGE.substitute(
        figures=figures,
        heading=html.escape(attribution.heading),
        tokens=spans,
        legend=html.escape(attribution.legend),
    )


def _attribution_figure(attribution: Attribution) -> Figure:
    """The images on the left; on the right the tokens on their colours, the scale, the legend."""
    cells = _cells(attribution)
    n_lines = cells[-1].line + 1
    text_width, text_height = CELL_WIDTH * LINE_WIDTH, CELL_HEIGHT * n_lines
    width = text_width + 3.4
    height = max(text_height + 1.6, 3 * len(attribution.views)) + 0.2
    figure = Figure(figsize=(width, height))

    def add_axes(left, top, w, h):  # in inches from the top left corner
        return figure.add_axes((left / width, 1 - (top + h) / height, w / width, h / height))

    for number, (name, view) in enumerate(attribution.views):
        ax = add_axes(0.1, 3 * number + 0.3, 2.9, 2.6)
        ax.imshow(view)
        ax.set(title=name, xticks=[], yticks=[])
    ax = add_axes(3.2, 0.1, text_width, text_height)
    ax.set(xlim=(0, LINE_WIDTH), ylim=(n_lines, 0))
    ax.axis("off")
    for cell in cells:
        corner = (cell.column, cell.line)
        ax.add_patch(
            patches.Rectangle(corner, len(cell.text), 1, facecolor=cell.colour, edgecolor="white")
        )
        style = {"fontsize": 10, "family": "DejaVu Sans Mono", "parse_math": False}
        ax.text(cell.column, cell.line + 0.72, _in_font(cell.text), **style)
    scale = cm.ScalarMappable(colors.Normalize(-attribution.limit, attribution.limit), GAIN_COLOURS)
    bar_axes = add_axes(3.3, text_height + 0.3, 4, 0.2)
    figure.colorbar(scale, cax=bar_axes, orientation="horizontal")
    legend = textwrap.fill(attribution.legend, 100, break_on_hyphens=False)
    bar_axes.text(0, -1.6, legend, transform=bar_axes.transAxes, va="top", fontsize=9)
    return figure


class Cell(NamedTuple):
    """A piece of text on the PNG's grid of characters."""

    line: int
    column: int
    text: str
    colour: object


def _cells(attribution: Attribution) -> list[Cell]:
    """The heading, an empty line, then the tokens, wrapped at LINE_WIDTH and after newlines."""
    heading = textwrap.wrap(attribution.heading, LINE_WIDTH)
    cells = [Cell(line, 0, text, "white") for line, text in enumerate(heading)]
    line, column = len(heading) + 1, 0
    for token, colour in zip(attribution.tokens, attribution.colours, strict=True):
        for piece in textwrap.wrap(_visible(token), LINE_WIDTH, drop_whitespace=False):
            if column + len(piece) > LINE_WIDTH:
                line, column = line + 1, 0
            cells.append(Cell(line, column, piece, colour))
            column += len(piece)
        if "\n" in token:
            line, column = line + 1, 0
    return cells


def _visible(token: str) -> str:
    """A token with its invisible characters replaced; a space beside letters needs no sign."""
    text = token.replace("\n", "↵").replace("\t", "⇥") or "∅"
    if not text.strip(" ↵⇥"):
        text = text.replace(" ", "␣")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


@functools.cache
def _glyphs() -> dict:
    return font_manager.get_font(font_manager.findfont("DejaVu Sans Mono")).get_charmap()


def _in_font(text: str) -> str:
    """Characters that the PNG's font lacks (Chinese, for one) become boxes."""
    return "".join(c if ord(c) in _glyphs() else "□" for c in text)


# ---------------------------------------------------------------------------- per-patch attribution


def black_out_patches(image: Image.Image, patch_mask) -> Image.Image:
    """The image at 14 pixels per patch, the patches of patch_mask[h, w] in black."""
    mask = Image.fromarray(255 * np.asarray(patch_mask, dtype=np.uint8))
    masked = image.resize((14 * mask.width, 14 * mask.height))
    masked.paste((0, 0, 0), None, mask.resize(masked.size, Image.Resampling.NEAREST))
    return masked


def heat_map(image: Image.Image, heat, out_png, title: str = "") -> Path:
    """Draw the image beside itself under heat[rows, columns], one value per patch.

    Where values of both signs occur, the colours are centred on 0.
    """
    heat = np.asarray(heat, dtype=float)
    if heat.ndim != 2:
        raise ValueError(f"heat must be [rows, columns] of patches, got shape {heat.shape}")
    if heat.min() < 0 < heat.max():
        scale = {"cmap": "RdBu", "norm": colors.CenteredNorm()}
    else:
        scale = {"cmap": "inferno"}
    figure = Figure(figsize=(9, min(9, 4 * image.height / image.width + 0.6)), layout="constrained")
    figure.suptitle(title, fontsize=11, parse_math=False)
    left, right = figure.subplots(1, 2)
    left.imshow(image.convert("RGB"))
    right.imshow(image.convert("L").convert("RGB"), alpha=0.4)  # grey and pale, under the heat
    whole_image = (-0.5, image.width - 0.5, image.height - 0.5, -0.5)
    drawn = right.imshow(heat, extent=whole_image, alpha=0.7, **scale)
    for ax in (left, right):
        ax.axis("off")
    figure.colorbar(drawn, ax=right)
    figure.savefig(out_png, dpi=110)
    return Path(out_png)
