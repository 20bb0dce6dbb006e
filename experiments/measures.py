"""What the report is made of: results by variant and seed, measures of a run, and intervals."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from itertools import product
from pathlib import Path
from statistics import fmean

import numpy as np

from experiments.tasks import SPLITS
from support import plots

RESULTS = Path(__file__).resolve().parent / "results"

Results = dict[str, dict[int, dict]]  # variant -> seed -> result


def load(folder: Path = RESULTS) -> Results:
    found: Results = {}
    for file in sorted(folder.rglob("*.json")):
        result = json.loads(file.read_text())
        found.setdefault(result["variant"], {})[result["seed"]] = result
    return found


# Measures


def accuracy(result: dict, split: str = "overall") -> float:
    """Accuracy at the end in %; "overall" is the mean of the two splits."""
    splits = SPLITS if split == "overall" else (split,)
    return 100 * float(np.mean([result["final"][name]["accuracy"] for name in splits]))


def accuracy_over_training(result: dict) -> float:
    """Mean accuracy in % of the evaluations during training, without the one before it."""
    return fmean(score for step, score in overall_curve(result).items() if step > 0)


def overall_curve(result: dict) -> dict[int, float]:
    """Step -> mean accuracy of both splits in % of the evaluations during training."""
    return {int(step): 100 * fmean(scores.values()) for step, scores in result["curve"].items()}


def accuracy_gain(result: dict, base: dict, split: str = "overall") -> float:
    return accuracy(result, split) - accuracy(base, split)


def gain_over_training(result: dict, base: dict) -> float:
    return accuracy_over_training(result) - accuracy_over_training(base)


def delta_rel(result: dict, base: dict) -> float:
    """The paper's: the mean over splits of the relative gain, in %."""
    ratios = [accuracy(result, split) / accuracy(base, split) for split in SPLITS]
    return float(np.mean([100 * (ratio - 1) for ratio in ratios]))


def count(result: dict, what: str, splits: Iterable[str] = SPLITS) -> float:
    """A count of the final evaluation, summed over the splits."""
    return sum(result["final"][split][what] for split in splits)


def misread_change(result: dict, base: dict, splits: tuple[str, ...] = SPLITS) -> float:
    """How many more answers rest on a misread image than the baseline has, in %."""
    return 100 * (count(result, "misread", splits) / count(base, "misread", splits) - 1)


def wrong_change(result: dict, base: dict) -> float:
    """How many more answers are wrong than the baseline has, in %."""
    return 100 * (count(result, "wrong") / count(base, "wrong") - 1)


# Statistics


def paired(found: Results, variant: str, base: str, measure: Callable) -> list[float]:
    """measure(result, base's result) at each seed that both have.

    ValueError if the two runs of a seed record different start models.
    """
    runs, base_runs = found.get(variant, {}), found.get(base, {})
    seeds = sorted(runs.keys() & base_runs.keys())
    for seed in seeds:
        if runs[seed].get("start_model") != base_runs[seed].get("start_model"):
            raise ValueError(f"{variant} and {base}: two start models at seed {seed}")
    return [measure(runs[seed], base_runs[seed]) for seed in seeds]


def at_seeds(found: Results, seeds: Iterable[int]) -> Results:
    """The results at these seeds alone; variants without any are left out."""
    chosen = {
        variant: {seed: runs[seed] for seed in seeds if seed in runs}
        for variant, runs in found.items()
    }
    return {variant: runs for variant, runs in chosen.items() if runs}


def complete(found: Results, seeds: Iterable[int]) -> Results:
    """The results at these seeds of the variants that have them all."""
    wanted = list(seeds)
    return {
        variant: runs
        for variant, runs in at_seeds(found, wanted).items()
        if len(runs) == len(wanted)
    }


def common_seeds(found: Results, variants: Iterable[str]) -> list[int]:
    return sorted(set.intersection(*(set(found[variant]) for variant in variants)))


def sign_flip_p(differences: list[float]) -> float:
    """Two-sided exact p: the share of sign patterns whose mean is at least as far from 0."""
    values = np.array(differences)
    patterns = product((1, -1), repeat=len(values))
    means = np.abs([np.mean(values * signs) for signs in patterns])
    return float(np.mean(means >= abs(values.mean()) - 1e-12))


def holm(ps: list[float]) -> list[float]:
    """The p corrected by Holm's method: the smallest times their number, the next times one less,
    and none below the one before it."""
    corrected, least = [0.0] * len(ps), 0.0
    for rank, index in enumerate(sorted(range(len(ps)), key=ps.__getitem__)):
        least = max(least, min(1.0, (len(ps) - rank) * ps[index]))
        corrected[index] = least
    return corrected


