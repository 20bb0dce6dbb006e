"""The part of the report on the confirmation: semantic masks against grpo, at seeds kept for it."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from experiments.measures import (
    MISREAD_CHANGE,
    Results,
    accuracy,
    accuracy_gain,
    accuracy_over_training,
    complete,
    corrected_table,
    count_ahead,
    delta_rel,
    interval,
    markdown,
    misread_change,
    overall_curve,
    paired,
    wrong_change,
)
from experiments.protocol import CONFIRMING_SEEDS
from experiments.report_cost import pay_table
from experiments.report_tasks import QUESTIONS, curve_gain
from experiments.tasks import SPLITS
from support import plots

METHOD, BASE = "dots/semantic_0.17", "dots/grpo"
LABELS = {BASE: "grpo", METHOD: "semantic 0.17"}


def primary_table(found: Results) -> str:
    """How far and how fast; p as is and corrected by Holm."""
    differences = {name: paired(found, METHOD, BASE, gain) for name, gain in QUESTIONS.items()}
    return corrected_table("semantic 0.17 minus grpo", differences)


def accuracy_table(found: Results) -> str:
    rows = [["", "overall", *SPLITS, "mean over training"]]
    for variant, label in LABELS.items():
        runs = found[variant].values()
        ends = [interval([accuracy(run, split) for run in runs]) for split in ("overall", *SPLITS)]
        rows.append([label, *ends, interval([accuracy_over_training(run) for run in runs])])
    return markdown(rows)


def difference_table(found: Results) -> str:
    """Secondary differences, at the end unless the row says otherwise."""
    of_splits = {f"{split}, points": partial(accuracy_gain, split=split) for split in SPLITS}
    measures = of_splits | {
        "overall after step 20, points": gain_after_20_steps,
        "Delta_rel %": delta_rel,
        "wrong answers, relative to baseline %": wrong_change,
        MISREAD_CHANGE: misread_change,
    }
    rows = [["semantic 0.17 against grpo", "difference", "larger than 0"]]
    for name, measure in measures.items():
        values = paired(found, METHOD, BASE, measure)
        rows.append([name, interval(values, sign=True), count_ahead(values)])
    return markdown(rows)


def gain_after_20_steps(result: dict, base: dict) -> float:
    return curve_gain(result, base)[20]


def figure(found: Results, figures: Path) -> str:
    """Left: mean accuracy over the steps. Right: the difference at each seed, and its mean."""
    drawn = Figure(figsize=(10, 3.6), layout="constrained")
    left, right = drawn.subplots(1, 2)
    left.set_title("dots: overall accuracy in %, mean", fontsize=9.5)
    for colour, (variant, label) in zip(("C0", "C2"), LABELS.items(), strict=True):
        curves = [overall_curve(run) for run in found[variant].values()]
        means = np.mean([list(curve.values()) for curve in curves], axis=0)
        left.plot(curves[0].keys(), means, ".-", color=colour, label=label)
    left.legend(fontsize=8)
    right.set_title("semantic 0.17 minus grpo, points: seeds, mean, 95% interval", fontsize=9.5)
    right.axhline(0, color="black", linewidth=0.8)
    gains = paired(found, METHOD, BASE, curve_gain)
    for gain in gains:
        right.plot(gain.keys(), gain.values(), color="C2", linewidth=0.7, alpha=0.5)
    steps = list(gains[0])
    intervals = [plots.mean_interval([gain[step] for gain in gains]) for step in steps]
    means, halves = np.transpose(intervals)
    right.plot(steps, means, ".-", color="C2", linewidth=2)
    right.fill_between(steps, means - halves, means + halves, color="C2", alpha=0.15)
    for ax in (left, right):
        ax.set_xlabel("step", fontsize=8)
        ax.grid(alpha=0.3)
    drawn.savefig(figures / "confirm.png", dpi=110)
    return "![semantic masks against grpo at eight new seeds](figures/confirm.png)"


def sections(everything: Results, costs: dict, figures: Path) -> list[str]:
    """Nothing is reported until all runs are complete. costs: see report_cost.spent."""
    found = complete(everything, CONFIRMING_SEEDS)
    if not LABELS.keys() <= found.keys():
        return ["## confirm", "(not complete)"]
    parts = ["## confirm", primary_table(found), accuracy_table(found), difference_table(found)]
    parts += ["## confirm: at equal cost", pay_table(found, costs, {METHOD: BASE})]
    return [*parts, figure(found, figures)]