def interval(values: list[float], digits: int = 1, sign: bool = False) -> str:
    """Mean +- half the width of the 95% t interval; "-" without values."""
    if not values:
        return "-"
    mean, half = plots.mean_interval(values)
    shown = f"{mean:+.{digits}f}" if sign else f"{mean:.{digits}f}"
    return shown if math.isnan(half) else f"{shown} +- {half:.{digits}f}"


def count_ahead(differences: list[float]) -> str:
    return f"{sum(value > 0 for value in differences)} of {len(differences)}"


def corrected_table(difference: str, gains: dict[str, list[float]]) -> str:
    """The mean gain for each question, the pairs above 0, and p as is and corrected by Holm."""
    ps = [sign_flip_p(values) for values in gains.values()]
    rows = [["", difference, "pairs above 0", "p", "corrected p"]]
    for (question, values), p, corrected in zip(gains.items(), ps, holm(ps), strict=True):
        row = [question, interval(values, sign=True), count_ahead(values)]
        rows.append([*row, f"{p:.5f}", f"{corrected:.5f}"])  # 16 pairs: 0.00003 is the smallest
    return markdown(rows)


def markdown(rows: list[list[str]]) -> str:
    """A table of a header and rows; a note if there are none."""
    if len(rows) < 2:
        return "(not run yet)"
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])


READING = ("wrong %", "of these misread %", "cells read right %")
MISREAD_CHANGE = "misread answers, relative to baseline %"


def reading_cells(runs: Iterable[dict], splits: tuple[str, ...] = SPLITS) -> list[str]:
    """How many answers are wrong, how many of those rest on a misread image: see READING."""
    wrong, misread, cells_right = [], [], []
    for run in runs:
        n_wrong = count(run, "wrong", splits)
        wrong.append(100 * n_wrong / count(run, "responses", splits))
        misread.append(100 * count(run, "misread", splits) / max(n_wrong, 1))
        cells_right.append(100 * count(run, "cells_right", splits) / len(splits))
    return [interval(wrong), interval(misread), interval(cells_right)]


def accuracy_cells(runs: list[dict]) -> list[str]:
    """Each split, overall, and the mean over training."""
    cells = [interval([accuracy(run, split) for run in runs]) for split in (*SPLITS, "overall")]
    trained = [run for run in runs if "curve" in run]
    return [*cells, interval([accuracy_over_training(run) for run in trained])]


# Metric -> (factor, rise): by how much its median must have grown to count as a sign of collapse.
COLLAPSE_SIGNS = {
    "kl_prcp": (1.5, 0.05),
    "clip_frac": (1.5, 0.005),
    "entropy": (1.25, 0.02),
    "masked_entropy": (1.25, 0.02),
}


def collapse_warning(steps: list[dict], window: int = 7) -> str | None:
    """One line when the paper's early signs of collapse appear together, else None.

    Compares the last `window` training lines with the `window` lines before them. A metric shows
    a sign if half of its last window lies above its whole earlier window and its median has grown
    by the factor and the rise in COLLAPSE_SIGNS. Every measured metric must show one at once.
    KL_prcp rising alone, which PAPO wants, therefore never warns; neither does a healthy run,
    whose entropies fall, nor independent noise.

    Not measured are masked_entropy where it is not logged and the clip fraction where it is 0
    throughout (one update per step). At least three metrics must be measured, among them KL_prcp
    and the entropy; lines without these two are skipped. The thresholds are fitted to one run in
    experiments/, where the warning comes three steps after accuracy halves. Later (`remedies`) it
    came in 2 of 23 collapsed runs, so its absence says nothing; no healthy run has had it.
    """
    usable = [
        line
        for line in steps
        if plots.finite_series([line], "kl_prcp") and plots.finite_series([line], "entropy")
    ]
    recent = usable[-2 * window :]
    signs = []
    for metric, (factor, rise) in COLLAPSE_SIGNS.items():
        values = np.array(list(plots.finite_series(recent, metric).values()))
        measured = len(values) == 2 * window and (metric != "clip_frac" or values.any())
        if not measured:
            continue
        earlier, last = values[:window], values[window:]
        before, after = np.median(earlier), np.median(last)
        if after <= earlier.max() or after < factor * before or after < before + rise:
            return None
        signs.append(f"{metric} {before:.3g} -> {after:.3g}")
    if len(signs) < 3:
        return None
    step = recent[-1]["step"]
    return f"step {step}: early signs of collapse over the last {window} steps: {', '.join(signs)}"
